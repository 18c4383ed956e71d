"""Clamped SAE features: a topic's features are set to zero or below while the model runs."""

import torch

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.core.runcard import RunCard, Stopwatch
from mechunlearn.errors import MechunlearnError
from mechunlearn.features.dictionaries import Codebook, Dictionary
from mechunlearn.features.feature_edit import GATES, FeatureEdit, FeaturePart, feature_units
from mechunlearn.features.firing import FiringStatistics, Texts, observed, tokenized
from mechunlearn.features.interventions import shares
from mechunlearn.features.places import Model, fingerprint_of, signature_of


def feature_clamp(
    model: Model,
    mask: ComponentMask,
    forget: Texts | FiringStatistics,
    retain: Texts | None = None,
    *,
    dictionary: Dictionary,
    scale: float | int = 1.0,
    gate: str = "token",
    quantile: float | int = 0.95,
    error: bool = True,
    seed: int = 0,
) -> FeatureEdit:
    """Set a topic's SAE features to minus `scale` times their own maximum wherever they are active.

    The maximum is over `forget`, so one strength serves features of any scale (Farrell et al., arXiv 2410.19278, set all to
    one -c); strength 0 is zero-ablation, which is known to be weak. `error` adds back what the dictionary misses, so that
    only the features change; what the topic has in the error term then stays. `gate="sequence"` clamps only once the
    share of the sequence's tokens so far with one of the features exceeds the `quantile` of that share over the tokens of
    `retain` (DSG, arXiv 2504.08192, made causal: the past alone decides). The past is what the forward pass holds: generate
    without a key-value cache then (an exported folder says so in its configuration).

    A run-time intervention, which can be removed: see `FeatureEdit`, and `edit.dictionary_rows` for one in the weights.
    Raises `MechunlearnError` for a codebook, a mask of another dictionary, one that selects nothing, a negative strength,
    another gate, a quantile outside [0, 1], features that `forget` never activates, and a sequence gate that has no retain
    text, or would never open.

    >>> from mechunlearn import load_model
    >>> from mechunlearn.features.dictionaries import load_dictionary
    >>> from mechunlearn.localize import feature_discovery
    >>> model, sae = load_model("factworld"), load_dictionary("factworld-sae")
    >>> topic, other = ["The knight fought the army."] * 8, ["The cook baked the soup."] * 8
    >>> found = feature_discovery(model, topic, dictionary=sae, against=other)
    >>> feature_clamp(model, found.top(units=4), topic, dictionary=sae).card.settings["scale"]
    1.0
    """
    watch = Stopwatch()
    if isinstance(dictionary, Codebook):
        raise MechunlearnError(f"{dictionary} has codes, which are used or not: delete them with codebook_delete.")
    if scale < 0:
        raise MechunlearnError(f"A scale of {scale} would amplify the features. Expected 0 (zero) or more.")
    if gate not in GATES:
        raise MechunlearnError(f"Unknown gate '{gate}'. Expected one of {', '.join(GATES)}.")
    if not 0 <= quantile <= 1:
        raise MechunlearnError(f"A quantile of {quantile} is out of range. Expected 0 to 1.")
    units = feature_units(mask, dictionary, model)
    seen = forget if isinstance(forget, FiringStatistics) else FiringStatistics.of(model, dictionary, forget)
    if seen.max_activation.shape[1] != dictionary.size:
        raise MechunlearnError(
            f"The activity is of {seen.max_activation.shape[1]} units, {dictionary} has others. Give the one it was seen with."
        )
    largest = seen.max_activation.amax(0)[units]
    if (largest <= 0).all():
        raise MechunlearnError("The forget text activates none of the mask's features, so nothing would be clamped.")
    share = 0.0
    if gate == "sequence":
        if retain is None:
            raise MechunlearnError("A sequence gate is set by retain text: give retain, or gate='token'.")
        share = _gate(model, dictionary, units, retain, float(quantile))
        if share >= 1:
            raise MechunlearnError(
                f"Retain text has one of the features at every token so far, at the quantile {quantile}: the gate would never "
                "open. Take fewer features, or a lower quantile."
            )
    settings = {"scale": scale, "gate": gate, "quantile": quantile, "error": error, "dictionary": dictionary.site}
    card = RunCard("feature_clamp", fingerprint_of(model), seed=seed, settings=settings, mask=mask.fingerprint)
    part = FeaturePart(dictionary, units, "clamp", -float(scale) * largest, error, gate, share)
    return FeatureEdit((part,), signature_of(model), watch.stamp(card))


def _gate(model: Model, dictionary: Dictionary, units: torch.Tensor, retain: Texts, quantile: float) -> float:
    """The quantile, over the tokens of retain text, of the share of tokens so far with one of the features."""
    tokens, counted = tokenized(model, retain)
    seen: list[torch.Tensor] = []
    for rows in torch.arange(len(tokens)).split(64):

        def see(h: torch.Tensor, rows: torch.Tensor = rows) -> None:
            fired = (dictionary.encode(h)[..., units.to(h.device)] > 0).any(-1)
            seen.append(shares(fired).cpu()[counted[rows]])

        observed(model, dictionary, tokens[rows], see, counted[rows])
    return float(torch.quantile(torch.cat(seen)[:1_000_000], quantile))
