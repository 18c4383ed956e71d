"""Dictionaries: activations at one point of a model as few of many features (SAE) or codes (codebook).

The only file that knows sae_lens.
"""

import difflib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mechunlearn.core.files import data_folder, whole_folder
from mechunlearn.core.runcard import digest
from mechunlearn.errors import MechunlearnError
from mechunlearn.features.interventions import Codes, PlainSAE
from mechunlearn.model.decoder import STREAMS, UNITS
from mechunlearn.model.hook_points import HOOK_POINTS, hook_name_of, layer_of, site_of
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.layout import Signature
from mechunlearn.model.taps import tapped

Model = HookedModel | nn.Module
SHIPPED = ("factworld-codebook", "factworld-sae")


@runtime_checkable
class Dictionary(Protocol):
    """What methods know of a dictionary. `hook_name` is a site (`L3.resid_post`) or, of a model without a layout, the path
    of a module (`encoder.block.2`); `site` is what its units are called in masks, `L3.codebook:<id>`, with an id made
    from the weights.
    """

    hook_name: str
    signature: Signature | None

    @property
    def size(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def site(self) -> str: ...
    @property
    def fitted_on(self) -> str: ...
    def encode(self, h: Float[Tensor, "*pos d_model"]) -> Float[Tensor, "*pos feature"]: ...
    def decode(self, z: Float[Tensor, "*pos feature"]) -> Float[Tensor, "*pos d_model"]: ...
    def save(self, folder: str | Path) -> None: ...


class Codebook(Codes):
    """A discrete bottleneck at one point of a model (CodeUnlearn, arXiv 2410.10866; codebook features, arXiv 2310.17230).

    x = ReLU(W h + b), `linear` times as wide as h (ReLU of a square map loses half of it; 0 for x = h); the `used` codes
    with the largest cosine to x are summed, and a linear map of the sum takes the place of h: nothing else passes, so what
    no code says is lost. `encode` gives how often each code is used (0 or 1),
    `[... code]`. `hook_ids` is the module the ids `[... used]` go through; hook it to see or replace them. Make one with
    `train_codebook`. Not for keeping a model as it is: every codebook costs some loss, look at its `quality`.

    Raises `MechunlearnError` if there are fewer codes than are used, or groups do not divide size and width.

    >>> codebook = Codebook(d_model=16, size=32, used=4, hook_name="L1.resid_post")
    >>> h = torch.randn(2, 5, 16)
    >>> codebook(h).shape, codebook.encode(h).sum(-1).unique()
    (torch.Size([2, 5, 16]), tensor([4.]))
    """

    def __init__(
        self,
        d_model: int,
        size: int,
        used: int,
        *,
        hook_name: str,
        groups: int = 1,
        linear: int = 2,
        signature: Signature | None = None,
        fitted_on: str = "",
    ) -> None:
        if min(used, groups) < 1 or linear < 0 or size % groups or d_model * (linear or 1) % groups:
            raise MechunlearnError(
                f"A codebook of {size} codes, {used} used, in {groups} groups does not fit width {d_model}. Expected at "
                "least one used, and a number of groups that divides both the codes and the width."
            )
        if size // groups < used:
            raise MechunlearnError(
                f"A codebook of {size // groups} codes{' a group' if groups > 1 else ''} cannot use {used} of them at a "
                "time. Give more codes (size) or use fewer (used)."
            )
        super().__init__(d_model, size, used, groups, linear)
        self.hook_name, self.signature, self.fitted_on = hook_name, signature, fitted_on
        self.quality: dict[str, float] = {}

    @property
    def about(self) -> dict[str, Any]:
        """Its shape, as `interventions.Codes` takes it."""
        return {name: getattr(self, name) for name in ("d_model", "size", "used", "groups", "linear")}

    @property
    def site(self) -> str:
        return f"L{layer_of(self.hook_name)}.codebook:{_name(self)}"

    def encode(self, h: Float[Tensor, "*pos d_model"]) -> Float[Tensor, "*pos feature"]:
        return self.counted(self.nearest(self.entering(h)))

    def counted(self, ids: Tensor) -> Float[Tensor, "*pos feature"]:
        """How often each code stands among the ids."""
        counts = torch.zeros(*ids.shape[:-1], self.size, device=ids.device)
        return counts.scatter_add_(-1, ids, torch.ones_like(ids, dtype=counts.dtype))

    def decode(self, z: Float[Tensor, "*pos feature"]) -> Float[Tensor, "*pos d_model"]:
        codes = self.codes.unflatten(0, (self.groups, -1))
        summed = torch.einsum("...gk,gkd->...gd", z.unflatten(-1, (self.groups, -1)).to(codes), codes).flatten(-2)
        return self.leaving(summed)

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `codebook.safetensors` into a new or empty folder."""
        config = {
            "kind": "codebook",
            **self.about,
            "hook_name": self.hook_name,
            "signature": None if self.signature is None else asdict(self.signature),
            "fitted_on": self.fitted_on,
            "quality": self.quality,
        }
        with whole_folder(folder) as beside:
            tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
            save_file(tensors, beside / "codebook.safetensors")
            (beside / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Codebook":
        """Raises `MechunlearnError` if the folder holds no whole codebook."""
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if config.pop("kind", "") != "codebook":
                raise MechunlearnError(f"'{folder}' holds no codebook: its config.json does not say so.")
            quality, signature = config.pop("quality"), config.pop("signature")
            made = cls(**config, signature=None if signature is None else Signature(**signature))
            made.load_state_dict(load_file(folder / "codebook.safetensors"))
        except MechunlearnError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise MechunlearnError(
                f"'{folder}' is not a whole codebook ({type(error).__name__}: {_first_line(error)}). Expected a folder with "
                "config.json and codebook.safetensors, as `Codebook.save` writes it."
            ) from None
        made.quality = quality
        return made.eval()

    def __repr__(self) -> str:
        return f"Codebook({self.size} codes, {self.used} used, {self.hook_name}, width {self.d_model})"


class SAE:
    """A sparse autoencoder of sae-lens at one point of a model; `.sae` is sae-lens's own object.

    Make one with `train_sae` or `load_dictionary`, or wrap one that you have: the hook point is read from its metadata
    unless given. A folder written by `save` is an ordinary sae-lens folder.

    Raises `MechunlearnError` if the metadata names no hook point, or one that has no counterpart here.
    """

    def __init__(
        self, sae: Any, hook_name: str | None = None, signature: Signature | None = None, fitted_on: str = ""
    ) -> None:
        told = hook_name or sae.cfg.metadata.hook_name
        if told is None:
            raise MechunlearnError(
                "This SAE does not say where it belongs. Give hook_name, for example 'L3.resid_post'."
            )
        self.sae, self.hook_name, self.quality = sae.eval(), site_of(told), {}
        sae.turn_off_forward_pass_hook_z_reshaping()
        ours: dict = sae.cfg.metadata.mechunlearn or {}
        given = ours.get("signature")
        self.signature = signature or (Signature(**given) if given else None)
        self.fitted_on = fitted_on or ours.get("fitted_on", "")
        self.quality = ours.get("quality", {})

    @property
    def size(self) -> int:
        return self.sae.cfg.d_sae

    @property
    def d_model(self) -> int:
        return self.sae.cfg.d_in

    @property
    def site(self) -> str:
        return f"L{layer_of(self.hook_name)}.sae:{_name(self.sae)}"

    def encode(self, h: Float[Tensor, "*pos d_model"]) -> Float[Tensor, "*pos feature"]:
        return self.sae.encode(h)

    def decode(self, z: Float[Tensor, "*pos feature"]) -> Float[Tensor, "*pos d_model"]:
        return self.sae.decode(z)

    @property
    def directions(self) -> Float[Tensor, "feature d_model"]:
        """What one unit of each feature writes."""
        written = self.sae.W_dec.detach()
        folds = getattr(self.sae.cfg, "rescale_acts_by_decoder_norm", False)
        return written / written.norm(dim=-1, keepdim=True) if folds else written

    def plain(self) -> tuple[PlainSAE, dict[str, Any]]:
        """The same arithmetic without sae-lens, and its shape. Raises `MechunlearnError` for a kind that has none."""
        cfg, sae = self.sae.cfg, self.sae
        kind = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}.get(
            cfg.architecture().removesuffix("_training")
        )
        if kind is None or cfg.normalize_activations != "none":
            raise MechunlearnError(
                f"An SAE of architecture '{cfg.architecture()}' with normalize_activations='{cfg.normalize_activations}' "
                "cannot be exported. Expected standard, topk or jumprelu without normalisation."
            )
        about: dict[str, Any] = {
            "d_model": self.d_model,
            "size": self.size,
            "activation": kind,
            "k": getattr(cfg, "k", 0),
            "centred": bool(cfg.apply_b_dec_to_input),
        }
        made = PlainSAE(**about)
        folds = getattr(cfg, "rescale_acts_by_decoder_norm", False)
        norms = sae.W_dec.norm(dim=-1) if folds else torch.ones(self.size, device=sae.W_dec.device)
        state = {"W_enc": sae.W_enc * norms, "b_enc": sae.b_enc * norms, "W_dec": sae.W_dec / norms[:, None]}
        state |= {"b_dec": sae.b_dec} | ({"threshold": sae.threshold} if kind == "jumprelu" else {})
        made.load_state_dict({name: t.detach().clone() for name, t in state.items()})
        return made.eval(), about

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load_dictionary` and sae-lens's `SAE.load_from_disk` read; it must be new or empty."""
        name = hook_name_of(self.hook_name)
        if self.sae.cfg.reshape_activations == "hook_z":  # sae-lens accepts it under the older name only
            name = name.replace(*HOOK_POINTS["attn.o"])
        self.sae.cfg.metadata.hook_name = name
        self.sae.cfg.metadata.mechunlearn = {
            "signature": None if self.signature is None else asdict(self.signature),
            "fitted_on": self.fitted_on,
            "quality": self.quality,
        }
        with whole_folder(folder) as beside:
            self.sae.save_model(beside)

    @classmethod
    def load(cls, folder: str | Path) -> "SAE":
        """Raises `MechunlearnError` if the folder holds no whole SAE."""
        from sae_lens import SAE as Loaded  # seconds to import

        try:
            loaded = Loaded.load_from_disk(Path(folder))
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RuntimeError,
            AssertionError,
            SafetensorError,
        ) as error:
            raise MechunlearnError(
                f"'{folder}' is not a whole SAE ({type(error).__name__}: {_first_line(error)}). Expected a folder with "
                "cfg.json and sae_weights.safetensors, as sae-lens writes it."
            ) from None
        return cls(loaded)

    def __repr__(self) -> str:
        return f"SAE({self.size} features, {self.sae.cfg.architecture()}, {self.hook_name}, width {self.d_model})"


def load_dictionary(source: str | Path, sae_id: str | None = None) -> "Codebook | SAE":
    """Load a dictionary: a shipped one (`factworld-codebook`, `factworld-sae`), a folder, or an SAE of a sae-lens release.

    With `sae_id`, `source` is the name of a release: `load_dictionary("gpt2-small-res-jb", "blocks.8.hook_resid_pre")`.
    Raises `MechunlearnError` if there is none, or the folder holds something else.

    >>> load_dictionary("factworld-codebook")
    Codebook(512 codes, 2 used, L3.resid_post, width 128)
    """
    if sae_id is not None:
        from sae_lens import SAE as Loaded

        try:
            return SAE(Loaded.from_pretrained(str(source), sae_id))
        except (OSError, ValueError, KeyError) as error:
            raise MechunlearnError(
                f"Could not load the SAE '{sae_id}' of release '{source}': {_first_line(error)}."
            ) from None
    folder = data_folder() / str(source) if str(source) in SHIPPED else Path(source).expanduser()
    if (folder / "cfg.json").is_file():
        return SAE.load(folder)
    if (folder / "config.json").is_file():
        return Codebook.load(folder)
    raise MechunlearnError(
        f"There is no dictionary in '{source}'. Expected {' or '.join(SHIPPED)}, or a folder with config.json (a codebook) or "
        "cfg.json (an SAE of sae-lens)."
    )


def check(dictionary: Dictionary, model: Model) -> None:
    """Bring a dictionary to the model's device.

    Raises `MechunlearnError` unless it belongs to a model of this architecture, width and hook points.
    """
    there = signature_of(model)
    if dictionary.signature is not None and dictionary.signature != there:
        raise MechunlearnError(
            f"{dictionary} was made for ({dictionary.signature}), the model is ({there}). "
            "A dictionary fits one architecture only: train another on this model."
        )
    name = place(model, dictionary.hook_name)
    module = getattr(dictionary, "sae", dictionary)
    if isinstance(module, nn.Module):
        module.to(model.device if isinstance(model, HookedModel) else next(model.parameters()).device)
    wide = width(model, name)
    if wide is not None and wide != dictionary.d_model:
        raise MechunlearnError(
            f"{dictionary} reads activations of width {dictionary.d_model}; '{name}' of ({there}) has {wide}."
        )


def place(model: Model, hook_name: str) -> str:
    """The hook point as this model calls it: a site, or a module's path where the model has no layout.

    Raises `MechunlearnError`, with the nearest names, if there is none.
    """
    if isinstance(model, HookedModel):
        layers, site = range(model.signature.layers), site_of(hook_name)
        kinds = [kind for kind in (*UNITS, *STREAMS) if kind != "resid_mid" or not model.layout.parallel]
        names = [f"L{layer}.{kind}" for layer in layers for kind in kinds]
    else:
        site, names = hook_name, [name for name, _ in model.named_modules() if name]
    if site in names:
        return site
    near = difflib.get_close_matches(site, names, n=3, cutoff=0.4)
    raise MechunlearnError(
        f"No hook point '{hook_name}' in ({signature_of(model)}). Nearest: {', '.join(near) or 'none'}. "
        f"Expected one such as {names[-2] if len(names) > 1 else 'a module'}."
    )


def width(model: Model, hook_name: str) -> int | None:
    """How wide the activation is; None where only a run would tell."""
    if not isinstance(model, HookedModel):
        return None
    kind = hook_name.split(".", 1)[1]
    heads = {"attn.q": "heads", "attn.o": "heads", "attn.k": "kv_heads", "attn.v": "kv_heads"}
    if kind in heads:
        return getattr(model.signature, heads[kind]) * model.layout.d_head
    return model.signature.d_mlp if kind == "mlp.out" else model.signature.d_model


@contextmanager
def installed(model: Model, hook_name: str, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Within the block the function sees the activations `[... pos width]` at a hook point, heads side by side."""
    name = place(model, hook_name)
    if not isinstance(model, HookedModel):
        with tapped([(model.get_submodule(name), "out", function)]):
            yield
        return
    with model.hooks({name: partial(_by_head, function) if ".attn." in name else function}):
        yield


def _by_head(function: Callable[[Tensor], Tensor | None], z: Tensor) -> Tensor | None:
    changed = function(z.flatten(-2))
    return None if changed is None else changed.view_as(z)


@contextmanager
def spliced(model: Model, dictionary: Dictionary, error: bool | None = None) -> Iterator[None]:
    """Within the block the reconstruction takes the activation's place: what a dictionary costs before anything is edited.

    `error` adds back what an SAE missed (by default it does, and nothing changes then but rounding); a codebook never adds
    it, as that would bypass the bottleneck. Raises `MechunlearnError` if it is asked to, or belongs to another model.
    """
    if isinstance(dictionary, Codebook) and error:
        raise MechunlearnError("A codebook adds no error term: it would bypass the bottleneck. Give error=False.")
    check(dictionary, model)

    def replaced(h: Tensor) -> Tensor:
        if isinstance(dictionary, Codebook):
            return dictionary(h).to(h.dtype)
        new = dictionary.decode(dictionary.encode(h)).to(h.dtype)
        return new if error is False else new + (h - new).detach()

    with installed(model, dictionary.hook_name, replaced):
        yield


def signature_of(model: Model) -> Signature:
    """The architecture, of a module without a layout read from its configuration."""
    if isinstance(model, HookedModel):
        return model.signature
    config: Any = model.config

    def number(*names: str) -> int:
        return next((int(n) for name in names if (n := getattr(config, name, None)) is not None), 0)

    heads = number("num_heads", "num_attention_heads", "n_head")
    kv_heads = number("num_key_value_heads") or heads
    layers = number("num_layers", "num_hidden_layers", "n_layer")
    d_mlp = number("d_ff", "intermediate_size", "n_inner")
    return Signature(config.model_type, layers, heads, kv_heads, d_mlp, number("d_model", "hidden_size", "n_embd"))


def fingerprint_of(model: Model) -> str:
    """What names a model in a run card: a hash of its weights."""
    return model.fingerprint if isinstance(model, HookedModel) else _name(model)


def _name(module: nn.Module) -> str:
    """Eight digits of a hash of the weights."""
    parts = (
        (n, t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        for n, t in module.state_dict().items()
    )
    return digest(*(part for pair in parts for part in pair))[:8]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
