"""Activation patching: the exact effect of giving a unit the activation of another run."""

from collections.abc import Sequence
from typing import Any

from mechunlearn.artifacts.localization import Localization
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import Metric, logit_diff
from mechunlearn.model.hooked import HookedModel
from mechunlearn.patching.cost import BUDGET
from mechunlearn.patching.scores import from_effects, localizer
from mechunlearn.patching.sweep import effects


@localizer
def activation_patching(
    model: HookedModel,
    prompts: Prompts,
    *,
    metric: Metric = logit_diff,
    kinds: Sequence[str] = ("attn.o", "mlp_out"),
    by: str | None = None,
    denoise: bool = False,
    corrupt: str = "prompts",
    neurons: int = 1,
    budget: float | None = BUDGET,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Localization:
    """Measure how the metric changes when each head, neuron, MLP or residual stream takes its corrupt activation.

    The score is metric(patched) - metric(clean), averaged over facts; with `denoise=True` clean activations are put
    into the corrupt run instead and it is metric(patched) - metric(corrupt) (Vig et al. 2020, arXiv 2004.12265;
    Heimersheim and Nanda 2024, arXiv 2404.15255).

    Exact, and so the slowest: one run a unit, though only of the layers and positions after the patch. By default the
    units are heads and whole MLPs. Ask for neurons with `kinds=["mlp.out"]`, in blocks with `neurons=64`; for all of a
    large model's use `attribution_patching`, whose best candidates can be verified by this method.

    Args:
        model: The model.
        prompts: The facts.
        metric: A function of `(logits, prompts)`, one number a fact.
        kinds: `attn.o` (heads), `attn.q`, `attn.k`, `attn.v`, `mlp.out` (neurons), `attn_out`, `mlp_out` (a whole
            layer's: every unit of it gets the whole layer's score), `resid_pre`, `resid_mid`, `resid_post` (no unit's: only in
            `by_role`).
        by: `role` or `position`: patch at each token role or position too. `found.by_role[site]` is then `[row unit]`
            with rows named in `found.roles`, the first being all positions.
        denoise: Put clean activations into the corrupt run.
        corrupt: `prompts` (the paired subject), `random` (subjects of random tokens, as long), `resample` (another
            fact's prompt of the same length), `noise` (Gaussian on the subject's embeddings, one draw a fact), `zero`
            or `mean` (over facts, by token role).
        neurons: How many neurons are patched together, where `kinds` has `mlp.out`.
        budget: Minutes that the sweep may take, by an estimate from one timed forward pass; None for any time.
        seed: Seed of what a corruption draws.
        batch_size: Facts a batch.
        progress: Show a bar; None shows one on a terminal or in a notebook. True says before what the sweep will cost.

    Returns:
        The mean change by unit, in units of the metric.

    Raises:
        MechunlearnError: Unknown kind or corruption, facts longer than the context, or more work than the budget
            allows.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> activation_patching(toy.model, toy.prompts([1]), kinds=["mlp.out"]).ranked()[0]
    L0.mlp.out[1]
    """
    run: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "budget": budget, "progress": progress}
    found = effects(model, prompts, metric, kinds, by=by, denoise=denoise, corrupt=corrupt, neurons=neurons, **run)
    return from_effects(model, found)
