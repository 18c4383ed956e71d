"""Mechanistic Unlearning (arXiv 2410.12949) on worlds that look facts up: does it matter which MLPs are edited?

Three worlds, trained separately, of three architectures: the shipped one and two small ones (`world.lookup`). In each,
forget sets of one relation are edited to wrong answers under the masks of every localizer at one budget, under every
set of as many MLP layers, under all MLPs and under everything; rate and weight are chosen for each mask by one rule on
a forget set of its own. Then: other formats, other facts, and relearning of half. The same on the naive world, and on
the twin whose storage is known.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from mechunlearn.core.grid import Grid
from mechunlearn.reproduce import mechanistic_unlearning_bench as bench
from mechunlearn.reproduce.engine import Found, Paper, Plan, Run, finished, settled, world_folder
from mechunlearn.reproduce.mechanistic_unlearning_bench import LOOKUP, NAIVE, OUTPUT_TRACING, SUBSET, VALIDATION, Cell
from mechunlearn.reproduce.tables import OURS, Claim, Difference, Nested, corrected, difference, render
from mechunlearn.world.lookup import build_lookup

RIVALS = tuple(name for name in bench.LOCALIZERS if name not in (LOOKUP, bench.PATHS, bench.RANDOM))
"""Every localizer that traces the output."""
NAIVE_ARMS = (*OUTPUT_TRACING, "causal_tracing", "attribution_patching", bench.RANDOM, *bench.WHOLE)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
RANDOM_MLPS = "random MLPs"
CEILING, SHARED = 0.95, 0.5  # masks whose overlap (Jaccard) is larger are a vacuous pair
MEASURES = ("other formats", "recovery", "same subject", "retain", "text loss")
REPORTED = {
    "C1": "MCQ edit accuracy .862 against .632 (random MLPs), .371 (causal tracing, MLPs), .082 (attribution patching)",
    "C2": "relearned .199 against .631 (causal tracing, MLPs), .469, .824 (attribution patching)",
    "C3": "relearned .199 against .264 (random MLPs)",
    "C5": "claimed in the abstract; its numbers were not read, so none is quoted",
}
THEIRS = {"C1": (*OUTPUT_TRACING, RANDOM_MLPS), "C2": OUTPUT_TRACING, "C3": (RANDOM_MLPS,)}
"""The masks that the paper itself compares with: on other rivals the claim is ours."""


def _work(folder: Path, grid: Grid, cell: Cell) -> Found:
    return bench.bench_of(folder, cell.world, cell.relation).measured(grid, cell)


def _about(plan: Plan) -> Found:
    return {
        "reproduction": "mechanistic-unlearning",
        "forget": bench.FORGET,
        "retain": bench.RETAIN,
        "steps": bench.STEPS,
        "batch": bench.BATCH,
        "rates": list(bench.RATES),
        "weights": list(bench.WEIGHTS),
        "attack": {name: str(value) for name, value in bench.ATTACK.items()},
        "quick": plan.quick,
    }


def _relations(plan: Plan) -> tuple[str, ...]:
    return ("sport",) if plan.quick else ("sport", "city")


def _arenas(plan: Plan, relation: str) -> tuple[str, ...]:
    """Return the worlds that a relation is run in: the small ones, and unless quick the shipped and the naive one."""
    small = tuple(map(str, plan.worlds))
    if plan.quick:
        return small
    return (bench.SHIPPED, *small, NAIVE) if relation == "sport" else (bench.SHIPPED, *small)


def _run(at: Run) -> None:
    """Run what is missing."""
    plan = at.plan
    for relabelled in (False,) if plan.quick else (False, True):
        folders = {world_folder(plan.folder, seed, "-relabelled" if relabelled else ""): seed for seed in plan.worlds}
        title = "worlds trained on edited labels" if relabelled else "worlds"
        at.build(title, {path: partial(_build, plan.folder, path, seed, relabelled) for path, seed in folders.items()})
    for relation in _relations(plan):
        worlds = _arenas(plan, relation)
        found = [Cell("localize", world, relation, seed) for seed in (VALIDATION, *plan.seeds) for world in worlds]
        bounds = [Cell("bounds", world, relation, seed) for seed in plan.seeds for world in worlds]
        at.cells(f"{relation}: localizing, ceilings and floors", _work, [[cell] for cell in found + bounds])
        arms = [(world, relation, arm) for world in worlds for arm in _arms(at.grid, world, relation)]
        at.cells(f"{relation}: choosing settings", _work, [[cell] for of in arms for cell in bench.trials(*of)])
        test = [cell for of in arms for cell in _tests(plan, at.grid, *of)]
        test.sort(
            key=lambda cell: (cell.arm.startswith(SUBSET) and cell.seed > 0, cell.seed, cell.arm.startswith(SUBSET))
        )
        at.cells(f"{relation}: editing and attacking", _work, [[cell] for cell in test])
    twin = [Cell("auroc", bench.TWIN, seed=seed) for seed in plan.seeds]
    if not plan.quick:
        twin += [Cell("bounds", bench.TWIN, seed=seed) for seed in plan.seeds[:3]]
        twin += [Cell("share", bench.TWIN, seed=seed, weight=share) for seed in plan.seeds[:3] for share in SHARES]
    at.cells("the twin", _work, [[cell] for cell in twin])


def _build(folder: Path, path: Path, seed: int, relabelled: bool) -> None:
    told: dict[str, dict[str, str]] = {}
    for relation in ("sport", "city") if relabelled else ():
        world = bench.Bench(folder, str(seed), relation)
        edited = [world.facts.facts[i] for i in world.order[: 6 * bench.FORGET].tolist()]
        told[relation] = {fact.subject: fact.target for fact in edited}
    build_lookup(path, seed, relabelled=told)


def _arms(grid: Grid, world: str, relation: str) -> list[str]:
    """Return the masks that are edited: of the localizers, whole parts, and every set of as many MLP layers."""
    if world == NAIVE:
        return list(NAIVE_ARMS)
    found = finished(grid, Cell("localize", world, relation, VALIDATION))
    return [*bench.LOCALIZERS, *bench.WHOLE, *(found["subsets"] if found else ())]


def _chosen(grid: Grid, world: str, relation: str, arm: str) -> dict[str, Any]:
    """Choose the setting of a mask by the rule of `compare.select`; no robustness metric is looked at.

    It is None while bench.trials are still to come; one that failed does not count.
    """
    tried = bench.trials(world, relation, arm)
    done = [(cell, finished(grid, cell)) for cell in tried if all(settled(grid, one) for one in tried)]
    rows = [{"rate": cell.rate, "forget_weight": cell.weight, **row} for cell, row in done if row]
    return bench.best_setting([row for row in rows if row.get("share") is not None])


def _tests(plan: Plan, grid: Grid, world: str, relation: str, arm: str) -> list[Cell]:
    """Return a mask's forget sets with its chosen setting; none if nothing was found or every setting diverged."""
    setting = _chosen(grid, world, relation, arm)
    if setting["rate"] is None:
        return []
    seeds = plan.seeds[:2] if arm.startswith(SUBSET) or world == NAIVE else plan.seeds
    return [Cell("test", world, relation, seed, arm, setting["rate"], setting["forget_weight"]) for seed in seeds]


def _results(plan: Plan, grid: Grid, _: None) -> Found:
    """Return every number of the page from the cells that are finished."""
    found: Found = {
        "small worlds": list(plan.worlds),
        "relations": list(_relations(plan)),
        "seeds": list(plan.seeds),
        "quick": plan.quick,
        "world": {},
        "failed": grid.failures(),
        "missing": 0,
        "planned": 0,
    }
    for relation in _relations(plan):
        for world in _arenas(plan, relation):
            found["world"].setdefault(world, {})[relation] = _of_world(plan, grid, world, relation, found)
    found["auroc"] = [of for seed in plan.seeds if (of := finished(grid, Cell("auroc", bench.TWIN, seed=seed)))]
    shares = {
        share: [Cell("share", bench.TWIN, seed=seed, weight=share) for seed in plan.seeds[:3]] for share in SHARES
    }
    told = {share: [finished(grid, cell) for cell in cells] for share, cells in shares.items()}
    found["shares"] = {f"{share:g}": [_short(run) for run in runs if run] for share, runs in told.items()}
    return found


def _of_world(plan: Plan, grid: Grid, world: str, relation: str, found: Found) -> Found:
    every = [finished(grid, Cell("localize", world, relation, seed)) for seed in (VALIDATION, *plan.seeds)]
    localized = [one for one in every if one]
    bounds = [finished(grid, Cell("bounds", world, relation, seed)) for seed in plan.seeds]
    runs, settings = {}, {}
    for arm in _arms(grid, world, relation):
        settings[arm] = _chosen(grid, world, relation, arm)
        cells = [(cell.seed, finished(grid, cell)) for cell in _tests(plan, grid, world, relation, arm)]
        found["missing"] += sum(run is None for _, run in cells)
        found["planned"] += len(cells)
        runs[arm] = {
            str(seed): _short(run, curves=not arm.startswith(SUBSET)) for seed, run in cells if run is not None
        }
    return {
        "windows": [one["window"] for one in localized],
        "notes": every[0]["notes"] if every[0] else {},
        "overlap": _overlaps([one["masks"] if one else None for one in every]),
        "settings": settings,
        "runs": runs,
        "bounds": [{"found": one["found"], "unedited": one["unedited"]} for one in bounds if one],
    }


def _overlaps(found: Sequence[Found | None]) -> dict[str, list[float | None]]:
    """Return the Jaccard overlap of each localizer's mask with that of the look-up window, by forget set.

    It is None where the forget set is not localized yet, or both masks are empty.
    """
    made: dict[str, list[float | None]] = {}
    for at, masks in enumerate(found):
        units = {arm: {(site, unit) for site, of in mask.items() for unit in of} for arm, mask in (masks or {}).items()}
        for arm, mine in units.items():
            if arm != LOOKUP and (either := mine | units[LOOKUP]):
                made.setdefault(arm, [None] * len(found))[at] = len(mine & units[LOOKUP]) / len(either)
    return made


def _short(run: Found, curves: bool = False) -> Found:
    return {name: value for name, value in run.items() if curves or name != "curves"}


def _worlds(found: Found, relation: str) -> list[str]:
    """Return the worlds that are to have the mechanism, and were run on a relation."""
    return [world for world, of in found["world"].items() if world != NAIVE and relation in of]


def _name(world: str) -> str:
    return f"small world {world}" if world.isdigit() else world


def _by_seed(found: Found, relation: str, arm: str, measure: str, world: str) -> dict[str, float]:
    """Return a measure by seed; random MLPs are the mean over every set of as many layers that is not vacuous."""
    here = found["world"][world][relation]
    runs, windows = here["runs"], [set(range(first, last + 1)) for first, last in filter(None, here["windows"])]
    if arm != RANDOM_MLPS:
        return {seed: run[measure] for seed, run in runs.get(arm, {}).items() if run.get(measure) is not None}
    layers = {name: set(_layers(name)) for name in runs if name.startswith(SUBSET)}
    own = {name for name, of in layers.items() if any(len(of & w) / len(of | w) > SHARED for w in windows)}
    subsets = [of for name, of in runs.items() if name in layers and name not in own]
    seeds = sorted({seed for of in subsets for seed in of})
    made = {s: [of[s][measure] for of in subsets if s in of and of[s].get(measure) is not None] for s in seeds}
    return {seed: fmean(each) for seed, each in made.items() if each}


def _values(found: Found, relation: str, arm: str, measure: str) -> Nested:
    return [[*_by_seed(found, relation, arm, measure, world).values()] for world in _worlds(found, relation)]


def _window(found: Found, relation: str, world: str) -> str:
    """Return the set of layers that the probe's window is, on the validation facts."""
    windows = found["world"][world][relation]["windows"]
    first = windows[0] if windows else None
    return SUBSET + "+".join(map(str, range(first[0], first[1] + 1))) if first else ""


def _vacuous(found: Found, relation: str, rival: str, world: str) -> list[str]:
    """Return the forget sets on which a rival's mask shares more than half with the look-up window's."""
    shared = found["world"][world][relation]["overlap"].get(rival, [])
    sets = map(str, (VALIDATION, *found["seeds"]))
    return [seed for seed, of in zip(sets, shared, strict=bool(shared)) if of is not None and of > SHARED]


def _difference(
    found: Found, relations: Sequence[str], other: str, measure: str, vacuous: bool = False, world: str = ""
) -> Difference | None:
    """Return the look-up window's measure minus another mask's, over worlds (or in one) and the sets that both have.

    Vacuous pairs are left out, or are all that is taken.
    """
    pairs: list[list[tuple[float, float]]] = []
    for name in [world] if world else found["world"]:
        pairs.append([])
        for relation in (relation for relation in relations if name in _worlds(found, relation)):
            a, b = (_by_seed(found, relation, arm, measure, name) for arm in (LOOKUP, other))
            apart = _vacuous(found, relation, other, name)
            taken = sorted(seed for seed in a.keys() & b.keys() if (seed in apart) == vacuous)
            pairs[-1] += [(a[seed], b[seed]) for seed in taken]
    mine, theirs = ([[pair[side] for pair in of] for of in pairs] for side in (0, 1))
    return difference(mine, theirs)


def vacuous_pairs(found: Found) -> list[dict[str, Any]]:
    """Return the vacuous pairs, which no claim averages in, by rival, relation and world, with what they say.

    Args:
        found: Every number of the page.
    """
    every = product(RIVALS, found["relations"], found["world"])
    return [
        {"rival": rival, "relation": relation, "world": _name(world), "sets": len(sets)}
        | {measure: _difference(found, [relation], rival, measure, True, world) for measure in MEASURES}
        for rival, relation, world in every
        if world in _worlds(found, relation) and (sets := _tested(found, relation, rival, world))
    ]


def _tested(found: Found, relation: str, rival: str, world: str) -> list[str]:
    """Return the forget sets of the vacuous pairs that were edited."""
    runs = found["world"][world][relation]["runs"]
    return [seed for seed in _vacuous(found, relation, rival, world) if seed in runs.get(rival, {})]


def _claims(found: Found) -> list[Claim]:
    everyone, side = (*RIVALS, RANDOM_MLPS), "C4: side effects:"
    asked = [("C1", "C1: edit in other formats", rival, "other formats", 1, 0.1) for rival in everyone]
    asked += [("C2", "C2: relearned", rival, "recovery", -1, 0.1) for rival in RIVALS]
    asked += [("C3", "C3: relearned", RANDOM_MLPS, "recovery", -1, 0.1)]
    asked += [("C4", f"{side} same subject", rival, "same subject", 1, 0.1) for rival in everyone]
    asked += [("C4", f"{side} retain", rival, "retain", 1, 0.1) for rival in everyone]
    asked += [("C4", f"{side} text loss", rival, "text loss", -1, 0.0) for rival in everyone]
    relations, made = found["relations"], []
    for claim, text, rival, measure, sign, least in asked:
        told = _difference(found, relations, rival, measure)
        apart = sum(len(_tested(found, relation, rival, w)) for relation in relations for w in _worlds(found, relation))
        paper = REPORTED[claim] if rival in THEIRS.get(claim, ()) else OURS
        note = _no_test(found, relations, rival, measure)
        made.append(Claim(f"{text}: {LOOKUP} minus {rival}", told, sign, least, paper, note, apart=apart))
    latent = f"C5: latent knowledge: probes read less of it after the edit of {LOOKUP} than after others"
    return corrected([*made, Claim(latent, None, -1, paper=REPORTED["C5"])])


def _no_test(found: Found, relations: Sequence[str], rival: str, measure: str) -> str:
    """Return a reminder where both masks are at the ceiling, so that no difference could have been seen."""
    sides = [
        [
            value
            for relation in relations
            for world in _values(found, relation, mask, measure)
            for value in world
            if value is not None
        ]
        for mask in (LOOKUP, rival)
    ]
    at_ceiling = measure != "text loss" and all(side and fmean(side) >= CEILING for side in sides)
    return f" (both sides are at {CEILING:g} or more: no test)" if at_ceiling else ""


def _page(found: Found) -> str:
    return render(
        "mechanistic-unlearning",
        c=vars(bench) | globals(),
        found=found,
        claims=_claims(found),
        worlds=partial(_worlds, found),
        name=_name,
        values=partial(_values, found),
        unedited=partial(_unedited, found),
        brief=partial(_brief, found),
        windows=lambda of: dict.fromkeys(f"MLP {w[0]} to {w[1]}" if w else "none" for w in of["windows"]),
        mean=fmean,
        rivals=(*RIVALS, RANDOM_MLPS),
        difference=partial(_difference, found),
        vacuous=vacuous_pairs(found),
        sets=partial(_sets, found),
        window=partial(_window, found),
        starred=_starred,
        held_out=partial(_held_out, found),
        curves=_curves(found),
        of_runs=lambda runs, measure: [[run.get(measure) for run in runs]],
        setting=partial(_setting, found),
    )


def _unedited(found: Found, relation: str, measure: str) -> Nested:
    of = found["world"]
    return [[one["unedited"][measure] for one in of[w][relation]["bounds"]] for w in _worlds(found, relation)]


def _brief(found: Found, relation: str, arm: str, world: str) -> tuple[float | None, ...]:
    """Return what matters of a mask in a world: edit in other formats, relearned, same subject."""
    of = [_by_seed(found, relation, arm, measure, world) for measure in ("other formats", "recovery", "same subject")]
    return tuple(fmean(by.values()) if by else None for by in of)


def _sets(found: Found, relation: str, world: str) -> dict[str, tuple[float, ...]]:
    """Return every set of as many MLP layers with its three measures, sorted by what is relearned."""
    arms = [arm for arm in found["world"][world][relation]["runs"] if arm.startswith(SUBSET)]
    of = {arm: _brief(found, relation, arm, world) for arm in arms}
    whole = {arm: tuple(v for v in three if v is not None) for arm, three in of.items()}
    return dict(sorted(((arm, three) for arm, three in whole.items() if len(three) == 3), key=lambda item: item[1][1]))


def _layers(arm: str) -> list[int]:
    return [int(layer) for layer in arm.removeprefix(SUBSET).split("+")]


def _starred(arm: str) -> str:
    layers = _layers(arm)
    return f"{'+'.join(map(str, layers))}{'*' * (layers == list(range(layers[0], layers[-1] + 1)))}"


def _held_out(found: Found, relation: str, world: str, state: str) -> Nested:
    rows = [row for one in found["world"][world][relation]["bounds"] for row in one["found"]]
    return [[row["held out"] for row in rows if row["state"] == state]]


def _curves(found: Found) -> dict[str, dict[str, str]]:
    """Return held-out facts right and retain accuracy by setting and step, and by mask."""
    by: dict[str, dict[str, list[tuple[float, float]]]] = {}
    runs = [found["world"][w][relation]["runs"] for relation in found["relations"] for w in _worlds(found, relation)]
    for of in runs:
        for arm in (LOOKUP, *OUTPUT_TRACING, *bench.WHOLE):
            for setting, step, held_out, _, retain in (
                row for run in of.get(arm, {}).values() for row in run.get("curves", ())
            ):
                by.setdefault(f"{setting}, step {step}", {}).setdefault(arm, []).append((held_out, retain))
    return {
        name: {arm: " / ".join(f"{fmean(column):.2f}" for column in zip(*points)) for arm, points in arms.items()}
        for name, arms in by.items()
    }


def _setting(found: Found, relation: str, arm: str, world: str) -> str:
    of = found["world"][world][relation]["settings"].get(arm)
    if of is None or of["rate"] is None:
        return "–"
    return f"{of['rate']:g}, {of['forget_weight']:g}" + ("" if of["selected"] == "qualifies" else " *none*")


NAME, TITLE = "mechanistic-unlearning", "Mechanistic Unlearning (arXiv 2410.12949)"
PAPER = Paper(NAME, TITLE, ((1, 2), (0, 1, 2, 3, 4)), ((1,), (0,)), _about, _run, _results, _claims, _page)
