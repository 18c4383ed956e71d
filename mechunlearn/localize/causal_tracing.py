"""Causal tracing: hide the subject behind noise, restore one activation, and see how much of the answer comes back."""

from collections.abc import Sequence
from typing import Any

from mechunlearn.artifacts.localization import Localization
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import Metric, answer_probability
from mechunlearn.metrics.stats import bootstrap_interval
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.layout import KINDS
from mechunlearn.patching.cost import BUDGET
from mechunlearn.patching.scores import from_effects, localizer
from mechunlearn.patching.sweep import effects


@localizer
def causal_tracing(
    model: HookedModel,
    prompts: Prompts,
    *,
    kinds: Sequence[str] = ("attn.o", "mlp_out"),
    by: str | None = None,
    window: int = 1,
    sigma: float = 3.0,
    metric: Metric = answer_probability,
    neurons: int = 1,
    budget: float | None = BUDGET,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Localization:
    """Find the activations that alone bring back the answer when the subject is hidden by noise.

    Gaussian noise is added to the embeddings of the subject's tokens; one activation takes its clean value; the score
    is the indirect effect, p(restored) - p(corrupt), averaged over facts (ROME, arXiv 2202.05262, section 2). Each
    fact has one draw of noise, the same in every restored run. Where no subject is named, the tokens in which clean
    and corrupt differ are hidden. The component variant of Mechanistic Unlearning (arXiv 2410.12949) is the default:
    head outputs and whole MLPs, at all positions; with `kinds=["resid_post"], by="role"` it is ROME's over layers and
    token roles, with `kinds=["mlp_out"], window=10` over windows of layers.

    It finds what carries the answer out as well as what looks it up: on its own it says little of where a fact is kept.

    Args:
        model: The model.
        prompts: The facts.
        kinds: Kinds of activations, as in `activation_patching`.
        by: `role` or `position`: restore at each token role or position too.
        window: How many neighbouring layers are restored together; more than 1 for whole layers only.
        sigma: Size of the noise, in standard deviations of the embeddings.
        metric: A function of `(logits, prompts)`, one number a fact.
        neurons: How many neurons are restored together.
        budget: Minutes that the sweep may take, by an estimate from one timed forward pass; None for any time.
        seed: Seed of the noise.
        batch_size: Facts a batch.
        progress: Show a bar; None shows one on a terminal or in a notebook. True says before what the sweep will cost.

    Returns:
        The mean indirect effect by unit. `evidence["total effect"]` is p(clean) - p(corrupt), by which to divide;
        `evidence["intervals"]` has the 95 % bootstrap interval of every site and row but single neurons'.

    Raises:
        MechunlearnError: A window below 1 or of single units, an unknown kind, or more work than the budget allows.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> found = causal_tracing(toy.model, toy.prompts(), kinds=["resid_post"], by="role")
    >>> float(found.by_role["L0.resid_post"][found.roles.index("subject last"), 0]) > 0.1
    True
    """
    if window > 1 and any(kind in KINDS for kind in kinds):
        raise MechunlearnError(
            "A window restores whole layers. Use kinds such as 'mlp_out', 'attn_out' or 'resid_post'."
        )
    run: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "budget": budget, "progress": progress}
    noise: dict[str, Any] = {"denoise": True, "corrupt": "noise", "sigma": sigma}
    found = effects(model, prompts, metric, kinds, by=by, neurons=neurons, window=window, **noise, **run)
    intervals = {
        site: {
            name: [[round(float(end), 6) for end in bootstrap_interval(unit)] for unit in rows.numpy()]
            for name, rows in zip(found.rows, change, strict=True)
        }
        for site, change in found.by_site.items()
        if not site.endswith("mlp.out")
    }
    total = float((found.clean - found.corrupt).mean())
    return from_effects(model, found, {"total effect": total, "intervals": intervals})
