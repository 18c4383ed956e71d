"""Attribution patching: every unit's effect from two forward passes and one backward pass."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.components import SCORED, Localization
from mechunlearn.hooked import HookedModel
from mechunlearn.metrics import Metric, logit_diff
from mechunlearn.prompts import Prompts
from mechunlearn.runcard import RunCard, Stopwatch
from mechunlearn.scores import localization


def attribution_patching(
    model: HookedModel,
    prompts: Prompts,
    *,
    metric: Metric = logit_diff,
    kinds: Sequence[str] = SCORED,
    batch: int = 32,
) -> Localization:
    """Estimate how the metric changes when each head or neuron takes its corrupt activation.

    The score of a unit is (corrupt - clean) . d metric / d clean, summed over positions, averaged over facts
    (Nanda 2023; arXiv 2310.10348 for its error). It is exact where the metric is linear in the activation; behind
    saturated softmaxes or normalisation it can be far off: check the largest by exact patching.
    Cost: two forward passes and one backward pass of each batch.

    >>> from mechunlearn.toy import planted_facts
    >>> toy = planted_facts()
    >>> attribution_patching(toy.model, toy.prompts([1]), kinds=["mlp.out"]).ranked()[0]
    L0.mlp.out[1]
    """
    watch = Stopwatch()
    sites = [f"L{layer}.{kind}" for layer in range(model.signature.layers) for kind in kinds]
    totals: dict[str, Tensor] = {}
    for rows in torch.arange(len(prompts)).split(batch):
        for site, score in _batch_scores(model, prompts.select(rows), sites, metric).items():
            totals[site] = totals[site] + score if site in totals else score
    card = RunCard(
        "attribution_patching",
        model=model.fingerprint,
        data=prompts.fingerprint,
        settings={"metric": metric.__name__, "kinds": list(kinds)},
        device=str(model.device),
    )
    return localization(model, {site: total / len(prompts) for site, total in totals.items()}, watch.stamp(card))


def _batch_scores(
    model: HookedModel, prompts: Prompts, sites: list[str], metric: Metric
) -> dict[str, Float[Tensor, " _unit"]]:
    """Scores summed over the facts of a batch. Padding is the same in both runs and after every answer: it adds zero."""
    _, corrupt = model.cache(prompts.corrupt, sites)
    logits, clean = model.cache(prompts.tokens, sites, grad=True)
    gradients = torch.autograd.grad(metric(logits, prompts).sum(), [clean[site] for site in sites])
    scores = {}
    for site, gradient in zip(sites, gradients, strict=True):
        effect = (corrupt[site] - clean[site].detach()) * gradient
        scores[site] = effect.flatten(3).sum((0, 1, 3)) if effect.ndim == 4 else effect.sum((0, 1))
    return scores
