"""A change as a value: new rows for the selected units, to apply, undo, save, combine and export."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.artifacts.adapter import save_low_rank
from mechunlearn.artifacts.between import BETWEEN, changed_rows, check_same_logits
from mechunlearn.artifacts.calls import Call, remade
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.core import tensors
from mechunlearn.core.display import card, unit_name
from mechunlearn.core.runcard import RunCard, Stopwatch
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.component import Component, check_site
from mechunlearn.model.hooked import HookedModel, export
from mechunlearn.model.layout import Signature, flat

SIDES = ("left", "right")


@runtime_checkable
class Edit(Protocol):
    """What editors return: a change that can be applied, undone and saved."""

    @property
    def card(self) -> RunCard:
        """How the edit was made."""

    def applied(self, model: HookedModel) -> AbstractContextManager[HookedModel]:
        """Edit a model for the length of a block; after it, every bit is as it was.

        Args:
            model: The model.
        """

    def apply_(self, model: HookedModel) -> None:
        """Edit a model for good.

        Args:
            model: The model.
        """

    def save(self, path: str | Path) -> None:
        """Write the edit to a file.

        Args:
            path: A name in `.safetensors` (compact) or `.json` (readable); both are complete.
        """


@dataclass(frozen=True, eq=False)
class WeightEdit:
    """New weights for some units, and nothing of any other weight.

    Undo copies the old rows back, so it is bit-identical. Two edits combine with `|` if they share no unit.

    Attributes:
        units: `{site: units}`, each unit once.
        rows: `{site: [unit weight]}`, their new weights.
        signature: The architecture.
        card: How the edit was made.
        low_rank: `{parameter: (left, right)}` of a low-rank edit, which has no rows: left @ right, of the parameter's
            shape and zero outside the units, is added to the weights that it was made on. `save_adapter` writes it
            for PEFT.

    Raises:
        MechunlearnError: If units, rows and factors do not fit one another or the architecture, or are not finite.
    """

    units: Mapping[str, Int[Tensor, " _unit"]]
    rows: Mapping[str, Float[Tensor, "_unit _weight"]]
    signature: Signature
    card: RunCard
    low_rank: Mapping[str, tuple[Float[Tensor, "_row _rank"], Float[Tensor, "_rank _column"]]] = field(
        default_factory=dict
    )
    calls: tuple[Call, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.rows.keys() <= self.units.keys() or (self.rows.keys() != self.units.keys() and not self.low_rank):
            raise MechunlearnError(
                f"An edit needs rows for its units: {set(self.units) ^ set(self.rows)} has one only."
            )
        for site, units in self.units.items():
            count = self.signature.units(Component.parse(site).kind) or 0
            check_site(site, count, self.signature)
            numbers = units.dtype == torch.int64 and units.ndim == 1
            if not numbers or ((units < 0) | (units >= count)).any() or len(units.unique()) != len(units):
                raise MechunlearnError(
                    f"Edit of '{site}': expected a vector of whole numbers below {count}, each unit once; got "
                    f"{list(units.shape)} of {units.dtype}, beginning {units.flatten()[:8].tolist()}."
                )
        for site, rows in self.rows.items():
            if rows.ndim != 2 or len(rows) != len(self.units[site]):
                raise MechunlearnError(f"Edit of '{site}': {len(self.units[site])} units but {len(rows)} rows.")
        for name, (left, right) in self.low_rank.items():
            if left.ndim != 2 or right.ndim != 2 or left.shape[1] != len(right):
                raise MechunlearnError(
                    f"Edit of '{name}': factors {list(left.shape)} and {list(right.shape)} do not fit."
                )
        factors = {name: torch.cat([t.flatten() for t in pair]) for name, pair in self.low_rank.items()}
        for name, new in {**self.rows, **factors}.items():
            if not new.is_floating_point() or not torch.isfinite(new).all():
                raise MechunlearnError(f"Edit of '{name}': some new weights are not finite. Lower the learning rate.")

    @classmethod
    @steady()
    def between(cls, before: HookedModel, after: HookedModel) -> "WeightEdit":
        """Make the edit that turns a model into another one, such as one that was trained with another tool.

        It holds the units that differ in some bit, as they are afterwards. Applied to `before`, it gives the logits of
        `after` bit by bit. No editor made it: `remake` refuses, and `evaluate` moves random units by the same
        differences as its control.

        Args:
            before: The model as it was before its training.
            after: The trained one, of the same architecture, tokenizer and dtype; adapters are merged. It may be on
                another device.

        Returns:
            The edit; its run card has the names and fingerprints of both models.

        Raises:
            MechunlearnError: If the models are of different architectures, vocabularies, tokenizers or dtypes; if
                parameters differ that no head or neuron has (embeddings, norms, the unembedding, other biases); if the
                configurations make them compute something else; if nothing differs.

        >>> from mechunlearn.world.toy import planted_facts
        >>> before, after = planted_facts().model, planted_facts().model
        >>> after.hf.model.layers[0].mlp.down_proj.weight.data[:, 3] = 0  # by any trainer
        >>> edit = WeightEdit.between(before, after)
        >>> edit.mask == ComponentMask.of(["L0.mlp.out[3]"], before.signature)
        True
        """
        watch = Stopwatch()
        units, rows = changed_rows(before, after)
        made = cls(units, rows, before.signature, RunCard(BETWEEN))
        with made.applied(before):
            check_same_logits(before, after)
        card = RunCard(
            BETWEEN,
            model=before.fingerprint,
            settings={"before": before.name, "after": after.name, "after_fingerprint": after.fingerprint},
            mask=made.mask.fingerprint,
            weights=sum(new.numel() for new in rows.values()),
            device=str(before.device),
        )
        return replace(made, card=watch.stamp(card))

    @property
    def mask(self) -> ComponentMask:
        """The units that the edit moves."""
        addresses = (
            Component(site.layer, site.kind, unit)
            for site, units in ((Component.parse(name), units) for name, units in self.units.items())
            for unit in units.tolist()
        )
        return ComponentMask.of(addresses, self.signature)

    def remake(self, mask: ComponentMask | None = None, seed: int | None = None) -> "WeightEdit":
        """Make the edit again by the same call: the same model, sets, texts and functions, none of them copied.

        Args:
            mask: Where to edit this time; `None` or the edit's own `mask` keeps the mask of the call. Of a composed
                edit (`a | b`) each part gets, of each kind, as many of these units as it had (see
                `artifacts.calls.dealt`).
            seed: The seed this time; `None` keeps the seed of the call, of each part its own.

        Raises:
            MechunlearnError: For an edit that was loaded from a file or put together by hand.
        """
        made: WeightEdit = remade(self, mask, seed)
        return made

    def apply_(self, model: HookedModel) -> None:
        """Write the new rows into a model, hooked and Hugging Face view alike.

        Nothing is written if anything does not fit. A model with other weights than those that the edit was made on is
        edited, with a warning.

        Args:
            model: The model.

        Raises:
            MechunlearnError: If the edit is for another architecture or other widths, or is low-rank and was made on
                other weights.
        """
        new = self.new_rows(model)
        if self.card.model not in ("", model.fingerprint) and not self.is_applied(model):
            warnings.warn(
                f"This edit was made on other weights (fingerprint {self.card.model}) than the model's "
                f"({model.fingerprint}): another checkpoint, another dtype, or one that was edited since. Its rows take the "
                "place of the model's all the same; evaluate it on this model.",
                stacklevel=2,
            )
        for site, rows in new.items():
            model.write_(site, rows, self.units[site])

    def is_applied(self, model: HookedModel) -> bool:
        """Return whether a model has the edit's rows already. Of a low-rank edit, which adds to rows, it is not known.

        Args:
            model: A model that the edit fits.
        """
        return bool(self.rows) and all(
            torch.equal(model.rows(site)[self.units[site].to(model.device)].cpu(), rows.to(model.dtype))
            for site, rows in self.rows.items()
        )

    def new_rows(self, model: HookedModel) -> dict[str, Float[Tensor, "_unit _weight"]]:
        """Return the new weights of the units of every site, those of a low-rank edit worked out from the model's own.

        Args:
            model: The model.

        Raises:
            MechunlearnError: As `apply_`.
        """
        self._check(model)
        new, parameters = dict(self.rows), dict(model.hf.named_parameters())
        changes = {name: left @ right for name, (left, right) in self.low_rank.items()}
        for site in self.units.keys() - self.rows.keys():
            address = Component.parse(site)
            names = [n for n in model.layout.parameter_names(address.layer, address.kind) if n in parameters]
            added = {n: changes[n] if n in changes else torch.zeros(parameters[n].shape) for n in names}
            units = self.units[site]
            change = flat(model.layout.views(added, address.layer, address.kind))[units]
            new[site] = model.rows(site)[units.to(model.device)].float().cpu() + change
        return new

    @contextmanager
    def applied(self, model: HookedModel) -> Iterator[HookedModel]:
        """Edit a model for the length of a block; after it, every bit is as it was, also if the edit does not fit.

        Args:
            model: The model.

        Yields:
            The same model, edited.

        Raises:
            MechunlearnError: As `apply_`.
        """
        new = self.new_rows(model)
        before = {site: model.rows(site)[units.to(model.device)].cpu() for site, units in self.units.items()}
        try:
            for site, rows in new.items():
                model.write_(site, rows, self.units[site])
            yield model
        finally:
            for site, rows in before.items():
                model.write_(site, rows, self.units[site])

    def _check(self, model: HookedModel) -> None:
        """Refuse a model that the edit does not fit, before anything is written."""
        if self.signature != model.signature:
            raise MechunlearnError(f"The edit is for ({self.signature}), the model is ({model.signature}).")
        if self.low_rank and self.card.model != model.fingerprint:
            raise MechunlearnError(
                f"A low-rank edit adds to the weights it was made on (model {self.card.model}); this model's are "
                "others "
                f"({model.fingerprint}). Load the model as it was then, in the same dtype and without this edit "
                "applied."
            )
        widths = {site: model.unit_weights(Component.parse(site).kind) for site in self.rows}
        shapes = {name: list(p.shape) for name, p in model.hf.named_parameters() if name in self.low_rank}
        given = {site: rows.shape[1] for site, rows in self.rows.items()}
        pairs = {name: [len(left), right.shape[1]] for name, (left, right) in self.low_rank.items()}
        for name, size in {**given, **pairs}.items():
            expected = {**widths, **shapes}.get(name)
            if size != expected:
                raise MechunlearnError(
                    f"The edit holds weights of size {size} for '{name}', where the model has {expected}. Give the "
                    "model "
                    "that the edit was made on, or one of its sizes."
                )

    def __or__(self, other: "WeightEdit") -> "WeightEdit":
        """Both edits at once. Raises `MechunlearnError`, by name, if they share a unit."""
        shared = self.mask & other.mask
        if len(shared):
            raise MechunlearnError(f"The edits overlap in {len(shared)} units, the first is {next(iter(shared))}.")
        sites = {**self.units, **other.units}
        units = {site: torch.cat([e.units[site] for e in (self, other) if site in e.units]) for site in sites}
        if self.low_rank or other.low_rank:
            raise MechunlearnError("Low-rank edits do not combine: apply one, then make the other on the edited model.")
        rows = {site: torch.cat([e.rows[site] for e in (self, other) if site in e.rows]) for site in sites}
        card = RunCard(
            f"{self.card.method} | {other.card.method}", settings={"parts": [asdict(self.card), asdict(other.card)]}
        )
        calls = self.calls + other.calls if self.calls and other.calls else ()
        return WeightEdit(units, rows, self.signature, card, calls=calls)

    def export(self, model: HookedModel, folder: str | Path) -> None:
        """Write the edited model as an ordinary Hugging Face checkpoint with its tokenizer and run card.

        Args:
            model: The model, which is left as it was.
            folder: A new or empty folder.

        Raises:
            MechunlearnError: As `apply_`, and if the folder holds something or the disk refuses.
        """
        with self.applied(model):
            export(model, folder, {"mechunlearn.json": self.card.to_json()})

    def save_adapter(self, model: HookedModel, folder: str | Path) -> None:
        """Write a low-rank edit as a PEFT adapter folder: `PeftModel.from_pretrained(hf, folder)` loads it, unmerged.

        The adapter goes on the unedited model.

        Args:
            model: The model that the edit was made on.
            folder: A new or empty folder.

        Raises:
            MechunlearnError: For an edit that is not low-rank, as `apply_`, and if the folder holds something or the
                disk refuses.
        """
        if not self.low_rank:
            raise MechunlearnError("This edit is not low-rank, so it is no adapter. Use `export`, or `fisher_lora`.")
        self._check(model)
        save_low_rank(model, self.low_rank, folder, self.card)

    def save(self, path: str | Path) -> None:
        """Write the edit to one self-contained file.

        Args:
            path: A name in `.safetensors` (compact) or `.json` (readable); both are complete.

        Raises:
            MechunlearnError: If the name ends in something else, or the disk refuses.
        """
        pairs = {side: {name: pair[i] for name, pair in self.low_rank.items()} for i, side in enumerate(SIDES)}
        parts = {"units": self.units, "rows": self.rows, **pairs}
        held = {f"{part}/{name}": t for part, of in parts.items() for name, t in of.items()}
        tensors.save(path, "weight edit", held, {"signature": self.signature, "card": self.card})

    @classmethod
    def load(cls, path: str | Path) -> "WeightEdit":
        """Read an edit from a file of `save`.

        Args:
            path: The `.safetensors` or `.json` file.

        Returns:
            The edit, equal to the one that was saved.

        Raises:
            MechunlearnError: If the file is missing, damaged or something else than a weight edit.
        """
        return tensors.load(path, {"weight edit": cls._made})

    @classmethod
    def _made(cls, held: dict[str, Tensor], about: dict[str, Any]) -> "WeightEdit":
        parts = tensors.grouped(held, ("units", "rows", *SIDES))
        pairs = {name: (left, parts["right"][name]) for name, left in parts["left"].items()}
        made = tensors.checked(about, {"signature": Signature, "card": RunCard})
        return cls(parts["units"], parts["rows"], low_rank=pairs, **made)

    def __repr__(self) -> str:
        weights = sum(rows.numel() for rows in self.rows.values())
        weights += sum(t.numel() for pair in self.low_rank.values() for t in pair)
        return f"WeightEdit({self.card.method}, {sum(map(len, self.units.values()))} units, {weights} weights; {self.signature})"

    def _repr_html_(self) -> str:
        low_rank = ", ".join(f"{name} of rank {left.shape[1]}" for name, (left, _) in self.low_rank.items())
        held = sum(rows.numel() for rows in self.rows.values())
        about = {
            "moves": f"{len(self.mask)} units, {held} weights set anew"
            if not low_rank
            else f"{len(self.mask)} units, by what is added",
            "low rank": low_rank,
            "for": self.signature,
            "made in": f"{self.card.seconds:.1f} s, seed {self.card.seed}",
            "stopped": self.card.stopped,
            "undo": "with edit.applied(model): ... ends as it began, bit by bit",
        }
        rows = [(kind, f"{unit_name(kind)}s", layers, n) for kind, layers, n, _ in self.mask._by_kind()]
        return card(f"WeightEdit: {self.card.method}", about, ("site", "units", "layers", "moved"), rows)
