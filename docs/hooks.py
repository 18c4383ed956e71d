"""Makes the notebooks and every module pages of the site, and lists every method in its navigation.

Notebooks lie in a folder beside docs/, and mkdocs itself looks into docs/ alone.
"""

import importlib
import logging
import pkgutil
import posixpath
import re
from itertools import chain
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import mechunlearn
from mechunlearn.core.methods import methods

ROOT = Path(__file__).parent.parent
LINK = re.compile(r'\b(href|src)="((?!\w+:)[^"#?/][^"#?]*\.(?:md|ipynb|png))(#[^"]*)?"')
SECTIONS = {"Localizers": "localize", "Editors": "edit", "Attacks": "attack"}
TABLE = re.compile(r"<!-- methods of (\w+) -->")
MODULES = "<!-- modules -->"
INTERNAL = re.compile(
    r"mechunlearn\.(cli(\.\w+)?|reproduce(\.\w+)?|world\.(build|corpus|gates|generate|lexicon|packing|tokenizer|train))"
)
"""Commands say what they do in --help; reproductions and the making of the shipped world are run by them."""
FENCE = re.compile(r"^```python .+$", re.MULTILINE)
log = logging.getLogger("mkdocs.hooks")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the page of every method and module in the navigation. A page that is not there fails `--strict`."""
    config.nav = with_pages(config.nav)
    return config


def with_pages(nav: Any) -> Any:
    """Add the page of every method to the section of its kind, and the page of every module to the API.

    Args:
        nav: The navigation, or a part of it, as mkdocs.yml has it.
    """
    if isinstance(nav, list):
        return [with_pages(entry) for entry in nav]
    if not isinstance(nav, dict):
        return nav
    names = {title: methods(folder) for title, folder in SECTIONS.items() if title in nav}
    pages: dict[str, list[Any]] = {
        title: [{name: f"methods/{name}.md"} for name in found] for title, found in names.items()
    }
    if "API" in nav:
        pages["API"] = [
            {folder: [{name.rpartition(".")[2]: address(name)} for name in found]}
            for folder, found in modules().items()
        ]
    return {
        title: [*with_pages(inner), *pages[title]] if title in pages else with_pages(inner)
        for title, inner in nav.items()
    }


def modules() -> dict[str, list[str]]:
    """Return the full names of all public modules by folder, but for those of a method, which has a page of its own."""
    of_methods = {found.function.__module__ for folder in SECTIONS.values() for found in methods(folder).values()}
    by_folder: dict[str, list[str]] = {}
    for module in pkgutil.walk_packages(mechunlearn.__path__, "mechunlearn."):
        if not (module.ispkg or INTERNAL.fullmatch(module.name) or module.name in of_methods):
            inner = module.name.split(".")[1:]
            by_folder.setdefault(inner[0] if len(inner) > 1 else "mechunlearn", []).append(module.name)
    return dict(sorted(by_folder.items(), key=lambda item: item[0] == "mechunlearn"))


def address(name: str) -> str:
    """Return where the page of a module lies in the site's sources.

    Args:
        name: Its full name.

    >>> address("mechunlearn.model.hooked")
    'api/model/hooked.md'
    """
    return "/".join(["api", *name.split(".")[1:]]) + ".md"


def api_page(name: str) -> str:
    """Write the page of a module.

    Args:
        name: Its full name.
    """
    return f"::: {name}\n    options: {{ heading_level: 1, show_root_full_path: true }}\n"


def table_of_modules() -> str:
    """Write a table of the modules of each folder: each name, and the first sentence of its docstring."""
    told = []
    for folder, names in modules().items():
        package = importlib.import_module("mechunlearn" if folder == "mechunlearn" else f"mechunlearn.{folder}")
        rows = [
            f"| [`{name.partition('.')[2]}`]({address(name)}) | {_first_sentence(importlib.import_module(name).__doc__)} |"
            for name in names
        ]
        told += [f"## {folder}", _first_sentence(package.__doc__), "\n".join(["| | |", "|---|---|", *rows])]
    return "\n\n".join(told)


def _first_sentence(docstring: str | None) -> str:
    return " ".join((docstring or "").partition("\n\n")[0].split()).replace("|", "\\|")


def table(folder: str) -> str:
    """Write a table of the methods of a folder: each name, and the first sentence of its page.

    Args:
        folder: `localize`, `edit` or `attack`.
    """
    texts = {name: (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8") for name in methods(folder)}
    rows = [f"| [`{name}`]({name}.md) | {text.split(chr(10) * 2)[1]} |" for name, text in texts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


@event_priority(100)  # before the plugin that turns notebooks into pages
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add notebooks/*.ipynb and a page for every module. One of the navigation that is not there fails `--strict`."""
    for name in chain(*modules().values()):
        files.append(File.generated(config, address(name), content=api_page(name)))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File(f"notebooks/{path.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put tables of methods and modules where a page has their place; make what is written for the repository fit for the site.

    Notebooks are linked to where they lie, and a block may say how it is tested: neither is for the site.
    """
    markdown = TABLE.sub(lambda place: table(place[1]), markdown)
    if MODULES in markdown:
        markdown = markdown.replace(MODULES, table_of_modules())
    return FENCE.sub("```python", markdown.replace("../notebooks/", "notebooks/"))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Notebooks link to `../docs/washing.md` and `2-remove.ipynb`; in the site these have other addresses."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def in_the_site(match: re.Match[str]) -> str:
        uri = posixpath.normpath(f"notebooks/{match[2]}").removeprefix("docs/")
        file = files.get_file_from_path(uri)
        if file is None:
            log.warning("%s links to '%s', which is no page of the site.", page.file.src_uri, match[2])
            return match[0]
        return f'{match[1]}="{file.url_relative_to(page.file)}{match[3] or ""}"'

    return LINK.sub(in_the_site, html)
