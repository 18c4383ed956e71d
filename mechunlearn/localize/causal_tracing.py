"""Causal tracing: hide the subject behind noise, restore one activation, and see how much of the answer comes back."""

from collections.abc import Sequence

from mechunlearn.artifacts.localization import Localization
from mechunlearn.core.runcard import RunCard, Stopwatch
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import Metric, answer_probability, name_of
from mechunlearn.metrics.stats import bootstrap_interval
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.layout import KINDS
from mechunlearn.patching.scores import from_effects
from mechunlearn.patching.sweep import effects


def causal_tracing(
    model: HookedModel,
    prompts: Prompts,
    *,
    kinds: Sequence[str] = ("attn.o", "mlp_out"),
    by: str | None = None,
    window: int = 1,
    sigma: float | int = 3.0,
    metric: Metric = answer_probability,
    neurons: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
) -> Localization:
    """Find the activations that alone bring back the answer when the subject is hidden by noise.

    Gaussian noise of `sigma` times the standard deviation of the embeddings is added to the subject's tokens; one
    activation takes its clean value; the score is the indirect effect, p(restored) - p(corrupt), averaged over facts (ROME,
    arXiv 2202.05262, section 2). Each fact has one draw of noise, the same in every restored run. The component variant
    of Mechanistic Unlearning (arXiv 2410.12949) is the default: head outputs and whole MLPs, at all positions; with
    `kinds=["resid_post"], by="role"` it is ROME's over layers and token roles, with `kinds=["mlp_out"], window=10` over
    windows of layers. `evidence["total effect"]` is p(clean) - p(corrupt), by which to divide; `evidence["intervals"]`
    has the 95 % bootstrap interval of every site and row but single neurons'.

    It finds what carries the answer out as well as what looks it up: on its own it says little of where a fact is kept.
    Where no subject is named, the tokens in which clean and corrupt differ are hidden.
    Raises `MechunlearnError` for a window below 1 or of single units, and for unknown kinds.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> found = causal_tracing(toy.model, toy.prompts(), kinds=["resid_post"], by="role")
    >>> float(found.by_role["L0.resid_post"][found.roles.index("subject last"), 0]) > 0.1
    True
    """
    watch = Stopwatch()
    if window < 1:
        raise MechunlearnError(f"Cannot restore a window of {window} layers. Expected window=1 or more.")
    if window > 1 and any(kind in KINDS for kind in kinds):
        raise MechunlearnError(
            "A window restores whole layers. Use kinds such as 'mlp_out', 'attn_out' or 'resid_post'."
        )
    found = effects(
        model,
        prompts,
        metric,
        kinds,
        by=by,
        denoise=True,
        corrupt="noise",
        neurons=neurons,
        window=window,
        seed=seed,
        batch_size=batch_size,
        sigma=sigma,
        progress=progress,
    )
    intervals = {
        site: {
            name: [bootstrap_interval(unit) for unit in rows.numpy()]
            for name, rows in zip(found.rows, change, strict=True)
        }
        for site, change in found.by_site.items()
        if not site.endswith("mlp.out")
    }
    total = found.clean - found.corrupt
    card = RunCard(
        "causal_tracing",
        model=model.fingerprint,
        data=prompts.fingerprint,
        seed=seed,
        settings={
            "metric": name_of(metric),
            "kinds": list(kinds),
            "window": window,
            "sigma": float(sigma),
            "by": by,
            "neurons": neurons,
        },
        device=str(model.device),
    )
    evidence = {"total effect": float(total.mean()), "intervals": _listed(intervals)}
    return from_effects(model, found, watch.stamp(card), evidence)


def _listed(intervals: dict) -> dict:
    return {
        site: {name: [[round(float(x), 6) for x in one] for one in units] for name, units in rows.items()}
        for site, rows in intervals.items()
    }
