"""A change of activations as a value: codes deleted or features clamped, to apply, undo, save, combine and export."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mechunlearn.artifacts.calls import Call, remade
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.display import card
from mechunlearn.core.files import whole_folder
from mechunlearn.core.runcard import RunCard
from mechunlearn.core.tensors import load_tensors, save_tensors
from mechunlearn.errors import MechunlearnError
from mechunlearn.features import interventions
from mechunlearn.features.dictionaries import (
    SAE,
    Codebook,
    Dictionary,
    Model,
    check,
    installed,
    load_dictionary,
    place,
    signature_of,
)
from mechunlearn.features.interventions import CodeDeletion, FeatureClamp
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.layout import Signature

AnyModel = TypeVar("AnyModel", bound=Model)
LOADER = "modeling_mechunlearn.py"
FILES = {"codebook": ("config.json", "codebook.safetensors"), "sae": ("cfg.json", "sae_weights.safetensors")}
TAIL = '''

from transformers import {config} as _Config, {model} as _Model


class EditedConfig(_Config):
    model_type = "mechunlearn-{family}"


class Edited(_Model):
    """{model} with features edited at run time."""

    config_class = EditedConfig

    def __init__(self, config):
        super().__init__(config)
        self.interventions = nn.ModuleList([build(part) for part in config.mechunlearn])
        for part, intervention in zip(config.mechunlearn, self.interventions):
            attach(self.get_submodule(part["module"]), part["side"], intervention)
'''


@dataclass(frozen=True, eq=False)
class FeaturePart:
    """What is done at one dictionary: `units` of a codebook are deleted (`reselect`, `zero`), of an SAE clamped to `values`.

    `error`, `gate` and `share` belong to clamps (see `edit.feature_clamp`).
    """

    dictionary: Dictionary
    units: Int[Tensor, " _unit"]
    how: str
    values: Float[Tensor, " _value"] = field(default_factory=lambda: torch.zeros(0))
    error: bool = False
    gate: str = "token"
    share: float = 0.0

    @property
    def settings(self) -> dict[str, Any]:
        return {"how": self.how, "error": self.error, "gate": self.gate, "share": self.share}

    def intervention(self, device: torch.device | str = "cpu") -> nn.Module:
        """The function of activations, on a device. The dictionary itself goes there too."""
        made: nn.Module
        if isinstance(self.dictionary, Codebook):
            deleted = torch.zeros(self.dictionary.size, dtype=torch.bool)
            deleted[self.units] = True
            made = CodeDeletion(self.dictionary, deleted, self.how == "reselect")
        else:
            sae = self.dictionary.sae if isinstance(self.dictionary, SAE) else self.dictionary
            made = FeatureClamp(sae, self.units, self.values, self.error, self.gate, self.share)
        return made.to(device)


@dataclass(frozen=True, eq=False)
class FeatureEdit:
    """Codes deleted or features clamped while a model runs: a hook, not a weight.

    Its weights are the model's own, so it cannot be an ordinary checkpoint, and whoever holds the model can take it off:
    removing the bottleneck brings everything back. `export` writes a folder with a small loader (`trust_remote_code`).
    Edits combine with `|`: deletions on one codebook become one, others must be at other hook points.
    Use a `WeightEdit` (`edit.dictionary_rows`) where the weights are given away.
    """

    parts: tuple[FeaturePart, ...]
    signature: Signature
    card: RunCard
    calls: tuple[Call, ...] = field(default=(), repr=False)
    _held: dict[int, ExitStack] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for part in self.parts:
            if len(part.units) and int(part.units.max()) >= part.dictionary.size:
                raise MechunlearnError(f"Unit {int(part.units.max())} is out of range: {part.dictionary}.")
            if not torch.isfinite(part.values).all():
                raise MechunlearnError("Some values that features would be set to are not finite.")
            if isinstance(part.dictionary, Codebook) and part.how == "reselect":
                _check_left(part.dictionary, part.units)
        points = [part.dictionary.hook_name for part in self.parts]
        if len(set(points)) < len(points):
            raise MechunlearnError(
                f"Two edits at one hook point ({max(points, key=points.count)}) with different dictionaries or settings do "
                "not combine: one would see what the other has changed. Make both with the same."
            )

    @property
    def mask(self) -> ComponentMask:
        """The features and codes it acts on."""
        sites = {}
        for part in self.parts:
            sites[part.dictionary.site] = torch.zeros(part.dictionary.size, dtype=torch.bool)
            sites[part.dictionary.site][part.units] = True
        return ComponentMask(sites, self.signature)

    def remake(self, mask: ComponentMask | None = None, seed: int | None = None) -> "FeatureEdit":
        """Make the edit again by the same call, as `WeightEdit.remake` does.

        Args:
            mask: Features or codes of the same dictionary; `None` or the edit's own `mask` keeps the mask of the call. Of a
                composed edit each part gets, of each dictionary, as many of these units as it had.
            seed: The seed this time; `None` keeps the seed of the call.

        Raises:
            MechunlearnError: For an edit that was loaded from a file or put together by hand.
        """
        made: FeatureEdit = remade(self, mask, seed)
        return made

    @contextmanager
    def applied(self, model: AnyModel) -> Iterator[AnyModel]:
        """Within the block the model's activations are edited; after it, every bit is as it was."""
        with self._hooked(model):
            yield model

    def apply_(self, model: Model) -> None:
        """Edit the model's activations until `remove_`. Raises `MechunlearnError` if this edit is on it already."""
        if id(_module(model)) in self._held:
            raise MechunlearnError("This edit is applied to this model already. Take it off with remove_(model).")
        self._held[id(_module(model))] = self._hooked(model)

    def remove_(self, model: Model) -> None:
        """Take the edit off again. Raises `MechunlearnError` if it was not applied with `apply_`."""
        if id(_module(model)) not in self._held:
            raise MechunlearnError("This edit is not applied to this model, so it cannot be taken off.")
        self._held.pop(id(_module(model))).close()

    def _hooked(self, model: Model) -> ExitStack:
        self._check(model)
        device = next(_module(model).parameters()).device
        with ExitStack() as stack:
            for part in self.parts:
                intervention = part.intervention(device)

                def changed(h: Tensor, intervention: nn.Module = intervention) -> Tensor:
                    return intervention(h).to(h.dtype)

                stack.enter_context(installed(model, part.dictionary.hook_name, changed))
            return stack.pop_all()

    def _check(self, model: Model) -> None:
        if self.signature != signature_of(model):
            raise MechunlearnError(f"The edit is for ({self.signature}), the model is ({signature_of(model)}).")
        for part in self.parts:
            check(part.dictionary, model)

    def __or__(self, other: "FeatureEdit") -> "FeatureEdit":
        """Both at once.

        Raises `MechunlearnError` if they act on one hook point in different ways, share a clamped feature, or are for
        different architectures, and if fewer codes are left than are used.
        """
        if self.signature != other.signature:
            raise MechunlearnError(f"Edits of different architectures: ({self.signature}) and ({other.signature}).")
        parts = {part.dictionary.site: part for part in self.parts}
        for part in other.parts:
            site = part.dictionary.site
            parts[site] = _joined(parts[site], part) if site in parts else part
        cards = [asdict(self.card), asdict(other.card)]
        card = RunCard(f"{self.card.method} | {other.card.method}", self.card.model, settings={"parts": cards})
        calls = self.calls + other.calls if self.calls and other.calls else ()
        return FeatureEdit(tuple(parts.values()), self.signature, card, calls)

    def save(self, path: str | Path) -> None:
        """Write one self-contained .safetensors file, the dictionaries included."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise MechunlearnError(f"Edits are saved as .safetensors files; '{path}' is not named so.")
        tensors: dict[str, Tensor] = {}
        parts = []
        for i, part in enumerate(self.parts):
            kind = "codebook" if isinstance(part.dictionary, Codebook) else "sae"
            config, weights = FILES[kind]
            with tempfile.TemporaryDirectory() as made:
                part.dictionary.save(Path(made) / "it")
                text = (Path(made) / "it" / config).read_text(encoding="utf-8")
                tensors |= {f"{i}/weights/{name}": t for name, t in load_file(Path(made) / "it" / weights).items()}
            tensors |= {f"{i}/units": part.units, f"{i}/values": part.values}
            parts.append({"dictionary": kind, "config": text, **part.settings})
        about = {"signature": asdict(self.signature), "card": asdict(self.card), "parts": parts}
        save_tensors(path, tensors, {"kind": "feature edit", "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> "FeatureEdit":
        """Load an edit. Nothing in the file names a path: dictionaries go through files whose names are fixed here.

        Raises `MechunlearnError` if the file is missing, truncated or something else.
        """
        tensors, metadata = load_tensors(Path(path), "feature edit")
        try:
            about = json.loads(metadata["about"])
            parts = [_loaded_part(settings, tensors, i) for i, settings in enumerate(about["parts"])]
            return cls(tuple(parts), Signature(**about["signature"]), RunCard(**about["card"]))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise MechunlearnError(
                f"'{path}' is not a whole feature edit ({type(error).__name__}: {error}). "
                "Expected a file that `FeatureEdit.save` of this version wrote: make the edit again."
            ) from None

    def export(self, model: Model, folder: str | Path) -> None:
        """Write a Hugging Face folder that reproduces the edited logits, with the loader it needs.

        `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it. Without `trust_remote_code` it does
        not load at all, rather than as the unedited model. The folder must be new or empty.
        Raises `MechunlearnError` for a hook point that no module gives or takes (`resid_mid`, `attn.q`, `attn.k`, `attn.v`),
        and for an SAE whose architecture the loader does not know.
        """
        self._check(model)
        module = _module(model)
        described: list[dict[str, Any]] = []
        state: dict[str, Tensor] = {}
        for i, part in enumerate(self.parts):
            name, side = _exported_place(model, part.dictionary.hook_name)
            common = {"module": name, "side": side}
            if isinstance(part.dictionary, Codebook):
                made = part.intervention(next(module.parameters()).device)
                described.append(
                    {**common, "kind": "delete", "about": part.dictionary.about, "reselect": part.how == "reselect"}
                )
            else:
                if not isinstance(part.dictionary, SAE):
                    raise MechunlearnError(f"{part.dictionary} cannot be exported. Expected a Codebook or an SAE.")
                plain, about = part.dictionary.plain()
                made = FeatureClamp(plain, part.units, part.values, part.error, part.gate, part.share)
                clamp = {"units": len(part.units), "error": part.error, "gate": part.gate, "share": part.share}
                described.append({**common, "kind": "clamp", "about": about, **clamp})
            state |= {f"interventions.{i}.{name}": t.detach().cpu() for name, t in made.state_dict().items()}
        names = {
            "config": type(module.config).__name__,
            "model": type(module).__name__,
            "family": module.config.model_type,
        }
        with whole_folder(folder) as beside:
            # under the names that the module has now: those of older checkpoints are not translated for a loader of ours
            module.save_pretrained(beside, save_original_format=False)
            _add_tensors(beside, state)
            config = json.loads((beside / "config.json").read_text(encoding="utf-8"))
            stem, auto = LOADER.removesuffix(".py"), _auto_class(module)
            config |= {
                "model_type": f"mechunlearn-{names['family']}",
                "architectures": ["Edited"],
                "auto_map": {"AutoConfig": f"{stem}.EditedConfig", auto: f"{stem}.Edited"},
                "mechunlearn": described,
            }
            (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            if any(part.gate == "sequence" for part in self.parts):
                _generate_without_cache(beside / "generation_config.json")
            source = Path(interventions.__file__).read_text(encoding="utf-8")
            (beside / LOADER).write_text(source + TAIL.format(**names), encoding="utf-8")
            (beside / "mechunlearn.json").write_text(self.card.to_json() + "\n", encoding="utf-8")
            tokenizer = getattr(model, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(beside)

    def __repr__(self) -> str:
        told = ", ".join(f"{len(part.units)} of {part.dictionary} {part.how}" for part in self.parts)
        return f"FeatureEdit({self.card.method}: {told or 'nothing'})"

    def _repr_html_(self) -> str:
        about = {"for": self.signature, "note": "a hook, not a weight: whoever holds the model can take it off"}
        rows = [
            (part.dictionary.hook_name, part.dictionary, part.how, f"{len(part.units)} of {part.dictionary.size}")
            for part in self.parts
        ]
        return card(f"FeatureEdit: {self.card.method}", about, ("at", "dictionary", "how", "units"), rows)


def _loaded_part(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], i: int) -> FeaturePart:
    """One part of a saved edit. Its dictionary is loaded from a temporary folder, through the two file names of its kind."""
    config, weights = FILES[settings["dictionary"]]
    prefix = f"{i}/weights/"
    held = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / config).write_text(settings["config"], encoding="utf-8")
        save_file(held, Path(folder) / weights)
        dictionary = load_dictionary(folder)
    chosen = {name: settings[name] for name in ("how", "error", "gate", "share")}
    return FeaturePart(dictionary, tensors[f"{i}/units"], values=tensors[f"{i}/values"], **chosen)


def load_edit(path: str | Path) -> "WeightEdit | FeatureEdit":
    """Load an edit of either kind. Raises `MechunlearnError` if the file holds none."""
    try:
        with safe_open(Path(path), "pt") as file:
            kind = (file.metadata() or {}).get("kind")
    except (OSError, SafetensorError) as error:
        raise MechunlearnError(f"'{path}' is not a whole .safetensors file ({error}).") from None
    return FeatureEdit.load(path) if kind == "feature edit" else WeightEdit.load(path)


def feature_units(mask: ComponentMask, dictionary: Dictionary, model: Model) -> Int[Tensor, " _unit"]:
    """The units of a dictionary that a mask selects.

    Raises `MechunlearnError` for a dictionary or mask of another model, a mask of something else than this dictionary, and
    a mask that selects nothing.
    """
    check(dictionary, model)
    mask.check(signature_of(model))
    chosen = mask.sites.get(dictionary.site)
    others = [site for site in mask.sites if site != dictionary.site]
    if others:
        raise MechunlearnError(
            f"The mask selects units of {', '.join(others[:3])}; the dictionary is '{dictionary.site}'. Expected a mask of "
            "this dictionary's own, as feature_discovery(model, ..., dictionary=dictionary) finds them."
        )
    if chosen is None or not chosen.any():
        raise MechunlearnError(
            f"The mask selects nothing of {dictionary}, so nothing is deleted or clamped. Lower the threshold, or look at "
            "the localization's note."
        )
    return chosen.nonzero().flatten()


def _check_left(codebook: Codebook, units: Int[Tensor, " _unit"]) -> None:
    left = torch.ones(codebook.size, dtype=torch.bool)
    left[units] = False
    fewest = int(left.view(codebook.groups, -1).sum(1).min())
    if fewest < codebook.used:
        raise MechunlearnError(
            f"Only {fewest} codes of {codebook} would be left{' in a group' if codebook.groups > 1 else ''}, fewer than are "
            "used at a time. Delete fewer, or how='zero'."
        )


def _joined(one: FeaturePart, other: FeaturePart) -> FeaturePart:
    if one.settings != other.settings:
        raise MechunlearnError(
            f"The edits act on {one.dictionary.site} in different ways ({one.settings} and {other.settings}). Make both with "
            "the same settings."
        )
    units = torch.cat([one.units, other.units])
    if isinstance(one.dictionary, Codebook):
        return replace(one, units=units.unique())
    shared = [f"{one.dictionary.site}[{unit}]" for unit in units.tolist() if (units == unit).sum() > 1]
    if shared:
        raise MechunlearnError(f"The edits overlap in {len(shared) // 2} features, the first is {min(shared)}.")
    return replace(one, units=units, values=torch.cat([one.values, other.values]))


def _module(model: Model) -> Any:
    return model.hf if isinstance(model, HookedModel) else model


def _exported_place(model: Model, hook_name: str) -> tuple[str, str]:
    """The module of a hook point by name, and whether it enters or leaves it."""
    name = place(model, hook_name)
    if not isinstance(model, HookedModel):
        return name, "out"
    kind = name.split(".", 1)[1]
    if kind == "resid_mid" or kind in ("attn.q", "attn.k", "attn.v"):
        raise MechunlearnError(
            f"An edit at '{name}' cannot be exported: no module of the model gives or takes just that. Use another hook "
            "point, such as the block's resid_post, or save the edit and apply it with mechunlearn."
        )
    module, side = model.decoder.place(name)
    return next(path for path, other in model.hf.named_modules() if other is module), side


def _generate_without_cache(path: Path) -> None:
    """Let generation see whole sequences: with a cache a gate on the sequence would see its last token alone."""
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**settings, "use_cache": False}, indent=2) + "\n", encoding="utf-8")


def _auto_class(module: Any) -> str:
    return "AutoModelForSeq2SeqLM" if module.config.is_encoder_decoder else "AutoModelForCausalLM"


def _add_tensors(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Add tensors to a checkpoint: in its file, or as a further shard."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        whole = load_file(folder / "model.safetensors")
        save_file(
            {**whole, **{n: t.contiguous() for n, t in state.items()}}, folder / "model.safetensors", {"format": "pt"}
        )
        return
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "interventions.safetensors", {"format": "pt"})
    listed = json.loads(index.read_text(encoding="utf-8"))
    listed["weight_map"] |= dict.fromkeys(state, "interventions.safetensors")
    index.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
