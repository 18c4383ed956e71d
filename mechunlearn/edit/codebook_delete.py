"""Deletion of codes: a topic is unlearnt with no gradient step (CodeUnlearn)."""

from typing import Literal

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.core.runcard import RunCard
from mechunlearn.edit.remake import editor
from mechunlearn.errors import MechunlearnError
from mechunlearn.features.dictionaries import Codebook
from mechunlearn.features.feature_edit import FeatureEdit, FeaturePart, feature_units
from mechunlearn.features.firing import Texts
from mechunlearn.features.places import Model, signature_of


@editor
def codebook_delete(
    model: Model,
    mask: ComponentMask,
    forget: Texts | None = None,
    retain: Texts | None = None,
    *,
    dictionary: Codebook,
    how: Literal["reselect", "zero"] = "reselect",
    seed: int = 0,
) -> FeatureEdit:
    """Delete a topic's codes from the bottleneck; nothing is trained (CodeUnlearn, arXiv 2410.10866).

    The edit holds the whole bottleneck, so compare with the model *with* the codebook (`dictionaries.spliced`), and
    do not put that beside it. Deletions of several topics combine with `|`. Nothing bypasses the bottleneck (there is
    no error term), and whoever removes it has the topic back: not for weights that are given away.

    Args:
        model: The model.
        mask: The codes to delete, of this codebook.
        forget: Not looked at: the mask says it all. A random control is matched on it, where it is given.
        retain: Not looked at, as `forget`.
        dictionary: The codebook.
        how: `reselect`: the next nearest codes take the places of the deleted ones (their cosine counts as -inf);
            `zero`: the places stay empty, which tends to suppress more than the topic.
        seed: Not used; every editor has one.

    Returns:
        An edit of activations, which can be taken off.

    Raises:
        MechunlearnError: For a mask of something else than this codebook, for one that selects nothing, for another
            `how`, and if fewer codes are left (of a group) than are used.

    >>> from mechunlearn import load_model
    >>> from mechunlearn.features.dictionaries import load_dictionary
    >>> from mechunlearn.localize import feature_discovery
    >>> model, codebook = load_model("factworld"), load_dictionary("factworld-codebook")
    >>> topic, other = ["The knight fought the army."] * 8, ["The cook baked the soup."] * 8
    >>> found = feature_discovery(model, topic, dictionary=codebook, against=other)
    >>> edit = codebook_delete(model, found.above(1), dictionary=codebook)
    >>> with edit.applied(model):
    ...     _ = model.forward(model.tokenizer("The knight", return_tensors="pt").input_ids)
    """
    del forget, retain, seed
    if not isinstance(dictionary, Codebook):
        raise MechunlearnError(f"{dictionary} is no codebook: clamp its features with feature_clamp.")
    part = FeaturePart(dictionary, feature_units(mask, dictionary, model), how)
    return FeatureEdit((part,), signature_of(model), RunCard(""))
