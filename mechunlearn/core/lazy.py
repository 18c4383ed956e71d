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

    def __getattr__(self, name: str) -> object:
        if name not in self._homes:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        home = self._homes[name]
        found = import_module(f"{home}.{name}") if home == self.__name__ else getattr(import_module(home), name)
        self.__dict__[name] = found
        return found

    def __setattr__(self, name: str, value: object) -> None:
        """Ignore the import system where it would put a submodule in the place of a function."""
        hides = isinstance(value, ModuleType) and self._homes.get(name, self.__name__) != self.__name__
        if not hides:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self._homes, *(name for name in self.__dict__ if name.startswith("__"))})


def lazy(package: str, methods: bool = False) -> None:
    """Let a package give, on first use, the names that its `if TYPE_CHECKING:` block imports, and list them in `dir`.

    Args:
        package: `__name__` of the package. `from package import name` in the block names a submodule.
        methods: Also give every method of the folder (see `method_names`), without a line for each.
    """
    module = sys.modules[package]
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.asname or alias.name: str(node.module) for node in imports for alias in node.names}
    if methods:
        homes |= {name: f"{package}.{name}" for name in method_names(package)}
    module.__dict__.update(_homes=homes, __all__=sorted(homes))
    module.__class__ = _Package


def method_names(package: str) -> tuple[str, ...]:
    """List the methods of a package without importing them: modules that define a function of their own name.

    >>> method_names("mechunlearn.attack")[:2]
    ('activation_perturbation', 'probing')
    """
    paths = list(import_module(package).__path__)
    names = [info.name for info in iter_modules(paths) if not info.ispkg]
    sources = {
        name: next(Path(path, f"{name}.py") for path in paths if Path(path, f"{name}.py").exists()) for name in names
    }
    return tuple(
        name for name in names if re.search(rf"^def {name}\(", sources[name].read_text(encoding="utf-8"), re.M)
    )
