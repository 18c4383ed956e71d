"""What the pages of reproductions show: intervals as text, differences with a verdict, tables, filled-in templates."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2
import pandas as pd

from mechunlearn.metrics.stats import hierarchical_interval, hierarchical_paired

Nested = Sequence[Sequence[float | None]]
"""Worlds of forget sets (or codebooks of topics); what was not measured is None or NaN."""


class Difference(NamedTuple):
    """How much larger one side is than the other.

    Attributes:
        mean: Over worlds, of the pairs' mean difference.
        low: Lower end of the 95 % hierarchical bootstrap interval.
        high: Upper end.
        pairs: How many pairs have both numbers.
        worlds: How many worlds the pairs are from.
    """

    mean: float
    low: float
    high: float
    pairs: int
    worlds: int


def difference(one: Nested, other: Nested) -> Difference | None:
    """Return one side minus the other over the pairs that have both numbers, or None if there are none.

    Args:
        one: Worlds of numbers.
        other: The same worlds and forget sets, in the same order; empty if nothing was measured.

    >>> difference([[1.5, 2.5], [7.0]], [[1.0, None], [7.0]])
    Difference(mean=0.25, low=0.0, high=0.5, pairs=2, worlds=2)
    """
    if not one or not other:
        return None
    pairs = [list(zip(mine, theirs, strict=True)) for mine, theirs in zip(one, other, strict=True)]
    whole = [[(a, b) for a, b in world if a is not None and b is not None and a - b == a - b] for world in pairs]
    whole = [world for world in whole if world]
    if not whole:
        return None
    mine, theirs = ([[pair[side] for pair in world] for world in whole] for side in (0, 1))
    return Difference(*hierarchical_paired(mine, theirs), sum(map(len, whole)), len(whole))


def verdict(found: Difference | None, sign: int, least: float = 0.1) -> str:
    """Return what became of a claim that a difference has this sign.

    Args:
        found: The difference, with its interval.
        sign: 1 if it is claimed to be positive, -1 if negative.
        least: The smallest difference that holds; a smaller one with the sign that was claimed is weak.

    >>> cases = (0.3, 0.2, 0.4, 9, 3), (0.05, 0.01, 0.1, 9, 3), (0.3, -0.1, 0.7, 9, 3), (0.3, 0.3, 0.3, 1, 1)
    >>> [verdict(Difference(*case), 1) for case in cases], verdict(Difference(*cases[0]), -1)
    (['holds', 'weak', 'inconclusive', 'one pair'], 'reversed')
    """
    if found is None:
        return "not measured"
    if found.low <= 0 <= found.high:
        return "inconclusive"
    if found.pairs == 1:
        return "one pair"
    if (found.mean > 0) != (sign > 0):
        return "reversed"
    return "holds" if abs(found.mean) >= least else "weak"


@dataclass(frozen=True)
class Claim:
    """A claim that a difference has a sign, and what was found.

    Attributes:
        text: The claim.
        difference: Our number.
        sign: 1 if it is claimed to be positive, -1 if negative.
        least: The smallest difference that holds.
        paper: What the paper itself reports.
        note: What must be known to read the number.
        unit: What the intervals are over.
    """

    text: str
    difference: Difference | None
    sign: int
    least: float = 0.1
    paper: str = ""
    note: str = ""
    unit: str = "worlds"

    @property
    def verdict(self) -> str:
        """What became of the claim."""
        return verdict(self.difference, self.sign, self.least)

    @property
    def n(self) -> str:
        """How many pairs, and of how many worlds."""
        return f"{self.difference.pairs} pairs, {self.difference.worlds} {self.unit}" if self.difference else "0"


def shown(numbers: Sequence[float] | None, form: str = ".2f") -> str:
    """Return a mean and its interval as text.

    Args:
        numbers: Mean, lower and upper end; None if nothing was measured.
        form: How each number is written.

    >>> shown((0.5, 0.25, 1.0)), shown((0.5, 0.25, 1.0), "+.3g"), shown(None)
    ('0.50 [0.25, 1.00]', '+0.5 [+0.25, +1]', '–')
    """
    return "–" if numbers is None else "{0:{3}} [{1:{3}}, {2:{3}}]".format(*numbers[:3], form)


def interval(values: Nested, form: str = ".2f") -> str:
    """Return the mean of what was measured and its 95 % hierarchical bootstrap interval as text.

    Args:
        values: Worlds of numbers.
        form: How each number is written.

    >>> interval([[1.0, None], [0.0, 0.0]], ".1f"), interval([[None]])
    ('0.5 [0.0, 1.0]', '–')
    """
    kept = [[value for value in world if value is not None and value == value] for world in values]
    kept = [world for world in kept if world]
    return shown(hierarchical_interval(kept) if kept else None, form)


def table(lines: str) -> str:
    r"""Return a markdown table.

    Args:
        lines: Its rows, cells separated by `|`; the first one names the columns. Empty lines are left out.

    >>> print(table("method | kept\nIHL | 0.75 [0.5, 1]"))
    | method   | kept          |
    |:---------|:--------------|
    | IHL      | 0.75 [0.5, 1] |
    """
    columns, *rows = ([cell.strip() for cell in line.split("|")] for line in lines.splitlines() if line.strip())
    return str(pd.DataFrame(rows, columns=columns).to_markdown(index=False, disable_numparse=True))


def render(template: str, **numbers: Any) -> str:
    """Return a page: a template of `templates/`, filled in.

    Args:
        template: Its name without `.md.jinja`.
        numbers: What the template needs.
    """
    text = _TEMPLATES.get_template(f"{template}.md.jinja").render(numbers)
    return re.sub(r"\n\s*\n", "\n\n", text).strip() + "\n"


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("mechunlearn.reproduce"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters.update({"shown": shown, "interval": interval, "table": lambda lines: f"{table(lines)}\n"})
