"""Makes the notebooks pages of the site, and lists every method in its navigation.

Notebooks lie in a folder beside docs/, and mkdocs itself looks into docs/ alone.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from mechunlearn.core.methods import methods

ROOT = Path(__file__).parent.parent
LINK = re.compile(r'\b(href|src)="((?!\w+:)[^"#?/][^"#?]*\.(?:md|ipynb|png))(#[^"]*)?"')
SECTIONS = {"Localizers": "localize", "Editors": "edit", "Attacks": "attack"}
TABLE = re.compile(r"<!-- methods of (\w+) -->")
FENCE = re.compile(r"^```python .+$", re.MULTILINE)
log = logging.getLogger("mkdocs.hooks")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the page of every method in the navigation. A page that is not there fails `--strict`."""
    config.nav = with_methods(config.nav)
    return config


def with_methods(nav: Any) -> Any:
    """Add the page of every method to the section of its kind.

    Args:
        nav: The navigation, or a part of it, as mkdocs.yml has it.
    """
    if isinstance(nav, list):
        return [with_methods(entry) for entry in nav]
    if not isinstance(nav, dict):
        return nav
    names = {title: methods(folder) for title, folder in SECTIONS.items() if title in nav}
    pages = {title: [{name: f"methods/{name}.md"} for name in found] for title, found in names.items()}
    return {
        title: [*with_methods(inner), *pages[title]] if title in pages else with_methods(inner)
        for title, inner in nav.items()
    }


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
    """Add notebooks/*.ipynb. A notebook of the navigation that is not there fails `--strict`."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File(f"notebooks/{path.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put tables of methods where a page has their place; make what is written for the repository fit for the site.

    Notebooks are linked to where they lie, and a block may say how it is tested: neither is for the site.
    """
    markdown = TABLE.sub(lambda place: table(place[1]), markdown)
    return FENCE.sub("```python", markdown.replace("../notebooks/", "notebooks/"))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Notebooks link to `../docs/washing.md` and `2-remove.ipynb`; in the site these have other addresses."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def address(match: re.Match[str]) -> str:
        uri = posixpath.normpath(f"notebooks/{match[2]}").removeprefix("docs/")
        file = files.get_file_from_path(uri)
        if file is None:
            log.warning("%s links to '%s', which is no page of the site.", page.file.src_uri, match[2])
            return match[0]
        return f'{match[1]}="{file.url_relative_to(page.file)}{match[3] or ""}"'

    return LINK.sub(address, html)
