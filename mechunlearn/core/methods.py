"""Methods are files: what a folder of methods holds, read from its source, so that listing them imports nothing heavy."""

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from mechunlearn.core.lazy import method_names, source
from mechunlearn.errors import MechunlearnError

CALLED_WITH = {
    "localize": ("model", "prompts"),
    "edit": ("model", "mask", "forget", "retain"),
    "attack": ("model", "edit", "forget", "retain"),
}
RETURNS = {
    "localize": ("Localization", "Circuit"),
    "edit": ("WeightEdit", "FeatureEdit", "Edit"),
    "attack": ("pd.DataFrame",),
}
KIND = {"localize": "localizer", "edit": "editor", "attack": "attack"}


@dataclass(frozen=True)
class Method:
    """A localizer, editor or attack, as its source describes it.

    Attributes:
        name: The name of the function and of its file.
        folder: `localize`, `edit` or `attack`.
        takes: All parameters of the function.
        needs: The parameters that have no default.
        returns: The annotation of what it returns, as written.
    """

    name: str
    folder: str
    takes: tuple[str, ...]
    needs: tuple[str, ...]
    returns: str

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself; this imports it."""
        function: Callable[..., Any] = getattr(import_module(f"mechunlearn.{self.folder}"), self.name)
        return function

    def __call__(self, *given: Any, **options: Any) -> Any:
        """Call the function.

        Args:
            given: What every method of its kind is called with.
            options: Other arguments; those that it does not take are left out.
        """
        function = self.function
        taken = inspect.signature(function).parameters
        return function(*given, **{name: value for name, value in options.items() if name in taken})

    @property
    def ready(self) -> bool:
        """Whether it needs nothing beyond what every method of its kind is called with, and returns what they return."""
        return set(self.needs) <= set(CALLED_WITH[self.folder]) and self.returns in RETURNS[self.folder]


def methods(folder: str) -> dict[str, Method]:
    """List the methods of a folder by name: every module that defines a function of its own name.

    Args:
        folder: `localize`, `edit` or `attack`.

    >>> methods("localize")["feature_discovery"].needs
    ('model', 'prompts', 'dictionary')
    """
    return {name: _read(folder, name) for name in method_names(f"mechunlearn.{folder}")}


def ready_methods(folder: str, taking: str | None = None) -> tuple[str, ...]:
    """Name the methods of a folder that need nothing beyond what every method of their kind is called with.

    Args:
        folder: `localize`, `edit` or `attack`.
        taking: A parameter that they must have.

    >>> ready_methods("edit", taking="covariance")
    ('memit', 'mlp_washing', 'null_space')
    """
    found = methods(folder).items()
    return tuple(name for name, method in found if method.ready and (taking is None or taking in method.takes))


def method_named(folder: str, name: str, taking: str | None = None) -> Method:
    """Find a method that needs nothing beyond what every method of its kind is called with.

    Args:
        folder: `localize`, `edit` or `attack`.
        name: The method's name.
        taking: A parameter that it must have.

    Raises:
        MechunlearnError: No method is named so, with the nearest names; or it cannot be called like this.

    >>> method_named("edit", "memit").takes[:4]
    ('model', 'mask', 'forget', 'retain')
    """
    known, usable = methods(folder), ready_methods(folder, taking)
    if name in usable:
        return known[name]
    near = get_close_matches(name, usable, n=2, cutoff=0.5)
    meant = f"Did you mean {' or '.join(near)}? " if near else ""
    what = f"Unknown {KIND[folder]} '{name}'."
    if name in known:
        more = [each for each in known[name].needs if each not in CALLED_WITH[folder]]
        why = f"needs {', '.join(more)} too" if more else f"takes no {taking}" if taking else "returns something else"
        what, meant = f"'{name}' {why}: call mechunlearn.{folder}.{name} from Python.", ""
    raise MechunlearnError(f"{what} {meant}Expected one of {', '.join(usable)}.")


def _read(folder: str, name: str) -> Method:
    tree = ast.parse(source(f"mechunlearn.{folder}", name))
    given = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    plain = [*given.args.posonlyargs, *given.args.args]
    needs = plain[: len(plain) - len(given.args.defaults)]
    needs += [each for each, default in zip(given.args.kwonlyargs, given.args.kw_defaults) if default is None]
    takes = tuple(each.arg for each in (*plain, *given.args.kwonlyargs))
    returns = "" if given.returns is None else ast.unparse(given.returns).strip("'\"")
    return Method(name, folder, takes, tuple(each.arg for each in needs), returns)
