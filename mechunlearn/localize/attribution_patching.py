"""Attribution patching: every unit's effect from two forward passes and one backward pass."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.artifacts.localization import Localization
from mechunlearn.core.batches import in_batches
from mechunlearn.core.runcard import RunCard, Stopwatch
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import Metric, logit_diff, name_of, per_fact, positions_read
from mechunlearn.model.component import SCORED
from mechunlearn.model.decoder import tapped
from mechunlearn.model.hooked import HookedModel, frozen
from mechunlearn.patching.corruption import check_finite, check_prompts, unchanged
from mechunlearn.patching.relevance import relevance_rules
from mechunlearn.patching.scores import from_effects
from mechunlearn.patching.sweep import Effects, check_kinds, effects, rows_of

RULES = ("gradient", "relp")


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
    batch_size: int = 32,
) -> Localization:
    """Estimate how the metric changes when each head, neuron or stream takes its corrupt activation.

    The score of a unit is (corrupt - clean) . d metric / d activation, summed over positions, averaged over facts (Nanda
    2023; arXiv 2310.10348 for its error). `kinds` and `by` are those of `activation_patching`, which it estimates. The
    gradient is taken at the clean run; with `steps=m` it is averaged over m left Riemann points of the embeddings from
    corrupt to clean (integrated gradients, arXiv 2403.17806); with `rule="relp"` it is RelP's (arXiv 2508.21258), which
    freezes norms and attention patterns and so survives saturation better, but sees nothing that acts by a pattern.
    `verify=n` measures the n units with the largest |score| exactly and puts the result in place of the estimate, as
    AtP* does (arXiv 2403.00745), within n forward passes of the data; `found.evidence["verified"]` names them.

    It is exact where the metric is linear in the activation; behind saturated softmaxes or norms it can be far off.
    Cost: two forward passes and one backward pass of each batch (1 + m of each with `steps=m`).
    Raises `MechunlearnError` for unknown kinds or rules, and facts longer than the context.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> attribution_patching(toy.model, toy.prompts([1]), kinds=["mlp.out"]).ranked()[0]
    L0.mlp.out[1]
    """
    watch = Stopwatch()
    if rule not in RULES:
        raise MechunlearnError(f"Unknown rule '{rule}'. Expected one of {', '.join(RULES)}.")
    if ig_steps < 0 or verify < 0:
        raise MechunlearnError(f"steps={ig_steps} and verify={verify} must not be negative. Expected 0 for neither.")
    check_kinds(model, kinds)
    check_prompts(model, prompts, batch_size)
    sites = [f"L{layer}.{kind}" for layer in range(model.signature.layers) for kind in kinds]
    width = prompts.tokens.shape[1]
    parts = in_batches(
        len(prompts),
        batch_size,
        lambda rows: _batch_effects(model, prompts.select(rows), sites, metric, by, ig_steps, rule, width),
    )
    found = Effects(
        {site: torch.cat([part.by_site[site] for part in parts], -1) for site in sites},
        parts[0].rows,
        torch.cat([part.clean for part in parts]),
        torch.cat([part.corrupt for part in parts]),
        unchanged=unchanged(prompts, "prompts"),
    )
    evidence = _verified(model, prompts, metric, found, verify, batch_size) if verify else {}
    card = RunCard(
        "attribution_patching",
        model=model.fingerprint,
        data=prompts.fingerprint,
        settings={
            "metric": name_of(metric),
            "kinds": list(kinds),
            "steps": ig_steps,
            "rule": rule,
            "verify": verify,
            "by": by,
        },
        device=str(model.device),
    )
    return from_effects(model, found, watch.stamp(card), evidence)


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
    points = [None] if start is None else [torch.lerp(other.resid[0], start, k / ig_steps) for k in range(ig_steps)]
    total: list[Tensor] = []
    clean: dict[str, Tensor] = {}
    value = torch.zeros(())
    for point in points:
        value, seen, gradients = _differentiated(model, prompts, sites, metric, at, point, rule)
        clean = clean or seen
        total = [a + b for a, b in zip(total, gradients, strict=True)] if total else list(gradients)
    if ig_steps:
        run = decoder.record(prompts.tokens, at, sites, keys=False)
        clean, value = run.kept, per_fact(metric, run.logits, prompts)[0]
    where, names = rows_of(prompts, by, width)
    by_site = {}
    for site, gradient in zip(sites, total, strict=True):
        effect = (other.kept[site] - clean[site]) * gradient / len(points)
        unit = effect.sum(-1) if effect.ndim == 4 else effect
        unit = unit if "." in site.split(".", 1)[1] else unit.sum(-1, keepdim=True)
        by_site[site] = torch.einsum("rfp,fpu->ruf", where.to(unit), unit).float().cpu()
    corrupt = per_fact(metric, other.logits, prompts)[0]
    return Effects(by_site, names, value.detach().float().cpu(), corrupt.float().cpu())


def _differentiated(
    model: HookedModel, prompts: Prompts, sites: list[str], metric: Metric, at: Tensor, start: Tensor | None, rule: str
) -> tuple[Float[Tensor, " fact"], dict[str, Tensor], tuple[Tensor, ...]]:
    """The metric, the activations and their gradients, from these embeddings (the prompts' own, if None)."""
    points: dict[str, Tensor] = {}

    def leaf(x: Tensor) -> Tensor:
        return (x.detach() if start is None else start).clone().requires_grad_()

    def keep(site: str, x: Tensor) -> Tensor:
        points[site] = x.view_as(x)
        return points[site]

    taps = [(model.decoder.blocks[0], "in", leaf), model.decoder.reading(at)]
    taps += [tap for site in sites for tap in model.decoder.taps(site, partial(keep, site))]
    rules = relevance_rules(model.decoder) if rule == "relp" else nullcontext()
    with torch.enable_grad(), frozen(model.hf), rules, tapped(taps):
        logits = model.hf(input_ids=prompts.tokens.to(model.device), use_cache=False).logits
        value = per_fact(metric, logits, prompts)[0]
        gradients = torch.autograd.grad(
            value.sum(), [points[site] for site in sites], allow_unused=True, materialize_grads=True
        )
    check_finite(model, value.detach(), prompts.tokens, metric)
    return value.detach(), {site: x.detach() for site, x in points.items()}, gradients


def _verified(
    model: HookedModel, prompts: Prompts, metric: Metric, found: Effects, verify: int, batch_size: int
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
    exact = effects(
        model, prompts, metric, [], by=None, denoise=False, corrupt="prompts", batch_size=batch_size, only=only
    )
    for site, chosen in only.items():
        found.by_site[site][0, chosen.int().argmax(1)] = exact.by_site[site][0]
    return {"verified": [f"{site}[{unit}]" for site, unit in best], "forward budget": verify}
