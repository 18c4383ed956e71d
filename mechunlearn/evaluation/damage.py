"""Has an edit damaged the model? Judged by facts that no edit saw and by ordinary text.

Facts that an editor was trained to keep say little: it kept them because it was shown them. If even these are lost, that
counts; that they stay counts for nothing.
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from mechunlearn.attack.states import GATE
from mechunlearn.evaluation.cells import UNSEEN

DAMAGED_KL = 0.5
"""Nats a token. At half a nat the model gives each next word that it would have said exp(-.5) = .61 of its probability, on
geometric average. Edits whose text still reads well move it by .02 to .2; those that wreck it by 4 and more."""
DAMAGED_LOSS = 0.5
"""Nats a token by which the loss of ordinary text rises: a perplexity that is 1.65 times as high."""
LEAST = 8
"""Facts that were right before, at least, for a share of them to say anything."""


def damage(frame: pd.DataFrame, column: str = "after") -> list[str]:
    """Return what an edit has damaged, a phrase with its numbers for each; empty if no damage is seen.

    Facts: fewer than .9 of those that were right before are right. It takes at least 8 such facts. Text: the
    next-token distribution moved by more than `DAMAGED_KL`, or the loss rose by more than `DAMAGED_LOSS`.

    Args:
        frame: `Report.frame`.
        column: The edited model that is judged: a column of the frame.

    >>> rows = [("unseen", "statement", "kept", 24, 1.0, 0.29), ("text", "neutral", "kl_to_before", 42, 0.0, 3.93)]
    >>> damage(pd.DataFrame(rows, columns=["split", "format", "metric", "n", "before", "after"]))
    ['29% of 24 unseen facts that were right are still right', 'neutral text moved by 3.93 nats a token']
    """
    found = []
    for row in frame.to_dict("records"):
        before, after = row["before"], row[column]
        retained = (row["split"], row["format"], row["metric"]) == ("retain", "statement", "accuracy")
        if _judges(row) and after < GATE * before:
            what = "unseen facts" if row["split"] == "unseen" else "unseen facts of other relations"
            found.append(f"{after:.0%} of {row['n']} {what} that were right are still right")
        elif retained and after < GATE * before:
            found.append(f"{after:.1%} of the retain facts are right (before: {before:.1%})")
        elif row["split"] == "text":
            name = {"neutral": "neutral text", "own samples": "the model's own text"}.get(
                row["format"], "the facts' text"
            )
            if row["metric"] == "kl_to_before" and not after <= DAMAGED_KL:
                found.append(f"{name} moved by {after:.2f} nats a token")
            if row["metric"] == "loss" and not after <= before + DAMAGED_LOSS:
                found.append(f"the loss of {name} rose from {before:.2f} to {after:.2f} nats a token")
    return found


def harm_was_measured(frame: pd.DataFrame) -> bool:
    """Return whether damage could have been seen: on enough facts that no edit saw, or on ordinary text.

    Args:
        frame: `Report.frame`.
    """
    return any(row["split"] == "text" or _judges(row) for row in frame.to_dict("records"))


def _judges(row: Mapping[Any, Any]) -> bool:
    """Whether a row says how many unseen facts an edit keeps, and of enough of them."""
    return row["split"].startswith(UNSEEN) and row["metric"] == "kept" and bool(row["n"] >= LEAST)
