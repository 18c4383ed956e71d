"""What every editor has around it.

Checks of its numbers, a run card of its arguments, and the call, to make the edit again.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import wraps
from inspect import Signature, signature
from numbers import Integral, Number, Real
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin

from torch import Tensor, enable_grad, uint8

from mechunlearn.artifacts.calls import Call
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.runcard import Stopwatch, digest
from mechunlearn.edit import losses
from mechunlearn.edit.objective import training_texts
from mechunlearn.errors import MechunlearnError
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
Range = tuple[type, Callable[[Any], bool], str]

NOT_SETTINGS = ("model", "mask", "forget", "retain", "seed", "progress")
WHOLE: Range = (Integral, lambda n: n >= 1, "a whole number, 1 or more")
FROM_0: Range = (Integral, lambda n: n >= 0, "a whole number, 0 or more")
ABOVE_0: Range = (Real, lambda x: x > 0, "a number above 0")
WEIGHT: Range = (Real, lambda x: x >= 0, "a number, 0 or more")
SHARE: Range = (Real, lambda x: 0 <= x <= 1, "a share, from 0 to 1")
NUMBERS: dict[str, Range] = {
    "seed": (Integral, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2**63 - 1"),
    "lr": (Real, lambda x: 0 <= x <= 1000, "a learning rate from 0 to 1000, such as 2e-3"),
    "energy": (Real, lambda x: 0 < x < 1, "a share between 0 and 1"),
    "growth": (Real, lambda x: 1 <= x < 1e30, "a number, 1 or more"),
    **dict.fromkeys(("steps", "batch_size", "accumulate", "rank"), WHOLE),
    **dict.fromkeys(("warmup", "prefixes"), FROM_0),
    **dict.fromkeys(("clip", "alpha", "covariance_weight", "overshoot", "ridge"), ABOVE_0),
    **dict.fromkeys(("forget_weight", "retain_weight", "text_weight", "held_weight", "weight_decay", "scale"), WEIGHT),
    **dict.fromkeys(("stop_at", "quantile", "efficacy", "min_retention"), SHARE),
    "max_kl": ABOVE_0,
}
"""What the numbers of editors may be, by the names of their parameters: one name means the same in every editor."""


def editor(function: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """Make an editor of a function `(model, mask, forget, retain, *, ..., seed) -> Edit`.

    Before it runs, numbers out of range (`NUMBERS`), words that are none of a `Literal` annotation's, and a bare
    string in place of `texts` are refused. The edit's run card is filled in: the function's name, hashes of the model
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
        _check(function.__name__, known, given)
        settings = {name: described(value) for name, value in given.items() if name not in NOT_SETTINGS}
        model = given["model"]
        with enable_grad(), evaluating(model.hf) if isinstance(model, HookedModel) else nullcontext():
            edit = function(*args, **kwargs)
        sets = [described(given[name]) for name in ("forget", "retain")]
        texts = training_texts(given["forget"], given["texts"]) if "texts" in given else ()
        card = replace(
            edit.card,
            method=function.__name__,
            model=fingerprint_of(model),
            data=digest(json.dumps(sets), *texts),
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


def _check(name: str, known: Signature, given: dict[str, Any]) -> None:
    """Raise `MechunlearnError` for numbers and words that cannot be."""
    for key, value in given.items():
        words = get_args(known.parameters[key].annotation)
        if get_origin(known.parameters[key].annotation) is Literal and value not in words:
            raise MechunlearnError(f"{name} got {key}='{value}'. Expected one of {', '.join(words)}.")
        kind, within, expected = NUMBERS.get(key, (object, lambda x: True, ""))
        left_out = value is None and known.parameters[key].default is None
        number = isinstance(value, kind) and not isinstance(value, bool) and within(value)
        if expected and not left_out and not (number and math.isfinite(given[key])):
            raise MechunlearnError(f"{name} got {key}={value}. Expected {expected}.")
    if isinstance(given.get("texts"), str):
        raise MechunlearnError(f"{name} got one string as texts. Expected a list of texts: texts=[...].")
