"""A real Chromium for tests of pages: `with chromium() as browser`, under the mark `needs_browser`."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REQUIRED = bool(os.environ.get("MECHUNLEARN_NEEDS_BROWSER"))


def missing() -> str:
    """What a test in a browser lacks here; empty if nothing."""
    if not any(map(shutil.which, NAMES)):
        return f"no browser on PATH (looked for {', '.join(NAMES)})"
    return "" if importlib.util.find_spec("playwright") else "the package playwright is not installed"


needs_browser = pytest.mark.skipif(bool(missing()) and not REQUIRED, reason=missing() or "a browser is here")


@contextmanager
def chromium() -> Iterator["Browser"]:
    """The browser that is installed, headless and without a sandbox (tests may run as root).

    Fails where there is none: with MECHUNLEARN_NEEDS_BROWSER set, `needs_browser` skips nothing.
    """
    if missing():
        pytest.fail(f"MECHUNLEARN_NEEDS_BROWSER is set, and {missing()}.")
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, NAMES)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def screenshots(tmp_path: Path) -> Path:
    """Where pictures of pages go: the folder in MECHUNLEARN_SCREENSHOTS, else the test's own."""
    folder = Path(os.environ.get("MECHUNLEARN_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
