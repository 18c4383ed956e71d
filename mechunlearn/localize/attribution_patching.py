"""Attribution patching: every unit's effect from two forward passes and one backward pass."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mechunlearn.artifacts.localization import Localization
from mechunlearn.core.batches import in_batches
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import Metric, logit_diff, per_fact, positions_read
from mechunlearn.model.component import SCORED
from mechunlearn.model.hooked import HookedModel
from mechunlearn.patching.corruption import unchanged
from mechunlearn.patching.gradients import differentiated
from mechunlearn.patching.relevance import relevance_rules
from mechunlearn.patching.scores import from_effects, localizer
from mechunlearn.patching.sweep import Effects, check_kinds, effects, rows_of

RULES = ("gradient", "relp")


@localizer
def attribution_patching(
    model: HookedModel,
    prompts: Prompts,
    *,
    metric: Metric = logit_diff,
    kinds: Sequence[str] = SCORED,
    by: str | None = None,
    ig_steps: int = 0,
    rule: str = "gradient",
    verify: int = 0,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Localization:
    """Estimate how the metric changes when each head, neuron or stream takes its corrupt activation.

    The score of a unit is (corrupt - clean) . d metric / d activation, summed over positions, averaged over facts
    (Nanda 2023; arXiv 2310.10348 for its error), the gradient taken at the clean run. It estimates
    `activation_patching`: exact where the metric is linear in the activation, and far off where a softmax or norm
    behind it is saturated.
    Cost: two forward passes and one backward pass of each batch (1 + m of each with `ig_steps=m`).

    Args:
        model: The model.
        prompts: The facts.
        metric: A function of `(logits, prompts)`, one number a fact.
        kinds: Kinds of activations, as in `activation_patching`.
        by: `role` or `position`: score each token role or position too, as in `activation_patching`.
        ig_steps: m > 0 averages the gradient over m left Riemann points of the embeddings from corrupt to clean
            (integrated gradients, arXiv 2403.17806).
        rule: `gradient`, or `relp` for RelP's (arXiv 2508.21258), which freezes norms and attention patterns and so
            survives saturation better, but sees nothing that acts by a pattern.
        verify: Measure so many units with the largest |score| exactly and put the result in place of the estimate, as
            AtP* does (arXiv 2403.00745); `found.evidence["verified"]` names them. Each costs at most a forward pass.
        seed: Recorded only: nothing is drawn.
        batch_size: Facts a batch.
        progress: Show a bar; None shows one on a terminal or in a notebook.

    Returns:
        The estimated change by unit, in units of the metric.

    Raises:
        MechunlearnError: Unknown kind or rule, or facts longer than the context.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> attribution_patching(toy.model, toy.prompts([1]), kinds=["mlp.out"]).ranked()[0]
    L0.mlp.out[1]
    """
    if rule not in RULES:
        raise MechunlearnError(f"Unknown rule '{rule}'. Expected one of {', '.join(RULES)}.")
    check_kinds(model, kinds)
    sites = [f"L{layer}.{kind}" for layer in range(model.signature.layers) for kind in kinds]
    width = prompts.tokens.shape[1]
    parts = in_batches(
        len(prompts),
        batch_size,
        lambda rows: _batch_effects(model, prompts.select(rows), sites, metric, by, ig_steps, rule, width),
        "attribution patching",
        progress,
    )
    found = Effects(
        {site: torch.cat([part.by_site[site] for part in parts], -1) for site in sites},
        parts[0].rows,
        torch.cat([part.clean for part in parts]),
        torch.cat([part.corrupt for part in parts]),
        unchanged=unchanged(prompts, "prompts"),
    )
    evidence = _verified(model, prompts, metric, found, verify, batch_size, progress) if verify else {}
    return from_effects(model, found, evidence)


def _batch_effects(
    model: HookedModel,
    prompts: Prompts,
    sites: list[str],
    metric: Metric,
    by: str | None,
    ig_steps: int,
    rule: str,
    width: int | None = None,
) -> Effects:
    """Effects by row, unit and fact. Padding is the same in both runs and after every answer: it adds zero."""
    decoder, at = model.decoder, positions_read(metric, prompts).to(model.device)
    other = decoder.record(prompts.corrupt, at, sites, keys=False)
    start = decoder.record(prompts.tokens, at[:, :1], keys=False).resid[0] if ig_steps else None
    starts = [None] if start is None else [torch.lerp(other.resid[0], start, k / ig_steps) for k in range(ig_steps)]
    total: dict[str, Tensor] = {}
    clean: dict[str, Tensor] = {}
    value = torch.zeros(())
    for embeddings in starts:
        points: dict[str, Tensor] = {}
        taps = [tap for site in sites for tap in decoder.taps(site, partial(_kept, points, site))]
        rules = relevance_rules(decoder) if rule == "relp" else None
        value, _, gradients = differentiated(model, prompts, metric, embeddings, taps, points, rules)
        clean = clean or {site: x.detach() for site, x in points.items()}
        total = {site: gradient + total.get(site, 0) for site, gradient in gradients.items()}
    if ig_steps:
        run = decoder.record(prompts.tokens, at, sites, keys=False)
        clean, value = run.kept, per_fact(metric, run.logits, prompts)[0]
    where, names = rows_of(prompts, by, width)
    by_site = {}
    for site in sites:
        effect = (other.kept[site] - clean[site]) * total[site] / len(starts)
        unit = effect.sum(-1) if effect.ndim == 4 else effect
        unit = unit if "." in site.split(".", 1)[1] else unit.sum(-1, keepdim=True)
        by_site[site] = torch.einsum("rfp,fpu->ruf", where.to(unit), unit).float().cpu()
    corrupt = per_fact(metric, other.logits, prompts)[0]
    return Effects(by_site, names, value.detach().float().cpu(), corrupt.float().cpu())


def _kept(points: dict[str, Tensor], site: str, x: Tensor) -> Tensor:
    points[site] = x.view_as(x)
    return points[site]


def _verified(
    model: HookedModel,
    prompts: Prompts,
    metric: Metric,
    found: Effects,
    verify: int,
    batch_size: int,
    progress: bool | None,
) -> dict[str, object]:
    """Put exact effects in place of the largest estimates at all positions."""
    units = [(site, unit) for site, rows in found.by_site.items() for unit in range(rows.shape[1])]
    size = torch.cat([rows[0].mean(-1).abs() for rows in found.by_site.values()])
    best = [units[i] for i in size.argsort(descending=True, stable=True)[:verify].tolist()]
    only: dict[str, Tensor] = {}
    for site in dict.fromkeys(site for site, _ in best):
        count = model.signature.units(site.split(".", 1)[1])
        chosen = torch.tensor([unit for one, unit in best if one == site])
        only[site] = torch.eye(count or 1, dtype=torch.bool)[chosen]
    exact = effects(model, prompts, metric, [], batch_size=batch_size, progress=progress, only=only)
    for site, chosen in only.items():
        found.by_site[site][0, chosen.int().argmax(1)] = exact.by_site[site][0]
    return {"verified": [f"{site}[{unit}]" for site, unit in best], "forward budget": verify}
