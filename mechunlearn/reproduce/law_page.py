"""The page of the LAW reproduction: what every method costs at the same forget accuracy, and what became of each claim."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from mechunlearn.core.grid import Grid
from mechunlearn.metrics.stats import hierarchical_interval, hierarchical_paired
from mechunlearn.reproduce.law import (
    ABLATIONS,
    ATTACKED,
    BOUNDS,
    GONE,
    GRADIENT,
    HARM,
    LARGE,
    METHODS,
    RELEARN,
    RELEARNING,
    SCALING,
    SHIPPED,
    WHERE,
    Cell,
    Plan,
    Setting,
    ablated,
    scaling_settings,
    stored,
)

MAIN, TASKS = "MEMIT, retain keys", 200
COLUMNS = ("forget", "paraphrase", "question", "same subject", "retain", "neighbours", "skills", "text loss", "KL")
BETTER = {"same subject": 1, "retain": 1, "neighbours": 1, "skills": 1, "text loss": -1, "KL": -1}
Value = Callable[[dict], float]


def results(plan: Plan, grid: Grid, chosen: dict[str, dict[str, Setting]]) -> dict:
    """Every number of the page, as plain JSON, from the finished cells."""

    def run(method: str, world: str, seed: int, setting: Setting) -> dict:
        found = stored(grid, Cell(method, world, seed, setting))
        return {name: value for name, value in found.items() if name != "trajectory"}

    settings = {
        world: {**of, **{method: ablated(method, of) for method in ABLATIONS}, BOUNDS: Setting()}
        for world, of in chosen.items()
    }
    return {
        "worlds": list(plan.worlds),
        "seeds": list(plan.seeds),
        "quick": plan.quick,
        "where": {world: stored(grid, Cell(WHERE, world)) for world in plan.worlds},
        "settings": {
            world: {method: asdict(setting) for method, setting in of.items()} for world, of in settings.items()
        },
        "runs": {
            method: {
                world: [run(method, world, seed, settings[world][method]) for seed in plan.seeds]
                for world in plan.worlds
            }
            for method in (BOUNDS, *METHODS, *ABLATIONS)
        },
        "relearning": {
            world: [stored(grid, Cell(RELEARN, world, seed)) for seed in plan.seeds[:3]] for world in plan.worlds
        },
        "scaling": [
            {"retain_weight": setting.retain_weight} | stored(grid, Cell(SCALING, LARGE, plan.seeds[0], setting, size))
            for size in plan.sizes
            for setting in scaling_settings()
        ],
    }


def page(found: dict) -> str:
    """Markdown, from the results."""
    runs, worlds = found["runs"], found["worlds"]
    count = len(worlds) * len(found["seeds"])
    lines = [
        "# LAW: knowledge washing in closed form",
        "",
        "Written by `mechunlearn reproduce law"
        + (" --quick" if found["quick"] else "")
        + "`; do not edit."
        + (" **This is the quick run: one world, n = 1.**" if found["quick"] else ""),
        "",
        f"{len(worlds)} worlds ({', '.join(worlds)}; `{SHIPPED}` is the shipped one, which was *trained* to look facts up at the "
        f"subject, the others were not), {len(found['seeds'])} forget sets each: {count} runs a method. Two of three relations of the washed "
        "subjects are washed (half of the subjects; 160 of 800 in the shipped world: 320 facts). Of the other subjects two "
        "thirds are retain facts; *neighbours*, the last third, are told to no editor and are not in any text that "
        "editors are given. Intervals are 95 % hierarchical bootstrap intervals over worlds and forget sets; few worlds make "
        "them too narrow. Differences are paired. Nothing is corrected for the number of comparisons.",
        "",
        "Every method goes along a path of its own from weak to strong (strength of the ridge, norm of the change, ridge of "
        f"AlphaEdit, steps of training) and ends at the first point where at most {GONE:.0%} of the washed facts are answered: "
        "*matched forget accuracy*. What it has beside that (target values' reach, weight of the retain keys, growth, learning "
        "rate) is chosen in each world on a sixth forget set by one rule: of the settings that get there, and to "
        f"{2 * GONE:.0%} in other words, those that cost at most {HARM} nats of text and {HARM} of skill accuracy, and of these the best "
        "same subjects' and neighbours' accuracy. Gradient methods train the same weights (W_out of the same layers), read the same "
        "prompts, and with a retain term the same retain facts and text.",
        "",
        "Token and layers come from causal tracing by token role on that sixth set: the strongest MLP, those right below it with a "
        "quarter of its effect, and one above.",
        "",
        "| world | token | layers |",
        "|---|---|---|",
        *[f"| {world} | {w['role']} | {', '.join(map(str, w['layers']))} |" for world, w in found["where"].items()],
        "",
        "## At matched forget accuracy, over all worlds",
        "",
        "*forget*: the washed statements; *paraphrase*: the same facts in words that no editor saw; *question*: as a question. KL is that "
        "of the next token on stories, unedited against edited. *reached* counts runs that got to the target; the others are "
        "measured where they came closest.",
        "",
        *_table(runs, worlds, [BOUNDS, *METHODS]),
        "",
    ]
    if SHIPPED in worlds:
        lines += _shipped(found)
    lines += [
        "## Against each gradient method",
        "",
        f"`{MAIN}` minus each, in the same runs:",
        "",
        *_differences(runs, worlds, MAIN, GRADIENT),
        "",
        "## Which part earns what",
        "",
        *_table(
            runs, worlds, ["LAW", *ABLATIONS, "LAW, closed-form path", "MEMIT", "MEMIT, shared value", "MEMIT, reach"]
        ),
        "",
        "`LAW as released` is the published recipe with nothing matched: one run with a strength of 20,000 to begin with and a norm "
        "between a third and three quarters of the weight's. *Adam off* keeps the initialisation; *closed-form path* follows the "
        "gradient flow of the objective; *MEMIT* is the same initialisation along the strength instead of the norm. *Other "
        "token* edits at the one of subject last and last that the localization did not choose; *random layers* at as many others.",
        "",
        *_differences(
            runs, worlds, "LAW", ["LAW, Adam off", "LAW, closed-form path", "MEMIT", "MEMIT, reach", MAIN, "AlphaEdit"]
        ),
        "",
    ]
    lines += _relearning(found)
    lines += _scaling(found["scaling"])
    lines += ["## Settings chosen", "", *_settings(found), "", "## Claims", "", *_claims(found), ""]
    return "\n".join(lines)


def value_of(name: str) -> Value:
    return lambda run: run["measured"].get(name, math.nan)


def _nested(of: dict[str, list[dict]], worlds: Iterable[str], value: Value) -> list[list[float]]:
    kept = [[value(run) for run in of[world] if not math.isnan(value(run))] for world in worlds]
    return [world for world in kept if world]


def _mean(of: dict[str, list[dict]], worlds: Iterable[str], value: Value) -> str:
    nested = _nested(of, worlds, value)
    if not nested:
        return "–"
    mean, low, high = hierarchical_interval(nested)
    return f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def _table(runs: dict, worlds: Sequence[str], methods: Sequence[str]) -> list[str]:
    lines = [f"| method | reached | {' | '.join(COLUMNS)} |", "|" + "---|" * (2 + len(COLUMNS))]
    for method in methods:
        cells = [run for world in worlds for run in runs[method][world]]
        failed = sum("note" in run for run in cells)
        reached = "" if method == BOUNDS else f"{sum(run['reached'] for run in cells)} of {len(cells)}"
        reached += f", {failed} failed" if failed else ""
        shown = [_mean(runs[method], worlds, value_of(name)) for name in COLUMNS]
        lines.append(f"| {method} | {reached} | {' | '.join(shown)} |")
    return lines


def difference(
    runs: dict, worlds: Sequence[str], one: str, other: str, value: Value
) -> tuple[float, float, float, int] | None:
    """Mean and interval of one minus other, over the runs that have both numbers."""
    pairs = [
        [(value(a), value(b)) for a, b in zip(runs[one][world], runs[other][world], strict=True)] for world in worlds
    ]
    whole = [[pair for pair in world if not any(map(math.isnan, pair))] for world in pairs]
    whole = [world for world in whole if world]
    if not whole:
        return None
    mine, theirs = ([[pair[side] for pair in world] for world in whole] for side in (0, 1))
    return *hierarchical_paired(mine, theirs), sum(map(len, whole))


def _told(pair: tuple[float, float, float, int] | None) -> str:
    return "–" if pair is None else f"{pair[0]:+.3g} [{pair[1]:+.3g}, {pair[2]:+.3g}]"


def _differences(runs: dict, worlds: Sequence[str], one: str, others: Iterable[str]) -> list[str]:
    lines = [f"| {one} minus | {' | '.join(BETTER)} |", "|" + "---|" * (1 + len(BETTER))]
    for other in others:
        shown = [_told(difference(runs, worlds, one, other, value_of(name))) for name in BETTER]
        lines.append(f"| {other} | {' | '.join(shown)} |")
    return lines


def _shipped(found: dict) -> list[str]:
    """The shipped world by itself: what was asked of washing there, and side effects row by row."""
    runs, where = found["runs"], [SHIPPED]
    cells = runs[MAIN][SHIPPED]
    worst = {name: max(run["measured"][name] for run in cells) for name in ("forget", "paraphrase")}
    means = {name: sum(run["measured"][name] for run in cells) / len(cells) for name in worst}
    skills = [name for name in cells[0]["measured"] if name not in (*COLUMNS, "skills")]
    lines = [
        f"## The shipped world: 320 facts, {len(cells)} forget sets",
        "",
        f"`{MAIN}`: forget {means['forget']:.3f} (largest {worst['forget']:.3f}), asked: at most .05; paraphrases "
        f"{means['paraphrase']:.3f} (largest {worst['paraphrase']:.3f}), asked: at most .1.",
        "",
        *_table(runs, where, [BOUNDS, *METHODS]),
        "",
        "Edited minus unedited, paired over the forget sets. **within noise**: the interval includes 0, or the mean lies within "
        "the spread of the unedited number over the trained worlds (their standard deviation, for text loss) or within what 200 "
        "tasks can tell of the unedited accuracy: 1.96 standard errors, or 3 / 200 where that is more (a rate of exactly 1 is "
        "known no better).",
        "",
        "| method | text loss | " + " | ".join(skills) + " |",
        "|" + "---|" * (2 + len(skills)),
    ]
    spread = _spread(found)
    for method in METHODS:
        shown = []
        for name in ("text loss", *skills):
            pair = difference(runs, where, method, BOUNDS, value_of(name))
            before = runs[BOUNDS][SHIPPED][0]["measured"][name]
            noise = spread if name == "text loss" else max(1.96 * math.sqrt(before * (1 - before) / TASKS), 3 / TASKS)
            inside = pair is not None and (pair[1] <= 0 <= pair[2] or abs(pair[0]) <= noise)
            shown.append(_told(pair) + (" within noise" if inside else ""))
        lines.append(f"| {method} | {' | '.join(shown)} |")
    lines += [
        "",
        f"The unedited text loss has a standard deviation of {spread:.3f} over the other trained worlds."
        if spread
        else "With one world there is no spread between worlds: the interval alone decides for text loss.",
        "",
        f"`{MAIN}` minus each gradient method, on this world:",
        "",
        *_differences(runs, where, MAIN, GRADIENT),
        "",
    ]
    return lines


def _spread(found: dict) -> float:
    """Standard deviation of the unedited text loss over the worlds that were trained alike."""
    losses = [found["where"][world]["unedited"]["text loss"] for world in found["worlds"] if world != SHIPPED]
    if len(losses) < 2:
        return 0.0
    mean = sum(losses) / len(losses)
    return math.sqrt(sum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1))


def _best(curves: dict[str, list[list]], column: int) -> float:
    """The largest accuracy of the points that count: after training, with enough of the retain facts."""
    points = [point for curve in curves.values() for point in curve if point[0] > 0 and point[4]]
    return max((point[column] for point in points), default=math.nan)


def _relearning(found: dict) -> list[str]:
    rates = ", ".join(f"{rate:g}" for rate in RELEARNING["lrs"]["full"])
    lines = [
        "## Relearning",
        "",
        f"All weights trained for {RELEARNING['steps']} steps on half of one washed relation, the retain facts and text, at rates {rates}; "
        "accuracy on the *other half*, best over rates and steps, for everyone alike. A point counts while retain accuracy is "
        f"{RELEARNING['min_retention']} or more. *Never taught* is the floor: as many facts of people that no model saw.",
        "",
        "| state | before | best held out | best on the trained half |",
        "|---|---|---|---|",
    ]
    for name in ("unedited", *ATTACKED, "never taught"):
        of = {
            world: [{"curves": cell["curves"].get(name, {})} for cell in cells]
            for world, cells in found["relearning"].items()
        }
        before = _mean(of, found["worlds"], lambda run: next((c[0][1] for c in run["curves"].values()), math.nan))
        shown = [_mean(of, found["worlds"], lambda run, i=i: _best(run["curves"], i)) for i in (1, 2)]  # type: ignore[misc]
        lines.append(f"| {name} | {before} | {' | '.join(shown)} |")
    return [*lines, ""]


def relearned(found: dict, method: str) -> tuple[float, float, float, int] | None:
    """How much more relearning half brings back of the rest of what a method washed than of facts never taught."""
    worlds = found["worlds"]
    of = {
        name: {
            world: [{"curves": cell["curves"].get(name, {})} for cell in found["relearning"][world]] for world in worlds
        }
        for name in (method, "never taught", "unedited")
    }
    return difference(of, worlds, method, "never taught", lambda run: _best(run["curves"], 1))


def _stays_gone(found: dict, method: str) -> str:
    pair = relearned(found, method)
    claim = (
        f"{method}: washed facts are gone (relearning half brings back no more of the rest than of facts never taught)"
    )
    if pair is None:
        return f"- {claim}: cannot be told, no run kept enough of the retain facts."
    word = "**refuted**" if pair[1] > 0 else "**holds**" if pair[2] <= 0 else "**null**"
    return f"- {claim}: {word}, {_told(pair)}, n = {pair[3]}."


def _scaling(cells: Sequence[dict]) -> list[str]:
    if not cells:
        return []
    lines = [
        "## More facts",
        "",
        f"World {LARGE}: 1,000 people, 3,000 facts, one forget set a row (n = 1), all three relations washed. `memit` towards end-of-text, with and "
        "without retain keys, to the first strength that reaches the target. Seconds are wall time beside another process: the "
        "[benchmark](../washing.md) measures cost.",
        "",
        "| facts | retain weight | reached | forget | paraphrase | retain | neighbours | skills | text loss | KL | seconds: targets | one edit |",
        "|" + "---|" * 12,
    ]
    for cell in cells:
        shown = [
            f"{cell['measured'][name]:.3g}"
            for name in ("forget", "paraphrase", "retain", "neighbours", "skills", "text loss", "KL")
        ]
        reached = "yes" if cell["reached"] else "no"
        lines.append(
            f"| {cell['facts']} | {cell['retain_weight']:g} | {reached} | {' | '.join(shown)} | {cell['targets seconds']:.0f} | {cell['edit seconds']:.1f} |"
        )
    return [*lines, ""]


def _settings(found: dict) -> list[str]:
    lines = [f"| method | {' | '.join(found['worlds'])} |", "|" + "---|" * (1 + len(found["worlds"]))]
    for method, grid in METHODS.items():
        if len(grid) == 1:
            continue
        shown = []
        for world in found["worlds"]:
            setting = found["settings"][world][method]
            parts = {"reach": setting["reach"], "retain weight": setting["retain_weight"]}
            own = "rate" if method in GRADIENT else "energy" if method == "AlphaEdit" else "growth"
            told = [f"{name} {value:g}" for name, value in parts.items() if method.startswith("MEMIT") and value]
            shown.append(", ".join(told or [f"{own} {setting['own']:g}"]))
        lines.append(f"| {method} | {' | '.join(shown)} |")
    return lines


def _claims(found: dict) -> list[str]:
    """Each claim with its interval: it holds, it is refuted, or it is null."""
    runs, worlds = found["runs"], found["worlds"]
    asked: list[tuple[str, str, str, str]] = []
    for other in GRADIENT:
        for name in ("skills", "text loss", "neighbours"):
            asked.append((f"LAW keeps {name} better than {other}", "LAW", other, name))
            asked.append((f"{MAIN} keeps {name} better than {other}", MAIN, other, name))
    asked += [
        ("the Adam phase of LAW keeps more neighbours than none", "LAW", "LAW, Adam off", "neighbours"),
        (
            "the closed-form path keeps more neighbours than the initialisation",
            "LAW, closed-form path",
            "LAW, Adam off",
            "neighbours",
        ),
        ("the norm band keeps more neighbours than the path of strengths", "LAW, Adam off", "MEMIT", "neighbours"),
        ("LAW keeps more neighbours than AlphaEdit", "LAW", "AlphaEdit", "neighbours"),
        ("retain keys keep more neighbours than MEMIT", MAIN, "MEMIT", "neighbours"),
        ("retain keys cost no text: lower text loss than MEMIT", MAIN, "MEMIT", "text loss"),
    ]
    lines = [_stays_gone(found, method) for method in ("LAW", MAIN)]
    for claim, one, other, name in asked:
        pair = difference(runs, worlds, one, other, value_of(name))
        if pair is None:
            lines.append(f"- {claim}: cannot be told, no pair of runs has both numbers.")
            continue
        better = pair[1] > 0 if BETTER[name] > 0 else pair[2] < 0
        worse = pair[2] < 0 if BETTER[name] > 0 else pair[1] > 0
        word = "**holds**" if better else "**refuted**" if worse else "**null**"
        lines.append(f"- {claim}: {word}, {_told(pair)}, n = {pair[3]}{_unmatched(runs, worlds, one, other)}.")
    return lines


def _unmatched(runs: dict[str, Any], worlds: Sequence[str], one: str, other: str) -> str:
    """A reminder where the two are not at the same forget accuracy."""
    short = [name for name in (one, other) if not all(run["reached"] for world in worlds for run in runs[name][world])]
    return f" (not matched: {' and '.join(short)} did not always reach the target)" if short else ""
