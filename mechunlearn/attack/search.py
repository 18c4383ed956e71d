"""Find the budget of an attack that trains: the learning rates at which it teaches facts that the model does not know."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from mechunlearn.attack.states import NEVER_TAUGHT, SEARCHED, UNEDITED, Attack, Row, State, never_taught
from mechunlearn.core.progress import track
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import PAD
from mechunlearn.metrics.answers import with_answers

KEY = ("method", "lr", "steps")
TEACHES = 0.9
"""The share of the facts trained on that a budget must teach."""
HALF = 10**0.5
"""Half a decade."""


@dataclass(frozen=True, order=True)
class Budget:
    """How hard an attack trains.

    Args:
        method: What is trained, such as "lora".
        lr: The learning rate.
        steps: The number of optimiser steps.
    """

    method: str
    lr: float
    steps: int


Curve = Callable[[State, Budget], Sequence[Row]]


def find_budgets(
    attack: Attack,
    curve: Curve,
    rates: Mapping[str, Sequence[float]],
    steps: Sequence[int],
    given: Sequence[Budget] | None = None,
    earlier: pd.DataFrame | None = None,
) -> tuple[list[Budget], list[Row]]:
    """Find the budgets of an attack on the unedited model; edits have no part in it, so they can share what is found.

    Facts that the model does not know are the never-taught facts, if the data set has some. Otherwise the forget facts
    stand in, each with its foil (the answer of its corrupt partner) for the truth: no model was taught that, and it is
    harder to teach, because the truth is in the way.

    Args:
        attack: The attack.
        curve: Trains a state with a budget, and returns its rows.
        rates: Learning rates by method (see `searched`).
        steps: Numbers of steps.
        given: Budgets that the caller gave: nothing is searched then.
        earlier: Rows of an earlier call, whose budgets are taken, as are those of the attack's `baseline_rows`.

    Returns:
        The budgets, and the rows of all that were tried, under the state "search".

    Raises:
        MechunlearnError: If there are no never-taught facts, and forget facts have no foil.
    """
    if given is not None:
        return list(given), []
    if attack.baseline_rows is not None:
        earlier = attack.baseline_rows
    if earlier is not None:
        return _budgets_of(earlier), []
    unknown = never_taught(attack.model, attack.forget, attack.seed)
    if unknown is None:
        if not (attack.forget.foils != PAD).any(1).all():
            raise MechunlearnError(
                f"{attack.method} searches its learning rates on facts that the model does not know, and there are none "
                "to be had: the data set has no never-taught facts, and all facts of a relation have the same answer. "
                "Give learning rates (lrs), or facts with other answers."
            )
        unknown = with_answers(attack.forget, "foils")
    state, budgets = State(SEARCHED, attack.model, None, unknown), list[Budget]()

    def trying() -> Generator[Sequence[Row], None, None]:
        budgets.extend((yield from searched(lambda budget: curve(state, budget), rates, steps, attack.min_retention)))

    title = f"{attack.method.replace('_', ' ')}, {SEARCHED}"
    rows = [row for made in track(trying(), title, progress=attack.progress) for row in made]
    return budgets, rows


def searched(
    curve: Callable[[Budget], Sequence[Row]],
    rates: Mapping[str, Sequence[float]],
    steps: Sequence[int],
    min_retention: float,
) -> Generator[Sequence[Row], None, list[Budget]]:
    """Try budgets from coarse to fine, and return those that teach.

    A budget teaches if at a step after 0 it gives .9 or more of the facts that it trains on (`trained`), and the
    retain facts pass the gate. `rates`, a decade apart, are tried from the smallest to the first that teaches, or that
    breaks the model at every step though a smaller one did not; then the rates half a decade below and above the first
    that teaches, or the one between too weak and too strong. (A prefix of random vectors disturbs a model until it is
    trained, so the smallest rate may break it too.) If nothing teaches in `steps[0]` steps, the next number is tried.

    Args:
        curve: Trains with a budget, and returns its rows.
        rates: Learning rates by method, ascending.
        steps: Numbers of steps, ascending.
        min_retention: The gate.

    Yields:
        The rows of one budget after another.

    Returns:
        At most two budgets a method, the gentlest and the strongest that teach. Where none does: the one that taught
        most.
    """
    chosen: list[Budget] = []
    for method, decades in rates.items():
        taught: dict[Budget, float] = {}
        for count in steps:
            share, weak, budget = -1.0, -1.0, Budget(method, decades[0], count)
            for lr in decades:
                budget = Budget(method, lr, count)
                weak, share = max(weak, share), (yield from _taught(curve, budget, min_retention))
                taught[budget] = share
                if share >= TEACHES or (share < 0 <= weak):
                    break
            between = [budget.lr / HALF] * (share >= TEACHES or share < 0 <= weak)
            between += [budget.lr * HALF] * (share >= TEACHES)
            for budget in (Budget(method, lr, count) for lr in between):
                taught[budget] = yield from _taught(curve, budget, min_retention)
            if max(taught.values()) >= TEACHES:
                break
        able = sorted(budget for budget, share in taught.items() if share >= TEACHES)
        able = able or [max(taught, key=lambda budget: (taught[budget], -budget.lr))]
        chosen += dict.fromkeys((able[0], able[-1]))
    return chosen


def _taught(
    curve: Callable[[Budget], Sequence[Row]], budget: Budget, min_retention: float
) -> Generator[Sequence[Row], None, float]:
    """Yield the rows of a budget, and return the largest share that it teaches; -1 if it breaks the model throughout."""
    rows = curve(budget)
    yield rows
    kept = [row["trained"] for row in rows if row["step"] > 0 and row["retain"] >= min_retention]
    return max(kept, default=-1.0)


def never_taught_rows(tried: Sequence[Row], budgets: Sequence[Budget]) -> list[list[Row]]:
    """Return the rows of the budgets as those of the never-taught state: the search has trained on the same facts.

    Args:
        tried: The rows of the search.
        budgets: The budgets that were chosen.
    """
    return [
        [row | {"state": NEVER_TAUGHT} for row in tried if Budget(row["method"], row["lr"], row["steps"]) == budget]
        for budget in budgets
    ]


def _budgets_of(rows: pd.DataFrame) -> list[Budget]:
    """The budgets that an earlier call ran."""
    if not {"state", *KEY} <= set(rows) or not (rows["state"] == UNEDITED).any():
        raise MechunlearnError(
            f"Budgets are taken from rows that an attack which trains has returned, with its unedited model ({UNEDITED}). "
            f"These have the columns {', '.join(map(str, rows)) or '(none)'}. Give such rows, or none: they are searched."
        )
    mine = rows[rows["state"] == UNEDITED][list(KEY)].drop_duplicates()
    return [Budget(str(method), float(lr), int(steps)) for method, lr, steps in mine.itertuples(index=False)]
