"""Controls of an edit: the same editor on other units of the same kinds and weight."""

from dataclasses import replace

import torch

import mechunlearn.edit
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import Edit, WeightEdit
from mechunlearn.edit import losses
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.features.feature_edit import FeatureEdit
from mechunlearn.features.firing import FiringStatistics, matched_units
from mechunlearn.localize import random_units
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel


def random_control(model: HookedModel, edit: Edit, forget: Prompts, retain: Prompts, seed: int = 0) -> Edit:
    """The same editor with the same settings on a random mask of the same kinds and weight.

    A closed-form editor collects its covariance there from the forget data set's own passages. Of a feature edit: other
    features or codes that are active about as often on both sets.
    """
    if isinstance(edit, FeatureEdit):
        return _random_features(model, edit, forget, retain, seed)
    assert isinstance(edit, WeightEdit)
    if edit.card.method == "dictionary_rows":
        raise MechunlearnError(
            "An edit of dictionary rows does not hold its dictionary: give evaluate a control= of yours."
        )
    settings = dict(edit.card.settings)
    settings |= {name: losses.named(settings[name]) for name in ("loss", "retain_loss") if name in settings}
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    editor = getattr(mechunlearn.edit, edit.card.method)
    return editor(model, random_mask(model, edit.mask, seed), forget, retain, seed=edit.card.seed, **settings)


def _random_features(model: HookedModel, edit: FeatureEdit, forget: Prompts, retain: Prompts, seed: int) -> FeatureEdit:
    parts = []
    for part in edit.parts:
        seen = [FiringStatistics.of(model, part.dictionary, prompts) for prompts in (forget, retain)]
        both = FiringStatistics(*(torch.cat([getattr(one, name) for one in seen]) for name in vars(seen[0])))
        units, largest = matched_units(both, part.units, seed), both.max_activation.amax(0)
        values = part.values
        if len(values):
            strength = (-values / largest[part.units].clamp(min=1e-9)).median()
            values = -strength * largest[units]
        parts.append(replace(part, units=units, values=values))
    return FeatureEdit(tuple(parts), edit.signature, replace(edit.card, method=f"random {edit.card.method}", seed=seed))


def random_mask(model: HookedModel, like: ComponentMask, seed: int = 0) -> ComponentMask:
    """A random mask with as many units of every kind as another, over all layers."""
    counts: dict[str, int] = {}
    for component in like:
        counts[component.kind] = counts.get(component.kind, 0) + 1
    tied = {kind for kind in ("mlp.in", "mlp.gate") if counts.get(kind) == counts.get("mlp.out")} & set(counts)
    chosen = ComponentMask({}, model.signature)
    for kind, count in counts.items():
        if kind in tied:
            continue
        noise = random_units(model, kinds=[kind], seed=seed)
        drawn = noise.top(units=count)
        if kind == "mlp.out" and tied:
            extra = [Component(c.layer, k, c.unit) for c in drawn for k in tied]
            drawn = drawn | ComponentMask.of(extra, model.signature)
        chosen = chosen | drawn
    return chosen
