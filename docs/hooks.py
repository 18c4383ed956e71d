"""Makes the notebooks pages of the site. They lie in a folder beside docs/, and mkdocs itself looks into docs/ alone."""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r'\b(href|src)="((?!\w+:)[^"#?/][^"#?]*\.(?:md|ipynb|png))(#[^"]*)?"')
FENCE = re.compile(r"^```python .+$", re.MULTILINE)
log = logging.getLogger("mkdocs.hooks")


@event_priority(100)  # before the plugin that turns notebooks into pages
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add notebooks/*.ipynb. A notebook of the navigation that is not there fails `--strict`."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File(f"notebooks/{path.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Notebooks are linked to where they lie, and a block may say how it is to be tested: neither is for the site."""
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
