"""Edits whose texts and units are chosen for you: facts washed out of MLPs, a topic deleted with a dictionary."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mechunlearn.artifacts.localization import Localization
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.methods import method_named
from mechunlearn.edit import codebook_delete, feature_clamp
from mechunlearn.edit.closed_form.edit_prompts import output_sites
from mechunlearn.edit.closed_form.washing import own_text, site
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.features.dictionaries import Codebook, Dictionary
from mechunlearn.features.feature_edit import FeatureEdit
from mechunlearn.localize import feature_discovery
from mechunlearn.metrics.text import text_loss
from mechunlearn.model.hooked import HookedModel
from mechunlearn.training.covariance import Covariance
from mechunlearn.world.text import world_text


def washing_texts(forget: Prompts) -> tuple[str, ...]:
    """Return what the covariance of a closed form is collected from, of the texts that come with the facts.

    Of the shipped world its documents that name none of the forgotten, and eight times the half of its stories that
    editors may train on; of other facts that half of their texts.

    Args:
        forget: The facts that are washed out.
    """
    facts = forget.facts
    own = facts.texts[::2] if facts is not None else ()
    if facts is None or not facts.name.startswith("factworld/"):
        return own
    return (*world_text(without=facts.subjects), *own * 8)


def wash(
    model: HookedModel,
    mask: ComponentMask,
    forget: Prompts,
    retain: Prompts,
    *,
    method: str = "memit",
    texts: Sequence[str] | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> WeightEdit:
    """Wash facts out of MLP output weights with a closed form, its text chosen and its covariance kept in a folder.

    Args:
        model: The model to edit.
        mask: The neurons; sites other than `mlp.out` are left alone.
        forget: Facts to wash out.
        retain: Facts to hold.
        method: A closed form by name, such as `memit`.
        texts: What covariance and prefixes are from, by default `washing_texts(forget)`, or else samples of the model.
        cache: A folder that keeps the covariance, and from which it is read where it is there.
        seed: The edit's seed.
        progress: Whether to show bars.
        settings: Further ones of the closed form.

    Returns:
        The edit.

    Raises:
        MechunlearnError: For an unknown method, no text from anywhere, and as the method does.
    """
    washer = method_named("edit", method, taking="covariance")
    sites = [site(layer) for layer in output_sites(model, mask)]
    chosen = tuple(texts) if texts is not None else washing_texts(forget) or own_text(model)
    if not chosen:
        raise MechunlearnError(
            "There is no text to collect the covariance from: the facts bring none, and a model without a tokenizer "
            "writes none. Give texts, on the command line --text FILE."
        )
    covariance = Covariance.of_text(model, sites, chosen, cache=cache, progress=progress)
    given = {"covariance": covariance, "texts": chosen, "seed": seed, "progress": progress}
    edit: WeightEdit = washer.function(model, mask, forget, retain, **given, **settings)
    return edit


@dataclass(frozen=True, eq=False)
class DeletedTopic:
    """What `delete_topic` made.

    Attributes:
        found: The units by how much more the topic uses them.
        edit: Those above the threshold deleted, or clamped.
        losses: Loss in nats a token, before and after, of the topic and of the other text.
    """

    found: Localization
    edit: FeatureEdit
    losses: dict[str, tuple[float, float]]


def delete_topic(
    model: HookedModel,
    topic: Sequence[str],
    against: Sequence[str],
    *,
    dictionary: Dictionary,
    threshold: float = 1.0,
    how: Literal["reselect", "zero"] = "reselect",
    scale: float = 1.0,
) -> DeletedTopic:
    """Find the units of a topic and delete (codebook) or clamp (SAE) them; nothing is trained.

    Args:
        model: The model; its weights stay.
        topic: Texts on the topic.
        against: Other text to tell the topic from (`features.firing.swapped` makes some).
        dictionary: A codebook or an SAE.
        threshold: Least log2 enrichment of a unit on the topic.
        how: Of a codebook: `reselect` or `zero`.
        scale: Of an SAE: features are set to minus so many times their maximum.

    Raises:
        MechunlearnError: If no unit is above the threshold, and as the editors do.

    >>> from mechunlearn import load_model
    >>> from mechunlearn.features.dictionaries import load_dictionary
    >>> topic, other = ["The knight fought the army."] * 8, ["The cook baked the soup."] * 8
    >>> made = delete_topic(load_model("factworld"), topic, other, dictionary=load_dictionary("factworld-codebook"))
    >>> before, after = made.losses["topic"]
    >>> after > before
    True
    """
    found = feature_discovery(model, topic, dictionary=dictionary, against=against)
    mask = found.above(threshold)
    if not len(mask):
        raise MechunlearnError(found.note or f"No unit is enriched by more than {threshold:g}: nothing is deleted.")
    if isinstance(dictionary, Codebook):
        edit = codebook_delete(model, mask, topic, against, dictionary=dictionary, how=how)
    else:
        edit = feature_clamp(model, mask, topic, against, dictionary=dictionary, scale=scale)
    named = {"topic": tuple(topic), "other text": tuple(against)}
    before = {name: float(text_loss(model, texts).mean()) for name, texts in named.items()}
    with edit.applied(model):
        return DeletedTopic(found, edit, {n: (before[n], float(text_loss(model, t).mean())) for n, t in named.items()})
