"""Names that a package imports when they are first used, so that `import mechunlearn` waits for nothing heavy."""

import ast
import re
import sys
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType


class _Package(ModuleType):
    """A package in which a function hides the module of the same name, whichever was imported first."""

    _named: dict[str, str]
    _methods: bool

    @property
    def _homes(self) -> dict[str, str]:
        """The module of each name: the package's own name for one of its submodules."""
        methods = method_names(self.__name__) if self._methods else ()
        return {name: f"{self.__name__}.{name}" for name in methods} | self._named

    @property
    def __all__(self) -> list[str]:
        return sorted(name for name in self._homes if not name.startswith("_"))

    def __getattr__(self, name: str) -> object:
        homes = {} if name.startswith("_") and name not in self._named else self._homes
        if name not in homes:
            near = get_close_matches(name, homes, n=1)
            meant = f" Did you mean '{near[0]}'?" if near else ""
            # `obj` is left out: with it, Python's traceback would print a suggestion of its own
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'.{meant}", name=name)
        home = homes[name]
        found = import_module(f"{home}.{name}") if home == self.__name__ else getattr(import_module(home), name)
        self.__dict__[name] = found
        return found

    def __setattr__(self, name: str, value: object) -> None:
        """Ignore the import system where it would put a submodule in the place of a function."""
        if not isinstance(value, ModuleType) or self._homes.get(name, self.__name__) == self.__name__:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self._homes, *(name for name in self.__dict__ if name.startswith("__"))})

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by name, as cloudpickle does with ordinary modules."""
        return import_module, (self.__name__,)


def lazy(package: str, methods: bool = False) -> None:
    """Let a package import, on first use, the names that its `if TYPE_CHECKING:` block imports, and list them in `dir`.

    Args:
        package: `__name__` of the package. `from package import name` in the block names a submodule.
        methods: Also find every method of the folder (see `method_names`), with or without a line in the block.
    """
    module = sys.modules[package]
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    named = {alias.asname or alias.name: str(node.module) for node in imports for alias in node.names}
    module.__dict__.update(_named=named, _methods=methods)
    module.__class__ = _Package


def method_names(package: str) -> tuple[str, ...]:
    """List the methods of a package without importing them: modules that define a function of their own name.

    Args:
        package: The package's full name. Folders that were added to its `__path__` are searched too.

    Returns:
        The names, sorted.

    >>> method_names("mechunlearn.attack")[:2]
    ('activation_perturbation', 'hints')
    """
    sources = {name: path.read_text(encoding="utf-8") for name, path in _files(package).items()}
    return tuple(sorted(name for name, text in sources.items() if re.search(rf"^def {name}\(", text, re.MULTILINE)))


def source(package: str, name: str) -> str:
    """Read the source of a module without importing it.

    Args:
        package: The full name of the package that holds the module.
        name: The module's name within the package.
    """
    return _files(package)[name].read_text(encoding="utf-8")


def _files(package: str) -> dict[str, Path]:
    """The file of each module of a package; the first folder of its path wins."""
    folders = [Path(folder) for folder in reversed(list(import_module(package).__path__))]
    return {file.stem: file for folder in folders for file in folder.glob("*.py")}
