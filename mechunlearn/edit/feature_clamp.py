"""Clamped SAE features: a topic's features are set to zero or below while the model runs."""

from typing import Literal

import torch

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.core.runcard import RunCard
from mechunlearn.edit.remake import editor
from mechunlearn.errors import MechunlearnError
from mechunlearn.features.dictionaries import Codebook, Dictionary
from mechunlearn.features.feature_edit import FeatureEdit, FeaturePart, feature_units
from mechunlearn.features.firing import FiringStatistics, Texts, observed, tokenized
from mechunlearn.features.interventions import shares
from mechunlearn.features.places import Model, signature_of


@editor
def feature_clamp(
    model: Model,
    mask: ComponentMask,
    forget: Texts | FiringStatistics,
    retain: Texts | None = None,
    *,
    dictionary: Dictionary,
    scale: float = 1.0,
    gate: Literal["token", "sequence"] = "token",
    quantile: float = 0.95,
    error: bool = True,
    seed: int = 0,
) -> FeatureEdit:
    """Set a topic's SAE features to minus `scale` times their own maximum wherever they are active.

    The maximum is over `forget`, so one scale serves features of any size (Farrell et al., arXiv 2410.19278, set all to
    one -c). A run-time intervention, which can be removed: see `FeatureEdit`, and `edit.dictionary_rows` for one in the
    weights.

    Args:
        model: The model.
        mask: The features to clamp, of this dictionary.
        forget: The topic: prompts, texts, tokens with lengths, or firing statistics of them.
        retain: Other text, which sets the gate of a sequence.
        dictionary: The SAE.
        scale: How many times their maximum; 0 is zero-ablation, which is known to be weak.
        gate: `token` clamps wherever a feature is active. `sequence` clamps only once the share of the sequence's
            tokens so far with one of the features exceeds the `quantile` of that share over the tokens of `retain`
            (DSG, arXiv 2504.08192, made causal: the past alone decides). The past is what the forward pass holds:
            generate without a key-value cache then (an exported folder has this in its configuration).
        quantile: Of the share, from 0 to 1.
        error: Whether to add back what the dictionary misses, so that only the features change; what the topic has in
            the error term then stays.
        seed: Not used; every editor has one.

    Returns:
        An edit of activations, which can be taken off.

    Raises:
        MechunlearnError: For a codebook, a mask of another dictionary, one that selects nothing, numbers out of range,
            another gate, features that `forget` never activates, and a sequence gate that has no retain text, or would
            never open.

    >>> from mechunlearn import load_model
    >>> from mechunlearn.features.dictionaries import load_dictionary
    >>> from mechunlearn.localize import feature_discovery
    >>> model, sae = load_model("factworld"), load_dictionary("factworld-sae")
    >>> topic, other = ["The knight fought the army."] * 8, ["The cook baked the soup."] * 8
    >>> found = feature_discovery(model, topic, dictionary=sae, against=other)
    >>> feature_clamp(model, found.top(units=4), topic, dictionary=sae).card.settings["scale"]
    1.0
    """
    del seed
    if isinstance(dictionary, Codebook):
        raise MechunlearnError(f"{dictionary} has codes, which are used or not: delete them with codebook_delete.")
    units = feature_units(mask, dictionary, model)
    seen = forget if isinstance(forget, FiringStatistics) else FiringStatistics.of(model, dictionary, forget)
    if seen.max_activation.shape[1] != dictionary.size:
        raise MechunlearnError(
            f"The activity is of {seen.max_activation.shape[1]} units, {dictionary} has others. Give the one it was "
            "seen with."
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
                f"Retain text has one of the features at every token so far, at the quantile {quantile}: the gate "
                "would never "
                "open. Take fewer features, or a lower quantile."
            )
    part = FeaturePart(dictionary, units, "clamp", -float(scale) * largest, error, gate, share)
    return FeatureEdit((part,), signature_of(model), RunCard(""))


def _gate(model: Model, dictionary: Dictionary, units: torch.Tensor, retain: Texts, quantile: float) -> float:
    """Return the quantile, over the tokens of retain text, of the share of tokens so far with one of the features."""
    tokens, counted = tokenized(model, retain)
    seen: list[torch.Tensor] = []
    for rows in torch.split(torch.arange(len(tokens)), 64):

        def see(h: torch.Tensor, rows: torch.Tensor = rows) -> None:
            fired = (dictionary.encode(h)[..., units.to(h.device)] > 0).any(-1)
            seen.append(shares(fired).cpu()[counted[rows]])

        observed(model, dictionary, tokens[rows], see, counted[rows])
    return float(torch.quantile(torch.cat(seen)[:1_000_000], quantile))
