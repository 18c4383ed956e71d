"""The pages: every link leads somewhere, every public name and method is on a page, every page is in the navigation."""

import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
import yaml
from markdown.extensions.toc import slugify
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import PluginCollection
from mkdocs.structure.files import File, Files
from mkdocs_jupyter.plugin import NotebookFile

import mechunlearn
from mechunlearn.cli.main import app
from mechunlearn.core.methods import CALLED_WITH, methods

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
METHODS = [method.function for folder in CALLED_WITH for method in methods(folder).values()]
SAYS = ("Use it when", "Cost", "It assumes", "Its control", "Do not use it when")

FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
DIRECTIVE = re.compile(r"^::: (mechunlearn[\w.]*)$", re.MULTILINE)
DIFF = re.compile(r"^```diff\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shown(path: Path) -> str:
    """The running text of a page, without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCED.sub("", path.read_text(encoding="utf-8")))


def anchors(path: Path) -> set[str]:
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in HEADING.findall(text)]
    return {slugify(title.replace("`", "").strip(), "-") for title in titles} | set(DIRECTIVE.findall(text))


def links() -> list[tuple[Path, str]]:
    """Every relative link and image of the pages and of the notebooks' text, with where it stands."""
    found = [(page, target) for page in PAGES for target in LINK.findall(shown(page))]
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        found += [(notebook, target) for text in texts for target in LINK.findall(FENCED.sub("", text))]
    return [(page, target) for page, target in found if not re.match(r"\w+:", target)]


def entries(nav: object) -> list[str]:
    """The pages of the navigation."""
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else []
    return [page for entry in inner for page in entries(entry)]


def loaded(name: str):
    """A file of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hooks():
    return loaded("hooks")


HOOKS = hooks()
NAV = entries(HOOKS.with_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))


def public() -> dict[str, object]:
    """Every function and class of the public modules, by its full name."""
    found = {}
    for module in pkgutil.walk_packages(mechunlearn.__path__, "mechunlearn."):
        if HOOKS.INTERNAL.fullmatch(module.name):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            kind = inspect.isfunction(value) or inspect.isclass(value)
            if kind and not name.startswith("_") and value.__module__ == module.name:
                found[f"{module.name}.{name}"] = value
    return found


PUBLIC = public()
GENERATED = {HOOKS.address(name): HOOKS.api_page(name) for found in HOOKS.modules().values() for name in found}
DIRECTIVES = {
    name
    for page in (*GENERATED.values(), *(page.read_text() for page in (DOCS / "methods").glob("*.md")))
    for name in DIRECTIVE.findall(page)
}


def has_docstring(value: object) -> bool:
    """A dataclass without one is given its signature for one."""
    said = (getattr(value, "__doc__", None) or "").strip()
    return bool(said) and not (inspect.isclass(value) and said.startswith(f"{value.__name__}("))


class TestLinks:
    def test_every_relative_link_leads_to_a_file(self):
        assert len(links()) > 200
        there = [(page, target) for page, target in links() if target.partition("#")[0]]
        broken = [f"{page.name}: {t}" for page, t in there if not (page.parent / t.partition("#")[0]).exists()]
        assert not broken

    def test_every_anchor_is_a_heading(self):
        with_anchor = [(page, *target.partition("#")[::2]) for page, target in links() if "#" in target]
        assert len(with_anchor) > 30
        missing = [
            f"{page.name}: {target}#{anchor}"
            for page, target, anchor in with_anchor
            if anchor not in anchors(page.parent / target if target else page)
        ]
        assert not missing


class TestNames:
    def test_every_name_of_the_package_is_on_a_page_and_says_what_it_is(self):
        for name in mechunlearn.__all__:
            value = getattr(mechunlearn, name)
            home = value.__name__ if inspect.ismodule(value) else f"{value.__module__}.{value.__name__}"
            assert (home in PUBLIC or inspect.ismodule(value)) and has_docstring(value), name
            assert f"`mu.{name}`" in (DOCS / "api.md").read_text(), f"docs/api.md does not list mu.{name}"

    def test_no_public_name_is_undocumented(self):
        assert len(PUBLIC) > 250
        assert not [name for name, value in PUBLIC.items() if not has_docstring(value)]
        missing = {name for name in PUBLIC if not {name, name.rpartition(".")[0]} & DIRECTIVES}
        assert not missing, "no `:::` directive of a module's page or of docs/methods covers these"

    def test_every_directive_names_something(self):
        for name in DIRECTIVES:
            assert name in PUBLIC or importlib.util.find_spec(name), name


def shown_index() -> str:
    """The page that lists the methods, as the site has it."""
    return hooks().on_page_markdown((DOCS / "methods" / "index.md").read_text(), None, None, None)


class TestMethods:
    @pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
    def test_every_method_has_its_page(self, method):
        name = method.__name__
        page = (DOCS / "methods" / f"{name}.md").read_text()
        assert page.startswith(f"# {name}\n") and f"methods/{name}.md" in NAV
        assert f"{inspect.unwrap(method).__module__}.{name}" in DIRECTIVE.findall(page)
        assert list(re.findall(r"^\| \*\*(.+?)\*\* \|", page, re.MULTILINE)) == list(SAYS)
        sentence = page.split("\n\n")[1]
        assert f"| [`{name}`]({name}.md) | {sentence} |" in shown_index()

    def test_every_page_has_its_method(self):
        pages = {page.stem for page in (DOCS / "methods").glob("*.md")} - {"index"}
        assert pages == {method.__name__ for method in METHODS}


class TestNavigation:
    def test_every_page_is_listed_once(self):
        pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
        listed = [entry for entry in NAV if entry.endswith(".md")]
        assert len(listed) == len(set(listed)) and set(listed) == pages | set(GENERATED)

    def test_every_notebook_is_listed(self):
        listed = [entry for entry in NAV if entry.endswith(".ipynb")]
        assert len(listed) == 7 and listed == [f"notebooks/{path.name}" for path in NOTEBOOKS]


class TestExamples:
    def test_a_method_is_its_file_and_its_page(self):
        added = re.findall(r"^\+\+\+ (\S+)$", (DOCS / "extending.md").read_text(), re.MULTILINE)
        methods = (("localize", "activation_change"), ("edit", "silence"), ("attack", "weight_noise"))
        files = [(f"mechunlearn/{folder}/{name}.py", f"docs/methods/{name}.md") for folder, name in methods]
        assert added == [file for pair in files for file in pair]

    def test_the_diffs_apply(self):
        """What a new method is added beside is still there, line after line."""
        hunks = [
            (file, body)
            for diff in DIFF.findall((DOCS / "extending.md").read_text())
            for file, body in re.findall(r"^@@ (\S+) @@\n(.*?)(?=^@@|\Z)", diff, re.MULTILINE | re.DOTALL)
        ]
        assert len(hunks) == 2
        for file, body in hunks:
            old = [line[1:] for line in body.splitlines() if not line.startswith("+")]
            replaced = [line[1:] for line in body.splitlines() if line.startswith("-")]
            text = (ROOT / file).read_text()
            together = old if not replaced else replaced[:1]
            assert "\n".join(together) in text and all(line in text for line in old), f"{file}:\n{body}"

    def test_every_command_and_option_exists(self):
        root = typer.main.get_command(app)
        lines = [
            line
            for page in PAGES
            for block in SHELL.findall(page.read_text())
            for line in block.replace("\\\n", " ").splitlines()
            if line.startswith("mechunlearn ")
        ]
        assert len(lines) > 15
        for line in lines:
            words, command = shlex.split(line)[1:], root
            while hasattr(command, "commands"):
                assert words[0] in command.commands, f"no command '{words[0]}': {line}"
                command, words = command.commands[words[0]], words[1:]
            try:
                command.make_parser(command.context_class(command)).parse_args(words)
            except Exception as error:
                pytest.fail(f"{line}: {error}")


class TestModules:
    """Every module has a page of its own, which the site makes."""

    def test_the_table_names_each_with_what_it_is(self):
        page = HOOKS.on_page_markdown((DOCS / "api.md").read_text(), None, None, None)
        assert "<!-- modules -->" not in page and "## model\n" in page
        assert "| [`model.restart`](api/model/restart.md) | Runs that start at some layer and position. |" in page
        assert len(re.findall(r"^\| \[`", page, re.MULTILINE)) == len(GENERATED) > 100

    def test_a_method_is_on_its_own_page_alone(self):
        assert not {HOOKS.address(inspect.unwrap(method).__module__) for method in METHODS} & set(GENERATED)

    def test_they_are_pages_of_the_site(self, tmp_path):
        config = MkDocsConfig()
        config.load_dict({"site_name": "site", "docs_dir": str(DOCS), "site_dir": str(tmp_path)})
        config.plugins = PluginCollection()
        config.plugins.run_event("startup", command="build", dirty=False)
        files = HOOKS.on_files(Files([]), config)
        made = files.get_file_from_path("api/model/hooked.md")
        assert made.content_string.startswith("::: mechunlearn.model.hooked\n") and made.url == "api/model/hooked/"


class TestHooks:
    @pytest.fixture
    def site(self, tmp_path):
        config = MkDocsConfig()
        config.load_dict({"site_name": "site", "docs_dir": str(DOCS), "site_dir": str(tmp_path / "site")})
        config.plugins = PluginCollection()
        config.plugins.run_event("startup", command="build", dirty=False)
        pages = [File(uri, str(DOCS), str(tmp_path / "site"), True) for uri in ("washing.md", "howto/mask.md")]
        return config, Files(pages)

    def test_notebooks_become_pages_and_their_links_hold(self, site, tmp_path, monkeypatch, caplog):
        config, files = site
        (tmp_path / "notebooks").mkdir()
        for name in ("1-find", "2-remove"):
            (tmp_path / "notebooks" / f"{name}.ipynb").write_text("{}")
        hook = hooks()
        monkeypatch.setattr(hook, "ROOT", tmp_path)
        files = hook.on_files(files, config)
        assert Path(files.get_file_from_path("notebooks/1-find.ipynb").abs_src_path).read_text() == "{}"
        files = Files([NotebookFile(f, **config) if f.src_uri.endswith(".ipynb") else f for f in files])
        first = files.get_file_from_path("notebooks/1-find.ipynb")
        page = SimpleNamespace(file=first)
        html = '<a href="../docs/washing.md#cost"><a href="2-remove.ipynb"><a href="https://a.org/b.md"><img src="data:x.png">'
        assert hook.on_page_content(html, page, config, files) == (
            '<a href="../../washing/#cost"><a href="../2-remove/"><a href="https://a.org/b.md"><img src="data:x.png">'
        )
        assert not caplog.records
        hook.on_page_content('<a href="../docs/nowhere.md">', page, config, files)
        assert "'../docs/nowhere.md', which is no page" in caplog.text

    def test_what_tests_ask_of_a_block_is_not_shown(self):
        written = "[1](../notebooks/1-find.ipynb)\n```python fixture:in_a_temporary_folder\nx\n```\n"
        shown_as = hooks().on_page_markdown(written, None, None, None)
        assert shown_as == "[1](notebooks/1-find.ipynb)\n```python\nx\n```\n"

    def test_doctests_are_shown_as_code(self):
        said = SimpleNamespace(docstring=SimpleNamespace(value="Add.\n\n>>> f(\n...     [0, 0])\n[0, 0]\n\nMore."))
        loaded("doctests").Doctests().on_object(obj=said)
        assert said.docstring.value == "Add.\n\n```pycon\n>>> f(\n...     [0, 0])\n[0, 0]\n```\n\nMore."


def test_the_page_of_defaults_on_a_real_model_has_the_numbers_of_its_cells():
    """The table is made anew from the committed cells."""
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("real_defaults", root / "benchmarks" / "real_defaults.py")
    bench = importlib.util.module_from_spec(spec)
    sys.modules["real_defaults"] = bench
    spec.loader.exec_module(bench)
    cells = json.loads((root / "docs" / "real-models.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "real-models.md").read_text(encoding="utf-8")
    for name, found in cells.items():
        assert bench.table(found) in page, f"paste what real_defaults.py prints for {name}"
