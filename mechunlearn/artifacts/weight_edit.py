"""A change as a value: new rows for the selected units, to apply, undo, save, combine and export."""

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from mechunlearn.artifacts.calls import Call, remade
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.core.display import card, unit_name
from mechunlearn.core.files import whole_folder
from mechunlearn.core.runcard import RunCard
from mechunlearn.core.tensors import load_tensors, save_tensors
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel, export
from mechunlearn.model.layout import Signature, flat

SIDES = ("left", "right")


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

    A low-rank edit has no rows but `low_rank`, `{parameter: (left, right)}`: left @ right, of the parameter's shape and zero
    outside the units, is added to the weights it was made on; `save_adapter` writes it for PEFT. Undo copies the old
    rows back, so it is bit-identical. Two edits combine with `|` if they share no unit.
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
        for site, rows in self.rows.items():
            units = self.units[site]
            if len(units) != len(rows) or len(units.unique()) != len(units):
                raise MechunlearnError(f"Edit of '{site}': {len(units)} units (each once) but {len(rows)} rows.")
        factors = {name: torch.cat([t.flatten() for t in pair]) for name, pair in self.low_rank.items()}
        for name, new in {**self.rows, **factors}.items():
            if not torch.isfinite(new).all():
                raise MechunlearnError(f"Edit of '{name}': some new weights are not finite. Lower the learning rate.")

    @property
    def mask(self) -> ComponentMask:
        """The units it moves."""
        addresses = (
            Component(site.layer, site.kind, unit)
            for site, units in ((Component.parse(name), units) for name, units in self.units.items())
            for unit in units.tolist()
        )
        return ComponentMask.of(addresses, self.signature)

    def remake(self, mask: ComponentMask | None = None, seed: int | None = None) -> "WeightEdit":
        """Make the edit again by the same call: the same model, sets, texts and functions, none of them copied.

        Args:
            mask: Where to edit this time; `None` or the edit's own `mask` keeps the mask of the call. Of a composed edit
                (`a | b`) each part gets, of each kind, as many of these units as it had (see `artifacts.calls.dealt`).
            seed: The seed this time; `None` keeps the seed of the call, of each part its own.

        Raises:
            MechunlearnError: For an edit that was loaded from a file or put together by hand.
        """
        made: WeightEdit = remade(self, mask, seed)
        return made

    def apply_(self, model: HookedModel) -> None:
        """Write the new rows into the model, hooked and Hugging Face view alike."""
        self._check(model)
        new = self.new_rows(model)
        for site, units in self.units.items():
            model.write_(site, new[site], units)

    def new_rows(self, model: HookedModel) -> dict[str, Float[Tensor, "_unit _weight"]]:
        """The new weights of the units of every site, of a low-rank edit worked out from the model's own."""
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
        if self.low_rank and self.card.model != model.fingerprint:
            raise MechunlearnError(
                f"A low-rank edit adds to the weights it was made on (model {self.card.model}); this model's are others "
                f"({model.fingerprint}). Load the model as it was then, in the same dtype and without this edit applied."
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

        The folder must be new or empty. The model itself is left as it was.
        """
        with self.applied(model):
            export(model, folder, {"mechunlearn.json": self.card.to_json()})

    def save_adapter(self, model: HookedModel, folder: str | Path) -> None:
        """Write a low-rank edit as a PEFT adapter folder: `PeftModel.from_pretrained(hf, folder)` loads it, unmerged.

        The adapter goes on the unedited model. The folder must be new or empty. Raises `MechunlearnError` for a dense edit.
        """
        if not self.low_rank:
            raise MechunlearnError("This edit is not low-rank, so it is no adapter. Use `export`, or `fisher_lora`.")
        self._check(model)
        from peft import LoraConfig  # seconds to import

        tensors, ranks, conv = {}, {}, False
        for name, (left, right) in self.low_rank.items():
            module = name.removesuffix(".weight")
            conv = isinstance(model.hf.get_submodule(module), Conv1D)
            down, up = (left.T, right.T) if conv else (right, left)
            ranks[module] = len(down)
            tensors[f"base_model.model.{module}.lora_A.weight"] = down.contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = up.contiguous()
        config = LoraConfig(
            r=max(ranks.values()),
            lora_alpha=max(ranks.values()),
            rank_pattern=ranks,
            alpha_pattern=ranks,
            target_modules=list(ranks),
            fan_in_fan_out=conv,
            task_type="CAUSAL_LM",
            inference_mode=True,
        )
        with whole_folder(folder) as beside:
            config.save_pretrained(str(beside))
            save_file(tensors, beside / "adapter_model.safetensors", metadata={"format": "pt"})
            (beside / "mechunlearn.json").write_text(self.card.to_json() + "\n", encoding="utf-8")

    def save(self, path: str | Path) -> None:
        """Write one self-contained .safetensors file."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise MechunlearnError(f"Edits are saved as .safetensors files; '{path}' is not named so.")
        tensors = {f"units.{site}": units for site, units in self.units.items()}
        tensors |= {f"rows.{site}": rows for site, rows in self.rows.items()}
        tensors |= {f"{side}.{name}": t for name, pair in self.low_rank.items() for side, t in zip(SIDES, pair)}
        about = {"signature": asdict(self.signature), "card": asdict(self.card)}
        save_tensors(path, tensors, {"kind": "weight edit", "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> "WeightEdit":
        tensors, metadata = load_tensors(Path(path), "weight edit")
        about = json.loads(metadata["about"])
        parts: dict[str, dict[str, Tensor]] = {"units": {}, "rows": {}, **{side: {} for side in SIDES}}
        for name, tensor in tensors.items():
            part, _, site = name.partition(".")
            parts[part][site] = tensor
        low_rank = {name: (left, parts["right"][name]) for name, left in parts["left"].items()}
        card = RunCard(**about["card"])
        return cls(parts["units"], parts["rows"], Signature(**about["signature"]), card, low_rank)

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
