"""Activation patching: the exact effect of giving a unit the activation of another run."""

from collections.abc import Sequence

from mechunlearn.artifacts.localization import Localization
from mechunlearn.core.runcard import RunCard, Stopwatch
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import Metric, logit_diff, name_of
from mechunlearn.model.component import SCORED
from mechunlearn.model.hooked import HookedModel
from mechunlearn.patching.scores import from_effects
from mechunlearn.patching.sweep import effects


def activation_patching(
    model: HookedModel,
    prompts: Prompts,
    *,
    metric: Metric = logit_diff,
    kinds: Sequence[str] = SCORED,
    by: str | None = None,
    denoise: bool = False,
    corrupt: str = "prompts",
    neurons: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
) -> Localization:
    """Measure how the metric changes when each head, neuron, MLP or residual stream takes its corrupt activation.

    The score is metric(patched) - metric(clean), averaged over facts; with `denoise=True` clean activations are put into
    the corrupt run instead and it is metric(patched) - metric(corrupt) (Vig et al. 2020, arXiv 2004.12265; Heimersheim
    and Nanda 2024, arXiv 2404.15255). `kinds` are `attn.o` (heads), `attn.q`, `attn.k`, `attn.v`, `mlp.out` (neurons,
    `neurons` of them together), `attn_out`, `mlp_out` (a whole layer's; every unit of it gets the score), `resid_pre`,
    `resid_mid`, `resid_post` (no unit's: only in `by_role`).
    `corrupt`: `prompts` (the paired subject), `random` (subjects of random tokens, as long), `resample` (another fact's
    prompt of the same length), `noise` (Gaussian on the subject's embeddings, one draw a fact), `zero` or `mean` (over facts, by token role).
    `by="role"` or `by="position"` patches at each token role or position too: `found.by_role[site]` is `[row unit]` with
    rows named in `found.roles`, the first being all positions.

    Exact, and so the slowest: one run a unit, though only of the layers and positions after the patch. For millions of
    neurons use `attribution_patching`, whose best candidates can be verified by this method.
    Raises `MechunlearnError` for unknown kinds, corruptions or facts longer than the context.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> activation_patching(toy.model, toy.prompts([1]), kinds=["mlp.out"]).ranked()[0]
    L0.mlp.out[1]
    """
    watch = Stopwatch()
    found = effects(
        model,
        prompts,
        metric,
        kinds,
        by=by,
        denoise=denoise,
        corrupt=corrupt,
        neurons=neurons,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    settings = {"metric": name_of(metric), "kinds": list(kinds), "denoise": denoise, "corrupt": corrupt}
    card = RunCard(
        "activation_patching",
        model=model.fingerprint,
        data=prompts.fingerprint,
        seed=seed,
        settings={**settings, "neurons": neurons, "by": by},
        device=str(model.device),
    )
    return from_effects(model, found, watch.stamp(card))
