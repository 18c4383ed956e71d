"""Controls of an edit: the same call on other units of the same kinds and weight."""

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from inspect import signature
from operator import or_
from typing import Any

import torch
from torch import Tensor

import mechunlearn.edit
from mechunlearn.artifacts.between import BETWEEN
from mechunlearn.artifacts.calls import Call
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import Edit, WeightEdit
from mechunlearn.core.lazy import method_names
from mechunlearn.core.runcard import RunCard
from mechunlearn.edit import losses
from mechunlearn.edit.objective import training_texts
from mechunlearn.edit.remake import described
from mechunlearn.errors import MechunlearnError
from mechunlearn.evaluation.recipes import washing_texts
from mechunlearn.facts.prompts import Prompts
from mechunlearn.features.dictionaries import Dictionary
from mechunlearn.features.feature_edit import FeatureEdit
from mechunlearn.features.firing import FiringStatistics, matched_mask
from mechunlearn.localize import random_units
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel

LOST, SETS = object(), ("forget", "retain")
YOURS = "Make the edit in this session, or give evaluate a control= of yours."


def random_control(
    model: HookedModel, edit: Edit, forget: Prompts, retain: Prompts, seed: int = 0, texts: Sequence[str] = ()
) -> Edit:
    """Make an edit again by its own call, on random units of the same kinds and weight.

    For features and codes these are others of the same dictionary that are active about as often, on the text that
    the edit was made for. An edit that was loaded from a file is made again from its run card, where that holds
    everything (see `remade_from_card`). An edit that no editor made (`WeightEdit.between`) has no call: random units
    are moved by its own differences, dealt out at random.

    Args:
        model: The unedited model.
        edit: The edit.
        forget: Facts to forget; a loaded edit is made again with them, and its features are matched on them.
        retain: The same of the facts to retain.
        seed: Seed of the random units. The edit's own seed stays.
        texts: The texts of a loaded edit that was made with texts of its own, or more of which they are the first.

    Raises:
        MechunlearnError: For a loaded edit that cannot be made again, by name.
    """
    if not isinstance(edit, WeightEdit | FeatureEdit):
        raise MechunlearnError(f"A {type(edit).__name__} does not know its call, so it has no random control. {YOURS}")
    if isinstance(edit, WeightEdit) and edit.card.method == BETWEEN:
        return _moved(model, edit, seed)
    if edit.calls:
        return edit.remake(mask=_random_masks(model, edit.calls, forget, retain, seed))
    if isinstance(edit, FeatureEdit):
        dictionary = edit.parts[0].dictionary
        mask = matched_mask(_statistics(model, dictionary, (forget, retain)), edit.mask, dictionary, seed)
    else:
        mask = random_mask(model, edit.mask, seed)
    return remade_from_card(model, edit, mask, forget, retain, texts)


def _moved(model: HookedModel, edit: WeightEdit, seed: int) -> WeightEdit:
    """Move random units of the same kinds by an edit's differences; those of a neuron's rows go to one neuron."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # even where all units are the edit's own, each gets another's difference
        mask = random_mask(model, edit.mask, seed)
    generator = torch.Generator().manual_seed(seed)
    units = {site: chosen.nonzero().flatten() for site, chosen in mask.sites.items() if chosen.any()}
    orders: dict[int, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for kind in {Component.parse(site).kind: None for site in sorted(edit.units)}:
        here, there = (
            sorted((s for s in sites if Component.parse(s).kind == kind), key=Component.parse)
            for sites in (edit.units, units)
        )
        moves = torch.cat([edit.rows[site].float() - _weights(model, site, edit.units[site]) for site in here])
        count = len(moves)
        order = orders.setdefault(count, torch.randperm(count, generator=generator))
        dealt = moves[order].split([len(units[site]) for site in there])
        rows |= {site: _weights(model, site, units[site]) + move for site, move in zip(there, dealt, strict=True)}
    settings = {"control": "the differences of the edit, dealt out to random units"}
    card = RunCard(BETWEEN, model.fingerprint, seed=seed, settings=settings, mask=mask.fingerprint)
    return WeightEdit(units, rows, model.signature, card)


def _weights(model: HookedModel, site: str, units: Tensor) -> Tensor:
    return model.rows(site)[units.to(model.device)].float().cpu()


def _random_masks(
    model: HookedModel, calls: Sequence[Call], forget: Prompts, retain: Prompts, seed: int
) -> ComponentMask:
    """Return as many units of each kind, and of each dictionary, as all calls had."""
    by_dictionary: dict[str, list[Call]] = {}
    for call in calls:
        by_dictionary.setdefault(getattr(call.arguments.get("dictionary"), "site", ""), []).append(call)
    found = []
    for site, mine in by_dictionary.items():
        mask = reduce(or_, (call.mask for call in mine))
        if not site:
            found.append(random_mask(model, mask, seed, _known_layers(mine)))
            continue
        dictionary, own = mine[0].arguments["dictionary"], [call.arguments[n] for call in mine for n in SETS]
        sets = [each for each in own if each is not None] or [forget, retain]
        found.append(matched_mask(_statistics(model, dictionary, sets), mask, dictionary, seed))
    return reduce(or_, found)


def _known_layers(calls: Sequence[Call]) -> set[int] | None:
    """Return the layers of the covariances that cannot be collected elsewhere, None if there is no such covariance."""
    given = [call.arguments.get("covariance") for call in calls]
    known = [{Component.parse(site).layer for site in each.sites} for each in given if each and each.texts is None]
    return set.intersection(*known) if known else None


def _statistics(model: HookedModel, dictionary: Dictionary, sets: Sequence[Any]) -> FiringStatistics:
    """Return when a dictionary's units are active on some sets of text."""
    seen = [
        each if isinstance(each, FiringStatistics) else FiringStatistics.of(model, dictionary, each) for each in sets
    ]
    return FiringStatistics(*(torch.cat([getattr(each, name) for each in seen]) for name in vars(seen[0])))


def remade_from_card(
    model: HookedModel,
    edit: WeightEdit | FeatureEdit,
    mask: ComponentMask,
    forget: Prompts,
    retain: Prompts,
    texts: Sequence[str] = (),
) -> WeightEdit | FeatureEdit:
    """Make an edit that was loaded from a file again, under another mask, by the settings of its run card.

    A card holds numbers, words and the losses of `edit.losses`. Of texts it holds a digest, by which the facts' own
    texts and those given here are known again; a covariance is collected over them anew. An edit of features holds
    its dictionary; clamped features are set to the same multiple of their largest activation on the facts.

    Args:
        model: The unedited model.
        edit: The edit that was loaded.
        mask: Where to edit this time.
        forget: Facts to forget.
        retain: Facts to retain.
        texts: The texts that the edit was made with, where they are not the facts' own, or more of which they are the
            first.

    Raises:
        MechunlearnError: For what a card does not hold (functions of yours, tensors, dictionaries, parts of a composed
            edit), by name.
    """
    card = edit.card
    if card.method not in method_names("mechunlearn.edit"):
        raise MechunlearnError(
            f"An edit by '{card.method}' from a file cannot be made again under another mask. {YOURS}"
        )
    if isinstance(edit, FeatureEdit):
        (part,) = edit.parts
        units, values = mask.sites[part.dictionary.site].nonzero().flatten(), part.values
        if len(values) and not isinstance(card.settings.get("scale"), float | int):
            raise MechunlearnError(f"The file of this clamp does not hold its scale. {YOURS}")
        if len(values):
            largest = _statistics(model, part.dictionary, (forget, retain)).max_activation.amax(0)
            values = -float(card.settings["scale"]) * largest[units]
        return replace(edit, parts=(replace(part, units=units, values=values),))
    editor = getattr(mechunlearn.edit, card.method)
    known = (lambda: texts, lambda: training_texts(forget), lambda: washing_texts(forget))
    settings = {name: _argument(value, name, card.settings, known) for name, value in card.settings.items()}
    lost = [name for name, value in settings.items() if value is LOST or name not in signature(editor).parameters]
    if lost:
        raise MechunlearnError(
            f"This edit by {card.method} cannot be made again from its file under another mask: the file does not hold "
            "its "
            f"{', '.join(lost)}. {YOURS}"
        )
    made: WeightEdit = editor(model, mask, forget, retain, seed=card.seed, **settings)
    if made.card.data != card.data:
        warnings.warn("The edit was made on other facts or texts than its control is made on here.", stacklevel=3)
    return made


def _argument(value: Any, name: str, settings: Mapping[str, Any], known: Sequence[Callable[[], Sequence[str]]]) -> Any:
    """Return the argument that a run card describes; `LOST` if it does not hold it."""
    if name in ("loss", "retain_loss", "text_loss"):
        ours = isinstance(value, dict) and value.get("name") in {loss.__name__ for loss in losses.LOSSES}
        return losses.named(value) if ours else LOST
    if name == "texts" and value:
        found = (tuple(each())[: value["texts"]] for each in known)
        return next((texts for texts in found if described(texts) == value), LOST)
    if name == "covariance" and value:  # the editor collects it anew, over the same texts
        return None if value["texts"] == settings.get("texts") else LOST
    parts = value if isinstance(value, list) else [value]
    if name == "dictionary" or any(isinstance(part, dict) for part in parts):
        return LOST
    return tuple(value) if isinstance(value, list) else value


def random_mask(
    model: HookedModel, like: ComponentMask, seed: int = 0, layers: Collection[int] | None = None
) -> ComponentMask:
    """Return a random mask with as many units of every kind as another.

    Rows of neurons stay together, if the other mask has as many of their inputs and gates as of their outputs.

    Args:
        model: The model.
        like: The other mask.
        seed: Seed of the draw.
        layers: Layers to draw from, by default all.
    """
    counts = Counter(component.kind for component in like)
    tied = [kind for kind in ("mlp.in", "mlp.gate") if counts[kind] and counts[kind] == counts["mlp.out"]]
    chosen = ComponentMask({}, model.signature)
    for kind, count in counts.items():
        if kind in tied:
            continue
        noise = random_units(model, kinds=[kind], seed=seed)
        scores = {s: x for s, x in noise.scores.items() if layers is None or Component.parse(s).layer in layers}
        drawn = replace(noise, scores=scores).top(units=count)
        if kind == "mlp.out" and tied:
            extra = [Component(c.layer, k, c.unit) for c in drawn for k in tied]
            drawn = drawn | ComponentMask.of(extra, model.signature)
        chosen = chosen | drawn
    if chosen == like:
        warnings.warn(
            "The random mask is the edit's own, as there are no other units of its kinds: the control says nothing.",
            stacklevel=2,
        )
    return chosen
