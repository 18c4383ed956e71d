"""Dictionaries: activations at one point of a model as few of many features (SAE) or codes (codebook).

The only file that knows sae_lens.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from mechunlearn.core import tensors
from mechunlearn.core.files import data_folder, whole_folder
from mechunlearn.core.runcard import digest
from mechunlearn.errors import MechunlearnError
from mechunlearn.features.codebook import CONFIG, ORIGIN, hashed
from mechunlearn.features.codebook import Codebook as Codebook
from mechunlearn.features.interventions import PlainSAE
from mechunlearn.features.places import Model, installed, place, signature_of, weights_name, width
from mechunlearn.model.hook_points import HOOK_POINTS, hook_name_of, layer_of, site_of
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.layout import Signature

SHIPPED = ("factworld-codebook", "factworld-sae")
CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"  # as sae-lens names them
OURS = ("mechunlearn", "fitted_on")  # two names in a cfg.json of ours: a bit that flips in one leaves the other


@runtime_checkable
class Dictionary(Protocol):
    """What methods know of a dictionary.

    Attributes:
        hook_name: A site (`L3.resid_post`) or, of a model without a layout, the path of a module (`encoder.block.2`).
        signature: The architecture, if it is known.
    """

    hook_name: str
    signature: Signature | None

    @property
    def size(self) -> int:
        """The number of features or codes."""

    @property
    def d_model(self) -> int:
        """The width of the activations."""

    @property
    def site(self) -> str:
        """What its units are called in masks: `L3.codebook:<id>`, with an id made from the weights."""

    @property
    def fitted_on(self) -> str:
        """The fingerprint of the model that it was trained on, if it is known."""

    def encode(self, h: Float[Tensor, "*pos d_model"]) -> Float[Tensor, "*pos feature"]:
        """Return how strongly each feature is active.

        Args:
            h: Activations.
        """

    def decode(self, z: Float[Tensor, "*pos feature"]) -> Float[Tensor, "*pos d_model"]:
        """Return the activations that features stand for.

        Args:
            z: How strongly each feature is active.
        """

    def save(self, folder: str | Path) -> None:
        """Write the dictionary.

        Args:
            folder: A new or empty folder.
        """


class SAE:
    """A sparse autoencoder of sae-lens at one point of a model; `.sae` is sae-lens's own object.

    Make one with `train_sae` or `load_dictionary`, or wrap one that you have. A folder written by `save` is an ordinary
    sae-lens folder.

    Args:
        sae: The object of sae-lens.
        hook_name: The hook point, read from the SAE's metadata unless given.
        signature: The architecture of the model, read from the metadata unless given.
        fitted_on: The fingerprint of the model that it was trained on, read from the metadata unless given.

    Raises:
        MechunlearnError: If the metadata names no hook point, or one that has no counterpart here.
    """

    def __init__(
        self, sae: Any, hook_name: str | None = None, signature: Signature | None = None, fitted_on: str = ""
    ) -> None:
        told = hook_name or sae.cfg.metadata.hook_name
        if told is None:
            raise MechunlearnError(
                "This SAE does not say where it belongs. Give hook_name, for example 'L3.resid_post'."
            )
        self.sae, self.hook_name = sae.eval(), site_of(told)
        sae.turn_off_forward_pass_hook_z_reshaping()
        ours = {"signature": None, "fitted_on": "", "quality": {}, **(sae.cfg.metadata.mechunlearn or {})}
        ours = tensors.checked(ours, ORIGIN)
        self.signature, self.fitted_on = signature or ours["signature"], fitted_on or ours["fitted_on"]
        self.quality: dict[str, float] = ours["quality"]

    @property
    def size(self) -> int:
        """The number of features."""
        return int(self.sae.cfg.d_sae)

    @property
    def d_model(self) -> int:
        """The width of the activations."""
        return int(self.sae.cfg.d_in)

    @property
    def site(self) -> str:
        """What its units are called in masks."""
        return f"L{layer_of(self.hook_name)}.sae:{weights_name(self.sae)}"

    def encode(self, h: Float[Tensor, "*pos d_model"]) -> Float[Tensor, "*pos feature"]:
        """Return how strongly each feature is active.

        Args:
            h: Activations.
        """
        z: Tensor = self.sae.encode(h)
        return z

    def decode(self, z: Float[Tensor, "*pos feature"]) -> Float[Tensor, "*pos d_model"]:
        """Return the activations that features stand for.

        Args:
            z: How strongly each feature is active.
        """
        h: Tensor = self.sae.decode(z)
        return h

    @property
    def directions(self) -> Float[Tensor, "feature d_model"]:
        """What one unit of each feature writes."""
        written: Tensor = self.sae.W_dec.detach()
        folds = getattr(self.sae.cfg, "rescale_acts_by_decoder_norm", False)
        return written / written.norm(dim=-1, keepdim=True) if folds else written

    def plain(self) -> tuple[PlainSAE, dict[str, Any]]:
        """Return the same arithmetic without sae-lens, and its shape.

        Raises:
            MechunlearnError: For an architecture or a normalisation that `interventions.PlainSAE` does not have.
        """
        cfg, sae = self.sae.cfg, self.sae
        kind = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}.get(
            cfg.architecture().removesuffix("_training")
        )
        if kind is None or cfg.normalize_activations != "none":
            raise MechunlearnError(
                f"An SAE of architecture '{cfg.architecture()}' with "
                f"normalize_activations='{cfg.normalize_activations}' "
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

    def described(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what `restored` makes the SAE of: the configuration that sae-lens writes, and the weights by name."""
        cfg, weights = self.sae.cfg.to_dict(), self.sae.state_dict()
        self.sae.process_state_dict_for_saving(weights)
        name = hook_name_of(self.hook_name)
        if cfg["reshape_activations"] == "hook_z":  # sae-lens accepts it under the older name only
            name = name.replace(HOOK_POINTS["attn.o"][0], HOOK_POINTS["attn.o"][1])
        ours = {key: getattr(self, key) for key in ORIGIN} | {"signature": self.signature and asdict(self.signature)}
        return {**cfg, "metadata": {**cfg["metadata"], "hook_name": name, "mechunlearn": ours}}, weights

    @classmethod
    def restored(cls, about: Mapping[str, Any], weights: Mapping[str, Tensor]) -> "SAE":
        """Make an SAE of what `described` returns.

        Args:
            about: The configuration.
            weights: The weights by name.

        Raises:
            MechunlearnError, LookupError, TypeError, ValueError, RuntimeError: If they are not those of an SAE.
        """
        from sae_lens import SAE as Loaded  # seconds to import

        cfg = {**about, "device": "cpu"}
        return cls(Loaded.load_from_disk("", converter=lambda *_, **__: (cfg, dict(weights))))

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load_dictionary` and sae-lens's `SAE.load_from_disk` read.

        Its `cfg.json` holds a hash of both files, under our own key of sae-lens's metadata.

        Args:
            folder: A new or empty folder.

        Raises:
            MechunlearnError: If the folder holds something, or the disk refuses.
        """
        cfg, weights = self.described()
        with whole_folder(folder) as beside:
            save_file({name: t.detach().cpu().contiguous() for name, t in weights.items()}, beside / WEIGHTS)
            (beside / CFG).write_text(sealed(cfg, (beside / WEIGHTS).read_bytes()), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "SAE":
        """Read an SAE from a folder of `save`, or of sae-lens.

        Args:
            folder: The folder.

        Raises:
            MechunlearnError: If the folder holds no SAE or one that is damaged. A folder of sae-lens holds no hash:
                in it damage that leaves the format whole is not noticed.
        """
        folder = Path(folder)
        advice = f"Expected {CFG} and {WEIGHTS}, as sae-lens or `SAE.save` wrote them: take an undamaged copy, or make it again."
        with tensors.reading(folder, "SAE", advice):
            text = (folder / CFG).read_text(encoding="utf-8")
            if any(name in text for name in OURS):
                cfg = json.loads(text)
                ours = cfg["metadata"]["mechunlearn"]
                if ours["hash"] != tensors.text_hash(text, ours["hash"]):
                    raise MechunlearnError(tensors.DAMAGED)
                return cls.restored(cfg, hashed(folder / WEIGHTS, ours["weights"]))
            from sae_lens import SAE as Loaded  # seconds to import

            loaded = Loaded.load_from_disk(folder)
        return cls(loaded)

    def __repr__(self) -> str:
        return f"SAE({self.size} features, {self.sae.cfg.architecture()}, {self.hook_name}, width {self.d_model})"


def load_dictionary(source: str | Path, sae_id: str | None = None) -> "Codebook | SAE":
    """Load a dictionary: a shipped one, one in a folder, or an SAE of a sae-lens release.

    `load_dictionary("gpt2-small-res-jb", "blocks.8.hook_resid_pre")` loads an SAE of a release.

    Args:
        source: `factworld-codebook`, `factworld-sae`, a folder, or with `sae_id` the name of a release.
        sae_id: The SAE of the release.

    Raises:
        MechunlearnError: If there is none, or the folder holds something else or is damaged.

    >>> load_dictionary("factworld-codebook")
    Codebook(512 codes, 2 used, L3.resid_post, width 128)
    """
    if sae_id is not None:
        from sae_lens import SAE as Loaded

        try:
            return SAE(Loaded.from_pretrained(str(source), sae_id))
        except (OSError, ValueError, KeyError) as error:
            raise MechunlearnError(
                f"Could not load the SAE '{sae_id}' of release '{source}': {tensors.one_line(error)}."
            ) from None
    folder = data_folder() / str(source) if str(source) in SHIPPED else Path(source).expanduser()
    if (folder / CFG).is_file():
        return SAE.load(folder)
    if (folder / CONFIG).is_file():
        return Codebook.load(folder)
    raise MechunlearnError(
        f"There is no dictionary in '{source}'. Expected {' or '.join(SHIPPED)}, or a folder with config.json (a "
        "codebook) or "
        "cfg.json (an SAE of sae-lens)."
    )


def check(dictionary: Dictionary, model: Model) -> None:
    """Bring a dictionary to a model's device, if it belongs to the model.

    Args:
        dictionary: The dictionary.
        model: The model.

    Raises:
        MechunlearnError: If the dictionary is for another architecture, width or hook point.
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


@contextmanager
def spliced(model: Model, dictionary: Dictionary, error: bool | None = None) -> Iterator[None]:
    """Put the reconstruction in the activation's place for a block: what a dictionary costs before anything is edited.

    Args:
        model: The model.
        dictionary: The dictionary.
        error: Whether to add back what an SAE missed, by default yes; nothing changes then but rounding. A codebook
            never adds it, as that would bypass the bottleneck.

    Raises:
        MechunlearnError: If a codebook is asked to add it, or the dictionary belongs to another model.
    """
    if isinstance(dictionary, Codebook) and error:
        raise MechunlearnError("A codebook adds no error term: it would bypass the bottleneck. Give error=False.")
    check(dictionary, model)

    def replaced(h: Tensor) -> Tensor:
        if isinstance(dictionary, Codebook):
            return torch.as_tensor(dictionary(h)).to(h.dtype)
        new = dictionary.decode(dictionary.encode(h)).to(h.dtype)
        return new if error is False else new + (h - new).detach()

    with installed(model, dictionary.hook_name, replaced):
        yield


def sealed(cfg: dict[str, Any], weights: bytes) -> str:
    """Return the `cfg.json` of an SAE with a hash of the weights, and of the rest of itself.

    Args:
        cfg: The configuration that sae-lens writes, with our own key in its metadata.
        weights: The file of the weights.
    """
    ours = cfg["metadata"]["mechunlearn"]
    ours |= {"weights": digest(weights), "hash": ""}
    ours["hash"] = tensors.text_hash(json.dumps(cfg))
    return json.dumps(cfg) + "\n"
