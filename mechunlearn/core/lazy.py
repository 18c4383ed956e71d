"""Names that a package imports when they are first used, so that `import mechunlearn` waits for nothing heavy."""

import ast
import re
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType


class _Package(ModuleType):
    """A package in which a function hides the module of the same name, whichever was imported first."""

    _homes: dict[str, str]
    _methods: bool

    def __getattr__(self, name: str) -> object:
        home = self._homes.get(name)
        if home is None and self._methods and not name.startswith("_") and name in method_names(self.__name__):
            home = f"{self.__name__}.{name}"
        if home is None:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        found = import_module(f"{home}.{name}") if home == self.__name__ else getattr(import_module(home), name)
        self.__dict__[name] = found
        return found

    def __setattr__(self, name: str, value: object) -> None:
        """Ignore the import system where it would put a submodule in the place of a function."""
        named = self._homes.get(name, self.__name__) != self.__name__ or (self._methods and hasattr(value, name))
        if not (named and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__all__, *(name for name in self.__dict__ if name.startswith("__"))})

    @property
    def __all__(self) -> list[str]:
        return sorted({*self._homes, *(method_names(self.__name__) if self._methods else ())})


def lazy(package: str, methods: bool = False) -> None:
    """Let a package give, on first use, the names that its `if TYPE_CHECKING:` block imports, and list them in `dir`.

    Args:
        package: `__name__` of the package. `from package import name` in the block names a submodule.
        methods: Also give every method of the folder (see `method_names`). The block is then for type checkers alone.
    """
    module = sys.modules[package]
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.asname or alias.name: str(node.module) for node in imports for alias in node.names}
    module.__dict__.update(_homes=homes, _methods=methods)
    module.__class__ = _Package


def method_names(package: str) -> tuple[str, ...]:
    """List the methods of a package without importing them: modules that define a function of their own name.

    Folders that were added to the package's `__path__` are looked through as well.

    Args:
        package: The package's full name.

    Returns:
        The names, sorted.

    >>> method_names("mechunlearn.attack")[:2]
    ('activation_perturbation', 'probing')
    """
    texts = {name: path.read_text(encoding="utf-8") for name, path in _modules(package).items()}
    return tuple(sorted(name for name, text in texts.items() if re.search(rf"^def {name}\(", text, re.MULTILINE)))


def source(package: str, name: str) -> str:
    """Read the source of a module without importing it.

    Args:
        package: The full name of the package that holds the module.
        name: The module's name in it.
    """
    return _modules(package)[name].read_text(encoding="utf-8")


def _modules(package: str) -> dict[str, Path]:
    """The file of each module of a package, by name; the first folder of its path wins."""
    folders = [Path(folder) for folder in import_module(package).__path__]
    return {
        info.name: folder / f"{info.name}.py"
        for folder in reversed(folders)
        for info in iter_modules([str(folder)])
        if not info.ispkg
    }
