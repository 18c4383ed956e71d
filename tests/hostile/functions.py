"""Bad calls of every public method, made from its own signature: one argument at a time is wrong."""

import collections.abc
import inspect
import math
import signal
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

import mechunlearn as mu
from mechunlearn.model.layout import Signature

LIMIT = 20  # seconds


class World(NamedTuple):
    """Good arguments by name, and others of the wrong kind.

    Attributes:
        good: Arguments that work, by name.
        facts: A data set, which is no prompts.
        other: A mask of another model.
    """

    good: dict[str, Any]
    facts: Any
    other: Any


def world() -> World:
    """Make a small set of good arguments."""
    model = mu.load_model("factworld")
    facts = mu.load_facts("factworld/sport")
    forget, retain = facts.prompts(model).split(forget=8, retain=24)
    mask = mu.ComponentMask.of(["L1.mlp.out"], model.signature)
    edit = mu.edit.masked_gradient(model, mask, forget, retain, steps=1)
    tiny = Signature("llama", layers=2, heads=4, kv_heads=2, d_mlp=6, d_model=8)
    good = {"model": model, "prompts": forget, "mask": mask, "forget": forget, "retain": retain, "edit": edit}
    good["names"] = ["L0.mlp -> logits"]
    return World(good, facts, mu.ComponentMask.of(["L0.mlp.out"], tiny))


def kinds(hint: Any) -> set[str]:
    """What an annotation allows: int, float, str, words (a Literal), many (a sequence), none, call."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*(kinds(each) for each in typing.get_args(hint)))
    if hint is None or hint is type(None):
        return {"none"}
    origin = typing.get_origin(hint) or hint
    if origin is typing.Literal:
        return {"words"}
    if origin is collections.abc.Callable:
        return {"call"}
    if origin in (collections.abc.Sequence, tuple, list):
        return {"many"}
    if origin in (collections.abc.Mapping, dict):
        return {"mapping"}
    return {origin.__name__} if origin in (int, float, str, bool) else {"other"}


WRONG: dict[str, tuple[Any, ...]] = {
    "int": (-1, 1.5, "3", math.nan, [1], b"x"),
    "float": (math.nan, math.inf, -1.0, "x", [1.0], 1j),
    "str": ("zz", "", 3, ["a"]),
    "words": ("zz", "", 3, ["a"]),
    "bool": (),
    "many": ("letters", ("zz",), 3, (None,), (object(),)),
    "mapping": (3, "zz", [1], {1: object()}),
    "call": ("logit_diff", 3),
    "other": (3, "zz", object()),
}


def bad_calls(some: World) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Every method with one wrong argument: (method, what is wrong, the call).

    Args:
        some: Good arguments.
    """
    for folder in ("localize", "edit", "attack"):
        for name in dir(getattr(mu, folder)):
            method = getattr(getattr(mu, folder), name)
            if not inspect.isfunction(method) or name.startswith("_") or name in ("recovery", "feature_discovery"):
                continue
            hints = typing.get_type_hints(method)
            parameters = inspect.signature(method).parameters
            if "dictionary" in parameters:
                continue
            good = {each: some.good[each] for each in parameters if each in some.good}
            for each, parameter in parameters.items():
                for wrong in wrong_values(each, hints[each], some):
                    if parameter.default is not wrong and not (each == "texts" and wrong == ("zz",)):
                        yield (
                            f"{folder}.{name}",
                            f"{each} = {wrong!r:.40}",
                            lambda m=method, g={**good, each: wrong}: m(**g),
                        )


def wrong_values(name: str, hint: Any, some: World) -> tuple[Any, ...]:
    """Values that make no sense for a parameter.

    Args:
        name: The parameter's name.
        hint: Its annotation.
        some: Good arguments.
    """
    prompts = some.good["prompts"]
    if name == "model":
        return None, 3, torch.nn.Linear(2, 2), prompts
    if name in ("prompts", "forget", "retain"):
        return 3, "text", some.good["mask"], torch.zeros(2, 3), *([prompts.select([])] if name != "retain" else [])
    if name == "mask":
        return None, 3, "L1.mlp.out", [], some.other, mu.ComponentMask.of([], some.good["model"].signature)
    if name == "edit":
        return 3, "edit", some.good["mask"]
    if name in (
        "cache",
        "progress",
        "measure",
        "baseline_rows",
        "extra_edits",
        "gold",
        "fisher",
        "covariance",
        "target_values",
        "earlier",
    ):
        return ()
    allowed = kinds(hint)
    values = tuple(value for kind in sorted(allowed) if kind in WRONG for value in WRONG[kind])
    if "float" in allowed:
        values = tuple(value for value in values if value not in (-1, 1.5, "3") or value == "3")
        values += (-1.0,) * (name != "threshold")  # of nats, which may be negative
    if "str" in allowed and "many" in allowed:
        values = tuple(value for value in values if not isinstance(value, str))
    return values + ((None,) if "none" not in allowed else ()) + (2**70,) * ("int" in allowed)


class TooLong(BaseException):
    """A call that went on instead of refusing."""


def outcome(call: Callable[[], Any]) -> str:
    """Make a call, and say what is wrong with how it ended; empty if it was refused.

    Args:
        call: The call.
    """

    def stop(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except mu.MechunlearnError as error:
        return "" if str(error).strip() else "no message"
    except TooLong:
        return f"still working after {LIMIT} s"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    finally:
        signal.alarm(0)
    return "accepted"
