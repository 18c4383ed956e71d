"""`import mechunlearn` waits for nothing heavy, works on every system, and `mu.<TAB>` lists what there is."""

import copy
import importlib
import inspect
import pickle
import pydoc
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import mechunlearn as mu
from mechunlearn.core.lazy import method_names, source

INIT = """
    from typing import TYPE_CHECKING

    from mechunlearn.core.lazy import lazy

    if TYPE_CHECKING:
        from {name} import part as part
        from {name}.helper import alpha as alpha
        from {name}.helper import useful as useful
    else:
        lazy(__name__, methods=True)
"""
FILES = {
    "alpha": "def alpha():\n    return 'of alpha'\n",  # hidden by the function of the block
    "beta": "def beta():\n    return 'of beta'\n",
    "helper": "def useful():\n    return 'useful'\n\n\ndef alpha():\n    return 'of helper'\n",
    "part": "VALUE = 1\n",
}


def fresh(code: str, *options: str) -> str:
    """What another Python prints."""
    command = [sys.executable, *options, "-c", textwrap.dedent(code)]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(mu.__file__).parents[1]).stdout


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make a package of this kind, under a name that no other test uses."""
    name = f"lazy_{tmp_path.name}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text(textwrap.dedent(INIT.format(name=name)))
    for stem, text in FILES.items():
        (folder / f"{stem}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module(name)
    for each in [each for each in sys.modules if each.partition(".")[0] == name]:
        del sys.modules[each]


class TestNames:
    def test_they_are_listed_and_nothing_is_imported_for_it(self, package):
        listed = ["alpha", "beta", "part", "useful"]
        assert [each for each in dir(package) if not each.startswith("_")] == package.__all__ == listed
        assert not [each for each in sys.modules if each.startswith(f"{package.__name__}.")]

    def test_they_are_what_the_block_says(self, package):
        assert package.part.VALUE == 1 and package.useful() == "useful"
        assert package.alpha() == "of helper" and package.beta() == "of beta"
        assert package.beta is package.beta and package.__dict__["beta"] is package.beta

    @pytest.mark.parametrize("first", ["alpha", "beta", "helper", "part"])
    def test_a_function_hides_the_module_of_its_name_whichever_is_imported_first(self, package, first):
        module = importlib.import_module(f"{package.__name__}.{first}")
        assert isinstance(module, ModuleType) and sys.modules[module.__name__] is module
        assert package.alpha() == "of helper" and package.beta() == "of beta"
        for name in ("alpha", "beta"):
            hidden = importlib.import_module(f"{package.__name__}.{name}")
            assert isinstance(hidden, ModuleType) and isinstance(getattr(package, name), FunctionType)
        assert package.helper.useful is package.useful, "a module that no name hides is reached once it is imported"

    def test_all_of_them_with_a_star(self, package):
        names = {}
        exec(f"from {package.__name__} import *", names)
        assert {name for name in names if not name.startswith("__")} == {"alpha", "beta", "part", "useful"}

    def test_another_name_is_refused_with_the_nearest(self, package):
        with pytest.raises(AttributeError, match=f"'{package.__name__}' has no attribute 'usefull'.*mean 'useful'"):
            package.usefull  # noqa: B018
        with pytest.raises(AttributeError, match=r"has no attribute 'xyz'\.$"):
            package.xyz  # noqa: B018
        with pytest.raises(ImportError, match="cannot import name 'usefull'"):
            exec(f"from {package.__name__} import usefull")
        assert not hasattr(package, "_repr_html_") and not hasattr(package, "__wrapped__")

    def test_a_method_added_later_is_found(self, package, tmp_path):
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "gamma.py").write_text("def gamma():\n    return 'of gamma'\n")
        (elsewhere / "beta.py").write_text("def beta():\n    return 'of another beta'\n")
        package.__path__.append(str(elsewhere))
        assert method_names(package.__name__) == ("alpha", "beta", "gamma")
        assert "gamma" in dir(package) and "gamma" in package.__all__ and package.gamma() == "of gamma"
        assert package.beta() == "of beta", "the first folder wins"
        assert source(package.__name__, "beta") == FILES["beta"]

    def test_a_value_that_is_set_is_there(self, package, monkeypatch):
        monkeypatch.setattr(package, "useful", len)
        assert package.useful is len


class TestModules:
    def test_it_is_pickled_by_name(self, package):
        for way in (lambda one: pickle.loads(pickle.dumps(one)), copy.copy, copy.deepcopy):
            assert way(package) is package
        assert pickle.loads(pickle.dumps(package.beta)) is package.beta

    def test_a_function_that_uses_it_is_pickled_by_cloudpickle(self):
        cloudpickle = pytest.importorskip("cloudpickle")
        function = FunctionType((lambda: mu.load_model).__code__, {"mu": mu})
        assert cloudpickle.loads(cloudpickle.dumps(function))() is mu.load_model

    def test_it_can_be_loaded_again(self, package):
        before = package.beta
        assert importlib.reload(package) is package
        assert package.beta is before and package.useful() == "useful" and "part" in dir(package)

    def test_help_shows_it(self, package):
        shown = pydoc.plain(pydoc.render_doc(package))
        assert "useful()" in shown and "beta()" in shown and "helper" in shown
        assert {"beta", "useful"} <= dict(inspect.getmembers(package)).keys()

    @pytest.mark.parametrize("option", ["-O", "-OO"])
    def test_without_assertions_and_docstrings(self, option):
        code = "import mechunlearn as mu; print(mu.MechunlearnError.__name__, mu.localize.__name__, 'edit' in dir(mu))"
        assert fresh(code, option) == "MechunlearnError mechunlearn.localize True\n"


class TestMechunlearn:
    def test_it_lists_folders_nouns_and_functions(self):
        assert {"attack", "edit", "features", "localize", "metrics", "plots", "model", "facts"} <= set(dir(mu))
        assert {"HookedModel", "FactDataset", "ComponentMask", "Localization", "WeightEdit", "Report"} <= set(dir(mu))
        assert {"load_model", "load_facts", "load_edit", "evaluate", "compare", "explore"} <= set(dir(mu))
        assert "core" not in dir(mu) and "lazy" not in dir(mu) and "TYPE_CHECKING" not in dir(mu)

    def test_its_version_is_that_of_the_installed_package(self):
        assert mu.__version__ == version("mechunlearn") and mu.__version__[0].isdigit()
        assert "__version__" in dir(mu) and "__version__" not in mu.__all__

    def test_a_package_and_a_function_of_one_name(self):
        for name, function in (("explore", mu.explore), ("localize.fact_lookup", mu.localize.fact_lookup)):
            module = importlib.import_module(f"mechunlearn.{name}")
            assert isinstance(module, ModuleType) and isinstance(function, FunctionType)
        assert mu.explore is importlib.import_module("mechunlearn.explore.widget").explore

    def test_importing_it_imports_nothing_heavy(self):
        code = "import sys, mechunlearn as mu; dir(mu); print(*{name.partition('.')[0] for name in sys.modules})"
        assert not {"torch", "transformers", "numpy", "pandas", "rich", "psutil"} & set(fresh(code).split())

    def test_every_module_is_imported_where_there_is_no_fcntl_and_no_resource(self):
        """As on Windows. psutil comes first: on Linux it uses `resource` itself."""
        code = """
            import importlib, pkgutil, sys
            import psutil
            sys.modules["fcntl"] = sys.modules["resource"] = None
            import mechunlearn as mu
            from mechunlearn.core.runcard import RunCard, Stopwatch
            for module in pkgutil.walk_packages(mu.__path__, "mechunlearn."):
                importlib.import_module(module.name)
            print(mu.load_model("factworld").signature.layers, Stopwatch().stamp(RunCard("by hand")).peak_mib > 10)
        """
        assert fresh(code, "-W", "ignore") == "8 True\n"
