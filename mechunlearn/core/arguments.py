"""What the arguments of methods may be: one check of kind and range for localizers, editors and attacks."""

import collections.abc
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from numbers import Integral, Real
from typing import Any, Literal, TypeVar

from mechunlearn.errors import MechunlearnError

Function = TypeVar("Function", bound=Callable[..., Any])
Range = tuple[Callable[[Any], bool], str]

UNIONS = ("typing.Union", "<class 'types.UnionType'>", "<class 'typing.Union'>")
MOST = 2**31
FROM_1: Range = (lambda n: 1 <= n < MOST, "a whole number, 1 or more")
FROM_0: Range = (lambda n: 0 <= n < MOST, "a whole number, 0 or more")
ABOVE_0: Range = (lambda x: x > 0, "a number above 0")
WEIGHT: Range = (lambda x: x >= 0, "a number, 0 or more")
SHARE: Range = (lambda x: 0 <= x <= 1, "a share, from 0 to 1")
RANGES: dict[str, Range] = {
    "seed": (lambda n: 0 <= n < 2**63, "a whole number from 0 to 2**63 - 1"),
    "lr": (lambda x: 0 <= x <= 1000, "a learning rate from 0 to 1000, such as 2e-3"),
    "energy": (lambda x: 0 < x < 1, "a share between 0 and 1"),
    "growth": (lambda x: 1 <= x < 1e30, "a number, 1 or more"),
    **dict.fromkeys(
        ("steps", "batch_size", "accumulate", "rank", "eval_every", "window", "neurons", "nearest"), FROM_1
    ),
    **dict.fromkeys(("warmup", "prefixes", "verify", "shots"), FROM_0),
    "ig_steps": (lambda n: 0 <= n <= 10_000, "a whole number from 0 to 10000"),
    "tokens": (lambda n: 1 <= n <= 100_000, "a whole number from 1 to 100000"),
    **dict.fromkeys(("clip", "alpha", "covariance_weight", "overshoot", "ridge", "max_kl", "budget", "sigma"), ABOVE_0),
    **dict.fromkeys(("forget_weight", "retain_weight", "text_weight", "held_weight", "weight_decay", "scale"), WEIGHT),
    **dict.fromkeys(("stop_at", "quantile", "efficacy", "min_retention", "false_discoveries"), SHARE),
}
"""Ranges of numbers, by the names of their parameters: one name means the same in every method."""
MEANT = {
    "HookedModel": "a model, as load_model(...) gives it",
    "Prompts": "facts as prompts, as load_facts(...).prompts(model) gives them",
    "DataFrame": "rows that an earlier call returned",
    "ComponentMask": "a ComponentMask, such as found.above(0) or found.top(weights=0.05)",
    "int": "a whole number",
    "float": "a finite number",
    "str": "a text",
    "bool": "True or False",
    "NoneType": "None",
}
"""Classes that are judged here, in words; methods judge all others, and say what to do with them."""
SCORES = {"ComponentMask": ("Localization", "Circuit")}
"""What is often given in their place: `ComponentMask.check` says how to make the one of the other."""


def validated(function: Function) -> Function:
    """Check the arguments of a function by its annotations and `RANGES`, each time before it runs.

    Args:
        function: The function.

    >>> @validated
    ... def dropped(seed: int = 0, *, steps: int = 3) -> int:
    ...     return steps
    >>> dropped(steps=0)
    Traceback (most recent call last):
    mechunlearn.errors.MechunlearnError: dropped got steps=0. Expected a whole number, 1 or more.
    """

    @wraps(function)
    def checked(*given: Any, **named: Any) -> Any:
        try:
            bound = inspect.signature(function).bind(*given, **named)
        except TypeError as error:
            raise TypeError(f"{function.__name__}(): {error}") from None
        check_arguments(function, bound.arguments)
        forget, retain = (bound.arguments.get(name) for name in ("forget", "retain"))
        if forget is not None and retain is not None:
            forget.check_apart(retain)
        return function(*given, **named)

    return checked  # type: ignore[return-value]


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raise an error for an argument that its annotation does not allow, or that is out of range.

    Args:
        function: Whose arguments they are.
        given: The arguments by name.

    Raises:
        MechunlearnError: Of the first that is wrong, with what is expected.
    """
    hints, parameters = _hints(function), inspect.signature(function).parameters
    for name, value in given.items():
        hint, default = hints.get(name, Any), parameters[name].default
        if value is None and default is None:
            continue
        if name == "texts" and isinstance(value, str):
            raise MechunlearnError(
                f"{function.__name__} got one string as texts. Expected a list of texts: texts=[...]."
            )
        within, expected = RANGES.get(name, (lambda x: True, ""))
        numeric = expected and isinstance(value, Real) and not isinstance(value, bool)
        if not _is(value, hint) or (numeric and not within(value)):
            raise MechunlearnError(
                f"{function.__name__} got {name}={_shown(value)}. Expected {expected or _meant(hint)}."
            )


@lru_cache(maxsize=256)
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function; none where one names what is imported for type checkers alone."""
    try:
        return typing.get_type_hints(inspect.unwrap(function))
    except NameError:
        return {}


def _shown(value: Any) -> str:
    """A value in a few words."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return f"{value!r:.60}"
    return f"a {type(value).__name__}" + (f" {value!r:.40}" if isinstance(value, list | tuple) else "")


def _meant(hint: Any) -> str:
    """What an annotation allows, in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if str(origin) in UNIONS:
        return " or ".join(dict.fromkeys(_meant(each) for each in inner))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (collections.abc.Sequence, list, tuple):
        return f"a list of them, each {_meant(inner[0])}" if inner else "a list"
    if origin is collections.abc.Mapping:
        return "a mapping"
    if origin is collections.abc.Callable:
        return "a function"
    name = getattr(hint, "__name__", str(hint))
    return MEANT.get(name, f"a {name}")


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation allows; True of annotations that are not judged here, such as protocols."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if str(origin) in UNIONS:
        return any(_is(value, each) for each in inner)
    if hint is None or hint is type(None):
        return value is None
    if origin is Literal:
        return isinstance(value, str | int) and value in inner
    if origin is collections.abc.Callable:
        return callable(value)
    if origin in (collections.abc.Sequence, list):
        many = isinstance(value, Sequence | set | frozenset) or hasattr(value, "tolist")
        return many and not isinstance(value, str | bytes) and (not inner or all(_is(each, inner[0]) for each in value))
    if origin is tuple and inner and inner[-1] is not ...:
        fits = isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) == len(inner)
        return fits and all(map(_is, value, inner))
    if origin in (collections.abc.Mapping, dict):
        return isinstance(value, Mapping) and all(_is(k, inner[0]) and _is(v, inner[1]) for k, v in value.items())
    if hint is bool:
        return isinstance(value, bool) or type(value).__name__ == "bool_"
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    judged = isinstance(hint, type) and origin is None and hint.__name__ in MEANT
    return not judged or type(value).__name__ in SCORES.get(hint.__name__, ()) or isinstance(value, hint)
