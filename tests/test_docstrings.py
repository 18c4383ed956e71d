"""Every public name says what it does, and every parameter of it what it is: Google style, an imperative sentence first."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator

import pytest

import mechunlearn

SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Example|Examples|Attributes|Note):$", re.MULTILINE)
ENTRY = re.compile(r"^ {4}\*{0,2}(\w+)(?: \([^)]*\))?:", re.MULTILINE)
EVERYWHERE = {"self", "cls"}
INTERNAL = re.compile(
    r"mechunlearn\.(cli|reproduce|world\.(build|corpus|gates|generate|lexicon|packing|tokenizer|train))(\.\w+)*"
)
"""Commands explain their options in --help; reproductions and the making of the shipped world are run by them."""


def modules() -> list[str]:
    """The modules of the package, by name."""
    names = [info.name for info in pkgutil.walk_packages(mechunlearn.__path__, "mechunlearn.")]
    return [name for name in names if not INTERNAL.fullmatch(name)]


def public(name: str) -> Iterator[tuple[str, Callable]]:
    """The public functions of a module, and the public methods of its public classes."""
    module = importlib.import_module(name)
    for key, value in vars(module).items():
        if key.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if inspect.isfunction(value):
            yield f"{name}.{key}", value
        elif inspect.isclass(value):
            for inner, method in vars(value).items():
                method = getattr(method, "__func__", method)  # class and static methods
                if inspect.isfunction(method) and not inner.startswith("_"):
                    yield f"{name}.{key}.{inner}", method


def documented(function: Callable) -> set[str]:
    """The parameters under `Args:` in a docstring."""
    parts = SECTION.split(inspect.cleandoc(function.__doc__ or ""))
    return {name for title, body in zip(parts[1::2], parts[2::2]) if title == "Args" for name in ENTRY.findall(body)}


def undocumented(name: str) -> list[str]:
    """The parameters of a module's public functions that no `Args:` section explains."""
    return [
        f"{where}({parameter})"
        for where, function in public(name)
        for parameter in inspect.signature(inspect.unwrap(function)).parameters
        if parameter not in EVERYWHERE and not parameter.startswith("_") and parameter not in documented(function)
    ]


@pytest.mark.parametrize("name", modules())
def test_every_parameter_of_a_public_name_is_documented(name):
    assert not undocumented(name)
