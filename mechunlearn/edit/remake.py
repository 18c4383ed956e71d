"""What every editor has around it.

Checks of its numbers, a run card of its arguments, and the call, to make the edit again.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import wraps
from inspect import signature
from numbers import Number
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, enable_grad, uint8

from mechunlearn.artifacts.calls import Call
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.arguments import check_arguments
from mechunlearn.core.runcard import Stopwatch, digest
from mechunlearn.core.steady import steady
from mechunlearn.edit import losses
from mechunlearn.edit.objective import training_texts
from mechunlearn.facts.prompts import Prompts
from mechunlearn.features.feature_edit import FeatureEdit
from mechunlearn.features.places import fingerprint_of
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.unwrap import evaluating
from mechunlearn.training.covariance import Covariance
from mechunlearn.training.fisher import DiagonalFisher

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made", WeightEdit, FeatureEdit)

NOT_SETTINGS = ("model", "mask", "forget", "retain", "seed", "progress")


def editor(function: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """Make an editor of a function `(model, mask, forget, retain, *, ..., seed) -> Edit`.

    Before it runs, arguments of another kind than their annotations say, numbers out of range, and a bare string in
    place of `texts` are refused (`core.arguments`). The edit's run card is filled in: the function's name, hashes of the model
    and the sets, the seed, and as `settings` a description of every other argument. So the function writes on the
    card only what it alone knows (`RunCard("", trajectory=...)`). The edit remembers the call, for
    `edit.remake(mask=..., seed=...)`: references to the arguments, no copies.

    Args:
        function: The editor. It leaves the model as it was.

    Returns:
        The same function, with the same signature.
    """

    def made(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
        watch = Stopwatch()
        known = signature(function)
        bound = known.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        check_arguments(function, given)
        settings = {name: described(value) for name, value in given.items() if name not in NOT_SETTINGS}
        model = given["model"]
        with steady(), enable_grad(), evaluating(model.hf) if isinstance(model, HookedModel) else nullcontext():
            edit = function(*args, **kwargs)
        sets = [described(given[name]) for name in ("forget", "retain")]
        texts = training_texts(given["forget"], given["texts"]) if "texts" in given else ()
        card = replace(
            edit.card,
            method=function.__name__,
            model=fingerprint_of(model),
            data=digest(json.dumps(sets), *texts),
            sets={n: given[n].fingerprint for n in ("forget", "retain") if isinstance(given[n], Prompts)},
            seed=int(given.get("seed", 0)),
            settings=settings,
            mask=given["mask"].fingerprint,
            device=str(getattr(model, "device", "cpu")),
        )
        if isinstance(edit, WeightEdit):
            sizes = (len(units) * model.unit_weights(Component.parse(site).kind) for site, units in edit.units.items())
            card = replace(card, weights=sum(sizes))
        return replace(edit, card=watch.stamp(card), calls=(Call(decorated, dict(given)),))

    decorated: Callable[Arguments, Made] = wraps(function)(made)
    return decorated


def described(value: Any) -> Any:
    """Return a JSON-serialisable description of an argument of an editor.

    Numbers, words and lists of them are themselves, and a dictionary is its site. A loss is its name with all of its
    settings (`losses.described`). Of texts, facts and tensors it is how many there are and a digest, of statistics
    how much they have seen. Whatever JSON holds as itself can be given to the editor again, a JSON object cannot.

    Args:
        value: The argument.

    >>> described((1 / 4, 1)), described(["One text.", "Another."])["texts"]
    ([0.25, 1], 2)
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Number):
        return value.item() if hasattr(value, "item") else str(value)
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().flatten().view(uint8).numpy().tobytes()
        return {"shape": list(value.shape), "digest": digest(str(value.dtype), data)}
    if isinstance(value, Prompts):
        return {"facts": len(value), "digest": value.fingerprint}
    if isinstance(value, Covariance):
        return {"tokens": value.count, "texts": described(value.texts)}
    if isinstance(value, DiagonalFisher):
        return {"sequences": value.count}
    if isinstance(value, Sequence):
        if value and all(isinstance(each, str) for each in value):
            return {"texts": len(value), "digest": digest(*value)}
        return [described(each) for each in value]
    site = getattr(value, "site", None)
    if isinstance(site, str):
        return site
    return losses.described(value) if callable(value) else {"type": type(value).__name__}
