"""Agreement: how much two localizations say the same, and how well one recovers a known truth."""

from collections.abc import Mapping

import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor

from mechunlearn.artifacts.localization import Localization
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.component import Component
from mechunlearn.model.layout import Signature


def rank_correlation(one: Localization, other: Localization) -> float:
    """Measure whether two localizations put the same units first, last and in between.

    Every unit counts alike, so thousands of neurons near zero decide it: for the units that would be edited use
    `jaccard_at`.

    Args:
        one: A localization.
        other: Another of the same architecture.

    Returns:
        Spearman's correlation of |scores|, -1 to 1, over the units that both score (ties get their mean rank); NaN if
        either gives all of these the same score.

    Raises:
        MechunlearnError: For scores of different architectures, and if no site is scored by both.

    >>> from mechunlearn.localize import attribution_patching, random_units
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> found = attribution_patching(toy.model, toy.prompts())
    >>> round(rank_correlation(found, found), 6)
    1.0
    >>> abs(rank_correlation(found, random_units(toy.model))) < 0.5
    True
    """
    _check(one.signature, other.signature)
    sites = _shared(one.scores, other.scores)
    mine, theirs = (torch.cat([found.scores[site].abs() for site in sites]) for found in (one, other))
    if mine.min() == mine.max() or theirs.min() == theirs.max():
        return float("nan")
    return float(spearmanr(mine.numpy(), theirs.numpy()).statistic)


def jaccard_at(one: Localization, other: Localization, weights: float = 0.05) -> float:
    """Measure how much of the model two localizations would both edit, at one budget.

    Chance is not 0: two random masks that take a share s of the scored units overlap by about s / (2 - s), and a
    share of all editable weights is a larger one of the kinds that are scored, so compare with `random_units`. A
    localization with fewer units above zero than the budget fills up with zeros in component order, and two such
    agree on those: take a smaller budget.

    Args:
        one: A localization.
        other: Another of the same architecture.
        weights: The budget, a share of all editable weights.

    Returns:
        Units in both masks over units in either, 0 to 1, for the masks `.top(weights=weights)`; 1 if both are empty.

    Raises:
        MechunlearnError: For scores of different architectures, and for a budget outside [0, 1].

    >>> from mechunlearn.localize import random_units
    >>> from mechunlearn.world.toy import planted_facts
    >>> model = planted_facts().model
    >>> one, other = random_units(model, seed=0), random_units(model, seed=1)
    >>> jaccard_at(one, one, weights=0.05), jaccard_at(one, other, weights=0.05) < 0.4
    (1.0, True)
    """
    _check(one.signature, other.signature)
    return one.top(weights=weights).jaccard(other.top(weights=weights))


def overlap(found: Mapping[str, Localization], weights: float = 0.05) -> pd.DataFrame:
    """Compare all localizers at one budget.

    `plots.overlap_map` draws the table. What `jaccard_at` says of sparse scores holds here.

    Args:
        found: A localization by each method.
        weights: The budget, a share of all editable weights.

    Returns:
        A square table of `jaccard_at`, a row and a column for each method: symmetric, with ones on the diagonal.

    Raises:
        MechunlearnError: As `jaccard_at`, for any two.

    >>> from mechunlearn.localize import random_units
    >>> from mechunlearn.world.toy import planted_facts
    >>> model = planted_facts().model
    >>> print(overlap({f"seed {seed}": random_units(model, seed=seed) for seed in range(2)}, weights=0.05).round(2))
            seed 0  seed 1
    seed 0    1.00    0.11
    seed 1    0.11    1.00
    """
    everyone = list(found.values())
    for other in everyone[1:]:
        _check(everyone[0].signature, other.signature)
    masks = [one.top(weights=weights) for one in everyone]
    table = [[one.jaccard(other) for other in masks] for one in masks]
    return pd.DataFrame(table, index=list(found), columns=list(found), dtype=float)


def auroc(found: Localization, truth: ComponentMask | Mapping[str, Bool[Tensor, " _unit"]]) -> float:
    """Measure how well scores tell the units that are known to matter from the others.

    Only units that both cover count, and a mask covers the sites it names: a site in which nothing is true must be
    there with nothing selected, or its units are not counted as wrong. With few true units among thousands it is
    close to 1 long before the first ranks are right: look at `found.ranked()` too.

    Args:
        found: A localization.
        truth: The units that matter, as a mask or as its sites.

    Returns:
        The area under the ROC curve of |scores|: the probability that a true unit scores higher than one that is not,
        ties counting half; 1 is perfect, 0.5 is chance.

    Raises:
        MechunlearnError: For another architecture, if they share no site, and if all or none of the shared units are
            true.

    >>> from mechunlearn.localize import attribution_patching
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> truth = ComponentMask.of([toy.neuron(3)], toy.model.signature)
    >>> auroc(attribution_patching(toy.model, toy.prompts([3])), truth)
    1.0
    """
    mask = _mask(found, truth)
    sites = _shared(found.scores, mask.sites)
    scores, labels = (torch.cat([of[site] for site in sites]) for of in (found.scores, mask.sites))
    return _area(scores.abs(), labels, "units")


def layer_auroc(
    found: Localization, truth: ComponentMask | Mapping[str, Bool[Tensor, " _unit"]], kind: str = "mlp.out"
) -> float:
    """Measure how well scores tell the layers that are known to matter from the others.

    Use it where the truth is which MLPs hold a fact, not which neurons. With few layers it takes few values: read their
    number beside it. Layers count that both cover, as in `auroc`.

    Args:
        found: A localization.
        truth: The units that matter, as a mask or as its sites.
        kind: The kind of units that stand for a layer.

    Returns:
        `auroc` over layers: a layer scores the mean |score| of its units, and is true if any of them is.

    Raises:
        MechunlearnError: As `auroc`.

    >>> from mechunlearn.localize import fact_lookup
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> truth = {"L0.mlp.out": torch.ones(32, dtype=torch.bool), "L1.mlp.out": torch.zeros(32, dtype=torch.bool)}
    >>> layer_auroc(fact_lookup(toy.model, toy.prompts()), truth)
    1.0
    """
    mask = _mask(found, truth)
    sites = _shared(found.scores, mask.sites, kind)
    scores = torch.stack([found.scores[site].abs().mean() for site in sites])
    labels = torch.stack([mask.sites[site].any() for site in sites])
    return _area(scores, labels, f"layers of '{kind}'")


def _check(one: Signature, other: Signature) -> None:
    if one != other:
        raise MechunlearnError(
            f"The first is for ({one}), the second for ({other}). Expected one architecture: localize both on the same "
            "model, units of two cannot be compared."
        )


def _mask(found: Localization, truth: ComponentMask | Mapping[str, Tensor]) -> ComponentMask:
    mask = truth if isinstance(truth, ComponentMask) else ComponentMask(truth, found.signature)
    _check(found.signature, mask.signature)
    return mask


def _shared(one: Mapping[str, Tensor], other: Mapping[str, Tensor], kind: str | None = None) -> list[str]:
    """Sites in both, with equally many units, of this kind if one is given."""
    sites = [site for site in one if site in other and kind in (None, Component.parse(site).kind)]
    if not sites:
        names = [", ".join(map(str, sorted({Component.parse(s) for s in of}))) or "none" for of in (one, other)]
        raise MechunlearnError(
            f"They share no site{f' of kind {kind}' if kind else ''}: the first covers {names[0]}; the second "
            f"{names[1]}. "
            "Expected a site in both: localize with the same `kinds`."
        )
    for site in sites:
        if len(one[site]) != len(other[site]):
            raise MechunlearnError(
                f"Site '{site}' has {len(one[site])} units in the first and {len(other[site])} in the second. Expected "
                "features or codes of the same dictionary."
            )
    return sites


def _area(scores: Float[Tensor, " unit"], labels: Bool[Tensor, " unit"], what: str) -> float:
    true = int(labels.sum())
    if true in (0, len(labels)):
        raise MechunlearnError(
            f"The truth selects {true} of the {len(labels)} {what} that both cover. Expected some that are true and "
            "some "
            "that are not: give the sites in which nothing is true too, with nothing selected."
        )
    return float(roc_auc_score(labels.numpy(), scores.numpy()))
