"""A change as a value: new rows for the selected units, to apply, undo, save, combine and export."""

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.components import Component, ComponentMask, load_tensors, save_tensors
from mechunlearn.errors import MechunlearnError
from mechunlearn.hooked import HookedModel, export
from mechunlearn.layout import Signature
from mechunlearn.runcard import RunCard


@runtime_checkable
class Edit(Protocol):
    """What editors return. `applied` undoes itself; `apply_` stays."""

    @property
    def card(self) -> RunCard: ...
    def applied(self, model: HookedModel) -> AbstractContextManager[HookedModel]: ...
    def apply_(self, model: HookedModel) -> None: ...
    def save(self, path: str | Path) -> None: ...


@dataclass(frozen=True, eq=False)
class WeightEdit:
    """New weights for some units: `{site: units}` and `{site: [unit weight]}`, nothing of any other weight.

    Undo copies the old rows back, so it is bit-identical. Two edits combine with `|` if they share no unit.
    """

    units: Mapping[str, Int[Tensor, " _unit"]]
    rows: Mapping[str, Float[Tensor, "_unit _weight"]]
    signature: Signature
    card: RunCard

    def __post_init__(self) -> None:
        if self.units.keys() != self.rows.keys():
            raise MechunlearnError(
                f"An edit needs rows for its units: {set(self.units) ^ set(self.rows)} has one only."
            )
        for site, units in self.units.items():
            if len(units) != len(self.rows[site]) or len(units.unique()) != len(units):
                raise MechunlearnError(
                    f"Edit of '{site}': {len(units)} units (each once) but {len(self.rows[site])} rows."
                )
            if not torch.isfinite(self.rows[site]).all():
                raise MechunlearnError(f"Edit of '{site}': some new weights are not finite. Lower the learning rate.")

    @property
    def mask(self) -> ComponentMask:
        """The units it moves."""
        addresses = (
            Component(site.layer, site.kind, unit)
            for site, units in ((Component.parse(name), units) for name, units in self.units.items())
            for unit in units.tolist()
        )
        return ComponentMask.of(addresses, self.signature)

    def apply_(self, model: HookedModel) -> None:
        """Write the new rows into the model, hooked and Hugging Face view alike."""
        self._check(model)
        for site, units in self.units.items():
            model.write_(site, self.rows[site], units)

    @contextmanager
    def applied(self, model: HookedModel) -> Iterator[HookedModel]:
        """Within the block the model is edited; after it, every bit is as it was."""
        self._check(model)
        before = {site: model.rows(site)[units.to(model.device)].cpu() for site, units in self.units.items()}
        self.apply_(model)
        try:
            yield model
        finally:
            for site, rows in before.items():
                model.write_(site, rows, self.units[site])

    def _check(self, model: HookedModel) -> None:
        if self.signature != model.signature:
            raise MechunlearnError(f"The edit is for ({self.signature}), the model is ({model.signature}).")

    def __or__(self, other: "WeightEdit") -> "WeightEdit":
        """Both edits at once. Raises `MechunlearnError`, by name, if they share a unit."""
        shared = self.mask & other.mask
        if len(shared):
            raise MechunlearnError(f"The edits overlap in {len(shared)} units, the first is {next(iter(shared))}.")
        sites = {**self.units, **other.units}
        units = {site: torch.cat([e.units[site] for e in (self, other) if site in e.units]) for site in sites}
        rows = {site: torch.cat([e.rows[site] for e in (self, other) if site in e.rows]) for site in sites}
        card = RunCard(
            f"{self.card.method} | {other.card.method}", settings={"parts": [asdict(self.card), asdict(other.card)]}
        )
        return WeightEdit(units, rows, self.signature, card)

    def export(self, model: HookedModel, folder: str | Path) -> None:
        """Write the edited model as an ordinary Hugging Face checkpoint with its tokenizer and run card.

        The folder must be new or empty. The model itself is left as it was.
        """
        with self.applied(model):
            export(model, folder, {"mechunlearn.json": self.card.to_json()})

    def save(self, path: str | Path) -> None:
        """Write one self-contained .safetensors file."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise MechunlearnError(f"Edits are saved as .safetensors files; '{path}' is not named so.")
        tensors = {f"units.{site}": units for site, units in self.units.items()}
        tensors |= {f"rows.{site}": rows for site, rows in self.rows.items()}
        about = {"signature": asdict(self.signature), "card": asdict(self.card)}
        save_tensors(path, tensors, {"kind": "weight edit", "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> "WeightEdit":
        tensors, metadata = load_tensors(Path(path), "weight edit")
        about = json.loads(metadata["about"])
        parts: dict[str, dict[str, Tensor]] = {"units": {}, "rows": {}}
        for name, tensor in tensors.items():
            part, _, site = name.partition(".")
            parts[part][site] = tensor
        return cls(parts["units"], parts["rows"], Signature(**about["signature"]), RunCard(**about["card"]))

    def __repr__(self) -> str:
        weights = sum(rows.numel() for rows in self.rows.values())
        return f"WeightEdit({self.card.method}, {sum(map(len, self.units.values()))} units, {weights} weights; {self.signature})"
