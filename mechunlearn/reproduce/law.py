"""LAW (arXiv 2405.16720) on fact worlds: facts washed in closed form, beside other editors at the same forget accuracy.

Three worlds are trained from scratch, the shipped one is the fourth, and a larger one shows how the cost grows. Every
method goes along a path of its own, from weak to strong, and stops at the first point where the forget facts are gone.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from statistics import stdev
from typing import Any

from mechunlearn.core.grid import Grid
from mechunlearn.reproduce import law_bench as bench
from mechunlearn.reproduce.engine import Found, Paper, Plan, Run, options, stored, world_folder
from mechunlearn.reproduce.law_bench import BOUNDS, GONE, GRADIENT, RELEARN, SHIPPED, WHERE, Cell, Setting
from mechunlearn.reproduce.tables import OURS, Claim, Difference, Nested, corrected, difference, render
from mechunlearn.world.small import build_small

LARGE, SIZES = "3", (100, 300, 900)
TRAINED: dict[str, Any] = {"people": 240, "steps": 1600, "passages": 40, "skills": ("copying", "comparison")}
HARM = 0.02
RATES = (1e-3, 3e-3, 6e-3, 1e-2, 2e-2)
REACHES, WEIGHTS = (1.0, 1.5, 2.0), (0.1, 0.3, 1.0)
METHODS: dict[str, tuple[Setting, ...]] = {
    "LAW": (Setting(),),
    "LAW, closed-form path": options(Setting, own=(2.0, 10.0)),
    "MEMIT": (Setting(),),
    "MEMIT, shared value": (Setting("shared"),),
    "MEMIT, reach": options(Setting, reach=REACHES[1:]),
    "MEMIT, retain keys": options(Setting, reach=REACHES, retain_weight=WEIGHTS),
    "AlphaEdit": options(Setting, own=(0.02, 0.2)),
    **dict.fromkeys(GRADIENT, options(Setting, own=RATES)),
}
ABLATIONS = (
    "LAW as released",
    "LAW, Adam off",
    "LAW path, elimination off",
    "LAW, Adam off, random layers",
    "LAW, Adam off, other token",
    "LAW, Adam off, covariance of a tenth",
    "MEMIT, mean value",
)
MAIN, TASKS = "MEMIT, retain keys", 200
COLUMNS = ("forget", "paraphrase", "question", "same subject", "retain", "neighbours", "skills", "text loss", "KL")
BETTER = {"same subject": 1, "retain": 1, "neighbours": 1, "skills": 1, "text loss": -1, "KL": -1}
WASHED = "washed facts are gone: relearning half brings back no more of the rest than of facts never taught"
FORGETS = "LAW forgets: fewer washed facts are answered than before (each run goes on until at most .05 are)"
REASONS = "LAW keeps skills as they were: minus before (claimed is equivalent)"
NOT_READ = "claimed in the abstract; its numbers were not read, so none is quoted"
REPORTED = {
    f"LAW: {WASHED}": f"{OURS}: not attacked there",
    FORGETS: NOT_READ,
    REASONS: NOT_READ,
    "LAW keeps skills better than GD": "accuracy .1926 of GPT2-XL after washing 332,036 facts (second hand); "
    "forgetting with reasoning kept, no neighbours measured",
    "LAW keeps skills better than FT to end-of-text + retain": f"{OURS}: not compared there",
    "LAW keeps neighbours better than GD": f"{OURS}: not compared there",
    "the Adam phase of LAW keeps more neighbours than none": f"{OURS}: not compared there",
    "LAW keeps more neighbours than AlphaEdit": f"{OURS}: not compared there",
}
"""What the paper reports on its claims."""


def _about(plan: Plan) -> Found:
    return {
        "reproduction": "law",
        "worlds": list(plan.worlds),
        "seeds": list(plan.seeds),
        "sizes": [] if plan.quick else list(SIZES),
        "trained": {k: list(v) if isinstance(v, tuple) else v for k, v in TRAINED.items()},
        "steps": bench.STEPS,
        "gone": GONE,
        "washed": bench.WASHED,
        "documents": [bench.DOCUMENTS, bench.STORIES],
        "paths": [list(bench.STRENGTHS), list(bench.NORMS), list(bench.RIDGES)],
        "settings": {method: [asdict(setting) for setting in settings] for method, settings in METHODS.items()},
        "relearning": bench.RELEARNING,
    }


def _run(at: Run) -> dict[str, dict[str, Setting]]:
    """Run what is missing, and return the chosen setting by world and method."""
    worlds, seeds, work = at.plan.worlds, at.plan.seeds, bench.measured
    every = (*worlds, *([] if at.plan.quick else [LARGE]))
    folders = {world: world_folder(at.plan.folder, world) for world in every if world != SHIPPED}
    trained = {world: TRAINED | ({"people": 1000, "steps": 3600} if world == LARGE else {}) for world in folders}
    at.build("worlds", {f: partial(build_small, f, int(world), **trained[world]) for world, f in folders.items()})
    at.cells("localizing", work, [[Cell(WHERE, world)] for world in every])
    tried = [[Cell(m, w, setting=one) for one in settings] for w in worlds for m, settings in METHODS.items()]
    at.cells("choosing settings", work, tried)
    chosen = {world: {method: _choose(at.grid, world, method) for method in METHODS} for world in worlds}
    last = [[Cell(m, w, seed, one) for m, one in _settings(chosen[w]).items()] for seed in seeds for w in worlds]
    at.cells("forget sets", work, last)
    at.cells("relearning", work, [[Cell(RELEARN, world, seed)] for seed in seeds[:3] for world in worlds])
    at.cells("scaling", work, [[cell] for cell in reversed(_scaling_cells(at.plan))])
    return chosen


def _scaling_cells(plan: Plan) -> list[Cell]:
    """Return cells of more and more facts: plain MEMIT, and with some reach and retain keys."""
    settings = Setting(), Setting(reach=REACHES[1], retain_weight=WEIGHTS[0])
    sizes = () if plan.quick else SIZES
    return [Cell(bench.SCALING, LARGE, plan.seeds[0], setting, size) for size in sizes for setting in settings]


def _settings(chosen: dict[str, Setting]) -> dict[str, Setting]:
    """Return the settings of everything that is run on a forget set; an ablation takes those of what it changes."""
    ablated = {name: chosen["LAW, closed-form path" if "path" in name else "LAW"] for name in ABLATIONS}
    return {BOUNDS: Setting(), **chosen, **ablated, "MEMIT, mean value": Setting("mean")}


def _choose(grid: Grid, world: str, method: str) -> Setting:
    """Choose the setting of a method in a world on its validation forget set, by one rule for all.

    Of the settings that reach forget accuracy .05, and .1 in other words: those that cost no more than .02 nats of text
    loss and .02 of skill accuracy first, and among these (or all, if there are none) the highest mean of neighbours'
    and same subjects' accuracy, less the text loss and skills lost. Ties go to the first of the grid.
    """
    before = stored(grid, Cell(WHERE, world))["unedited"]

    def score(setting: Setting) -> tuple[Any, ...]:
        cell = stored(grid, Cell(method, world, setting=setting))
        now = cell["measured"]
        text, skill = now["text loss"] - before["text loss"], before["skills"] - now["skills"]
        kept = (now["neighbours"] + now["same subject"]) / 2 - max(text, 0) - max(skill, 0)
        harmless = text <= HARM and skill <= HARM
        return cell["reached"], now["paraphrase"] <= 2 * GONE, harmless, kept if kept == kept else -math.inf

    return max(METHODS[method], key=score)


def _results(plan: Plan, grid: Grid, chosen: dict[str, dict[str, Setting]]) -> Found:
    worlds, seeds = plan.worlds, plan.seeds
    settings = {world: _settings(chosen[world]) for world in worlds}

    def of(method: str, world: str, seed: int) -> Found:
        found = stored(grid, Cell(method, world, seed, settings[world][method]))
        return {name: value for name, value in found.items() if name != "trajectory"}

    return {
        "worlds": list(worlds),
        "seeds": list(seeds),
        "quick": plan.quick,
        "where": {world: stored(grid, Cell(WHERE, world)) for world in worlds},
        "settings": {w: {method: asdict(setting) for method, setting in settings[w].items()} for w in worlds},
        "runs": {
            method: {world: [of(method, world, seed) for seed in seeds] for world in worlds}
            for method in (BOUNDS, *METHODS, *ABLATIONS)
        },
        "relearning": {world: [stored(grid, Cell(RELEARN, world, seed)) for seed in seeds[:3]] for world in worlds},
        "scaling": [
            {"retain_weight": cell.setting.retain_weight} | stored(grid, cell) for cell in _scaling_cells(plan)
        ],
    }


def _claims(found: Found) -> list[Claim]:
    asked = [
        (f"{one} keeps {name} {'better' if BETTER[name] > 0 else 'lower'} than {other}", one, other, name)
        for other in GRADIENT
        for name in ("skills", "text loss", "neighbours")
        for one in ("LAW", MAIN)
    ]
    initial, path = "LAW, Adam off", "LAW, closed-form path"
    asked += [
        ("the Adam phase of LAW keeps more neighbours than none", "LAW", initial, "neighbours"),
        ("the closed-form path keeps more neighbours than the initialisation", path, initial, "neighbours"),
        ("the norm band keeps more neighbours than the path of strengths", initial, "MEMIT", "neighbours"),
        ("LAW keeps more neighbours than AlphaEdit", "LAW", "AlphaEdit", "neighbours"),
        ("retain keys keep more neighbours than MEMIT", MAIN, "MEMIT", "neighbours"),
        ("retain keys cost no text: lower text loss than MEMIT", MAIN, "MEMIT", "text loss"),
    ]
    floor = _best(found, "never taught")
    made = [Claim(f"{name}: {WASHED}", difference(_best(found, name), floor), -1) for name in ("LAW", MAIN)]
    for text, name, sign in ((FORGETS, "forget", -1), (REASONS, "skills", 1)):
        made.append(Claim(text, _difference(found, "LAW", BOUNDS, name), sign))
    for text, one, other, name in asked:
        note = "".join(_unmatched(found, method) for method in (one, other))
        least = 0.1 if BETTER[name] > 0 else 0.0
        made.append(Claim(text, _difference(found, one, other, name), BETTER[name], least, note=note))
    return corrected([replace(claim, paper=REPORTED.get(claim.text, OURS)) for claim in made])


def _page(found: Found) -> str:
    return render(
        "law",
        c=vars(bench) | globals(),
        found=found,
        values=partial(_values, found),
        reached=partial(_reached, found),
        difference=partial(_difference, found),
        within_noise=partial(_within_noise, found),
        spread=_spread(found),
        best=partial(_best, found),
        relearning_rates=bench.RELEARNING["lrs"]["full"],
        setting=partial(_setting, found),
        claims=_claims(found),
    )


def _values(found: Found, method: str, name: str, worlds: Iterable[str] = ()) -> Nested:
    """Return a measure by world and forget set."""
    of = found["runs"][method]
    return [[run["measured"].get(name) for run in of[world]] for world in worlds or found["worlds"]]


def _difference(found: Found, one: str, other: str, name: str, worlds: Iterable[str] = ()) -> Difference | None:
    return difference(*(_values(found, method, name, worlds) for method in (one, other)))


def _reached(found: Found, method: str, worlds: Iterable[str] = ()) -> str:
    cells = [run for world in worlds or found["worlds"] for run in found["runs"][method][world]]
    failed = sum("note" in run for run in cells)
    return f"{sum(run['reached'] for run in cells)} of {len(cells)}" + (f", {failed} failed" if failed else "")


def _within_noise(found: Found, pair: Difference, name: str) -> bool:
    """Return whether a side effect on the shipped world lies within the noise of the unedited number."""
    before = found["runs"][BOUNDS][SHIPPED][0]["measured"][name]
    by_chance = max(1.96 * math.sqrt(max(before * (1 - before), 0) / TASKS), 3 / TASKS)
    noise = _spread(found) if name == "text loss" else by_chance
    return pair.low <= 0 <= pair.high or abs(pair.mean) <= noise


def _spread(found: Found) -> float:
    """Return the standard deviation of the unedited text loss over the worlds that were trained alike."""
    losses = [found["where"][world]["unedited"]["text loss"] for world in found["worlds"] if world != SHIPPED]
    return stdev(losses) if len(losses) > 1 else 0.0


def _best(found: Found, state: str, column: int = 1, before: bool = False) -> Nested:
    """Return the best accuracy after training, while enough of the retain facts are kept; or the one before it."""

    def best(cell: Found) -> float | None:
        points = [point for curve in cell["curves"].get(state, {}).values() for point in curve]
        if before:
            return points[0][column] if points else None
        return max((point[column] for point in points if point[0] > 0 and point[4]), default=None)

    return [[best(cell) for cell in found["relearning"][world]] for world in found["worlds"]]


def _setting(found: Found, method: str, world: str) -> str:
    """Return what was chosen for a method in a world."""
    own = "rate" if method in GRADIENT else "energy" if method == "AlphaEdit" else "growth"
    names = {"reach": "reach", "retain weight": "retain_weight"} if method.startswith("MEMIT") else {own: "own"}
    of = found["settings"][world][method]
    return ", ".join(f"{name} {of[key]:g}" for name, key in names.items() if of[key])


def _unmatched(found: Found, method: str) -> str:
    """Return a reminder where a method did not always reach the forget accuracy."""
    short = not all(run["reached"] for of in found["runs"][method].values() for run in of)
    return f" (not matched: {method} reached the target in {_reached(found, method)} runs)" if short else ""


WORLDS = ("0", "1", "2", SHIPPED)
TITLE = "LAW, Large Scale Knowledge Washing (arXiv 2405.16720)"
PAPER = Paper("law", TITLE, (WORLDS, (0, 1, 2, 3, 4)), ((SHIPPED,), (0, 1)), _about, _run, _results, _claims, _page)
