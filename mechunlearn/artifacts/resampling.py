"""How sure a score is, from its values by fact: facts are drawn again, their signs flipped, or split into halves.

`metrics.stats` has the intervals of single numbers; this is the same for every unit of a model at once.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from mechunlearn.errors import MechunlearnError

RESAMPLES = 2000
FEWEST = 8  # facts, below which a bootstrap misses the truth more than twice as often as it says (`paired_interval`)
EXACT = 12  # facts, up to which all sign flips are counted: half of 2^12 is about RESAMPLES
LARGEST, SPLITS = 10, 50
MOST = 2**28  # bytes of values by fact that a result keeps
CHUNK = 2**23  # numbers that are resampled at a time


def fits(facts: int, numbers: int) -> bool:
    """Return whether a result keeps its values by fact: as float32 they take at most 256 MiB.

    Args:
        facts: How many facts there are.
        numbers: How many values each has.

    >>> fits(64, 60_000), fits(64, 2_000_000)
    (True, False)
    """
    return 4 * facts * numbers <= MOST


def checked_facts(values: Tensor | None, mean: Float[Tensor, "..."], what: str) -> Float[Tensor, "fact ..."]:
    """Return values by fact, as float32 on the CPU, if they are those of their mean.

    Args:
        values: `[fact ...]`, with an entry for each of `mean`, or one for all.
        mean: What they should average to.
        what: What they are of, for the message.

    Raises:
        MechunlearnError: If they have another shape or mean.
    """
    if isinstance(values, Tensor) and values.ndim == mean.ndim + 1 and len(values):
        facts = values.detach().float().cpu()
        near = 1e-6 + 1e-3 * facts.abs().mean(0)
        if facts.shape[1:] in (mean.shape, (1,)) and ((facts.mean(0) - mean).abs() <= near).all():
            return facts.expand(len(facts), *mean.shape)
    raise MechunlearnError(
        f"Scores by fact of {what} must be a tensor [fact ...] with the scores as its mean. Give both, or none by fact "
        "with scores that are no mean over facts."
    )


def packed(values: Tensor | None) -> dict[str, Tensor]:
    """Return values by fact as a file holds them, without what is zero for every fact; nothing for None.

    Args:
        values: `[fact ...]`, or None.
    """
    if values is None:
        return {}
    scored = (values != 0).any(0)
    return {"by_fact": values[:, scored], "scored": scored}


def unpacked(held: Mapping[str, Tensor]) -> Tensor | None:
    """Return what `packed` was given.

    Args:
        held: The tensors of a file.

    Raises:
        MechunlearnError: If they claim more than a result keeps.

    >>> unpacked(packed(torch.tensor([[0.0, 2.0], [0.0, 3.0]])))
    tensor([[0., 2.],
            [0., 3.]])
    """
    if "by_fact" not in held:
        return None
    values, scored = held["by_fact"], held["scored"]
    if not fits(len(values), scored.numel()):
        raise MechunlearnError(f"{len(values)} facts of {scored.numel()} scores are more than a result keeps (256 MiB)")
    whole = torch.zeros(len(values), *scored.shape)
    whole[:, scored] = values
    return whole


def needed(values: Tensor | None, method: str, others: str) -> Tensor:
    """Return values by fact, or refuse where there are none.

    Args:
        values: By fact, or None.
        method: What found the scores.
        others: The methods that give them.

    Raises:
        MechunlearnError: If there are none.
    """
    if values is None:
        raise MechunlearnError(
            f"{method} gave no scores by fact, or too many to keep (over 256 MiB), so nothing says how far they vary. "
            f"Use {others}, or fewer facts."
        )
    return values


def columns(values: Float[Tensor, "fact unit"]) -> tuple[Float[Tensor, "fact column"], Int[Tensor, " unit"]]:
    """Give the columns of a table, of equal neighbours only the first: the units of a block share their values.

    Args:
        values: By fact and unit.

    Returns:
        The columns that differ from the one before, and for each unit the index of its column.

    >>> columns(torch.tensor([[1.0, 1.0, 2.0]]))
    (tensor([[1., 2.]]), tensor([0, 0, 1]))
    """
    first = torch.ones(values.shape[1], dtype=torch.bool)
    first[1:] = (values[:, 1:] != values[:, :-1]).any(0)
    return values[:, first], first.cumsum(0) - 1


def _drawn(facts: int, seed: int) -> NDArray[Any]:
    """The weight of each fact in each resample; the draws are those of `metrics.stats.bootstrap_interval`."""
    chosen = np.random.default_rng(seed).integers(0, facts, (RESAMPLES, facts))
    places = chosen + facts * np.arange(RESAMPLES)[:, None]
    return np.bincount(places.ravel(), minlength=RESAMPLES * facts).reshape(RESAMPLES, facts) / facts


def _flips(facts: int, seed: int) -> NDArray[Any]:
    """Signs of the facts: half of all there are for few facts (the other half mirrors it), else random ones."""
    if facts <= EXACT:
        bits = np.arange(2 ** (facts - 1))[:, None] >> np.arange(facts)
    else:
        bits = np.random.default_rng(seed).integers(0, 2, (RESAMPLES, facts))
    return 1.0 - 2.0 * (bits & 1)


def uncertainty(values: Float[Tensor, "fact unit"], seed: int = 0) -> dict[str, NDArray[Any]]:
    """Compute how sure the mean over facts is, for every unit.

    With x_i the n values of a unit and m their mean: se = sqrt(sum (x_i - m)^2 / (n - 1) / n); low and high are the 2.5
    and 97.5 % quantiles of the mean over 2,000 resamples of the facts (percentile bootstrap: Efron 1979); p is the
    share of sign flips s with |sum s_i x_i| >= |sum x_i| (Fisher 1935; Winkler et al. 2014), over all 2^n for 12 facts
    or fewer, else (1 + b) / (1 + 2,000) with b of 2,000 random ones (Phipson and Smyth 2010).

    Args:
        values: By fact and unit, two facts or more.
        seed: Draws the resamples and the flips, the same for all units.

    Returns:
        `se`, `low`, `high` and `p`, a number a unit.

    Raises:
        MechunlearnError: If there are fewer than two facts.

    >>> {name: one.round(2).tolist() for name, one in uncertainty(torch.tensor([[1.0], [2.0], [3.0]])).items()}
    {'se': [0.58], 'low': [1.0], 'high': [3.0], 'p': [0.25]}
    """
    facts = len(values)
    if facts < 2:
        raise MechunlearnError("One fact says nothing of how scores differ between facts. Give the localizer more.")
    kept, place = columns(values)
    weights, signs = _drawn(facts, seed), _flips(facts, seed)
    found: list[NDArray[Any]] = []
    for part in kept.T.split(max(1, CHUNK // RESAMPLES)):
        x = part.double().numpy()
        low, high = np.quantile(x @ weights.T, (0.025, 0.975), axis=1)
        total = np.abs(x.sum(1)) - 1e-12 * np.abs(x).sum(1)  # sums in another order differ by as much
        as_large = (np.abs(x @ signs.T) >= total[:, None]).sum(1)
        p = as_large / len(signs) if facts <= EXACT else (1 + as_large) / (1 + RESAMPLES)
        found.append(np.stack([x.std(1, ddof=1) / np.sqrt(facts), low, high, p]))
    return dict(zip(("se", "low", "high", "p"), np.concatenate(found, 1)[:, place.numpy()], strict=True))


def steadiness(values: Float[Tensor, "fact unit"], first: int, seed: int = 0) -> Float[Tensor, " unit"]:
    """Compute how often each unit keeps its sign and is among the largest when facts are drawn again.

    Args:
        values: By fact and unit.
        first: How many units are the largest; of units that tie with the last of them all count.
        seed: Draws the resamples.

    Returns:
        The share of 2,000 resamples in which the mean has the sign of the mean over all facts, and one of the `first`
        largest sizes.

    Raises:
        MechunlearnError: If there are fewer than 8 facts.

    >>> steadiness(torch.tensor([[3.0, 1.0, -1.0]] * 8), first=1)
    tensor([1., 0., 0.])
    """
    if len(values) < FEWEST:
        raise MechunlearnError(
            f"Resamples of {len(values)} facts say too little of what is stable. Expected {FEWEST} facts or more: give "
            "the localizer more, or leave stable= out."
        )
    kept, place = columns(values)
    x, whole = kept.float().numpy(), len(place)
    mean, held = x.mean(0), np.zeros(x.shape[1])
    if not 0 < first <= whole:
        return torch.zeros(whole)
    weights = _drawn(len(values), seed).astype(np.float32)
    for start in range(0, RESAMPLES, max(1, CHUNK // whole)):
        means = weights[start : start + max(1, CHUNK // whole)] @ x
        sizes = np.abs(means)
        units = sizes if len(mean) == whole else sizes[:, place.numpy()]
        least = np.partition(units, whole - first, axis=1)[:, whole - first, None]
        held += ((sizes >= least) & (means * mean > 0)).sum(0)
    return torch.tensor(held / RESAMPLES, dtype=torch.float32)[place]


def halves(values: Float[Tensor, "fact unit"], what: str = "scores") -> str:
    """Say how many of the largest scores random halves of the facts share.

    Of both halves the 10 scores of largest size are taken (fewer where fewer than 20 differ: half of them), and the
    number in both is averaged over 50 random splits (seed 0). Neighbouring units that share their values, such as the
    neurons of an MLP that was patched as a whole, count once. Halves have half the facts, so all facts agree better
    with as many others than this says. By chance k of N scores share k^2 / N.

    Args:
        values: By fact and unit.
        what: What they are called in the sentence.

    Returns:
        A sentence for `note`; empty for fewer than 8 facts, or where nothing was found or compared.

    >>> halves(torch.tensor([[3.0, 1.0, 2.0, -9.0]] * 8))
    'halves of the 8 facts share 2.0 of the 2 largest scores'
    """
    kept, _ = columns(values)
    facts, count = len(kept), min(LARGEST, kept.shape[1] // 2)
    if facts < FEWEST or not count or not kept.any():
        return ""
    order = np.random.default_rng(0).permuted(np.tile(np.arange(facts), (SPLITS, 1)), axis=1)
    one = torch.zeros(SPLITS, facts).scatter_(1, torch.tensor(order[:, : facts // 2]), 1.0)
    tops = torch.zeros(2, SPLITS, kept.shape[1], dtype=torch.bool)
    for top, half in zip(tops, (one, 1 - one), strict=True):
        top.scatter_(1, (half / half.sum(1, keepdim=True) @ kept).abs().topk(count, dim=1).indices, True)
    shared = float((tops[0] & tops[1]).sum()) / SPLITS
    return f"halves of the {facts} facts share {shared:.1f} of the {count} largest {what}"
