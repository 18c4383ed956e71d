"""The page of the LoKU reproduction: tables with intervals over worlds and forget sets, and what became of each claim."""

import math
from collections.abc import Callable, Sequence

from mechunlearn.core.grid import Grid
from mechunlearn.metrics.stats import hierarchical_interval, hierarchical_paired
from mechunlearn.reproduce.loku import (
    BATCH,
    BOUNDS,
    KEPT,
    LOSSES,
    METHODS,
    PASSAGES,
    PEOPLE,
    RANK,
    STEPS,
    Cell,
    Plan,
    Task,
    quick_plan,
    stored,
)

SHOWN = (1, 2, 4, 8, 12, 16, 20, 30, 40)
Value = Callable[[dict], float | None]


def results(plan: Plan, grid: Grid, chosen: dict[Task, dict[str, float]]) -> dict:
    """Every number of the page, as plain JSON, from the finished cells."""

    def run(task: Task, method: str, world: int, seed: int) -> dict:
        rate = 0.0 if method == BOUNDS else chosen[task][method]
        found = stored(grid, Cell(task, method, world, seed, rate))
        if "curve" in found:
            kept = [entry for entry in found["curve"] if entry["step"] in SHOWN]
            found = found | {"curve": [{name: entry[name] for name in ("step", "forget", "retain")} for entry in kept]}
        return found

    return {
        "worlds": list(plan.worlds),
        "seeds": list(plan.seeds),
        "rates": list(plan.rates),
        "tasks": list(plan.tasks),
        "quick": plan == quick_plan(plan.folder),
        "chosen": {task: dict(of) for task, of in chosen.items()},
        "runs": {
            task: {
                method: [[run(task, method, world, seed) for seed in plan.seeds] for world in plan.worlds]
                for method in (BOUNDS, *METHODS[task])
            }
            for task in plan.tasks
        },
    }


def page(found: dict) -> str:
    """Markdown, from the results."""
    results = Results(found)
    lines = [
        "# LoKU: inverted hinge and Fisher-initialised adapters",
        "",
        "Written by `mechunlearn reproduce loku`; do not edit.",
        "",
        *(["**This is a quick run: one world, two forget sets, passages only.**", ""] if found["quick"] else []),
        f"{len(results.worlds)} small worlds, each trained from nothing ({', '.join(results.families())}), with "
        f"{len(results.seeds)} disjoint forget sets each: {len(results.worlds) * len(results.seeds)} runs a method. Intervals are 95 % hierarchical "
        "bootstrap intervals over worlds and forget sets; few worlds make them too narrow. Differences are paired. "
        + ("One world is n = 1: nothing here speaks of other models. " if len(results.worlds) == 1 else "")
        + "Gold is the same world retrained without the forget sets (all of them, so one gold serves every forget set of its "
        "world).",
        "",
        "Every method has the same grid of learning rates "
        f"({', '.join(f'{rate:g}' for rate in results.rates)}), AdamW, batch {BATCH['passages']} ({BATCH['facts']} for facts), 2 steps of warm-up, cosine, clip 1. Its rate "
        "is chosen on a sixth forget set of each world: the fewest steps to the target among the rates that reach it in most "
        f"worlds with a retain accuracy of {KEPT} or more there, else the best retain accuracy. A run goes on to five times the "
        "step at which it reached the target, or to the last step. Text is never trained on here: text loss is damage. Forget "
        "quality is the p-value of a Kolmogorov-Smirnov test between the losses of the forgotten items of a run and of gold: "
        "near 0, they can be told apart.",
        "",
    ]
    for task in results.tasks:
        lines += _section(results, task)
    lines += ["## Claims", "", "Each with its own 95 % interval; they are many, and nothing is corrected for that.", ""]
    lines += [*_claims(results), ""]
    return "\n".join(lines)


class Results:
    """Finished runs by method, nested by world and forget set."""

    def __init__(self, found: dict) -> None:
        self.found, self.chosen = found, found["chosen"]
        self.worlds, self.seeds, self.rates, self.tasks = (found[n] for n in ("worlds", "seeds", "rates", "tasks"))

    def cells(self, task: Task, method: str) -> list[list[dict]]:
        return self.found["runs"][task][method]

    def families(self) -> list[str]:
        return [str(cells[0].get("family", "")) for cells in self.cells(self.tasks[0], BOUNDS)]

    def mean(self, task: Task, method: str, value: Value) -> str:
        """Mean and interval over the runs that have the value; how many do not is told by the table."""
        nested = _kept([[value(cell) for cell in world] for world in self.cells(task, method)])
        if not nested:
            return "–"
        mean, low, high = hierarchical_interval(nested)
        return f"{mean:.3g} [{low:.3g}, {high:.3g}]"

    def difference(self, task: Task, one: str, other: str, value: Value) -> tuple[float, float, float, int] | None:
        """Mean, interval and number of the pairs in which both runs have the value."""
        pairs = [
            [(value(a), value(b)) for a, b in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(self.cells(task, one), self.cells(task, other), strict=True)
        ]
        whole = [[(a, b) for a, b in world if a is not None and b is not None and a - b == a - b] for world in pairs]
        whole = [world for world in whole if world]
        if not whole:
            return None
        mine, theirs = ([[pair[side] for pair in world] for world in whole] for side in (0, 1))
        return *hierarchical_paired(mine, theirs), sum(map(len, whole))


def at(where: str, name: str) -> Value:
    """A number measured where the target was reached (`at hit`) or at the end (`at end`)."""
    return lambda cell: (cell[where] or {}).get(name)


def steps_to(task: Task) -> Value:
    """Steps to the target; a run that never reached it counts as the last step."""
    return lambda cell: float(cell["hit"] or STEPS[task])


def _section(results: Results, task: Task) -> list[str]:
    known = "MA" if task == "passages" else "accuracy"
    what = {
        "passages": "memorised passages. Forgotten: memorisation accuracy (MA) and EL10 both at or below those of passages "
        f"that were never taught. Each forget set has {PASSAGES} passages; 32 others are retained, 32 more measured only.",
        "facts": "facts. Forgotten: accuracy on the statements at or below the gold model's. Each forget set has "
        f"{PEOPLE} people with three facts each; 32 others are retained, 32 more measured only.",
    }[task]
    lines = [f"## {task.capitalize()}", "", f"Unlearning {what} At most {STEPS[task]} steps.", ""]
    before = {
        name: [[cell[name] for cell in world] for world in results.cells(task, BOUNDS)]
        for name in ("unedited", "gold", "target")
    }

    def bound(name: str, metric: str) -> str:
        nested = _kept([[cell.get(metric) for cell in world] for world in before[name]])
        return "{:.3g} [{:.3g}, {:.3g}]".format(*hierarchical_interval(nested)) if nested else "–"

    extra = "EL10" if task == "passages" else "other format"
    lines += [
        f"| model | forget {known} | {extra} | retain {known} | other passages MA | other facts | text loss | repetition |",
        "|---|---|---|---|---|---|---|---|",
        *[
            f"| {name} | "
            + " | ".join(
                bound(name, metric)
                for metric in ("forget", extra, "retain", "other passages", "other facts", "text loss", "repetition")
            )
            + " |"
            for name in before
        ],
        "",
    ]
    lines += _curves(results, task, known)
    lines += [
        f"### Losses ({task}, all heads and neurons trained)",
        "",
        *_methods(results, task, [m for m in METHODS[task] if m in LOSSES]),
        "",
    ]
    rivals = [name for name in METHODS[task] if name in LOSSES and name != "IHL"]
    lines += ["Inverted hinge with retain term, minus each other:", "", *_pairs(results, task, "IHL", rivals), ""]
    lines += [f"### Initialisations ({task}, rank {RANK} on every matrix, inverted hinge with retain term)", ""]
    lines += [*_methods(results, task, _starts(task)), "", "FILA (relative eps), minus each other:", ""]
    lines += [*_pairs(results, task, _starts(task)[0], _starts(task)[1:]), ""]
    return lines


def _curves(results: Results, task: Task, known: str) -> list[str]:
    """How forget and retain go over the steps, while every run of a method still goes on."""
    lines = [f"Forget {known} / retain {known} over the steps, mean over runs (– once a run has ended):", ""]
    lines += [f"| method | {' | '.join(map(str, SHOWN))} |", "|" + "---|" * (1 + len(SHOWN))]
    for method in METHODS[task]:
        curves = [
            {entry["step"]: entry for entry in cell["curve"]} for world in results.cells(task, method) for cell in world
        ]
        cells = []
        for step in SHOWN:
            at_step = [curve[step] for curve in curves if step in curve]
            means = [sum(entry[name] for entry in at_step) / len(curves) for name in ("forget", "retain")]
            cells.append(f"{means[0]:.2f} / {means[1]:.2f}" if len(at_step) == len(curves) else "–")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return [*lines, ""]


def _starts(task: Task) -> tuple[str, ...]:
    return tuple(method for method in METHODS[task] if method not in LOSSES)


def _methods(results: Results, task: Task, methods: Sequence[str]) -> list[str]:
    header = ["method", "rate", "reached", "steps to target", "retain, at target", "text loss, at target"]
    ends = ["retain", "text loss", "repetition", "other facts", "EL10" if task == "passages" else "other format"]
    ends += ["forget quality"]
    header += [f"{name}, at end" for name in ends]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for method in methods:
        cells = [cell for world in results.cells(task, method) for cell in world]
        reached = sum(cell["hit"] is not None for cell in cells)
        diverged = sum("note" in cell for cell in cells)
        values = [
            steps_to(task),
            at("at hit", "retain"),
            at("at hit", "text loss"),
            *(at("at end", name) for name in ends),
        ]
        rate = results.chosen[task][method]
        edge = " (largest tried)" if rate == max(results.rates) else ""
        edge = edge or (" (smallest tried)" if rate == min(results.rates) else "")
        row = [method, f"{rate:g}{edge}", f"{reached} of {len(cells)}"]
        row[2] += f", {diverged} diverged" if diverged else ""
        row += [results.mean(task, method, value) for value in values]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _pairs(results: Results, task: Task, one: str, others: Sequence[str]) -> list[str]:
    measures: dict[str, Value] = {
        "steps to target": steps_to(task),
        "retain, at target": at("at hit", "retain"),
        "retain, at end": at("at end", "retain"),
        "text loss, at end": at("at end", "text loss"),
    }
    lines = [f"| minus | {' | '.join(measures)} |", "|" + "---|" * (1 + len(measures))]
    for other in others:
        found = [results.difference(task, one, other, value) for value in measures.values()]
        lines.append(f"| {other} | {' | '.join(map(_told, found))} |")
    return lines


def _claims(results: Results) -> list[str]:
    """Each claim with its interval: it holds, it is refuted, or it is null."""
    lines = []
    for task in results.tasks:
        asked = [
            (f"IHL keeps text loss lower than {other} at the end ({task})", "IHL", other, at("at end", "text loss"), -1)
            for other in ("GA", "GD", "KL", "NPO")
        ]
        asked += [
            (
                f"IHL keeps more of the retain set than {other} at the end ({task})",
                "IHL",
                other,
                at("at end", "retain"),
                1,
            )
            for other in ("GA", "GD", "KL", "NPO")
        ]
        for start in (name for name in _starts(task) if "fila" in name):
            for other in ("LoRA random", "LoRA pissa"):
                asked += [
                    (f"{start} needs fewer steps than {other} ({task})", start, other, steps_to(task), -1),
                    (
                        f"{start} keeps more at the target than {other} ({task})",
                        start,
                        other,
                        at("at hit", "retain"),
                        1,
                    ),
                ]
        for claim, one, other, value, sign in asked:
            found = results.difference(task, one, other, value)
            if found is None:
                lines.append(f"- {claim}: cannot be told, no pair of runs has both numbers.")
                continue
            _, low, high, _ = found
            holds = low > 0 if sign > 0 else high < 0
            refuted = high < 0 if sign > 0 else low > 0
            word = "**holds**" if holds else "**refuted**" if refuted else "**null**"
            lines.append(f"- {claim}: {word}, {_told(found)}.")
    return lines


def _told(found: tuple[float, float, float, int] | None) -> str:
    if found is None:
        return "–"
    mean, low, high, pairs = found
    return f"{mean:+.3g} [{low:+.3g}, {high:+.3g}], n = {pairs}"


def _kept(nested: list[list[float | None]]) -> list[list[float]]:
    worlds = [[value for value in world if value is not None and not math.isnan(value)] for world in nested]
    return [world for world in worlds if world]
