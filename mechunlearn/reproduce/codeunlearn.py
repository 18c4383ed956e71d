"""CodeUnlearn (arXiv 2410.10866) on the topics of the fact world, with the controls that its paper lacks.

Codebooks and SAEs are trained in the frozen shipped world, and in a small world frozen and jointly with its model;
there a model is retrained from scratch without each topic. Settings of a topic are chosen on the other topics and on
dictionaries of a seed that no reported number uses.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

from mechunlearn.core.grid import Grid
from mechunlearn.reproduce import codeunlearn_bench as bench
from mechunlearn.reproduce.codeunlearn_bench import BY_CODES, CONTROLS, SHIPPED, VALIDATION, Book, Cell, Setting
from mechunlearn.reproduce.engine import Found, Paper, Plan, Run, finished, options, stored, world_folder
from mechunlearn.reproduce.tables import OURS, Claim, Nested, corrected, difference, interval, render
from mechunlearn.reproduce.topics import SYNONYMS, TOPICS, others
from mechunlearn.world.small import build_small

KEPT, CODES = 0.9, ("reselect", "zero")
TRAINED: dict[str, Any] = {"steps": 500, "people": 40, "passages": 16, "stories": 100}
NEAREST, STRENGTHS, FEATURE_THRESHOLDS = (2, 8), (0.5, 1.0, 2.0, 4.0), (1.0, 2.0, 4.0)
RATES, GRADIENT_TOPICS = (1e-3, 2e-3, 4e-3, 8e-3), ("kitchen", "sea", "space", "war")
METHODS: dict[str, tuple[Setting, ...]] = {
    "reselect": options(Setting, threshold=bench.THRESHOLDS, nearest=NEAREST),
    "zero": options(Setting, threshold=bench.THRESHOLDS, nearest=NEAREST[:1]),
    "SAE clamp": options(Setting, threshold=FEATURE_THRESHOLDS, strength=STRENGTHS),
    "SAE zero-ablation": options(Setting, threshold=FEATURE_THRESHOLDS),
    "SAE rows": options(Setting, threshold=FEATURE_THRESHOLDS, strength=STRENGTHS),
    "gradient difference": options(Setting, rate=RATES),
}
SWEPT = (Book(size=128), Book(size=2048), Book(used=4), Book(used=8))
MAIN = f"{SHIPPED} frozen"
EIGHT = tuple(topic for topic in TOPICS if topic != "ocean")
GONE, STAYS, UNTOUCHED = 0.3, 0.85, 0.85
LEAVES, KEEPS, COSTS = (
    "leaves less of the topic than",
    "keeps more of the other topics than",
    "costs less text loss than",
)
NOT_READ = "its numbers were not read in the paper itself, so none is quoted"
FREE = "the codebook alone, nothing deleted, costs other text nothing (nats a token)"
NEARER = "reselect comes nearer than nothing deleted to a model retrained without the topic: KL"
STAYS_AS_IT_WAS = "reselect keeps the other topics as they were: share kept, minus 1 (claimed is equivalent)"
LITTLE = f"reselect leaves less of the topic than asked: accuracy, minus {GONE:g}"
IN_CONTEXT = "reselect leaves less of the topic than random codes in sentence frames that discovery did not see"
FASTER = "reselect takes less time than gradient difference (seconds)"
REPORTED = {
    f"reselect {LEAVES} random codes of the same usage": NOT_READ,
    f"reselect {LEAVES} SAE clamp": NOT_READ,
    f"reselect {KEEPS} gradient difference": NOT_READ,
    FREE: NOT_READ,
    f"{NEARER} (0 frozen)": f"{OURS}: not measured there",
    f"{NEARER} (0 joint)": f"{OURS}: not measured there",
    STAYS_AS_IT_WAS: NOT_READ,
    IN_CONTEXT: NOT_READ,
    FASTER: NOT_READ,
}
"""What the paper reports on its claims."""
Chosen = dict[str, dict[str, dict[str, Setting]]]


def _work(folder: Path, grid: Grid, cell: Cell) -> Found:
    return bench.bench_of(folder, cell.book).measured(cell)


def _swept_books(plan: Plan) -> tuple[Book, ...]:
    return () if plan.quick else SWEPT


def _about(plan: Plan) -> Found:
    return {
        "reproduction": "codeunlearn",
        "seeds": list(plan.seeds),
        "arms": [list(arm) for arm in plan.worlds],
        "swept": [book.slug for book in _swept_books(plan)],
        "sites": [bench.SITES, bench.SMALL_SITE],
        "trained": TRAINED,
        "texts": bench.TEXTS,
        "codebook": [bench.CODEBOOK, bench.JOINT],
        "SAE": [bench.SAE_STEPS, bench.SAE_USED],
        "settings": {method: [asdict(setting) for setting in settings] for method, settings in METHODS.items()},
        "gradient": [bench.GRADIENT_STEPS, list(GRADIENT_TOPICS)],
        "sweep": list(bench.SWEPT_THRESHOLDS),
        "draws": bench.DRAWS,
        "kept": KEPT,
    }


def _methods(plan: Plan, world: str, arm: str) -> list[str]:
    """Return the methods of an arm: the shipped world has all; a quick run leaves out what trains weights."""
    if (world, arm) != (SHIPPED, "frozen"):
        return list(CODES)
    return [method for method in METHODS if not (plan.quick and method == "gradient difference")]


def _run(at: Run) -> Chosen:
    """Run what is missing, and return the chosen settings by arm, method and topic."""
    plan, makers = at.plan, {}
    for world, topic in product(sorted({world for world, _ in plan.worlds if world != SHIPPED}), ("", *TOPICS)):
        folder = world_folder(plan.folder, world, topic and f"-without-{topic}")
        makers[folder] = partial(build_small, folder, int(world), without=[topic] if topic else [], **TRAINED)
    at.build("worlds", makers)
    books = {(world, arm): Book(world, arm, VALIDATION) for world, arm in plan.worlds}
    at.cells("dictionaries of the validation seed", _work, [[Cell(bench.SPLICED, book)] for book in books.values()])
    tried = [
        [Cell(method, book, dict.fromkeys(_tried(method), setting)) for setting in METHODS[method]]
        for arm, book in books.items()
        for method in _methods(plan, *arm)
    ]
    at.cells("choosing settings", _work, tried)
    chosen = {
        " ".join(arm): {m: {t: _choose(at.grid, m, book, t) for t in TOPICS} for m in _methods(plan, *arm)}
        for arm, book in books.items()
    }
    last = []
    for seed, arm in product(plan.seeds, plan.worlds):
        book, mine = Book(arm[0], arm[1], seed), chosen[" ".join(arm)]
        cells = [Cell(bench.SPLICED, book), *(Cell(method, book, settings) for method, settings in mine.items())]
        cells += [Cell(control, book, mine[of]) for control, of in CONTROLS.items() if of in mine]
        last.append([*cells, Cell(bench.AMORTIZED, book, mine["reselect"])])
    at.cells("topics", _work, last)
    swept = (*_swept_books(plan), Book()) if _swept_books(plan) else ()
    at.cells("sweeps", _work, [[Cell(bench.SWEEP, replace(book, seed=seed))] for seed in plan.seeds for book in swept])
    return chosen


def _tried(method: str) -> Sequence[str]:
    return GRADIENT_TOPICS if method == "gradient difference" else TOPICS


def _choose(grid: Grid, method: str, book: Book, topic: str) -> Setting:
    """Choose the setting of a method for a topic on the other topics of the validation seed, by one rule for all.

    Of the settings that keep at least .9 of the topics that are to stay, on average: the lowest accuracy on the deleted
    ones. If none keeps so much: the one that keeps most. Neither the topic nor its near-synonym is looked at, and ties
    go to the first of the grid.
    """
    judged = [other for other in _tried(method) if other in others(topic)]

    def score(setting: Setting) -> tuple[int, float]:
        cell = stored(grid, Cell(method, book, dict.fromkeys(_tried(method), setting)))
        left = sum(cell["topics"][t]["brief"]["accuracy"][t] for t in judged) / len(judged)
        stays = sum(cell["topics"][t]["kept"] for t in judged) / len(judged)
        return (1, -left) if stays >= KEPT else (0, stays)

    return max(METHODS[method], key=score)


def _results(plan: Plan, grid: Grid, chosen: Chosen) -> Found:
    rows, inserted, cumulative = [], {}, {}
    for arm, seed in product(plan.worlds, plan.seeds):
        name, book = " ".join(arm), Book(arm[0], arm[1], seed)
        mine = chosen[name]
        before = inserted[f"{name} {seed}"] = stored(grid, Cell(bench.SPLICED, book))
        cumulative[f"{name} {seed}"] = stored(grid, Cell(bench.AMORTIZED, book, mine["reselect"]))["steps"]
        for method in [*_methods(plan, *arm), *(control for control, of in CONTROLS.items() if of in mine)]:
            cell = stored(grid, Cell(method, book, mine[CONTROLS.get(method, method)]))
            start = before["inserted" if method in BY_CODES else "alone"]
            for topic, run in cell["topics"].items():
                told = [_told(draw, topic, start) for draw in run.get("draws", [run])]
                mean = {key: sum(t[key] for t in told) / len(told) for key in told[0]}
                rows.append({"arm": name, "method": method, "seed": seed, "topic": topic, **mean})
    sweep = []
    for seed, book in product(plan.seeds, (Book(), *SWEPT) if _swept_books(plan) else ()):
        swept = finished(grid, Cell(bench.SWEEP, replace(book, seed=seed)))
        if swept is None:  # the page says how many seeds there are
            continue
        named = [dict(zip(("nearest", "threshold", "topic", "left", "kept", "units"), row)) for row in swept["rows"]]
        entry = {"size": book.size, "used": book.used, "seed": seed, "rows": named, "quality": swept["quality"]}
        sweep.append(entry)
    return {
        "seeds": list(plan.seeds),
        "quick": plan.quick,
        "rows": rows,
        "inserted": inserted,
        "cumulative": cumulative,
        "sweep": sweep,
        "settings": {
            arm: {method: {topic: asdict(setting) for topic, setting in by.items()} for method, by in mine.items()}
            for arm, mine in chosen.items()
        },
    }


def _told(run: Found, topic: str, start: Found) -> dict[str, float]:
    """Return what the page needs of one run on one topic."""
    now, near, stay = run["brief"], SYNONYMS.get(topic), others(topic)
    found = {
        "accuracy": now["accuracy"][topic],
        "before": start["accuracy"][topic],
        "loss": now["loss"][topic],
        "loss before": start["loss"][topic],
        "kept": run["kept"],
        "others loss": sum(now["loss"][t] for t in stay) / len(stay),
        "paraphrases": now["paraphrases"][topic],
        "text loss": now["text loss"],
        "synonym": now["accuracy"][near] / start["accuracy"][near] if near else math.nan,
        "units": run["units"],
        "usage": run.get("usage", math.nan),
        "seconds": run.get("seconds", math.nan),
    }
    if "KL" in now:
        found |= {"KL": now["KL"][topic], "KL others": sum(now["KL"][t] for t in stay) / len(stay)}
    return found


def _values(found: Found, method: str, key: str, arm: str = MAIN, topics: Sequence[str] = TOPICS) -> Nested:
    """Return a number by seed and topic; `share` is that of the accuracy before."""
    by: dict[int, list[float | None]] = {}
    for row in found["rows"]:
        if row["arm"] == arm and row["method"] == method and row["topic"] in topics:
            share = row["accuracy"] / max(row["before"], 1e-9)
            by.setdefault(row["seed"], []).append(share if key == "share" else row.get(key))
    return list(by.values())


def _median(found: Found, method: str, key: str, topic: str) -> float:
    return median(
        value for values in _values(found, method, key, topics=(topic,)) for value in values if value is not None
    )


def _arms(found: Found) -> list[str]:
    """Return the arms of the small world."""
    return [arm for arm in dict.fromkeys(row["arm"] for row in found["rows"]) if arm != MAIN]


def _ones(found: Found, arm: str = MAIN) -> list[Found]:
    """Return the bottleneck alone, by seed."""
    return [found["inserted"][f"{arm} {seed}"] for seed in found["seeds"]]


def _bare(found: Found, which: str, key: str, arm: str = MAIN, mean: bool = False) -> Nested:
    """Return a number with nothing deleted, by seed and, where it has topics, by topic or as their mean."""
    by = [one[which][key] for one in _ones(found, arm)]
    nested = [list(of.values()) if isinstance(of, dict) else [of] for of in by]
    return [[sum(of) / len(of)] for of in nested] if mean else nested


def _holding(found: Found, method: str) -> list[str]:
    """Return the topics of eight of which a method does what was asked."""
    return [
        topic
        for topic in EIGHT
        if _median(found, method, "accuracy", topic) <= GONE
        and _median(found, method, "kept", topic) >= STAYS
        and _median(found, "random codes", "share", topic) >= UNTOUCHED
    ]


def _claims(found: Found) -> list[Claim]:
    sides = {LEAVES: ("accuracy", -1, 0.1), KEEPS: ("kept", 1, 0.1), COSTS: ("text loss", -1, 0.0)}
    asked = [("random codes", (LEAVES,)), ("zero", (LEAVES, KEEPS))]
    asked += [("SAE clamp", tuple(sides)), ("gradient difference", tuple(sides))]
    made = []
    for other, verbs in asked:
        for verb in verbs:
            key, sign, least = sides[verb]
            mine, theirs = (_values(found, method, key) for method in ("reselect", other))
            text = f"reselect {verb} {other}{' of the same usage' * (other in CONTROLS)}"
            made.append(Claim(text, difference(mine, theirs, crossed=True), sign, least))
    kept, faster = _values(found, "reselect", "kept"), ("reselect", "gradient difference")
    made.append(Claim(STAYS_AS_IT_WAS, difference(kept, [[1.0] * len(of) for of in kept], crossed=True), 1))
    frames = (_values(found, method, "paraphrases") for method in ("reselect", "random codes"))
    made.append(Claim(IN_CONTEXT, difference(*frames, crossed=True), -1))
    seconds = (_values(found, method, "seconds") for method in faster)
    made.append(Claim(FASTER, difference(*seconds, crossed=True), -1, 0.0))
    for (size, used, nearest, threshold), seeds in _sweeps(found).items():
        if (size, used, nearest) == (512, 8, 8):
            name = f"the paper's S = S' = 8, threshold {threshold:g}"
            left, stays = ([[row[key] for row in rows] for rows in seeds] for key in ("left", "kept"))
            asked_for = ((LITTLE, left, GONE, -1), (STAYS_AS_IT_WAS, stays, 1.0, 1))
            for text, side, bar, sign in asked_for:
                told = difference(side, [[bar] * len(of) for of in side], crossed=True)
                made.append(Claim(f"{name}: {text}", told, sign))
    after, before = (_bare(found, which, "text loss") for which in ("inserted", "alone"))
    made.append(Claim(FREE, difference(after, before), -1, 0.0))
    for arm, method in product(_arms(found), CODES):
        kl = difference(_values(found, method, "KL", arm), _gold_kl(found, arm), crossed=True)
        made.append(Claim(f"{NEARER} ({arm})".replace("reselect", method), kl, -1, 0.0))
    return corrected([replace(claim, paper=REPORTED.get(claim.text, OURS), unit="codebooks") for claim in made])


def _gold_kl(found: Found, arm: str, stay: bool = False) -> Nested:
    """Return the KL from the retrained models with nothing deleted, at the topic or at those that are to stay."""
    golds = [one["gold"] for one in _ones(found, arm)]
    at: dict[str, Sequence[str]] = {t: others(t) if stay else [t] for t in TOPICS}
    return [[sum(gold[t]["KL of inserted"][o] for o in at[t]) / len(at[t]) for t in TOPICS] for gold in golds]


def _page(found: Found) -> str:
    arms = _arms(found)
    return render(
        "codeunlearn",
        c=vars(bench) | globals(),
        found=found,
        claims=_claims(found),
        holding={method: _holding(found, method) for method in CODES},
        enough=_enough,
        values=partial(_values, found),
        middle=partial(_median, found),
        bare=partial(_bare, found),
        arms=arms,
        gold_kl=partial(_gold_kl, found),
        gold_accuracy=[
            [one["gold"][t]["accuracy"][t] for t in TOPICS] for arm in arms[:1] for one in _ones(found, arm)
        ],
        score=partial(_score, found),
        after=partial(_after, found),
        sweeps=_sweeps(found),
        swept=_swept,
        settings=_settings(found),
    )


def _score(found: Found, arm: str) -> list[Nested]:
    """Return by seed the NLL of topics before training, with the codebook, after deletion, of gold, and both scores."""
    rows = []
    for one, after in zip(_ones(found, arm), _values(found, "reselect", "loss", arm)):
        gold = sum(one["gold"][topic]["loss"][topic] for topic in TOPICS) / len(TOPICS)
        before, codebook = (sum(one[which]["loss"].values()) / len(TOPICS) for which in ("original", "inserted"))
        now = sum(value for value in after if value is not None) / len(after)
        rows.append(
            (before, codebook, now, gold, (now - before) / (codebook - before), (now - gold) / (codebook - gold))
        )
    return [[[value] for value in column] for column in zip(*rows)]


def _after(found: Found, count: int) -> dict[str, Nested]:
    """Return by seed, once so many topics are deleted, what is left of them and of the others, and what it took."""
    gone = TOPICS[:count]
    left = [topic for topic in TOPICS[count:] if SYNONYMS.get(topic) not in gone]
    steps = [found["cumulative"][f"{MAIN} {seed}"][count - 1] for seed in found["seeds"]]
    start = [one["inserted"]["accuracy"] for one in _ones(found)]
    return {
        "deleted": [[sum(now["accuracy"][topic] for topic in gone) / count] for now in steps],
        "others": [[sum(now["accuracy"][t] / b[t] for t in left) / len(left)] for now, b in zip(steps, start) if left],
        **{key: [[now[key]] for now in steps] for key in ("units", "text loss", "seconds")},
    }


def _sweeps(found: Found) -> dict[tuple[int, int, int, float], list[list[Found]]]:
    """Return the rows of the sweeps by K, S, S' and threshold: seeds of topics."""
    by: dict[tuple[int, int, int, float], list[list[Found]]] = {}
    for entry in found["sweep"]:
        for at in dict.fromkeys((row["nearest"], row["threshold"]) for row in entry["rows"]):
            rows = [{**row, **entry["quality"]} for row in entry["rows"] if (row["nearest"], row["threshold"]) == at]
            by.setdefault((entry["size"], entry["used"], *at), []).append(rows)
    return by


def _swept(seeds: list[list[Found]], key: str) -> str:
    values = [[row[key] for row in rows] for rows in seeds]
    if key in ("loss increase", "explained variance"):
        return f"{fmean(of[0] for of in values):.3f}"
    return interval(values, ".0f" if key == "units" else ".2f", crossed=True)


def _enough(seeds: list[list[Found]]) -> int:
    """Return of how many of the eight topics a sweep leaves little enough, with enough of the others."""
    of = {t: [row for rows in seeds for row in rows if row["topic"] == t] for t in EIGHT}
    middle = [[median(row[key] for row in rows) for key in ("left", "kept")] for rows in of.values()]
    return sum(left <= GONE and kept >= STAYS for left, kept in middle)


def _settings(found: Found) -> list[tuple[str, str, str]]:
    """Return arm, method and the settings with their topics."""
    lines = []
    for arm, method in ((arm, method) for arm, of in found["settings"].items() for method in of):
        by: dict[str, list[str]] = {}
        for topic, setting in found["settings"][arm][method].items():
            parts = [f"{name} {value:g}" for name, value in setting.items() if value]
            by.setdefault(", ".join(parts), []).append(topic)
        lines.append((arm, method, "; ".join(f"{told} ({', '.join(topics)})" for told, topics in by.items())))
    return lines


ARMS = (SHIPPED, "frozen"), ("0", "frozen"), ("0", "joint")
FULL, SHORT = (ARMS, (0, 1, 2, 3, 4)), (ARMS[:1], (0, 1))
PAPER = Paper("codeunlearn", "CodeUnlearn (arXiv 2410.10866)", FULL, SHORT, _about, _run, _results, _claims, _page)
