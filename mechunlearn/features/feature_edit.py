"""A change of activations as a value: codes deleted or features clamped, to apply, undo, save, combine and export."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechunlearn.artifacts.calls import Call, remade
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core import tensors
from mechunlearn.core.display import card
from mechunlearn.core.runcard import RunCard
from mechunlearn.errors import MechunlearnError
from mechunlearn.features.dictionaries import SAE, Codebook, Dictionary, check
from mechunlearn.features.interventions import CodeDeletion, FeatureClamp
from mechunlearn.features.places import Model, installed, module_of, signature_of
from mechunlearn.model.layout import Signature

AnyModel = TypeVar("AnyModel", bound=Model)
KINDS: dict[str, type[Codebook] | type[SAE]] = {"codebook": Codebook, "sae": SAE}
DELETIONS, GATES = ("reselect", "zero"), ("token", "sequence")
SETTINGS = {"how": str, "error": bool, "gate": str, "share": float}


@dataclass(frozen=True, eq=False)
class FeaturePart:
    """What is done at one dictionary: units of a codebook are deleted, those of an SAE clamped.

    Attributes:
        dictionary: The codebook or SAE.
        units: The units, each once.
        how: Of a codebook, `reselect` (the next nearest codes take their places) or `zero`; of an SAE, `clamp`.
        values: What the features of an SAE are set to, one value a unit.
        error: Whether a clamp adds back what the dictionary misses.
        gate: Where a clamp acts, `token` or `sequence` (see `edit.feature_clamp`).
        share: The share of tokens above which the gate on the sequence opens.
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
        """How it acts: everything but the dictionary, the units and the values."""
        return {name: getattr(self, name) for name in SETTINGS}

    def intervention(self, device: torch.device | str = "cpu") -> nn.Module:
        """Return the function of activations.

        Args:
            device: Where it runs. The dictionary itself goes there too.
        """
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

    Its weights are the model's own, so it cannot be an ordinary checkpoint, and whoever holds the model can take it
    off: removing the bottleneck brings everything back. `export` writes a folder with a small loader
    (`trust_remote_code`). Edits combine with `|`: deletions on one codebook become one, others must be at other hook
    points. Use a `WeightEdit` (`edit.dictionary_rows`) where the weights are given away.

    Attributes:
        parts: What is done, a dictionary each, at different hook points.
        signature: The architecture.
        card: How the edit was made.

    Raises:
        MechunlearnError: If units, values or settings do not fit the dictionaries, or two parts are at one hook point.
    """

    parts: tuple[FeaturePart, ...]
    signature: Signature
    card: RunCard
    calls: tuple[Call, ...] = field(default=(), repr=False)
    _held: dict[int, ExitStack] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for part in self.parts:
            codebook = isinstance(part.dictionary, Codebook)
            if part.units.dtype != torch.int64 or part.units.ndim != 1:
                raise MechunlearnError(f"Units of {part.dictionary} must be a vector of whole numbers.")
            wrong = part.units[(part.units < 0) | (part.units >= part.dictionary.size)]
            if len(wrong):
                raise MechunlearnError(f"Unit {int(wrong[0])} is out of range: {part.dictionary}.")
            if part.how not in (DELETIONS if codebook else ("clamp",)) or part.gate not in GATES:
                raise MechunlearnError(f"{part.dictionary} cannot be edited with how='{part.how}', gate='{part.gate}'.")
            if part.values.shape != ((0,) if codebook else part.units.shape):
                raise MechunlearnError(
                    f"{len(part.units)} units of {part.dictionary}, but {part.values.numel()} values."
                )
            if not torch.isfinite(part.values).all():
                raise MechunlearnError("Some values that features would be set to are not finite.")
            if isinstance(part.dictionary, Codebook) and part.how == "reselect":
                _check_left(part.dictionary, part.units)
        points = [part.dictionary.hook_name for part in self.parts]
        if len(set(points)) < len(points):
            raise MechunlearnError(
                f"Two edits at one hook point ({max(points, key=points.count)}) with different dictionaries or "
                "settings do "
                "not combine: one would see what the other has changed. Make both with the same."
            )

    @property
    def mask(self) -> ComponentMask:
        """The features and codes that the edit acts on."""
        sites = {}
        for part in self.parts:
            sites[part.dictionary.site] = torch.zeros(part.dictionary.size, dtype=torch.bool)
            sites[part.dictionary.site][part.units] = True
        return ComponentMask(sites, self.signature)

    def remake(self, mask: ComponentMask | None = None, seed: int | None = None) -> "FeatureEdit":
        """Make the edit again by the same call, as `WeightEdit.remake` does.

        Args:
            mask: Features or codes of the same dictionary; `None` or the edit's own `mask` keeps the mask of the
                call. Of a composed edit each part gets, of each dictionary, as many of these units as it had.
            seed: The seed this time; `None` keeps the seed of the call.

        Raises:
            MechunlearnError: For an edit that was loaded from a file or put together by hand.
        """
        made: FeatureEdit = remade(self, mask, seed)
        return made

    @contextmanager
    def applied(self, model: AnyModel) -> Iterator[AnyModel]:
        """Edit a model's activations for the length of a block; after it, every bit is as it was.

        Args:
            model: The model.

        Yields:
            The same model, edited.

        Raises:
            MechunlearnError: If the edit is for another architecture, width or hook point.
        """
        with self._hooked(model):
            yield model

    def apply_(self, model: Model) -> None:
        """Edit a model's activations until `remove_`.

        Args:
            model: The model.

        Raises:
            MechunlearnError: As `applied`, and if this edit is on the model already.
        """
        if id(module_of(model)) in self._held:
            raise MechunlearnError("This edit is applied to this model already. Take it off with remove_(model).")
        self._held[id(module_of(model))] = self._hooked(model)

    def remove_(self, model: Model) -> None:
        """Take the edit off a model again.

        Args:
            model: The model.

        Raises:
            MechunlearnError: If the edit was not applied to it with `apply_`.
        """
        if id(module_of(model)) not in self._held:
            raise MechunlearnError("This edit is not applied to this model, so it cannot be taken off.")
        self._held.pop(id(module_of(model))).close()

    def _hooked(self, model: Model) -> ExitStack:
        self._check(model)
        device = next(module_of(model).parameters()).device
        with ExitStack() as stack:
            for part in self.parts:
                intervention = part.intervention(device)

                def changed(h: Tensor, intervention: nn.Module = intervention) -> Tensor:
                    new: Tensor = intervention(h)
                    return new.to(h.dtype)

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
        """Write the edit to one self-contained file, the dictionaries included.

        Args:
            path: A name in `.safetensors` (compact) or `.json` (readable); both are complete.

        Raises:
            MechunlearnError: If the name ends in something else, the disk refuses, or a dictionary is neither a
                `Codebook` nor an `SAE`.
        """
        held: dict[str, Tensor] = {}
        parts = []
        for i, part in enumerate(self.parts):
            if not isinstance(part.dictionary, Codebook | SAE):
                raise MechunlearnError(f"{part.dictionary} cannot be saved. Expected a Codebook or an SAE.")
            kind = "codebook" if isinstance(part.dictionary, Codebook) else "sae"
            described, weights = part.dictionary.described()
            held |= {f"{i}/weights/{name}": t for name, t in weights.items()}
            held |= {f"{i}/units": part.units, f"{i}/values": part.values}
            parts.append({"dictionary": kind, "described": described, **part.settings})
        about = {"signature": self.signature, "card": self.card, "parts": parts}
        tensors.save(path, "feature edit", held, about)

    @classmethod
    def load(cls, path: str | Path) -> "FeatureEdit":
        """Read an edit from a file of `save`. Dictionaries are made in memory: nothing in the file names a path.

        Args:
            path: The `.safetensors` or `.json` file.

        Returns:
            The edit, equal to the one that was saved.

        Raises:
            MechunlearnError: If the file is missing, damaged or something else than a feature edit.
        """
        return tensors.load(path, {"feature edit": cls._made})

    @classmethod
    def _made(cls, held: dict[str, Tensor], about: dict[str, Any]) -> "FeatureEdit":
        numbered = tensors.grouped(held, [str(i) for i in range(len(about["parts"]))])
        parts = [_made_part(settings, numbered[str(i)]) for i, settings in enumerate(about["parts"])]
        return cls(tuple(parts), **tensors.checked(about, {"signature": Signature, "card": RunCard}))

    def export(self, model: Model, folder: str | Path) -> None:
        """Write a Hugging Face folder that reproduces the edited logits, with the loader it needs.

        `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it. Without `trust_remote_code`
        it does not load at all, rather than as the unedited model.

        Args:
            model: The model.
            folder: A new or empty folder.

        Raises:
            MechunlearnError: For a hook point that no module gives or takes (`resid_mid`, `attn.q`, `attn.k`,
                `attn.v`), for an SAE whose architecture the loader does not know, as `applied`, and if the folder
                holds something.
        """
        from mechunlearn.features.export import export_features  # which knows this class

        self._check(model)
        export_features(self, model, folder)

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


def _made_part(settings: Mapping[str, Any], held: dict[str, Tensor]) -> FeaturePart:
    """One part of a saved edit."""
    units, values = held.pop("units"), held.pop("values")
    weights = tensors.grouped(held, ("weights",))["weights"]
    dictionary = KINDS[settings["dictionary"]].restored(settings["described"], weights)
    return FeaturePart(dictionary, units, values=values, **tensors.checked(settings, SETTINGS))


def load_edit(path: str | Path) -> "WeightEdit | FeatureEdit":
    """Load an edit of either kind.

    Args:
        path: A file of `WeightEdit.save` or `FeatureEdit.save`.

    Raises:
        MechunlearnError: If the file is missing, damaged or holds no edit.
    """
    makers: dict[str, tensors.Maker[WeightEdit | FeatureEdit]]
    makers = {"weight edit": WeightEdit._made, "feature edit": FeatureEdit._made}
    return tensors.load(path, makers)


def feature_units(mask: ComponentMask, dictionary: Dictionary, model: Model) -> Int[Tensor, " _unit"]:
    """Return the units of a dictionary that a mask selects.

    Args:
        mask: A mask of the dictionary's units alone.
        dictionary: The dictionary.
        model: The model that both are for.

    Raises:
        MechunlearnError: For a dictionary or mask of another model, a mask of something else than this dictionary,
            and a mask that selects nothing.
    """
    check(dictionary, model)
    mask.check(signature_of(model))
    chosen = mask.sites.get(dictionary.site)
    others = [site for site in mask.sites if site != dictionary.site]
    if others:
        raise MechunlearnError(
            f"The mask selects units of {', '.join(others[:3])}; the dictionary is '{dictionary.site}'. Expected a "
            "mask of "
            "this dictionary's own, as feature_discovery(model, ..., dictionary=dictionary) finds them."
        )
    if chosen is None or not chosen.any():
        raise MechunlearnError(
            f"The mask selects nothing of {dictionary}, so nothing is deleted or clamped. Lower the threshold, or look "
            "at "
            "the localization's note."
        )
    return chosen.nonzero().flatten()


def _check_left(codebook: Codebook, units: Int[Tensor, " _unit"]) -> None:
    left = torch.ones(codebook.size, dtype=torch.bool)
    left[units] = False
    fewest = int(left.view(codebook.groups, -1).sum(1).min())
    if fewest < codebook.used:
        raise MechunlearnError(
            f"Only {fewest} codes of {codebook} would be left{' in a group' if codebook.groups > 1 else ''}, fewer "
            "than are "
            "used at a time. Delete fewer, or how='zero'."
        )


def _joined(one: FeaturePart, other: FeaturePart) -> FeaturePart:
    if one.settings != other.settings:
        raise MechunlearnError(
            f"The edits act on {one.dictionary.site} in different ways ({one.settings} and {other.settings}). Make "
            "both with "
            "the same settings."
        )
    units = torch.cat([one.units, other.units])
    if isinstance(one.dictionary, Codebook):
        return replace(one, units=units.unique())
    shared = [f"{one.dictionary.site}[{unit}]" for unit in units.tolist() if (units == unit).sum() > 1]
    if shared:
        raise MechunlearnError(f"The edits overlap in {len(shared) // 2} features, the first is {min(shared)}.")
    return replace(one, units=units, values=torch.cat([one.values, other.values]))
