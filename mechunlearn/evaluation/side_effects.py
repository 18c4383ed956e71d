"""Side effects in the terms of model editing: one table, each number with how many it rests on and what so many could miss."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from mechunlearn.core.tables import NOTHING, Table, label
from mechunlearn.evaluation.cells import GENERALIZATION, OTHERS, UNSEEN
from mechunlearn.evaluation.portability import ALIAS, HOP, PORTABILITY, REVERSE, aliases
from mechunlearn.evaluation.words import cell
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.metrics.stats import Estimate, share_interval

Cell = tuple[str, str, str]
"""Split, format and metric."""
FLUENCY, ENTROPY, CHANGE = "fluency", "ngram_entropy", "entropy_change"
SAME = "same subject"
TRUTH, TARGET, KEPT = "accuracy", "target_accuracy", "kept"
CHANGED = "change"
FEW = 30
"""With fewer than so many, a row says what it could have missed."""
WHY = {
    "efficacy": "there are no facts to forget",
    GENERALIZATION: "the facts have no other format",
    "specificity": "no fact is left that no edit saw",
    SAME: "the data have no other relation of these subjects",
    PORTABILITY: "the questions were not asked",
    ALIAS: "the data have no other name of an answer or a subject",
    FLUENCY: "there is none that the model could read or write",
}
"""Why a measure is missing, where nothing else is known of it."""
COLUMNS = ["term", "measured", "n", "before", "after", "low", "high", "interval_of", "power"]


def least_seen(n: int) -> float:
    """Return the smallest share of exceptions that n facts show with probability .8: in at least one of them.

    1 - .2^(1/n): it is the exact upper bound (`stats.share_interval`) of a share of which none of n is seen, at .8. A
    smaller share of facts may be lost, or kept, without any of the n facts saying so. Not for means: there it is
    `stats.Estimate.detectable`.

    Args:
        n: How many facts there are.

    >>> [round(least_seen(n), 3) for n in (1, 8, 30)]
    [0.8, 0.182, 0.052]
    """
    return share_interval(0, n, 0.6)[1]


def derived(values: Mapping[Cell, Mapping[str, Tensor]], facts: FactDataset | None) -> dict[Cell, dict[str, Tensor]]:
    """Count facts that the model knew before, and average over the formats that no edit was trained on.

    Args:
        values: What each model knows, by fact: accuracies by split, format and metric, then by edit; "before" is the
            unedited model.
        facts: The facts to forget; None if they are tokens.

    Returns:
        Further cells of the same kind. Metric "kept", of all that was to stay and of the questions of `portability`: of
        the facts that were right before, 1 where one still is. Split "generalization": of each forgotten fact the mean
        over all formats but the training prompt and those that ask for another name; of the truth only over formats in
        which it was right before. Split "portability": formats that ask for another name.

    >>> before, after = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    >>> found = derived({("retain", "statement", "accuracy"): {"before": before, "after": after}}, None)
    >>> found["retain", "statement", "kept"]["after"].tolist()
    [1.0, 0.0]
    """
    found: dict[Cell, dict[str, Tensor]] = {}
    forget = {(format, metric): known for (split, format, metric), known in values.items() if split == "forget"}
    named = aliases(facts) if facts is not None else []
    for format in named:
        found[PORTABILITY, f"{ALIAS}: {format}", TRUTH] = dict(forget[format, TRUTH])
    for (split, format, metric), known in {**values, **found}.items():
        if split != "forget" and metric == TRUTH and (right := known["before"] > 0).any():
            found[split, format, KEPT] = {name: accuracy[right] for name, accuracy in known.items()}
    others = [format for format, metric in forget if metric == TRUTH and format not in ("statement", *named)]
    size = len(forget["statement", TRUTH]["before"]) if ("statement", TRUTH) in forget else 0
    return found | _over_formats(forget, [format for format in others if len(forget[format, TRUTH]["before"]) == size])


def _over_formats(
    forget: Mapping[tuple[str, str], Mapping[str, Tensor]], formats: Sequence[str]
) -> dict[Cell, dict[str, Tensor]]:
    """The mean of each fact over formats that all facts have."""
    if not formats:
        return {}
    right = torch.stack([forget[format, TRUTH]["before"] for format in formats]) > 0
    known = right.any(0)
    target, truth = {}, {}
    for name in forget[formats[0], TRUTH]:
        target[name] = torch.stack([forget[format, TARGET][name] for format in formats]).mean(0)
        said = torch.stack([forget[format, TRUTH][name] for format in formats])
        truth[name] = (said * right).sum(0)[known] / right.sum(0)[known]
    found = {(GENERALIZATION, OTHERS, TARGET): target}
    return found | {(GENERALIZATION, OTHERS, KEPT): truth} if known.any() else found


def side_effects(frame: pd.DataFrame, notes: Mapping[str, str], column: str = "after") -> pd.DataFrame:
    """Say in the terms of model editing what an edit did, what it rests on, and what it could have missed.

    The terms are those of ROME (arXiv 2202.05262) and, for portability, of Yao et al. (arXiv 2305.13172), by greedy answers
    (the probability of one answer above another there). What was to go is measured by the edit target and by the
    truth; what was to stay, and portability, by the facts that were right before: which of them still are. It judges
    nothing: for damage and status see `Report.harm` and `Report.status`.

    Args:
        frame: `Report.frame`.
        notes: Of what is measured: an example, or why it is not.
        column: The edit: "after", "control" or the name of another.

    Returns:
        One row a measure: `term`; what it was `measured` on; `n` facts or texts; the mean `before` and `after`; the 95 %
        interval from `low` to `high`; `interval_of`, "after" (exact for shares; by bootstrap for KL), or "change" where
        each text is its own control (Student's t, of after - before); `power`, what so few could have missed, where n
        is below 30. Shares are of facts, entropies in bits, KL in nats a token. What was not measured has n = 0, no
        numbers, and its reason in `measured`.

    >>> row = {"split": "unseen", "format": "statement", "metric": "kept", "n": 8, "before": 1.0, "after": 0.5}
    >>> found = side_effects(pd.DataFrame([row | {"after_low": 0.16, "after_high": 0.84}]), {})
    >>> measured = found[found.n > 0].iloc[0]
    >>> measured.term, measured.power
    ('specificity', 'a share of .18 or more that differs shows in at least one of 8, with probability .8')
    """
    rows = [_row(frame, notes, column, *place) for place in _places(frame)]
    return Table(rows, columns=COLUMNS)


def as_text(found: pd.DataFrame) -> pd.DataFrame:
    """Return the table for readers, numbers as text.

    Args:
        found: What `side_effects` returned.
    """
    digits = [3 if "KL" in measured else 2 for measured in found["measured"]]
    shown = found[["term", "measured", "n"]].assign(
        **{name: [*map(_number, found[name], digits)] for name in ("before", "after")},
        interval=[
            f"{'change ' * (of == CHANGED)}{_number(low, d)} to {_number(high, d)}" if n and low == low else NOTHING
            for of, low, high, n, d in zip(found["interval_of"], found["low"], found["high"], found["n"], digits)
        ],
        power=found["power"],
    )
    return Table(shown)


def _number(value: float, digits: int) -> str:
    return NOTHING if pd.isna(value) else f"{value:.{digits}f}"


def _places(frame: pd.DataFrame) -> Iterator[tuple[str, str, Cell]]:
    """Each measure: its term, what it is measured on, and where it stands in the frame."""
    yield "efficacy", "edit target, training prompt", ("forget", "statement", TARGET)
    yield "efficacy", "truth, training prompt", ("forget", "statement", TRUTH)
    yield GENERALIZATION, "edit target, other formats", (GENERALIZATION, OTHERS, TARGET)
    yield GENERALIZATION, "truth, other formats, where known before", (GENERALIZATION, OTHERS, KEPT)
    yield "specificity", "unseen facts of the relation, known before", (UNSEEN, "statement", KEPT)
    same = [split for split in frame["split"].unique() if split.startswith(SAME)]
    for split in same or [SAME]:
        yield SAME, f"{split.removeprefix(f'{SAME}: ')}, known before", (split, "statement", KEPT)
    named = [f for f in frame["format"][frame["split"] == PORTABILITY].unique() if f.startswith(ALIAS)]
    for format in (REVERSE, *(named or [ALIAS]), HOP):
        yield PORTABILITY, f"{label(format)}, known before", (PORTABILITY, format, KEPT)
    written = frame["format"][frame["split"] == FLUENCY].unique()
    for format in written if len(written) else ["what the model writes"]:
        yield FLUENCY, f"n-gram entropy, {format}, bits", (FLUENCY, format, ENTROPY)
    texts = frame["format"][frame["split"] == "text"].unique()
    for format in texts if len(texts) else ["ordinary text"]:
        yield FLUENCY, f"KL to before, {format}, nats a token", ("text", format, "kl_to_before")


def _row(
    frame: pd.DataFrame, notes: Mapping[str, str], column: str, term: str, measured: str, place: Cell
) -> dict[str, Any]:
    """One measure, or why there is none."""
    split, format, metric = place
    note = notes.get(format, notes.get(term, ""))
    found = cell(frame, *place)
    if not len(found):
        asked = cell(frame, split, format, TRUTH)
        none = f"the model knew none of {asked['n'].iloc[0]}" if len(asked) else note or WHY.get(format, WHY[term])
        return {"term": term, "measured": f"{measured}: not measured, {none}", "n": 0, "interval_of": "", "power": ""}
    ends = cell(frame, FLUENCY, format, CHANGE) if metric == ENTROPY else found
    n, low, high = int(found["n"].iloc[0]), *(float(ends[f"{column}_{end}"].iloc[0]) for end in ("low", "high"))
    means = {name: float(found[of].iloc[0]) for name, of in (("before", "before"), ("after", column))}
    about = f"{measured}: {note}" if note else measured
    of = CHANGED if metric == ENTROPY else "after"
    row = {"term": term, "measured": about, "n": n, **means, "low": low, "high": high, "interval_of": of}
    return row | {"power": _power(n, low, high, share=metric in (TRUTH, TARGET, KEPT))}


def _power(n: int, low: float, high: float, share: bool) -> str:
    """What so few could have missed."""
    if n >= FEW:
        return ""
    if share:
        least = f"{least_seen(n):.2f}".removeprefix("0")
        return f"a share of {least} or more that differs shows in at least one of {n}, with probability .8"
    if n < 2:
        return "one text has no interval"
    if low == high:
        return "every text is the same as before"
    least = f"{Estimate((low + high) / 2, low, high, n - 1).detectable:.3f}"
    return f"a mean of {least} or more shows as different from 0 with {n} texts, with probability .8"
