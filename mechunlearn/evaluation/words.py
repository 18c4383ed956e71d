"""What a report says in words: its rows, its status, and sentences with the figures."""

from typing import Any

import pandas as pd

from mechunlearn.core.tables import label
from mechunlearn.evaluation.cells import GENERALIZATION, OTHER, OTHERS, UNSEEN
from mechunlearn.evaluation.damage import damage

MEANING = {
    "before": "the unedited model",
    "after": "with the edit",
    "control": "the same editor and settings on a random mask of the same kinds and weight",
    "patching": "the same editor and settings on attribution patching's largest units, of the same weight",
}
DAMAGED = "the edit has damaged the model"
STATUS = {
    "gone": "No attack that was tried brings the facts back, and there are enough facts to tell:",
    "hidden": "The model still has the facts:",
    "collapsed": "The edit has damaged the model, so nothing can be said of the facts:",
    "inconclusive": "Whether the model still has the facts cannot be told:",
    "": "Nothing has tried to bring the facts back, so whether the model still has them is open.",
}
FIRST = (
    *(("forget", "statement", metric) for metric in ("target_accuracy", "accuracy")),
    *(("retain", "statement", "accuracy"), (UNSEEN, "statement", "kept"), (OTHER, "statement", "kept")),
    *(
        ("text", format, metric)
        for metric in ("kl_to_before", "loss")
        for format in ("neutral", "own samples", "passages")
    ),
)
"""The rows to read first."""
AS_WELL = 0.1
"""The control does as well where it is behind by less than this, in efficacy and in what is kept."""
NO_LONGER = "truth that is no longer said"
EFFICACY = {"efficacy": FIRST[0], NO_LONGER: FIRST[1]}
KEPT = {"specificity": FIRST[3], "retention": FIRST[2]}


def cell(frame: pd.DataFrame, split: str, format: str, metric: str) -> pd.DataFrame:
    """Return the rows of one split, format and metric: one or none.

    Args:
        frame: `Report.frame`.
        split: Such as "forget".
        format: Such as "statement".
        metric: Such as "accuracy".
    """
    return frame[(frame[["split", "format", "metric"]] == [split, format, metric]).all(axis=1)]


def describe(split: str, format: str, metric: str) -> str:
    """Return a row of the frame in plain words.

    Args:
        split: The split.
        format: The format.
        metric: The metric.

    >>> describe("forget", "statement", "target_accuracy"), describe("text", "neutral", "kl_to_before")
    ('forget, training prompt: target', 'text, neutral: KL to before')
    """
    if split.startswith("same subject"):
        return split if format == "statement" else f"{split}, {label(format)}"
    if split == "neighbours":
        return "specificity (neighbours)"
    if metric == "kept" and split in (UNSEEN, OTHER):
        return "specificity (unseen facts)" if split == UNSEEN else "other relations (unseen facts)"
    if split == "text":
        return f"text, {label(format)}: {label(metric)}"
    asked = "training prompt" if format == "statement" and split in ("forget", "retain") else label(format)
    return f"{split}, {asked}{': target' if metric == 'target_accuracy' else ''}"


def sentences(frame: pd.DataFrame) -> str:
    """Return what the numbers of the training prompt, of other wordings, unseen facts, text and the same subjects say.

    Args:
        frame: `Report.frame`.
    """
    parts = []
    for row in cell(frame, *FIRST[0]).to_dict("records"):
        left, kept = (float(cell(frame, *FIRST[i])["after"].iloc[0]) for i in (1, 2))
        parts.append(
            f"On the training prompt {row['after']:.1%} of the forget facts now give the edit target and {left:.1%} still "
            f"the truth; {kept:.1%} of the retain facts, which the edit was shown, are right."
        )
    parts += [
        f"Asked in other ways, the model still gives the truth in {row['after']:.1%} of the cases in which it knew it"
        f"{_beside(row, '.1%')}."
        for row in cell(frame, GENERALIZATION, OTHERS, "kept").to_dict("records")
    ]
    parts += [
        f"Of {row['n']} facts that no edit saw and that were right, {row['after']:.1%} are still right"
        f"{_beside(row, '.1%')}."
        for row in cell(frame, UNSEEN, "statement", "kept").to_dict("records")
    ]
    parts += [
        f"{name} has moved by {row['after']:.3f} nats a token{_beside(row, '.3f')}."
        for format, name in (("neutral", "Neutral text"), ("own samples", "The model's own text"))
        for row in cell(frame, "text", format, "kl_to_before").to_dict("records")
    ]
    same = frame[frame.split.str.startswith("same subject") & (frame.format == "statement")]
    parts += [
        f"Of the same subjects' {row['split'].split(': ')[1]} facts, which no loss held, {row['after']:.1%} are "
        f"right (before: {row['before']:.1%}; random mask: {row['control']:.1%})."
        for row in same[same.metric == "accuracy"].to_dict("records")
    ]
    return " ".join(parts)


def against_random(frame: pd.DataFrame) -> str:
    """Return a sentence where the random mask does as well as the edit, or is damaged; empty if neither.

    Args:
        frame: `Report.frame`.
    """
    if "control" not in frame:
        return ""
    told = []
    efficacy, kept = _first_of(frame, EFFICACY), _first_of(frame, KEPT)
    if (
        efficacy
        and kept
        and efficacy[1] > AS_WELL
        and all(other > mine - AS_WELL for _, mine, other in (efficacy, kept))
    ):
        numbers = "; ".join(f"{what} {other:.2f}, the chosen mask {mine:.2f}" for what, mine, other in (efficacy, kept))
        told.append(f"A random mask of the same kinds and weight does as well: {numbers}.")
    if harm := damage(frame, "control"):
        told.append(f"On the random mask the same editor damages the model: {'; '.join(harm)}.")
    return " ".join(told)


def _first_of(frame: pd.DataFrame, measures: dict[str, tuple[str, str, str]]) -> tuple[str, float, float] | None:
    """Return the first of these measures that the report has, for the edit and for its control."""
    for name, place in measures.items():
        for row in cell(frame, *place).to_dict("records"):
            flip = name == NO_LONGER
            return name, abs(flip - float(row["after"])), abs(flip - float(row["control"]))
    return None


def _beside(row: dict[Any, Any], spec: str) -> str:
    return f" (random mask: {row['control']:{spec}})" if "control" in row else ""
