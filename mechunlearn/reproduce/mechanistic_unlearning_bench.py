"""What one cell of the Mechanistic Unlearning reproduction does: localize, edit under a mask, measure, relearn."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import torch

from mechunlearn.artifacts.localization import Localization
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.overlap import layer_auroc
from mechunlearn.attack import relearning
from mechunlearn.attack.bounds import recovery
from mechunlearn.core.grid import Grid
from mechunlearn.edit import losses, masked_gradient
from mechunlearn.errors import MechunlearnError
from mechunlearn.evaluation.selection import select
from mechunlearn.facts.load import world_facts
from mechunlearn.facts.prompts import Prompts
from mechunlearn.localize import (
    activation_patching,
    attribution_patching,
    causal_tracing,
    direct_logit_attribution,
    edge_attribution,
    fact_lookup,
    path_patching,
    random_units,
)
from mechunlearn.metrics.answers import answered, measure
from mechunlearn.metrics.text import text_loss
from mechunlearn.model.component import SCORED, Component
from mechunlearn.model.hooked import HookedModel
from mechunlearn.reproduce.engine import Found, finished, model_in, options, world_folder

SHIPPED, NAIVE, TWIN = "factworld", "factworld-naive", "factworld-twin"
FORGET, RETAIN, VALIDATION = 40, 160, 9
STEPS, BATCH = 30, 40
RATES, WEIGHTS = (3e-3, 1e-2), (1.0, 4.0)
ATTACK: dict[str, Any] = {
    "lrs": {"lora": (5e-3,), "full": (5e-4, 2e-3)},
    "steps": 10,
    "eval_every": 5,
    "batch_size": 20,
}
LOOKUP, PATHS, RANDOM = "fact_lookup", "fact_lookup, paths", "random_units"
OUTPUT_TRACING = ("causal_tracing, MLPs", "attribution_patching, MLPs")
LOCALIZERS: dict[str, Callable[[HookedModel, Prompts, int], Localization]] = {
    LOOKUP: lambda model, facts, seed: fact_lookup(model, facts, seed=seed),
    PATHS: lambda model, facts, seed: fact_lookup(model, facts, rule="paths"),
    OUTPUT_TRACING[0]: lambda model, facts, seed: causal_tracing(model, facts, kinds=["mlp_out"], seed=seed),
    OUTPUT_TRACING[1]: lambda model, facts, seed: attribution_patching(model, facts, kinds=["mlp.out"]),
    "causal_tracing": lambda model, facts, seed: causal_tracing(model, facts, seed=seed),
    "attribution_patching": lambda model, facts, seed: attribution_patching(model, facts),
    "activation_patching": lambda model, facts, seed: activation_patching(model, facts, kinds=SCORED, neurons=16),
    "edge_attribution": lambda model, facts, seed: edge_attribution(model, facts, ig_steps=5).nodes(),
    "path_patching": lambda model, facts, seed: path_patching(model, facts),
    "direct_logit_attribution": lambda model, facts, seed: direct_logit_attribution(model, facts),
    RANDOM: lambda model, facts, seed: random_units(model, seed=seed),
}
ALL_MLPS, EVERYTHING, LAST, SUBSET = "all MLPs", "everything", "last layer", "MLP "
WHOLE = (ALL_MLPS, EVERYTHING, LAST)


@dataclass(frozen=True)
class Cell:
    """One run on one forget set of a relation of a world.

    Attributes:
        kind: What is done: `localize`, `bounds`, `edit`, `test`, `auroc` or `share`.
        world: The world's name or number.
        relation: The relation.
        seed: Which forget set.
        arm: Under which mask.
        rate: The learning rate.
        weight: The forget weight, or the share inside the storage site.
    """

    kind: str
    world: str
    relation: str = "sport"
    seed: int = 0
    arm: str = ""
    rate: float = 0.0
    weight: float = 0.0

    def description(self) -> Found:
        """Return what names the cell."""
        return dict(vars(self))


def trials(world: str, relation: str, arm: str) -> tuple[Cell, ...]:
    """Return the grid of settings of a mask, on the validation set.

    Args:
        world: The world's name or number.
        relation: The relation.
        arm: The mask.
    """
    return options(partial(Cell, "edit", world, relation, VALIDATION, arm), rate=RATES, weight=WEIGHTS)


def best_setting(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Choose a setting by the rule of `compare.select`, in the names of this grid's cells.

    Args:
        rows: Trials with `rate`, `forget_weight`, `strength`, `truth`, `retain` and `share`.

    Returns:
        `rate`, `forget_weight` and `selected`; the first two are None where nothing was tried.
    """
    best = select(
        [{**row, "lr": row["rate"], "efficacy": row.get("strength"), "retention": row.get("retain")} for row in rows]
    )
    return {"rate": best.pop("lr"), **best}


class Bench:
    """One relation of one world: its facts in disjoint forget sets, and a retain set that all of them share.

    Args:
        folder: The plan's folder.
        world: The world's name or number.
        relation: The relation.
    """

    def __init__(self, folder: Path, world: str, relation: str) -> None:
        where = world_folder(folder, world)
        self.model, self.facts = model_in(where), world_facts(where, relation)
        self.everything = ComponentMask.everything(self.model)
        self.folder, self.relabelled = folder, world_folder(folder, world, "-relabelled") if world.isdigit() else None
        self.prompts = self.facts.prompts(self.model)
        self.order = torch.randperm(len(self.facts), generator=torch.Generator().manual_seed(0))
        if world == TWIN:  # the people whose storage is known
            old = world_facts(world_folder(folder, SHIPPED), relation).subjects
            new = torch.tensor([fact.subject not in old for fact in self.facts])
            self.order = torch.cat([self.order[new[self.order]], self.order[~new[self.order]]])

    def sets(self, seed: int) -> tuple[Prompts, Prompts]:
        """Return a forget set (the validation set is one more), and the retain set.

        Args:
            seed: Which one.
        """
        first = FORGET * (5 if seed == VALIDATION else seed)
        return self.prompts.select(self.order[first : first + FORGET]), self.prompts.select(self.order[-RETAIN:])

    def localized(self, seed: int) -> Found:
        """Return tied masks of every localizer at the weight of the look-up window; the window; sets of as many layers.

        Where no window is found the weight is that of two MLP layers.

        Args:
            seed: Which forget set.
        """
        model, (forget, _) = self.model, self.sets(seed)
        masks: dict[str, dict[str, list[int]]] = {}
        notes: dict[str, str] = {}
        window, share = None, 2 / model.signature.layers * self.share(self._layers(range(model.signature.layers)))
        for name, localize in LOCALIZERS.items():
            try:
                found = localize(model, forget, seed)
            except MechunlearnError as error:
                masks[name], notes[name] = {}, str(error)
                continue
            if found.note:
                notes[name] = found.note
            mask = found.above(0).tied(model)
            if name == LOOKUP and len(mask):
                window, share = found.evidence["window"], found.share(mask)
            elif found.share(mask) > share:
                mask = found.top(weights=share, tied=True) & mask
            masks[name] = {str(site): of.nonzero().flatten().tolist() for site, of in mask.sites.items() if of.any()}
        every = combinations(range(model.signature.layers), window[1] - window[0] + 1) if window else ()
        subsets = [SUBSET + "+".join(map(str, chosen)) for chosen in every]
        return {"masks": masks, "window": window, "share": share, "subsets": subsets, "notes": notes}

    def mask(self, arm: str, found: Found) -> ComponentMask:
        """Return the mask of an arm.

        Args:
            arm: A localizer, a whole part or a set of MLP layers.
            found: What `localized` returned.

        Raises:
            MechunlearnError: If the localizer found nothing.
        """
        model, layers = self.model, self.model.signature.layers
        if arm.startswith(SUBSET):
            return self._layers(int(layer) for layer in arm.removeprefix(SUBSET).split("+"))
        if arm == ALL_MLPS:
            return self._layers(range(layers))
        if arm == EVERYTHING:
            return self.everything
        if arm == LAST:
            return ComponentMask.of([f"L{layers - 1}.{kind}" for kind in ("attn.o", "mlp.out")], model.signature).tied(
                model
            )
        units = [f"{site}[{unit}]" for site, of in found["masks"][arm].items() for unit in of]
        if not units:
            raise MechunlearnError(found["notes"].get(arm, "nothing found"))
        return ComponentMask.of(units, model.signature)

    def share(self, mask: ComponentMask) -> float:
        """Return which part of the editable weights a mask has.

        Args:
            mask: Which weights.
        """
        return mask.weights(self.model) / self.everything.weights(self.model)

    def _layers(self, layers: Iterable[int]) -> ComponentMask:
        """Return the MLPs of some layers."""
        return ComponentMask.of([f"L{layer}.mlp.out" for layer in layers], self.model.signature).tied(self.model)

    def _edited(self, cell: Cell, grid: Grid) -> Found:
        """Return what an edit does on the training prompt; for a test set also elsewhere, and what is relearned."""
        found = finished(grid, Cell("localize", cell.world, cell.relation, cell.seed)) or {}
        try:
            mask = self.mask(cell.arm, found)
        except MechunlearnError as error:
            return {"note": str(error)}
        return self._edit(cell, mask, grid)

    def _edit(self, cell: Cell, mask: ComponentMask, grid: Grid) -> Found:
        model, (forget, retain) = self.model, self.sets(cell.seed)
        made: Found = {"share": self.share(mask)}
        given, how = (model, mask, forget, retain), dict[str, Any](forget_weight=cell.weight, seed=cell.seed)
        try:
            edit = masked_gradient(
                *given, steps=STEPS, lr=cell.rate, batch_size=BATCH, text_loss=losses.cross_entropy, **how
            )
        except MechunlearnError as error:
            return {**made, "note": str(error)}
        with edit.applied(model):
            changed = measure(model, forget)
            made["strength"] = float(changed["target_accuracy"].mean())
            made["truth"] = float(changed["accuracy"].mean())
            made["retain"] = float(answered(model, retain).float().mean())
            if cell.kind == "edit":
                return made
            made |= self._elsewhere(forget)
        limits = finished(grid, Cell("bounds", cell.world, cell.relation, cell.seed))
        if limits is None:
            raise MechunlearnError("Its ceiling and floor are not finished.")
        known = pd.DataFrame(limits["rows"])
        known.attrs["card"] = limits["card"]
        return made | _recovered(relearning(model, edit, forget, retain, baseline_rows=known, seed=cell.seed, **ATTACK))

    def _elsewhere(self, forget: Prompts) -> Found:
        """Return other formats (edit target and truth), other facts of the same subjects, and text."""
        model, facts = self.model, forget.facts
        assert facts is not None
        others = [name for name in facts.formats if name not in (forget.format, "yes_no")]
        asked = {name: measure(model, facts.prompts(model, name)) for name in others}
        same = [part.prompts(model) for e in facts.related.values() if len(part := e.about(facts.subjects))]
        return {
            "formats": {name: float(m["target_accuracy"].mean()) for name, m in asked.items()},
            "other formats": fmean(float(m["target_accuracy"].mean()) for m in asked.values()),
            "truth elsewhere": fmean(float(m["accuracy"].mean()) for m in asked.values()),
            "same subject": fmean(float(answered(model, prompts).float().mean()) for prompts in same),
            "text loss": float(text_loss(model, facts.texts[1::8]).mean()),
        }

    def _bounds(self, seed: int) -> Found:
        """Return ceiling and floor of relearning, also those of a model trained from scratch on the edited labels."""
        forget, retain = self.sets(seed)
        scratch = self.relabelled
        beside = {"from scratch": model_in(scratch)} if scratch is not None and scratch.exists() else {}
        rows = relearning(self.model, None, forget, retain, extra_edits=beside, seed=seed, **ATTACK)
        unedited = {"retain": float(answered(self.model, retain).float().mean())} | self._elsewhere(forget)
        found = (
            recovery(rows)
            .reset_index()
            .rename(columns={"held_out": "held out"})[["state", "held out", "recovery", "floor", "ceiling"]]
        )
        card = rows.attrs["card"]
        return {"rows": _plain(rows), "card": card, "unedited": unedited, "found": _plain(found)}

    def _area(self, seed: int) -> Found:
        """Return how well each localizer ranks the layers where the twin stores its new people: area under the ROC."""
        model, (forget, _), site = self.model, self.sets(seed), self.storage()
        layers, width = range(model.signature.layers), model.signature.d_mlp
        trained = {f"L{layer}.mlp.out": torch.full((width,), layer in site) for layer in layers}
        return {name: layer_auroc(localize(model, forget, seed), trained) for name, localize in LOCALIZERS.items()}

    def storage(self) -> list[int]:
        """Return the layers whose MLPs the twin was taught in: those that differ from the shipped world's."""
        base, layers = model_in(world_folder(self.folder, SHIPPED)), range(self.model.signature.layers)
        same = (torch.equal(base.rows(site), self.model.rows(site)) for site in (f"L{i}.mlp.out" for i in layers))
        return [layer for layer, equal in zip(layers, same) if not equal]

    def _shared(self, cell: Cell, grid: Grid) -> Found:
        """Edit the twin's new people on random MLP neurons, a share of which is inside the storage site."""
        generator, neurons = torch.Generator().manual_seed(cell.seed), self.model.signature.d_mlp
        site, inside = self.storage(), round(cell.weight * neurons)
        elsewhere = [layer for layer in range(self.model.signature.layers) if layer not in site]
        units = [
            Component(layers[i // neurons], "mlp.out", i % neurons)
            for layers, count in ((site, inside), (elsewhere, neurons - inside))
            for i in torch.randperm(len(layers) * neurons, generator=generator)[:count].tolist()
        ]
        mask = ComponentMask.of(units, self.model.signature).tied(self.model)
        tried = trials(TWIN, cell.relation, cell.arm)
        setting = best_setting(
            [{"rate": c.rate, "forget_weight": c.weight, **self._edit(c, mask, grid)} for c in tried]
        )
        test = Cell("test", TWIN, cell.relation, cell.seed, cell.arm, setting["rate"], setting["forget_weight"])
        return {f"chosen {name}": value for name, value in setting.items()} | self._edit(test, mask, grid)

    def measured(self, grid: Grid, cell: Cell) -> Found:
        """Return the result of a cell.

        Args:
            grid: The finished cells.
            cell: What is run.
        """
        by_seed = {"localize": self.localized, "bounds": self._bounds, "auroc": self._area}
        if cell.kind in by_seed:
            return by_seed[cell.kind](cell.seed)
        return self._shared(cell, grid) if cell.kind == "share" else self._edited(cell, grid)


bench_of = cache(Bench)


def _recovered(rows: pd.DataFrame) -> Found:
    """Return what relearning brought back, and its curves."""
    best: Any = recovery(rows).loc["edited"]
    mine = rows[rows.state == "edited"].to_dict("records")
    return {
        "recovery": None if pd.isna(best["recovery"]) else float(best["recovery"]),
        "held out": None if pd.isna(best["held_out"]) else float(best["held_out"]),
        "outcome": best["outcome"],
        "floor": float(best["floor"]),
        "ceiling": float(best["ceiling"]),
        "curves": [[row[k] for k in ("setting", "step", "held_out", "trained", "retain")] for row in mine],
    }


def _plain(rows: pd.DataFrame) -> list[Found]:
    """Return rows as JSON, with None for what is missing."""
    return [
        {str(k): v for k, v in row.items()} for row in rows.astype(object).where(rows.notna(), None).to_dict("records")
    ]
