"""LoKU (arXiv 2408.06621) on small worlds: the inverted hinge beside other losses, FILA beside other initialisations.

Three worlds are trained from scratch, each with a retain-only model as gold. Every method gets the same grid of
learning rates and the same rule, on a forget set of its own; then five forget sets a world.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from mechunlearn.core.grid import Grid
from mechunlearn.edit.fisher_lora import INITS
from mechunlearn.reproduce import loku_bench as bench
from mechunlearn.reproduce.engine import Found, Paper, Plan, Run, stored, world_folder
from mechunlearn.reproduce.loku_bench import BOUNDS, LOSSES, STEPS, VALIDATION, Cell, Task
from mechunlearn.reproduce.tables import OURS, Claim, Difference, Nested, corrected, difference, render
from mechunlearn.world.small import build_small, forget_sets, small_world

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
KEPT = 0.9
METHODS: dict[Task, tuple[str, ...]] = {
    "passages": (*LOSSES, *(f"LoRA {init}" for init in INITS)),
    "facts": ("GA", "GD", "KL", "NPO", "IHL", "LoRA fila", "LoRA pissa", "LoRA random"),
}
RIVALS = ("GA", "GD", "KL", "NPO")
SHOWN = (1, 2, 4, 8, 12, 16, 20, 30, 40)
NOT_READ = "its numbers were not read in the paper itself, so none is quoted"
NOT_THERE = f"{OURS}: PiSSA was not compared there"
REPORTED = {
    "IHL keeps more of the retain set than GA at the end (passages)": NOT_READ,
    "IHL keeps more of the retain set than GD at the end (passages)": NOT_READ,
    "IHL keeps text loss lower than GD at the end (passages)": NOT_READ,
    "IHL repeats itself less than GA at the end (passages)": NOT_READ,
    "IHL repeats itself less than GD at the end (passages)": NOT_READ,
    "LoRA fila needs fewer steps than LoRA random (passages)": NOT_READ,
    "LoRA fila keeps more at the target than LoRA random (passages)": NOT_READ,
    "LoRA fila needs fewer steps than LoRA pissa (passages)": NOT_THERE,
    "LoRA fila keeps more at the target than LoRA pissa (passages)": NOT_THERE,
}
"""What the paper reports on its claims."""
UNMEASURED = (
    "GA on low-rank adapters trades less well than on all weights",
    "LoKU (IHL and FILA) keeps reasoning, on benchmarks",
)
FEW = 3
"""A method that needs no more steps to the target overshoots it: its rate is too high."""
Value = Callable[[Found], float | None]


def _work(folder: Path, grid: Grid, cell: Cell) -> Found:
    return bench.Bench(folder, cell.world, cell.forget, cell.task).measured(cell)


def _about(plan: Plan) -> Found:
    return {
        "reproduction": "loku",
        "worlds": list(plan.worlds),
        "seeds": list(plan.seeds),
        "rates": list(RATES),
        "rank": bench.RANK,
        "batch": bench.BATCH,
        "steps": STEPS,
    }


def _tasks(plan: Plan) -> tuple[Task, ...]:
    return ("passages",) if plan.quick else ("passages", "facts")


def _run(at: Run) -> dict[Task, dict[str, float]]:
    """Run what is missing, and return the chosen rate by task and method."""
    worlds, folder = at.plan.worlds, at.plan.folder
    golds: dict[Path, Callable[[], object]]
    golds = {world_folder(folder, world, "-gold"): partial(_build_gold, folder, world) for world in worlds}
    models = {world_folder(folder, world): partial(build_small, world_folder(folder, world), world) for world in worlds}
    at.build("worlds", models | golds)
    chosen: dict[Task, dict[str, float]] = {}
    for task in _tasks(at.plan):
        tried = [[Cell(task, m, world, VALIDATION, rate)] for world in worlds for m in METHODS[task] for rate in RATES]
        at.cells(f"{task}: choosing rates", _work, tried)
        of = chosen[task] = {method: _choose(at.grid, at.plan, task, method) for method in METHODS[task]}
        methods = {BOUNDS: 0.0, **of}
        test = [[Cell(task, m, w, seed, methods[m])] for seed in at.plan.seeds for w in worlds for m in methods]
        at.cells(f"{task}: forget sets", _work, test)
    return chosen


def _build_gold(folder: Path, world: int) -> None:
    gone = [entry for pair in forget_sets(small_world(world)) for part in pair for entry in part]
    build_small(world_folder(folder, world, "-gold"), world, without=gone)


def _choose(grid: Grid, plan: Plan, task: Task, method: str) -> float:
    """Choose the rate of a method on the validation forget set of every world, by one rule for all.

    Of the rates that reach the target in most worlds: the fewest steps to it among those whose retain accuracy there is
    at least .9 on average; if none has that, the best retain accuracy. Ties go to the smaller rate.
    """
    scored = []
    for rate in RATES:
        cells = [stored(grid, Cell(task, method, world, VALIDATION, rate)) for world in plan.worlds]
        hits = [cell["at hit"] for cell in cells if cell["hit"] is not None]
        kept = sum(hit["retain"] for hit in hits) / len(hits) if hits else 0.0
        steps = sum(cell["hit"] or STEPS[task] for cell in cells) / len(cells)
        scored.append((len(hits), kept >= KEPT, -steps if kept >= KEPT else kept, -rate))
    return -max(scored)[-1]


def _results(plan: Plan, grid: Grid, chosen: dict[Task, dict[str, float]]) -> Found:
    def of(task: Task, method: str, world: int, seed: int) -> Found:
        found = stored(grid, Cell(task, method, world, seed, chosen[task].get(method, 0.0)))
        if "curve" in found:
            kept = [entry for entry in found["curve"] if entry["step"] in SHOWN]
            found["curve"] = [{name: entry[name] for name in ("step", "forget", "retain")} for entry in kept]
        return found

    return {
        "worlds": list(plan.worlds),
        "seeds": list(plan.seeds),
        "rates": list(RATES),
        "tasks": list(_tasks(plan)),
        "quick": plan.quick,
        "chosen": {task: dict(rates) for task, rates in chosen.items()},
        "runs": {
            task: {
                method: [[of(task, method, world, seed) for seed in plan.seeds] for world in plan.worlds]
                for method in (BOUNDS, *METHODS[task])
            }
            for task in _tasks(plan)
        },
    }


def _claims(found: Found) -> list[Claim]:
    made = []
    for task in found["tasks"]:
        text_loss, retain, early = _at("at end", "text loss"), _at("at end", "retain"), _at("at hit", "retain")
        repeats = _at("at end", "repetition")
        asked = [(f"IHL keeps text loss lower than {r} at the end", "IHL", r, text_loss, -1, 0.0) for r in RIVALS]
        asked += [(f"IHL keeps more of the retain set than {r} at the end", "IHL", r, retain, 1, 0.1) for r in RIVALS]
        asked += [(f"IHL repeats itself less than {r} at the end", "IHL", r, repeats, -1, 0.1) for r in RIVALS]
        for one in (method for method in _starts(task) if "fila" in method):
            for r in ("LoRA random", "LoRA pissa"):
                asked.append((f"{one} needs fewer steps than {r}", one, r, _steps(task), -1, 0.0))
                asked.append((f"{one} keeps more at the target than {r}", one, r, early, 1, 0.1))
        for claimed, one, other, value, sign, least in asked:
            text, told = f"{claimed} ({task})", _difference(found, task, one, other, value)
            note = _caution(found, task, one, other, value)
            made.append(Claim(text, told, sign, least, REPORTED.get(text, OURS), note))
    made += [Claim(text, None, 1, paper=NOT_READ) for text in UNMEASURED]
    return corrected(made)


def _caution(found: Found, task: Task, one: str, other: str, value: Value) -> str:
    """Return what must be known beside a difference: that only one side has a retain term, or has no better rate."""
    notes = []
    steps = [value or 0.0 for of in _values(found, task, other, _steps(task)) for value in of]
    if sum(steps) <= FEW * len(steps):
        notes.append(f"{other} is at the target after {sum(steps) / len(steps):.2g} steps: too high a rate to compare")
    if other == "GA" and "IHL alone" in METHODS[task]:
        term = _difference(found, task, one, "IHL alone", value)
        notes.append(f"GA has no retain term; that term alone changes IHL by {term.mean:+.3g}" if term else "")
    if edge := _edge(found, task, other):
        notes.append(f"rate of {other}:{edge.replace('(', '').replace(')', '')}")
    return f" ({'; '.join(notes)})" if any(notes) else ""


def _page(found: Found) -> str:
    return render(
        "loku",
        c=vars(bench) | globals(),
        found=found,
        starts=_starts,
        at=_at,
        steps_to=_steps,
        values=partial(_values, found),
        difference=partial(_difference, found),
        curve=partial(_curve, found),
        reached=partial(_reached, found),
        edge=partial(_edge, found),
        claims=_claims(found),
    )


def _at(where: str, name: str) -> Value:
    """Return what reads a number measured where the target was reached (`at hit`) or at the end (`at end`)."""
    return lambda cell: (cell[where] or {}).get(name)


def _steps(task: Task) -> Value:
    """Return what reads the steps to the target; a run that never reached it counts as the last step."""
    return lambda cell: float(cell["hit"] or STEPS[task])


def _starts(task: Task) -> list[str]:
    return [method for method in METHODS[task] if method not in LOSSES]


def _values(found: Found, task: Task, method: str, value: Value) -> Nested:
    return [[value(cell) for cell in world] for world in found["runs"][task][method]]


def _difference(found: Found, task: Task, one: str, other: str, value: Value) -> Difference | None:
    return difference(*(_values(found, task, method, value) for method in (one, other)))


def _curve(found: Found, task: Task, method: str, step: int) -> str:
    """Return forget and retain at a step, if every run of the method still goes on."""
    cells = [cell for world in found["runs"][task][method] for cell in world]
    points = [entry for cell in cells for entry in cell["curve"] if entry["step"] == step]
    means = [sum(entry[name] for entry in points) / len(cells) for name in ("forget", "retain")]
    return f"{means[0]:.2f} / {means[1]:.2f}" if len(points) == len(cells) else "–"


def _reached(found: Found, task: Task, method: str) -> str:
    cells = [cell for world in found["runs"][task][method] for cell in world]
    diverged = sum("note" in cell for cell in cells)
    reached = f"{sum(cell['hit'] is not None for cell in cells)} of {len(cells)}"
    return reached + (f", {diverged} diverged" if diverged else "")


def _edge(found: Found, task: Task, method: str) -> str:
    """Return a reminder where no better rate can be ruled out, as the largest or smallest was chosen."""
    edges = {max(found["rates"]): " (largest tried)", min(found["rates"]): " (smallest tried)"}
    return edges.get(found["chosen"][task][method], "")


FULL, SHORT = ((0, 1, 2), (0, 1, 2, 3, 4)), ((0,), (0, 1))
PAPER = Paper("loku", "LoKU (arXiv 2408.06621)", FULL, SHORT, _about, _run, _results, _claims, _page)
