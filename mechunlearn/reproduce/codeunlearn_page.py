"""The page of the CodeUnlearn reproduction: a function of its numbers, which lie beside it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any

from mechunlearn.core.grid import Grid
from mechunlearn.errors import MechunlearnError
from mechunlearn.metrics.stats import hierarchical_interval, hierarchical_paired
from mechunlearn.reproduce.codeunlearn import (
    AMORTIZED,
    CONTROLS,
    SHIPPED,
    SPLICED,
    SWEEP,
    Book,
    Cell,
    Chosen,
    Plan,
    Setting,
    methods,
    stored,
)
from mechunlearn.reproduce.topics import SYNONYMS, TOPICS, others

MAIN = f"{SHIPPED} frozen"
EIGHT = tuple(topic for topic in TOPICS if topic != "ocean")
GONE, STAYS, UNTOUCHED = 0.3, 0.85, 0.85


def results(plan: Plan, grid: Grid, chosen: Chosen) -> dict:
    """Everything the page says, as plain numbers: a row a method, arm, seed and topic, and what is beside them."""
    rows, inserted, cumulative = [], {}, {}
    for world, arm in plan.arms:
        name = f"{world} {arm}"
        for seed in plan.seeds:
            book, mine = Book(world, arm, seed), chosen[name]
            before = inserted[f"{name} {seed}"] = stored(grid, Cell(SPLICED, book))
            cumulative[f"{name} {seed}"] = stored(grid, Cell(AMORTIZED, book, mine["reselect"]))["steps"]
            for method in [*methods(plan, world, arm), *(c for c, of in CONTROLS.items() if of in mine)]:
                cell = stored(grid, Cell(method, book, mine[CONTROLS.get(method, method)]))
                start = before["inserted" if method in ("reselect", "zero", "random codes") else "alone"]
                for topic, run in cell["topics"].items():
                    draws = run.get("draws", [run])
                    told = [_told(draw, topic, start) for draw in draws]
                    mean = {key: sum(t[key] for t in told) / len(told) for key in told[0]}
                    rows.append({"arm": name, "method": method, "seed": seed, "topic": topic, **mean})
    sweep = []
    for seed in plan.seeds if plan.swept else ():
        for book in (Book(), *plan.swept):
            try:
                cell = stored(grid, Cell(SWEEP, replace(book, seed=seed)))
            except MechunlearnError:  # a run that was stopped: the page says how many seeds there are
                continue
            rows_ = [dict(zip(("nearest", "threshold", "topic", "left", "kept", "units"), row)) for row in cell["rows"]]
            sweep.append(
                {
                    "size": book.size,
                    "used": book.used,
                    "seed": seed,
                    "rows": rows_,
                    "quality": cell["quality"],
                }
            )
    settings = {
        arm: {method: {topic: asdict(setting) for topic, setting in by.items()} for method, by in mine.items()}
        for arm, mine in chosen.items()
    }
    return {
        "seeds": list(plan.seeds),
        "quick": plan.quick,
        "rows": rows,
        "inserted": inserted,
        "cumulative": cumulative,
        "sweep": sweep,
        "settings": settings,
    }


def _told(run: dict, topic: str, start: dict) -> dict[str, float | int]:
    """What the page needs of one run on one topic."""
    now = run["brief"]
    near = SYNONYMS.get(topic)
    found = {
        "accuracy": now["accuracy"][topic],
        "before": start["accuracy"][topic],
        "loss": now["loss"][topic],
        "loss before": start["loss"][topic],
        "kept": run["kept"],
        "others loss": sum(now["loss"][t] for t in others(topic)) / len(others(topic)),
        "paraphrases": now["paraphrases"][topic],
        "text loss": now["text loss"],
        "synonym": now["accuracy"][near] / start["accuracy"][near] if near else math.nan,
        "units": run["units"],
        "usage": run.get("usage", math.nan),
        "seconds": run.get("seconds", math.nan),
    }
    if "KL" in now:
        found |= {"KL": now["KL"][topic], "KL others": sum(now["KL"][t] for t in others(topic)) / len(others(topic))}
    return found


def page(found: dict) -> str:
    """The whole page, from the numbers alone."""
    seeds = len(found["seeds"])
    lines = [
        "# CodeUnlearn, with controls",
        "",
        "Written by `mechunlearn reproduce codeunlearn`; do not edit. Its numbers are in `codeunlearn.json`.",
        "",
        *(
            ["**This is a quick run: two seeds, the shipped world alone, no gradient difference, no sweeps.**", ""]
            if found["quick"]
            else []
        ),
        f"Topics of the fact world's stories are deleted from a codebook (512 codes, 2 used, {seeds} seeds) by",
        "[2410.10866](https://arxiv.org/abs/2410.10866)'s rule: codes that are more frequent on the topic than in the same",
        "sentences with its words swapped. *Topic accuracy* is the share of the words of a topic (things, actions, people; the first",
        "of a story aside, as nothing before it says what the story is about) of which every token is answered by one that leads to",
        "some word of the topic: greedy, given the true tokens before. *Kept* is the mean over the other topics of the share of",
        "their accuracy that is left; *topic NLL* is nats a word. Codes are discovered on stories in four of six sentence frames;",
        "*paraphrases* are the other two. Sea and ocean share words: neither counts among the other's topics.",
        "Settings of a topic (threshold, S', strength, rate) are chosen on the *other* topics, with dictionaries of another seed:",
        f"of the settings that keep {0.9:g} of the others, the one that leaves least of the topic. Intervals are 95 % bootstrap over",
        "seeds, within them topics; they do not cover other worlds. No claim is corrected for their number.",
        "",
        *_verdict(found),
        *_by_topic(found),
        *_by_method(found),
        *_inserted(found),
        *_gold(found),
        *_cumulative(found),
        *_sweeps(found),
        *_settings(found),
    ]
    return "\n".join(lines).rstrip() + "\n"


def selected(
    found: dict, method: str, key: str, arm: str = MAIN, topics: Sequence[str] = TOPICS
) -> list[list[float | int]]:
    """Seeds of topics."""
    by: dict[int, list[float | int]] = {}
    for row in found["rows"]:
        if row["arm"] == arm and row["method"] == method and row["topic"] in topics and not _nan(row.get(key)):
            by.setdefault(row["seed"], []).append(row[key])
    return list(by.values())


def _mean(found: dict, method: str, key: str, arm: str = MAIN, topics: Sequence[str] = TOPICS, digits: int = 2) -> str:
    values = selected(found, method, key, arm, topics)
    if not values:
        return ""
    return _interval(values, digits)


def _interval(values: Sequence[Sequence[float | int]], digits: int = 2) -> str:
    mean, low, high = hierarchical_interval(values)
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _median(found: dict, method: str, key: str, topic: str) -> float | int:
    return median(values[0] for values in selected(found, method, key, topics=(topic,)))


def holds(found: dict, topic: str, method: str = "reselect", control: str = "random codes") -> bool:
    return (
        _median(found, method, "accuracy", topic) <= GONE
        and _median(found, method, "kept", topic) >= STAYS
        and _median(found, control, "share", topic) >= UNTOUCHED
    )


def _verdict(found: dict) -> list[str]:
    found["rows"] = [row | {"share": row["accuracy"] / max(row["before"], 1e-9)} for row in found["rows"]]
    holding = [topic for topic in EIGHT if holds(found, topic)]
    zero = [topic for topic in EIGHT if holds(found, topic, "zero")]
    lines = [
        "## What holds",
        "",
        f"- Asked: topic accuracy at most {GONE}, others at {STAYS} or more of theirs, random codes active as often leave the "
        f"topic at {UNTOUCHED} or more of its accuracy, for at least 5 of 8 topics (all but ocean, sea's near-synonym) on the "
        "median of seeds. "
        f"**Reselect: {len(holding)} of 8** ({', '.join(holding) or 'none'}). Zero: {len(zero)} of 8 ({', '.join(zero) or 'none'}).",
    ]
    for other, key, what in (
        ("random codes", "accuracy", "topic accuracy"),
        ("zero", "accuracy", "topic accuracy"),
        ("zero", "kept", "kept"),
        ("SAE clamp", "accuracy", "topic accuracy"),
        ("SAE clamp", "kept", "kept"),
        ("SAE clamp", "text loss", "text loss"),
        ("gradient difference", "accuracy", "topic accuracy"),
        ("gradient difference", "kept", "kept"),
        ("gradient difference", "text loss", "text loss"),
    ):
        mine, theirs = (selected(found, method, key) for method in ("reselect", other))
        if theirs and [len(x) for x in mine] == [len(x) for x in theirs]:
            mean, low, high = hierarchical_paired(mine, theirs)
            null = " **(null)**" if low <= 0 <= high else ""
            lines.append(f"- Reselect minus {other}, {what}: {mean:+.2f} [{low:+.2f}, {high:+.2f}]{null}.")
    ones = [found["inserted"][f"{MAIN} {seed}"] for seed in found["seeds"]]
    cost = _interval([[one["inserted"]["text loss"] - one["alone"]["text loss"]] for one in ones])
    lines.append(f"- The bottleneck alone, nothing deleted, costs other text {cost} nats a token.")
    for count in (1, 4, 8):
        _, left, stays, *_ = _after(found, count)
        lines.append(
            f"- {count} topic{'s' * (count > 1)} deleted from one codebook: accuracy of the deleted {_interval(left)}, share kept of "
            f"the others {_interval(stays)}."
        )
    return [*lines, ""]


def _by_topic(found: dict) -> list[str]:
    lines = [
        "## By topic, the shipped world, medians of seeds",
        "",
        "| topic | codes | before | reselect | kept | random codes, share left | paraphrases | zero | kept | holds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for topic in TOPICS:
        cells = [
            f"{_median(found, 'reselect', 'units', topic):.0f}",
            f"{_median(found, 'reselect', 'before', topic):.2f}",
            f"{_median(found, 'reselect', 'accuracy', topic):.2f}",
            f"{_median(found, 'reselect', 'kept', topic):.2f}",
            f"{_median(found, 'random codes', 'share', topic):.2f}",
            f"{_median(found, 'reselect', 'paraphrases', topic):.2f}",
            f"{_median(found, 'zero', 'accuracy', topic):.2f}",
            f"{_median(found, 'zero', 'kept', topic):.2f}",
            "yes" if holds(found, topic) else "no",
        ]
        lines.append(f"| {topic} | {' | '.join(cells)} |")
    return [*lines, ""]


def _by_method(found: dict) -> list[str]:
    columns = (
        "accuracy",
        "kept",
        "paraphrases",
        "loss",
        "others loss",
        "text loss",
        "synonym",
        "units",
        "usage",
        "seconds",
    )
    heads = (
        "topic accuracy",
        "kept",
        "paraphrases",
        "topic NLL",
        "others' NLL",
        "text loss",
        "near-synonym kept",
        "units",
        "usage",
        "seconds",
    )
    alone = [found["inserted"][f"{MAIN} {seed}"]["alone"]["text loss"] for seed in found["seeds"]]
    lines = [
        "## Every method, the shipped world",
        "",
        "Means over nine topics and all seeds. *Near-synonym kept*: what deleting sea leaves of ocean and the other way round (they",
        "share sailor, wave, tide, gull, sailed and anchored). *Usage*: the units' share of all that is active on",
        "stories. *Seconds*: the edit with discovery on text seen before. *Text loss*: documents of the world that are no story, in",
        f"nats a token; {alone[0]:.3f} for the model alone.",
        "",
        f"| method | {' | '.join(heads)} |",
        "|---|" + "---|" * len(columns),
    ]
    for name, which in (("unedited", "alone"), ("bottleneck, nothing deleted", "inserted")):
        of = [found["inserted"][f"{MAIN} {seed}"][which] for seed in found["seeds"]]
        told = [_interval([list(one[key].values()) for one in of]) for key in ("accuracy", "paraphrases", "loss")]
        text = _interval([[one["text loss"]] for one in of], 3)
        lines.append(f"| {name} | {told[0]} | | {told[1]} | {told[2]} | | {text} | | | | |")
    for method in dict.fromkeys(row["method"] for row in found["rows"] if row["arm"] == MAIN):
        digits = {"text loss": 3, "usage": 3, "units": 0}
        cells = [_mean(found, method, key, digits=digits.get(key, 2)) for key in columns]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return [*lines, ""]


def _inserted(found: dict) -> list[str]:
    lines = [
        "## What the bottleneck costs, and what comes back without it",
        "",
        "| arm | explained variance | dead codes | text loss alone | with codebook | topic accuracy alone | with codebook |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in found["rows"]):
        of = [found["inserted"][f"{arm} {seed}"] for seed in found["seeds"]]

        def mean(take: Callable[[dict], float], of: list[dict] = of) -> str:
            return _interval([[take(one)] for one in of], 3)

        accuracies = [
            mean(lambda one, which=which: sum(one[which]["accuracy"].values()) / len(TOPICS))  # type: ignore[misc]
            for which in ("alone", "inserted")
        ]
        losses = [mean(lambda one, which=which: one[which]["text loss"]) for which in ("alone", "inserted")]  # type: ignore[misc]
        quality = [mean(lambda one, key=key: one["codebook"][key]) for key in ("explained variance", "dead share")]  # type: ignore[misc]
        lines.append(f"| {arm} | {' | '.join([*quality, *losses, *accuracies])} |")
    return [
        *lines,
        "",
        "*Alone* is the model without the codebook: **whoever removes the bottleneck has all topics back**, in the frozen arms as",
        "they were. Deleted codes hide a topic from those who use the model through the bottleneck; they are no edit of weights.",
        "",
    ]


def _gold(found: dict) -> list[str]:
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in found["rows"]) if arm != MAIN]
    if not arms:
        return []
    golds = [found["inserted"][f"{arms[0]} {seed}"]["gold"] for seed in found["seeds"][:1]]
    gold_accuracy = sum(golds[0][topic]["accuracy"][topic] for topic in TOPICS) / len(TOPICS)
    lines = [
        "## Against models retrained without the topic (small world)",
        "",
        "A small world's model is trained from nothing with all topics, and nine times without one of them: the gold. KL is from the",
        "gold's next-token distribution, at the topic's places and at those of the other topics; one world, so n = 1 world.",
        f"Topic accuracy of the gold models on their missing topic: {gold_accuracy:.2f}.",
        "",
        "| arm | method | topic accuracy | kept | paraphrases | topic NLL | text loss | KL, topic | KL, others |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    closer: list[str] = []
    for arm in arms:
        start = [found["inserted"][f"{arm} {seed}"]["gold"] for seed in found["seeds"]]
        topic_kl = [[one[t]["KL of inserted"][t] for t in TOPICS] for one in start]
        other_kl = [
            [sum(one[t]["KL of inserted"][o] for o in others(t)) / len(others(t)) for t in TOPICS] for one in start
        ]
        told = [_interval(topic_kl), _interval(other_kl)]
        for method in ("reselect", "zero"):
            mean, low, high = hierarchical_paired(selected(found, method, "KL", arm), topic_kl)
            word = "null" if low <= 0 <= high else "nearer to the retrained model" if mean < 0 else "further from it"
            closer.append(
                f"- {arm}, {method} minus nothing deleted, KL at the topic: {mean:+.2f} [{low:+.2f}, {high:+.2f}] ({word})."
            )
        lines.append(f"| {arm} | nothing deleted | | | | | | {' | '.join(told)} |")
        for method in ("reselect", "zero", "random codes"):
            keys = ("accuracy", "kept", "paraphrases", "loss", "text loss", "KL", "KL others")
            lines.append(f"| {arm} | {method} | {' | '.join(_mean(found, method, key, arm) for key in keys)} |")
    lines += [
        "",
        *closer,
        "",
        "### The paper's score",
        "",
        "The paper normalises: 0 is the model before codebook training, 1 the codebook model before deletion. Here the model knew",
        "every topic before, so that difference is the cost of the bottleneck and the score divides by nearly nothing; beside it",
        "the same with the retrained model as 0. Both of topic NLL, means over topics.",
        "",
        "| arm | topic NLL before training | with codebook | reselect | retrained | paper's score | score from retrained |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        ones = [found["inserted"][f"{arm} {seed}"] for seed in found["seeds"]]
        left = selected(found, "reselect", "loss", arm)
        rows = []
        for one, after in zip(ones, left):
            gold = sum(one["gold"][t]["loss"][t] for t in TOPICS) / len(TOPICS)
            before, codebook = (sum(one[w]["loss"].values()) / len(TOPICS) for w in ("original", "inserted"))
            now = sum(after) / len(after)
            rows.append(
                (before, codebook, now, gold, (now - before) / (codebook - before), (now - gold) / (codebook - gold))
            )
        cells = []
        for column in zip(*rows):
            cells.append(_interval([[value] for value in column]))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return [*lines, ""]


def _cumulative(found: dict) -> list[str]:
    lines = [
        "## One codebook, topic after topic",
        "",
        "Topics deleted one after another from the same codebook of the shipped world (amortization); each row has all deletions so",
        "far. *Seconds* are for that topic alone: discovery on cached codes and the deletion.",
        "",
        "| after deleting | codes gone | accuracy of deleted topics | share kept of the others | text loss | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for count, topic in enumerate(TOPICS, 1):
        cells = [
            "" if _nan(column[0][0]) else _interval(column, digits)
            for column, digits in zip(_after(found, count), (0, 2, 2, 3, 3))
        ]
        lines.append(f"| {topic} | {' | '.join(cells)} |")
    return [*lines, ""]


def _after(found: dict, count: int) -> list[list[list[float | int]]]:
    """By seed, once so many topics are deleted: codes gone, accuracy of these topics, share kept of the others, text loss,
    and the seconds of the last deletion."""
    gone = TOPICS[:count]
    left = [topic for topic in TOPICS[count:] if SYNONYMS.get(topic) not in gone]
    rows = []
    for seed in found["seeds"]:
        now, start = (
            found["cumulative"][f"{MAIN} {seed}"][count - 1],
            found["inserted"][f"{MAIN} {seed}"]["inserted"]["accuracy"],
        )
        stays = sum(now["accuracy"][t] / start[t] for t in left) / len(left) if left else math.nan
        rows.append(
            (now["units"], sum(now["accuracy"][t] for t in gone) / count, stays, now["text loss"], now["seconds"])
        )
    return [[[value] for value in column] for column in zip(*rows)]


def _sweeps(found: dict) -> list[str]:
    if not found["sweep"]:
        return []
    lines = [
        "## Sweeps, reselect",
        "",
        "Means over topics, intervals over seeds and topics; nothing chosen. S' is how many nearest codes discovery counts.",
        "",
        "| K | S | S' | threshold | seeds | codes deleted | topic accuracy | kept | loss increase | explained variance |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple, list[dict]] = {}
    for entry in found["sweep"]:
        groups.setdefault((entry["size"], entry["used"]), []).append(entry)
    for (size, used), entries in groups.items():
        pairs = dict.fromkeys((row["nearest"], row["threshold"]) for row in entries[0]["rows"])
        for nearest, threshold in pairs:
            cells = []
            for key in ("units", "left", "kept"):
                values = [
                    [r[key] for r in entry["rows"] if (r["nearest"], r["threshold"]) == (nearest, threshold)]
                    for entry in entries
                ]
                cells.append(_interval(values, 0 if key == "units" else 2))
            for key in ("loss increase", "explained variance"):
                cells.append(f"{sum(e['quality'][key] for e in entries) / len(entries):.3f}")
            lines.append(f"| {size} | {used} | {nearest} | {threshold:g} | {len(entries)} | {' | '.join(cells)} |")
    return [*lines, ""]


def _settings(found: dict) -> list[str]:
    lines = ["## Chosen settings", "", "On the other topics, with dictionaries of another seed.", ""]
    for arm, by_method in found["settings"].items():
        for method, by in by_method.items():
            told: dict[str, list[str]] = {}
            for topic, setting in by.items():
                plain = Setting()
                parts = [f"{k} {v:g}" for k, v in setting.items() if v != getattr(plain, k)]
                told.setdefault(", ".join(parts), []).append(topic)
            listed = "; ".join(f"{setting} ({', '.join(topics)})" for setting, topics in told.items())
            lines.append(f"- {arm}, {method}: {listed}.")
    return lines


def _nan(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
