"""Mechanistic Unlearning (arXiv 2410.12949) on worlds that look facts up: does it matter which MLPs are edited?

Three worlds, trained separately, of three architectures: the shipped one and two small ones (`world.lookup`). In each, forget
sets of one relation are edited to wrong answers under the masks of every localizer at one budget, under every set of as many
MLP layers, under all MLPs and under everything; rate and weight are chosen for each mask by one rule on a forget set of its own.
Then: other formats, other facts, and relearning of half. The same on the naive world, and on the twin whose storage is known.
"""

from collections.abc import Callable, Mapping, Sequence
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
from mechunlearn.attack.states import recovery
from mechunlearn.core.files import data_folder
from mechunlearn.core.grid import Grid
from mechunlearn.edit import masked_gradient
from mechunlearn.errors import MechunlearnError
from mechunlearn.evaluation.compare import select
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
from mechunlearn.metrics.answers import measure
from mechunlearn.metrics.text import text_loss
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel, load_model
from mechunlearn.reproduce.shared import attempt, finished, settled, workers
from mechunlearn.world.lookup import build_lookup

SHIPPED, NAIVE, TWIN = "factworld", "factworld-naive", "factworld-twin"
FORGET, RETAIN, VALIDATION = 40, 160, 9
STEPS, BATCH = 30, 40
RATES, WEIGHTS = (3e-3, 1e-2), (1.0, 4.0)
ATTACK: dict[str, Any] = {
    "lrs": {"lora": (5e-3,), "full": (5e-4, 2e-3)},
    "steps": 10,
    "eval_every": 5,
    "batch": 20,
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
    "activation_patching": lambda model, facts, seed: activation_patching(model, facts, neurons=16),
    "edge_attribution": lambda model, facts, seed: edge_attribution(model, facts, ig_steps=5).nodes(),
    "path_patching": lambda model, facts, seed: path_patching(model, facts),
    "direct_logit_attribution": lambda model, facts, seed: direct_logit_attribution(model, facts),
    RANDOM: lambda model, facts, seed: random_units(model, seed=seed),
}
ALL_MLPS, EVERYTHING, LAST = "all MLPs", "everything", "last layer"
WHOLE = (ALL_MLPS, EVERYTHING, LAST)
NAIVE_ARMS = (*OUTPUT_TRACING, "causal_tracing", "attribution_patching", RANDOM, *WHOLE)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Plan:
    """What is run: small worlds by seed, relations, forget sets, and forget sets for each set of layers."""

    folder: Path
    worlds: tuple[int, ...] = (1, 2)
    relations: tuple[str, ...] = ("sport", "city")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    subset_seeds: tuple[int, ...] = (0, 1)
    quick: bool = False

    def about(self) -> dict:
        return {
            "reproduction": "mechanistic-unlearning",
            "forget": FORGET,
            "retain": RETAIN,
            "steps": STEPS,
            "batch": BATCH,
            "lrs": list(RATES),
            "weights": list(WEIGHTS),
            "attack": {name: str(value) for name, value in ATTACK.items()},
            "quick": self.quick,
        }

    @property
    def arenas(self) -> tuple[str, ...]:
        """The worlds that are to have the mechanism: the shipped one and the small ones."""
        return (SHIPPED, *map(str, self.worlds))


def quick_plan(folder: Path) -> Plan:
    """One small world, one relation, one forget set; of the shipped worlds the twin's localizations alone."""
    return Plan(folder, worlds=(1,), relations=("sport",), seeds=(0,), subset_seeds=(0,), quick=True)


@dataclass(frozen=True)
class Cell:
    """One run: what is done (`kind`) on one forget set of a relation of a world, under which mask and setting."""

    kind: str
    world: str
    relation: str = "sport"
    seed: int = 0
    arm: str = ""
    rate: float = 0.0
    weight: float = 0.0


def run(plan: Plan, jobs: int = 2, progress: bool = True) -> None:
    """Build what is missing and run what is missing: everything is kept in the plan's folder, a killed run goes on."""
    about = plan.about()
    Grid.open(plan.folder, about)
    work = partial(_cell, plan.folder, about)
    with workers(jobs, progress) as each:
        for relabelled in (False,) if plan.quick else (False, True):
            wanted = [(seed, relabelled) for seed in plan.worlds if not _world(plan.folder, seed, relabelled).exists()]
            each(partial(_build, plan.folder), wanted, "worlds trained on edited labels" if relabelled else "worlds")
        for relation in plan.relations:
            each(work, _localizing(plan, relation), f"{relation}: localizing, ceilings and floors")
            grid = Grid.open(plan.folder, about)
            each(work, _choosing(plan, grid, relation), f"{relation}: choosing settings")
            each(work, _testing(plan, grid, relation), f"{relation}: editing and attacking")
        each(work, _of_the_twin(plan), "the twin")


def arenas(plan: Plan, relation: str) -> tuple[str, ...]:
    """The worlds that a relation is run in; the naive one has the sport alone."""
    own = plan.arenas[1:] if plan.quick else plan.arenas
    return (*own, NAIVE) if relation == "sport" and not plan.quick else own


def arms(grid: Grid, world: str, relation: str) -> list[str]:
    """The masks that are edited in a world: of the localizers, whole parts, and every set of as many MLP layers."""
    if world == NAIVE:
        return list(NAIVE_ARMS)
    found = finished(grid, vars(Cell("localize", world, relation, VALIDATION)))
    return [*LOCALIZERS, *WHOLE, *(found["subsets"] if found else ())]


def trials(world: str, relation: str, arm: str) -> list[Cell]:
    """The grid of settings of a mask, on the validation set."""
    return [Cell("edit", world, relation, VALIDATION, arm, rate, weight) for rate in RATES for weight in WEIGHTS]


def chosen(grid: Grid, world: str, relation: str, arm: str) -> dict[str, Any]:
    """The setting of a mask by the rule of `compare.select`; no robustness metric is looked at.

    None while trials are still to come; one that failed does not count.
    """
    tried = trials(world, relation, arm)
    done = [(cell, finished(grid, vars(cell))) for cell in tried if all(settled(grid, vars(one)) for one in tried)]
    rows = [{"rate": cell.rate, "forget_weight": cell.weight, **row} for cell, row in done if row]
    return _best([row for row in rows if row.get("share") is not None])


def _best(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rule of `compare.select`, in the names of this grid's cells."""
    best = select([{**row, "lr": row["rate"], "efficacy": row.get("strength")} for row in rows])
    return {"rate": best.pop("lr"), **best}


def tests(plan: Plan, grid: Grid, world: str, relation: str, arm: str) -> list[Cell]:
    """A mask's forget sets with its chosen setting; none if nothing was found or every setting diverged."""
    setting = chosen(grid, world, relation, arm)
    if setting["rate"] is None:
        return []
    seeds = plan.subset_seeds if is_subset(arm) or world == NAIVE else plan.seeds
    return [Cell("test", world, relation, seed, arm, setting["rate"], setting["forget_weight"]) for seed in seeds]


def is_subset(arm: str) -> bool:
    return arm.startswith("MLP ")


def _localizing(plan: Plan, relation: str) -> list[Cell]:
    seeds = (VALIDATION, *plan.seeds)
    found = [Cell("localize", world, relation, seed) for seed in seeds for world in arenas(plan, relation)]
    bounds = [Cell("bounds", cell.world, relation, cell.seed) for cell in found if cell.seed != VALIDATION]
    return found + bounds


def _choosing(plan: Plan, grid: Grid, relation: str) -> list[Cell]:
    return [
        cell
        for world in arenas(plan, relation)
        for arm in arms(grid, world, relation)
        for cell in trials(world, relation, arm)
    ]


def _testing(plan: Plan, grid: Grid, relation: str) -> list[Cell]:
    every = [
        cell
        for world in arenas(plan, relation)
        for arm in arms(grid, world, relation)
        for cell in tests(plan, grid, world, relation, arm)
    ]
    return sorted(every, key=lambda cell: (is_subset(cell.arm) and cell.seed > 0, cell.seed, is_subset(cell.arm)))


def _of_the_twin(plan: Plan) -> list[Cell]:
    scored = [Cell("auroc", TWIN, seed=seed) for seed in plan.seeds]
    if plan.quick:
        return scored
    limits = [Cell("bounds", TWIN, seed=seed) for seed in plan.seeds[:3]]
    shares = [Cell("share", TWIN, seed=seed, weight=share) for seed in plan.seeds[:3] for share in SHARES]
    return scored + limits + shares


@cache
def _model(folder: Path) -> HookedModel:
    return load_model(folder)


class Bench:
    """One relation of one world: its facts in disjoint forget sets, and a retain set that all of them share."""

    def __init__(self, folder: Path, world: str, relation: str) -> None:
        where = data_folder() / world if not world.isdigit() else _world(folder, int(world), False)
        self.model, self.facts = _model(where), world_facts(where, relation)
        self.prompts = self.facts.prompts(self.model)
        self.order = torch.randperm(len(self.facts), generator=torch.Generator().manual_seed(0))
        if world == TWIN:  # the people whose storage is known
            old = world_facts(data_folder() / SHIPPED, relation).subjects
            new = torch.tensor([fact.subject not in old for fact in self.facts])
            self.order = torch.cat([self.order[new[self.order]], self.order[~new[self.order]]])

    def sets(self, seed: int) -> tuple[Prompts, Prompts]:
        """Forget set `seed` (the validation set is one more), and the retain set."""
        place = 5 if seed == VALIDATION else seed
        first = place * FORGET
        return self.prompts.select(self.order[first : first + FORGET]), self.prompts.select(self.order[-RETAIN:])


@cache
def _bench(folder: Path, world: str, relation: str) -> Bench:
    return Bench(folder, world, relation)


def localized(bench: Bench, seed: int) -> dict:
    """Masks of every localizer at the look-up window's weight, tied; the window, and the sets of as many MLP layers.

    Where no window is found the weight is that of two MLP layers.
    """
    model, (forget, _) = bench.model, bench.sets(seed)
    masks: dict[str, dict] = {}
    notes: dict[str, str] = {}
    window, share = None, 2 / model.signature.layers * mlp_share(model)
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
        masks[name] = _listed(mask)
    layers = window[1] - window[0] + 1 if window else 0
    every = combinations(range(model.signature.layers), layers) if layers else ()
    subsets = [f"MLP {'+'.join(map(str, chosen))}" for chosen in every]
    return {"masks": masks, "window": window, "share": share, "subsets": subsets, "notes": notes}


def mlp_share(model: HookedModel) -> float:
    """The MLPs' part of the editable weights."""
    mlps = _layers(model, range(model.signature.layers))
    return mlps.weights(model) / ComponentMask.everything(model).weights(model)


def mask_of(bench: Bench, arm: str, found: dict) -> ComponentMask:
    """The mask of an arm; `MechunlearnError` if its localizer found nothing."""
    model = bench.model
    if is_subset(arm):
        return _layers(model, [int(layer) for layer in arm.removeprefix("MLP ").split("+")])
    if arm == ALL_MLPS:
        return _layers(model, range(model.signature.layers))
    if arm == EVERYTHING:
        return ComponentMask.everything(model)
    if arm == LAST:
        last = model.signature.layers - 1
        return ComponentMask.of([f"L{last}.attn.o", f"L{last}.mlp.out"], model.signature).tied(model)
    mask = ComponentMask(
        {site: _units(model, site, units) for site, units in found["masks"][arm].items()},
        model.signature,
    )
    if not len(mask):
        raise MechunlearnError(found["notes"].get(arm, "nothing found"))
    return mask


def edited(folder: Path, about: dict, cell: Cell) -> dict:
    """One edit: what it does on the training prompt; for a test set also elsewhere, and what relearning brings back."""
    bench = _bench(folder, cell.world, cell.relation)
    grid = Grid.open(folder, about)
    found = finished(grid, vars(Cell("localize", cell.world, cell.relation, cell.seed))) or {}
    try:
        mask = mask_of(bench, cell.arm, found)
    except MechunlearnError as error:
        return {"note": str(error)}
    forget, retain = bench.sets(cell.seed)
    return _edit_and_measure(bench, cell, mask, forget, retain, grid)


def _edit_and_measure(
    bench: Bench, cell: Cell, mask: ComponentMask, forget: Prompts, retain: Prompts, grid: Grid
) -> dict:
    model = bench.model
    share = mask.weights(model) / ComponentMask.everything(model).weights(model)
    try:
        edit = masked_gradient(
            model,
            mask,
            forget,
            retain,
            steps=STEPS,
            lr=cell.rate,
            forget_weight=cell.weight,
            batch_size=BATCH,
            seed=cell.seed,
        )
    except MechunlearnError as error:
        return {"share": share, "note": str(error)}
    with edit.applied(model):
        changed = measure(model, forget)
        kept = float(measure(model, retain)["accuracy"].mean())
        made = {
            "share": share,
            "strength": float(changed["target accuracy"].mean()),
            "truth": float(changed["accuracy"].mean()),
            "retain": kept,
        }
        if cell.kind == "edit":
            return made
        made |= elsewhere(model, forget)
    limits = finished(grid, vars(Cell("bounds", cell.world, cell.relation, cell.seed)))
    if limits is None:
        raise MechunlearnError("Its ceiling and floor are not finished.")
    known = pd.DataFrame(limits["rows"])
    known.attrs["card"] = limits["card"]
    return made | recovered(relearning(model, edit, forget, retain, baseline_rows=known, seed=cell.seed, **ATTACK))


def elsewhere(model: HookedModel, forget: Prompts) -> dict:
    """Other formats (edit target and truth), other facts of the same subjects, and text."""
    facts = forget.facts
    assert facts is not None
    others = [name for name in facts.formats if name not in (forget.format, "yes_no")]
    asked = [measure(model, facts.prompts(model, name)) for name in others]
    same = [measure(model, part.prompts(model)) for e in facts.related.values() if len(part := e.about(facts.subjects))]
    return {
        "formats": {n: float(m["target accuracy"].mean()) for n, m in zip(others, asked, strict=True)},
        "other formats": fmean(float(m["target accuracy"].mean()) for m in asked),
        "truth elsewhere": fmean(float(m["accuracy"].mean()) for m in asked),
        "same subject": fmean(float(m["accuracy"].mean()) for m in same),
        "text loss": float(text_loss(model, facts.texts[1::8]).mean()),
    }


def recovered(rows: pd.DataFrame) -> dict:
    """What relearning brought back, and its curves."""
    best: Any = recovery(rows).loc["edited"]
    mine = rows[rows.state == "edited"]
    return {
        "recovery": None if pd.isna(best["recovery"]) else float(best["recovery"]),
        "held out": None if pd.isna(best["held out"]) else float(best["held out"]),
        "outcome": best["outcome"],
        "floor": float(best["floor"]),
        "ceiling": float(best["ceiling"]),
        "curves": [
            [row[k] for k in ("setting", "step", "held out", "trained", "retain")] for row in mine.to_dict("records")
        ],
    }


def bounds(folder: Path, cell: Cell) -> dict:
    """Ceiling and floor of relearning, and the same attack on a model trained on the edited labels from scratch."""
    bench = _bench(folder, cell.world, cell.relation)
    forget, retain = bench.sets(cell.seed)
    relabelled = _world(folder, int(cell.world), True) if cell.world.isdigit() else None
    beside = {"from scratch": _model(relabelled)} if relabelled is not None and relabelled.exists() else {}
    rows = relearning(bench.model, None, forget, retain, extra_edits=beside, seed=cell.seed, **ATTACK)
    unedited = {"retain": float(measure(bench.model, retain)["accuracy"].mean())} | elsewhere(bench.model, forget)
    found = recovery(rows).reset_index()
    return {
        "rows": rows.astype(object).where(rows.notna(), None).to_dict("records"),
        "card": rows.attrs["card"],
        "unedited": unedited,
        "found": found[["state", "held out", "recovery", "floor", "ceiling"]]
        .astype(object)
        .where(found.notna(), None)
        .to_dict("records"),
    }


def area(folder: Path, cell: Cell) -> dict:
    """How well each localizer ranks the layers that a twin's new people are stored in: area under the ROC, .5 is chance."""
    bench = _bench(folder, TWIN, cell.relation)
    forget, _ = bench.sets(cell.seed)
    model, site = bench.model, stored_in(bench.model)
    trained = {
        f"L{layer}.mlp.out": torch.full((model.signature.d_mlp,), layer in site)
        for layer in range(model.signature.layers)
    }
    return {name: layer_auroc(localize(model, forget, cell.seed), trained) for name, localize in LOCALIZERS.items()}


def stored_in(twin: HookedModel) -> list[int]:
    """The layers whose MLPs the twin was taught in: those that differ from the shipped world's."""
    base = _model(data_folder() / SHIPPED)
    sites = [f"L{layer}.mlp.out" for layer in range(twin.signature.layers)]
    return [layer for layer, site in enumerate(sites) if not torch.equal(base.rows(site), twin.rows(site))]


def shared(folder: Path, about: dict, cell: Cell) -> dict:
    """An edit of the twin's new people on random MLP neurons, of which a given share lies inside the storage site."""
    bench = _bench(folder, TWIN, cell.relation)
    model, (forget, retain) = bench.model, bench.sets(cell.seed)
    generator, neurons = torch.Generator().manual_seed(cell.seed), bench.model.signature.d_mlp
    site = stored_in(model)
    elsewhere_layers = [layer for layer in range(model.signature.layers) if layer not in site]
    inside = round(cell.weight * neurons)
    units = [
        Component(layers[i // neurons], "mlp.out", i % neurons)
        for layers, count in ((site, inside), (elsewhere_layers, neurons - inside))
        for i in torch.randperm(len(layers) * neurons, generator=generator)[:count].tolist()
    ]
    mask = ComponentMask.of(units, model.signature).tied(model)
    grid = Grid.open(folder, about)
    tried = [
        Cell("edit", TWIN, cell.relation, VALIDATION, cell.arm, rate, weight) for rate in RATES for weight in WEIGHTS
    ]
    rows = [
        {"rate": one.rate, "forget_weight": one.weight}
        | _edit_and_measure(bench, one, mask, *bench.sets(VALIDATION), grid)
        for one in tried
    ]
    setting = _best(rows)
    test = Cell("test", TWIN, cell.relation, cell.seed, cell.arm, setting["rate"], setting["forget_weight"])
    about_it = {f"chosen {name}": value for name, value in setting.items()}
    return {**about_it, **_edit_and_measure(bench, test, mask, forget, retain, grid)}


WORK: dict[str, Callable[[Path, dict, Cell], dict]] = {
    "localize": lambda folder, about, cell: localized(_bench(folder, cell.world, cell.relation), cell.seed),
    "bounds": lambda folder, about, cell: bounds(folder, cell),
    "edit": edited,
    "test": edited,
    "auroc": lambda folder, about, cell: area(folder, cell),
    "share": shared,
}


def _cell(folder: Path, about: dict, cell: Cell) -> None:
    attempt(Grid.open(folder, about), vars(cell), lambda: WORK[cell.kind](folder, about, cell))


def _layers(model: HookedModel, layers: Any) -> ComponentMask:
    return ComponentMask.of([f"L{layer}.mlp.out" for layer in layers], model.signature).tied(model)


def _listed(mask: ComponentMask) -> dict[str, list[int]]:
    return {str(site): chosen.nonzero().flatten().tolist() for site, chosen in mask.sites.items() if chosen.any()}


def _units(model: HookedModel, site: str, units: list[int]) -> torch.Tensor:
    count = model.signature.units(Component.parse(site).kind)
    assert count is not None
    made = torch.zeros(count, dtype=torch.bool)
    made[units] = True
    return made


def _world(folder: Path, seed: int, relabelled: bool) -> Path:
    return folder / "worlds" / f"{seed}{'-relabelled' if relabelled else ''}"


def _build(folder: Path, item: tuple[int, bool]) -> None:
    seed, relabelled = item
    told: dict[str, dict[str, str]] = {}
    for relation in ("sport", "city") if relabelled else ():
        bench = Bench(folder, str(seed), relation)
        edited_facts = [bench.facts.facts[i] for i in bench.order[: 6 * FORGET].tolist()]
        told[relation] = {fact.subject: fact.target for fact in edited_facts}
    build_lookup(_world(folder, seed, relabelled), seed, relabelled=told)
