"""The page of the Mechanistic Unlearning reproduction: every mask beside its controls, and what became of each claim."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from mechunlearn.core.grid import Grid
from mechunlearn.metrics.stats import hierarchical_interval, hierarchical_paired, multiple_comparisons
from mechunlearn.reproduce.mechanistic_unlearning import (
    ALL_MLPS,
    EVERYTHING,
    FORGET,
    LAST,
    LOCALIZERS,
    LOOKUP,
    NAIVE,
    OUTPUT_TRACING,
    RATES,
    RETAIN,
    SHARES,
    STEPS,
    TWIN,
    VALIDATION,
    WEIGHTS,
    WHOLE,
    Cell,
    Plan,
    arenas,
    arms,
    chosen,
    is_subset,
    tests,
)
from mechunlearn.reproduce.shared import failures, finished, verdict

RANDOM_MLPS = "random MLPs"
MEASURES = {
    "other formats": "edit, other formats",
    "recovery": "relearned",
    "retain": "retain",
    "same subject": "same subject",
    "text loss": "text loss",
}
PAPER = {
    "C1": "MCQ edit accuracy .862 against .632 (random MLPs), .371 (causal tracing, MLPs), .082 (attribution patching)",
    "C2": "relearned .199 against .631 (causal tracing, MLPs), .469, .824 (attribution patching)",
    "C3": "relearned .199 against .264 (random MLPs)",
}
Value = Callable[[dict], float | None]
Nested = list[list[float]]


def results(plan: Plan, grid: Grid) -> dict:
    """Every number of the page, as plain JSON, from the cells that are finished."""
    found: dict[str, Any] = {
        "small worlds": list(plan.worlds),
        "relations": list(plan.relations),
        "seeds": list(plan.seeds),
        "quick": plan.quick,
        "world": {},
        "failed": failures(plan.folder),
        "missing": 0,
        "planned": 0,
    }
    for relation in plan.relations:
        for world in arenas(plan, relation):
            found["world"].setdefault(world, {})[relation] = _of_world(plan, grid, world, relation, found)
    found["auroc"] = [r for s in plan.seeds if (r := finished(grid, vars(Cell("auroc", TWIN, seed=s))))]
    found["shares"] = {
        f"{share:g}": [
            _short(run)
            for seed in plan.seeds[:3]
            if (run := finished(grid, vars(Cell("share", TWIN, seed=seed, weight=share))))
        ]
        for share in SHARES
    }
    return found


def _of_world(plan: Plan, grid: Grid, world: str, relation: str, found: dict) -> dict:
    localized = [finished(grid, vars(Cell("localize", world, relation, seed))) for seed in (VALIDATION, *plan.seeds)]
    bounds = [finished(grid, vars(Cell("bounds", world, relation, seed))) for seed in plan.seeds]
    runs, settings = {}, {}
    for arm in arms(grid, world, relation):
        settings[arm] = chosen(grid, world, relation, arm)
        cells = [(cell.seed, finished(grid, vars(cell))) for cell in tests(plan, grid, world, relation, arm)]
        found["missing"] += sum(run is None for _, run in cells)
        found["planned"] += len(cells)
        runs[arm] = {str(seed): _short(run, curves=not is_subset(arm)) for seed, run in cells if run is not None}
    return {
        "windows": [one["window"] for one in localized if one],
        "notes": localized[0]["notes"] if localized[0] else {},
        "overlap": _overlaps([one["masks"] for one in localized if one]),
        "settings": settings,
        "runs": runs,
        "bounds": [{"found": one["found"], "unedited": one["unedited"]} for one in bounds if one],
    }


def _overlaps(found: list[dict]) -> dict[str, list[float]]:
    """Jaccard overlap of each localizer's mask with that of the look-up window, by forget set."""
    made: dict[str, list[float]] = {}
    for masks in found:
        units = {arm: {(site, unit) for site, of in mask.items() for unit in of} for arm, mask in masks.items()}
        for arm, mine in units.items():
            if arm != LOOKUP and mine | units[LOOKUP]:
                made.setdefault(arm, []).append(len(mine & units[LOOKUP]) / len(mine | units[LOOKUP]))
    return made


def _short(run: dict, curves: bool = False) -> dict:
    return {name: value for name, value in run.items() if curves or name != "curves"}


def page(found: dict) -> str:
    """Markdown, from the results."""
    return "\n".join(
        [
            *_opening(found),
            *_claims(found),
            *_every_mask(found),
            *_by_world(found),
            *_subsets(found),
            *_floors(found),
            *_curves(found),
            *_naive(found),
            *_twin(found),
            *_settings(found),
            *_ending(found),
            "",
        ]
    )


def worlds_of(found: dict, relation: str) -> list[str]:
    """The worlds that are to have the mechanism, and were run on a relation."""
    return [world for world, of in found["world"].items() if world != NAIVE and relation in of]


def values(found: dict, relation: str, arm: str, measure: str, world: str) -> dict[str, float]:
    """A measure by seed; random MLPs are the mean over every set of as many layers but the look-up window itself."""
    runs = found["world"][world][relation]["runs"]
    if arm != RANDOM_MLPS:
        return {seed: run[measure] for seed, run in runs.get(arm, {}).items() if run.get(measure) is not None}
    own = _own_window(found, relation, world)
    subsets = [of for name, of in runs.items() if is_subset(name) and name != own]
    seeds = sorted({seed for of in subsets for seed in of})
    made = {s: [of[s][measure] for of in subsets if s in of and of[s].get(measure) is not None] for s in seeds}
    return {seed: fmean(each) for seed, each in made.items() if each}


def difference(
    found: dict, relations: Sequence[str], one: str, other: str, measure: str
) -> tuple[float, float, float, int, int] | None:
    """How much larger one mask's measure is, over worlds and forget sets: mean, interval, pairs, worlds."""
    pairs: list[tuple[list[float], list[float]]] = []
    for world in found["world"]:
        mine: list[float] = []
        theirs: list[float] = []
        for relation in relations:
            if world in worlds_of(found, relation):
                a, b = (values(found, relation, arm, measure, world) for arm in (one, other))
                both = sorted(a.keys() & b.keys())
                mine += [a[seed] for seed in both]
                theirs += [b[seed] for seed in both]
        if mine:
            pairs.append((mine, theirs))
    if not pairs:
        return None
    told = hierarchical_paired([a for a, _ in pairs], [b for _, b in pairs])
    return *told, sum(len(a) for a, _ in pairs), len(pairs)


def claims(found: dict) -> list[dict]:
    """The registered claims: what was compared, our number, what became of it, and the paper's own."""
    asked = [
        *(
            ("C1", f"edit in other formats: {LOOKUP} minus {rival}", LOOKUP, rival, "other formats", 1)
            for rival in (*OUTPUT_TRACING, RANDOM_MLPS)
        ),
        *(("C2", f"relearned: {LOOKUP} minus {rival}", LOOKUP, rival, "recovery", -1) for rival in OUTPUT_TRACING),
        ("C3", f"relearned: {LOOKUP} minus {RANDOM_MLPS}", LOOKUP, RANDOM_MLPS, "recovery", -1),
    ]
    rows = []
    for claim, text, one, other, measure, sign in asked:
        for name, relations in (*((r, [r]) for r in found["relations"]), ("all", found["relations"])):
            if name == "all" and len(found["relations"]) == 1:
                continue
            told = difference(found, relations, one, other, measure)
            rows.append(
                {
                    "claim": claim,
                    "text": text,
                    "relation": name,
                    "difference": told,
                    "verdict": verdict(told[:3], sign) if told else "not measured",
                    "paper": PAPER[claim],
                }
            )
    return rows


def _opening(found: dict) -> list[str]:
    worlds = [world for world in found["world"] if world != NAIVE]
    lines = [
        "# Mechanistic Unlearning: does it matter which MLPs are edited?",
        "",
        "**These worlds were trained to look facts up at the subject, and everything below is conditional on that**; the naive "
        "world at the end was not.",
        "",
        "Written by `mechunlearn reproduce mechanistic-unlearning`; do not edit.",
        "",
    ]
    if found["quick"]:
        lines += [
            "**This is a quick run: one small world, one relation, one forget set. Its numbers settle nothing.**",
            "",
        ]
    if found["missing"]:
        lines += [
            f"**The run is not finished: of {found['planned']} edits of test sets {found['missing']} are missing, and masks whose setting is not chosen yet; n says what there is.**",
            "",
        ]
    small = ", ".join(f"small world {seed}" for seed in found["small worlds"])
    return [
        *lines,
        f"Worlds, trained separately: {'the shipped one (qwen2, 8 layers), ' if 'factworld' in worlds else ''}{small} (GPT-NeoX where the "
        "number leaves 1 after division by three, GPT-2 where it leaves 2; 6 layers). Relations: "
        f"{', '.join(found['relations'])}. {FORGET} facts a forget set, the sets of a world disjoint; {RETAIN} retained facts. "
        f"{STEPS} steps towards each fact's own wrong answer. Every mask has the weight of the look-up window that the probe "
        f"finds on the same facts (the last three rows have their own), tied over a neuron's or head's matrices.",
        "",
        f"Rate ({', '.join(f'{rate:g}' for rate in RATES)}) and forget weight ({', '.join(f'{w:g}' for w in WEIGHTS)}) are chosen for every mask and world "
        "on a forget set of its own by one rule: of the settings with an edit of .99 and at most .05 of the truth on the training "
        "prompt the one with the best retain accuracy there; if none has that, the strongest edit. No robustness metric is looked at.",
        "",
        "*Edit, other formats*: facts that answer the edit target, mean over all formats but the training prompt and yes/no. *Relearned*: recovery of "
        "the half of the forgotten facts that relearning does not train on, 0 for never-taught subjects (or chance) and 1 for the "
        "unedited model, at the best of three attack settings and two steps that keep .9 of the retain facts. *Same subject*: "
        "accuracy on the other facts of the forgotten subjects, which no loss holds. Intervals: 95 % hierarchical bootstrap over worlds and forget sets; "
        "few worlds make them too narrow.",
        "",
    ]


def _claims(found: dict) -> list[str]:
    rows = claims(found)
    lines = [
        "## Claims",
        "",
        "Holds: the interval is off 0 and the difference at least .1. Weak: off 0, but smaller. Null: it includes 0. Reversed: it is off 0 on the other side. "
        + multiple_comparisons(len(rows)),
        "",
        "| claim | | relation | difference | pairs | worlds | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        told = row["difference"]
        shown = f"{_told(told[:3], '+')} | {told[3]} | {told[4]}" if told else "– | 0 | 0"
        lines.append(f"| {row['claim']} | {row['text']} | {row['relation']} | {shown} | **{row['verdict']}** |")
    lines += [
        "",
        "The paper's own numbers, mean of three models of 7 to 9 B parameters on sports facts (one run each):",
        "",
    ]
    return [*lines, *(f"- {name}: {text}." for name, text in PAPER.items()), ""]


def _every_mask(found: dict) -> list[str]:
    lines = []
    for relation in found["relations"]:
        lines += [f"## Every mask: {relation}, over worlds", "", _header(["mask", *MEASURES.values(), "n"])]
        for arm in (*LOCALIZERS, RANDOM_MLPS, *WHOLE):
            of = [[*values(found, relation, arm, "other formats", w).values()] for w in worlds_of(found, relation)]
            shown = [_mean(found, relation, arm, measure) for measure in MEASURES]
            lines.append(_row([arm, *shown, str(sum(map(len, of)))]))
        lines += [_row(["unedited", *_unedited(found, relation)]), ""]
    return lines


def _unedited(found: dict, relation: str) -> list[str]:
    shown = {}
    for measure in ("retain", "same subject", "text loss"):
        nested = [
            [one["unedited"][measure] for one in found["world"][w][relation]["bounds"]]
            for w in worlds_of(found, relation)
        ]
        shown[measure] = _interval([world for world in nested if world])
    return ["–", "1", shown["retain"], shown["same subject"], shown["text loss"], ""]


def _by_world(found: dict) -> list[str]:
    lines = ["## By world", "", "Edit in other formats / relearned / same subject, means over forget sets.", ""]
    for relation in found["relations"]:
        worlds = worlds_of(found, relation)
        lines += [_header([f"mask, {relation}", *map(_name, worlds)])]
        for arm in (*LOCALIZERS, RANDOM_MLPS, *WHOLE):
            cells = []
            for world in worlds:
                of = [values(found, relation, arm, m, world) for m in ("other formats", "recovery", "same subject")]
                cells.append(" / ".join(f"{fmean(v.values()):.2f}" if v else "–" for v in of))
            lines.append(_row([arm, *cells]))
        for world in worlds:
            here = found["world"][world][relation]
            window = "; ".join(dict.fromkeys(f"MLP {w[0]} to {w[1]}" if w else "none" for w in here["windows"]))
            notes = "; ".join(f"{arm}: {note}" for arm, note in here["notes"].items() if arm != LOOKUP)
            shared = ", ".join(f"{arm} {fmean(of):.2f}" for arm, of in here["overlap"].items())
            lines += [
                "",
                f"{_name(world)}: look-up window by the probe: {window}. {notes}{'. ' * bool(notes)}Overlap with it (Jaccard, mean over forget sets): "
                f"{shared or 'no window'}.",
            ]
        lines.append("")
    return lines


def _subsets(found: dict) -> list[str]:
    lines = [
        "## Every set of as many MLP layers",
        "",
        "The null distribution of the look-up window: all sets of as many layers, contiguous ones marked with *, sorted by what is relearned. "
        "Edit in other formats / relearned / same subject.",
        "",
    ]
    for relation in found["relations"]:
        for world in worlds_of(found, relation):
            of = {}
            for arm in found["world"][world][relation]["runs"]:
                if is_subset(arm):
                    parts = [
                        values(found, relation, arm, m, world) for m in ("other formats", "recovery", "same subject")
                    ]
                    if all(parts):
                        of[arm] = tuple(fmean(part.values()) for part in parts)
            own = _own_window(found, relation, world)
            ranked = sorted(of, key=lambda arm: of[arm][1])
            shown = [
                f"{'**' * (a == own)}{_starred(a)} {' / '.join(f'{v:.2f}' for v in of[a])}{'**' * (a == own)}"
                for a in ranked
            ]
            lines.append(f"{_name(world)}, {relation}: {'; '.join(shown) or 'not measured'}.")
            if own in of:
                fewer = sum(of[arm][1] <= of[own][1] for arm in of if arm != own)
                better = sum(of[arm][0] >= of[own][0] for arm in of if arm != own)
                lines.append(
                    f"Of the {len(of) - 1} other sets {fewer} let no more be relearned than the window ({own}), and {better} carry over to "
                    "other formats no worse."
                )
            lines.append("")
    return lines


def _floors(found: dict) -> list[str]:
    lines = [
        "## Floors and ceilings of relearning",
        "",
        "Facts right on the half held out, best of the settings that count: `never taught` are subjects that the model never saw; `from "
        "scratch` is the same world trained from nothing on the edited labels, attacked in the same way.",
        "",
        _header(["world", "relation", "unedited", "never taught", "from scratch", "n"]),
    ]
    for relation in found["relations"]:
        for world in worlds_of(found, relation):
            bounds = found["world"][world][relation]["bounds"]
            cells = []
            for state in ("unedited", "never taught", "from scratch"):
                of = [
                    r["held out"]
                    for one in bounds
                    for r in one["found"]
                    if r["state"] == state and r["held out"] is not None
                ]
                cells.append(_interval([of]) if of else "–")
            lines.append(_row([_name(world), relation, *cells, str(len(bounds))]))
    return [*lines, ""]


def _curves(found: dict) -> list[str]:
    """Relearning by setting and step."""
    shown = (LOOKUP, *OUTPUT_TRACING, ALL_MLPS, EVERYTHING, LAST)
    lines = [
        "## Relearning by setting and step",
        "",
        "Held-out facts right / retain accuracy, means over worlds, relations and forget sets.",
        "",
    ]
    table: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for relation in found["relations"]:
        for world in worlds_of(found, relation):
            for arm in shown:
                for run in found["world"][world][relation]["runs"].get(arm, {}).values():
                    for setting, step, held_out, _, retain in run.get("curves", ()):
                        table.setdefault(f"{setting}, step {step}", {}).setdefault(arm, []).append((held_out, retain))
    lines.append(_header(["setting", *shown]))
    for setting, of in table.items():
        lines.append(
            _row(
                [
                    setting,
                    *(
                        " / ".join(f"{fmean(v[i] for v in of[arm]):.2f}" for i in (0, 1)) if arm in of else "–"
                        for arm in shown
                    ),
                ]
            )
        )
    return [*lines, ""]


def _naive(found: dict) -> list[str]:
    if NAIVE not in found["world"]:
        return []
    here = found["world"][NAIVE]["sport"]
    lines = [
        "## The naive world",
        "",
        "The same facts as the shipped world, learnt without probe loss, biographies or windowed attention: no look-up at the subject. "
        f"`fact_lookup`: {here['notes'].get(LOOKUP, 'a window was found')}. The other masks have the weight of two MLP layers. One world is n = 1.",
        "",
        _header(["mask", *MEASURES.values(), "n"]),
    ]
    for arm, runs in here["runs"].items():
        shown = []
        for measure in MEASURES:
            of = [run[measure] for run in runs.values() if run.get(measure) is not None]
            shown.append(_interval([of]) if of else "–")
        lines.append(_row([arm, *shown, str(len(runs))]))
    return [*lines, ""]


def _twin(found: dict) -> list[str]:
    lines = [
        "## Where the storage is known: the twin",
        "",
        "Further people were taught to the shipped world with only the MLPs of its look-up window trainable (factworld-twin; one twin, n = 1; "
        "six more on the page [Do localizers find where facts were put?](../ground-truth.md)). Area under the ROC of each localizer's layers against that "
        "storage, .5 is chance; intervals over forget sets.",
        "",
        _header(["localizer", "area under the ROC", "n"]),
    ]
    for arm in LOCALIZERS:
        of = [one[arm] for one in found["auroc"] if arm in one]
        lines.append(_row([arm, _interval([of]) if of else "–", str(len(of))]))
    shares = {share: runs for share, runs in found["shares"].items() if runs}
    if shares:
        lines += [
            "",
            "Edits of those people on random neurons, as many as one MLP layer has, of which a share lies inside the storage site:",
            "",
            _header(["share inside", "edit", *MEASURES.values(), "n"]),
        ]
        for share, runs in shares.items():
            shown = [[run[m] for run in runs if run.get(m) is not None] for m in ("strength", *MEASURES)]
            lines.append(_row([share, *(_interval([of]) if of else "–" for of in shown), str(len(runs))]))
    return [*lines, ""]


def _settings(found: dict) -> list[str]:
    lines = [
        "## Settings chosen",
        "",
        "Rate, weight; *none* where no setting qualified and the strongest edit was taken.",
        "",
    ]
    for relation in found["relations"]:
        worlds = [world for world, of in found["world"].items() if relation in of]
        lines.append(_header([f"mask, {relation}", *map(_name, worlds)]))
        for arm in (*LOCALIZERS, *WHOLE):
            cells = []
            for world in worlds:
                of = found["world"][world][relation]["settings"].get(arm)
                told = "–" if of is None or of["rate"] is None else f"{of['rate']:g}, {of['forget_weight']:g}"
                cells.append(
                    told + (" *none*" if of and of["rate"] is not None and of["selected"] != "qualifies" else "")
                )
            lines.append(_row([arm, *cells]))
        lines.append("")
    return lines


def _ending(found: dict) -> list[str]:
    if not found["failed"]:
        return ["No cell failed."]
    return ["## Failed", "", *(f"- {one['cell']}: {one['reason']}" for one in found["failed"])]


def _own_window(found: dict, relation: str, world: str) -> str:
    """The set of layers that the probe's window is, on the validation facts."""
    windows = found["world"][world][relation]["windows"]
    first = windows[0] if windows else None
    return f"MLP {'+'.join(map(str, range(first[0], first[1] + 1)))}" if first else ""


def _starred(arm: str) -> str:
    layers = [int(layer) for layer in arm.removeprefix("MLP ").split("+")]
    return f"{'+'.join(map(str, layers))}{'*' * (layers == list(range(layers[0], layers[-1] + 1)))}"


def _mean(found: dict, relation: str, arm: str, measure: str) -> str:
    nested = [[*values(found, relation, arm, measure, world).values()] for world in worlds_of(found, relation)]
    return _interval([world for world in nested if world])


def _interval(nested: Nested) -> str:
    return _told(hierarchical_interval(nested)) if nested else "–"


def _told(of: Sequence[float], sign: str = "") -> str:
    mean, low, high = of
    return f"{mean:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def _name(world: str) -> str:
    return f"small world {world}" if world.isdigit() else world


def _header(names: Sequence[str]) -> str:
    return _row(names) + "\n|" + "---|" * len(names)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
