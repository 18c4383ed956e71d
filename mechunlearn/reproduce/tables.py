"""What the pages of reproductions show: intervals as text, differences with a verdict, tables, filled-in templates."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jinja2
import pandas as pd

from mechunlearn.metrics.stats import Estimate, holm, over_crossed, over_worlds

OURS = "ours"
"""Begins what is said of the paper's own numbers where the claim is not the paper's."""
Nested = Sequence[Sequence[float | None]]
"""Worlds of forget sets (or codebooks of topics); what was not measured is None or NaN."""


class Difference(NamedTuple):
    """How much larger one side is than the other.

    Attributes:
        mean: Over worlds, of the pairs' mean difference.
        low: Lower end of the 95 % interval of Student's t over worlds.
        high: Upper end.
        pairs: How many pairs have both numbers.
        worlds: How many worlds the pairs are from.
        df: The degrees of freedom of the interval.
    """

    mean: float
    low: float
    high: float
    pairs: int
    worlds: int
    df: float

    @property
    def estimate(self) -> Estimate:
        """The mean, with what its interval says."""
        return Estimate(self.mean, self.low, self.high, self.df)


def difference(one: Nested, other: Nested, *, crossed: bool = False) -> Difference | None:
    """Return one side minus the other over the pairs that have both numbers, or None if there are none.

    Args:
        one: Worlds of numbers.
        other: The same worlds and forget sets, in the same order; empty if nothing was measured.
        crossed: Whether what is in a world is the same in all (topics, of codebooks), and drawn like them.

    >>> found = difference([[1.5, 2.5], [7.0]], [[1.0, None], [7.0]])
    >>> found.mean, round(found.low, 2), found.pairs, found.worlds, found.df
    (0.25, -2.93, 2, 2, 1)
    """
    if not one or not other:
        return None
    pairs = [list(zip(mine, theirs, strict=True)) for mine, theirs in zip(one, other, strict=True)]
    whole = [[a - b for a, b in world if a is not None and b is not None and a - b == a - b] for world in pairs]
    found = estimate([world for world in whole if world], crossed)
    if found is None:
        return None
    return Difference(*found[:3], sum(map(len, whole)), sum(map(bool, whole)), found.df)


def estimate(worlds: Sequence[Sequence[float]], crossed: bool = False) -> Estimate | None:
    """Return a mean with the interval of Student's t over worlds, or of a full table over both factors.

    Args:
        worlds: What was measured; no world is empty. None at all gives None.
        crossed: Whether what is in a world is the same in all.
    """
    if not worlds:
        return None
    full = len(worlds) > 1 and len({len(world) for world in worlds}) == 1 and len(worlds[0]) > 1
    return over_crossed(worlds) if crossed and full else over_worlds(worlds)


def verdict(found: Difference | None, sign: int, least: float = 0.1, p: float | None = None) -> str:
    """Return what became of a claim that a difference has this sign: one of five words, or "not measured".

    Args:
        found: The difference, with its interval.
        sign: 1 if it is claimed to be positive, -1 if negative.
        least: The smallest difference that matters, either way; 0 if any does.
        p: The p-value of the difference being 0, corrected for the number of claims. None takes its own.

    >>> cases = (0.3, 0.2, 0.4), (0.05, 0.01, 0.09), (0.3, -0.1, 0.7), (0.01, -0.02, 0.04)
    >>> said = [verdict(Difference(*case, 9, 3, 2), 1) for case in cases]
    >>> said, verdict(Difference(*cases[0], 9, 3, 2), -1), verdict(Difference(*cases[0], 9, 3, 2), 1, p=0.06)
    (['holds', 'weak', 'inconclusive', 'equivalent'], 'reversed', 'inconclusive')
    """
    if found is None:
        return "not measured"
    own = found.estimate
    if (own.p if p is None else p) <= 0.05:
        if abs(found.mean) < least:
            return "weak"
        return "holds" if (found.mean > 0) == (sign > 0) else "reversed"
    return "equivalent" if own.within(least) else "inconclusive"


@dataclass(frozen=True)
class Claim:
    """A claim that a difference has a sign, and what was found.

    Attributes:
        text: The claim.
        difference: Our number.
        sign: 1 if it is claimed to be positive, -1 if negative.
        least: The smallest difference that matters.
        paper: What the paper itself reports; `OURS`, with a reason or none, if it does not claim this.
        note: What must be known to read the number.
        unit: What the intervals are over.
        p: The p-value of the difference being 0, corrected for the number of claims (`corrected`).
        apart: How many pairs are vacuous, and not in the difference.
    """

    text: str
    difference: Difference | None
    sign: int
    least: float = 0.1
    paper: str = OURS
    note: str = ""
    unit: str = "worlds"
    p: float | None = None
    apart: int = 0

    @property
    def verdict(self) -> str:
        """What became of the claim."""
        return verdict(self.difference, self.sign, self.least, self.p)

    @property
    def said(self) -> str:
        """The verdict as the tables show it: an inconclusive one with the difference that could have been seen."""
        if self.verdict != "inconclusive" or self.difference is None or self.difference.df <= 0:
            return f"**{self.verdict}**"
        return f"**inconclusive** (could see {self.difference.estimate.detectable:.2g})"

    @property
    def n(self) -> str:
        """How many pairs, and of how many worlds; how many more are vacuous."""
        pairs = f"{self.difference.pairs} pairs, {self.difference.worlds} {self.unit}" if self.difference else "0"
        return pairs + (f"; {self.apart} vacuous" if self.apart else "")


def corrected(claims: Sequence[Claim]) -> list[Claim]:
    """Return the claims of a page with p-values corrected for their number (Holm): the paper's own, and ours apart.

    Args:
        claims: All claims of the page.

    >>> one = Claim("a is larger", Difference(0.3, 0.2, 0.4, 9, 3, 2), 1)
    >>> [claim.verdict for claim in corrected([one, one])], corrected([one] * 20)[0].verdict
    (['holds', 'holds'], 'inconclusive')
    """
    found: dict[int, float] = {}
    for ours in (True, False):
        every = [i for i, claim in enumerate(claims) if claim.paper.startswith(OURS) == ours]
        family = [i for i in every if (pair := claims[i].difference) and pair.df > 0]
        p = holm([claims[i].difference.estimate.p for i in family])  # type: ignore[union-attr]
        found |= dict(zip(family, p.tolist(), strict=True))
    return [replace(claim, p=found.get(i, 1.0)) for i, claim in enumerate(claims)]


def shown(numbers: Sequence[float] | None, form: str = ".2f") -> str:
    """Return a mean and its interval as text.

    Args:
        numbers: Mean, lower and upper end (NaN for a single number, which has none); None if nothing was measured.
        form: How each number is written.

    >>> shown((0.5, 0.25, 1.0)), shown((0.5, 0.25, 1.0), "+.3g"), shown(None)
    ('0.50 [0.25, 1.00]', '+0.5 [+0.25, +1]', '–')
    """
    if numbers is None:
        return "–"
    return (
        f"{numbers[0]:{form}}" if numbers[1] != numbers[1] else "{0:{3}} [{1:{3}}, {2:{3}}]".format(*numbers[:3], form)
    )


def interval(values: Nested, form: str = ".2f", crossed: bool = False) -> str:
    """Return the mean of what was measured and its 95 % interval as text.

    Args:
        values: Worlds of numbers.
        form: How each number is written.
        crossed: Whether what is in a world is the same in all.

    >>> interval([[1.0, None], [0.0, 0.5]], ".1f"), interval([[None]]), interval([[0.5]])
    ('0.6 [-4.1, 5.4]', '–', '0.50')
    """
    kept = [[value for value in world if value is not None and value == value] for world in values]
    return shown(estimate([world for world in kept if world], crossed), form)


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
