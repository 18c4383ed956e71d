"""JupyterLab and Notebook 7 themselves, in a real browser: the explorer runs, a click changes it, the saved mask is Python's."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import pytest

from mechunlearn import ComponentMask, load_facts
from mechunlearn.localize import attribution_patching
from tests.browser import chromium, missing, needs_browser, screenshots

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "1-find.ipynb"
SETTINGS = "@jupyterlab/notebook-extension"
FRONTS = {"lab": "lab/tree", "notebook": "notebooks"}
SHORT = [
    "import mechunlearn as mu\nfrom mechunlearn.explore import explore",
    "model = mu.load_model('factworld')\nforget, _ = mu.load_facts('factworld/sport').prompts(model).split(forget=8, seed=0)",
    "explore(model, forget)",
]


@contextmanager
def jupyter(front: str, folder: Path, notebook: nbformat.NotebookNode) -> Iterator[tuple[str, Path]]:
    """A server of its own on a free port, with a notebook that has not been run: nothing of the user's is read or written."""
    if missing():
        pytest.fail(missing())
    work, own = folder / "work", folder / "jupyter"
    work.mkdir()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # so that what is seen has been run here
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, work / "it.ipynb")
    (own / "settings" / SETTINGS).mkdir(parents=True)
    (own / "settings" / SETTINGS / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "JUPYTER_PREFER_ENV_PATH": "1", "IPYTHONDIR": str(own / "ipython"), "OMP_NUM_THREADS": "1"}
    env |= {f"JUPYTER_{name}_DIR": str(own / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    env |= {f"JUPYTERLAB_{name}_DIR": str(own / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    command = [sys.executable, "-m", f"jupyter{front}" if front == "lab" else front, "--no-browser", "--allow-root"]
    command += ["--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=secret", f"--ServerApp.root_dir={work}"]
    command += ["--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=env, cwd=work, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}/{FRONTS[front]}/it.ipynb?token=secret", work
    finally:
        process.terminate()
        process.wait(30)


def opened(page, address: str) -> None:
    """Wait for the server to answer and the notebook to be there."""
    from playwright.sync_api import Error

    for _ in range(120):
        try:
            page.goto(address)
            break
        except Error:
            page.wait_for_timeout(500)
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').first.wait_for(timeout=120_000)


def run_all(page) -> None:
    """Run all cells until the explorer is there. The kernel says idle before it listens, and then what was asked is lost: ask again."""
    from playwright.sync_api import TimeoutError

    running = page.locator(".jp-InputPrompt", has_text="[*]")
    for _ in range(200):
        with suppress(TimeoutError):
            if page.locator(".jp-Dialog").count():  # of a kernel that does not listen yet; it may come at any time
                page.locator(".jp-Dialog .jp-mod-accept").first.click(timeout=2000)
            if not running.count():
                if page.locator(".mu-explorer").count():
                    return
                page.get_by_role("menuitem", name="Run", exact=True).click(timeout=2000)
                page.get_by_text("Run All Cells", exact=True).click(timeout=2000)
        page.wait_for_timeout(2000)
    pytest.fail(f"No explorer after minutes of asking: {page.locator('.jp-InputPrompt').all_text_contents()}")


def used(page) -> None:
    """Look at a component, take a mask, save it."""
    page.locator('.mu-explorer [data-component="L2.mlp.out"]').first.scroll_into_view_if_needed()
    for component in ("L1.mlp.out", "L2.mlp.out"):
        page.locator(f'.mu-explorer [data-component="{component}"]').first.click()
        page.locator(".mu-explorer .detail h3", has_text=component).wait_for()
    page.locator('.mu-explorer [data-do="clear"]').click()
    page.locator(".mu-explorer .mask .total", has_text=re.compile("^0 units")).wait_for()
    page.locator('.mu-explorer [data-do="take"]').click()
    page.locator(".mu-explorer .mask .total").filter(has_not_text=re.compile("^0 units")).wait_for()
    page.locator('.mu-explorer [data-do="save"]').click()
    page.locator(".mu-explorer .said", has_text="explored.mask.json").wait_for()


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(("front", "facts"), [("lab", 32), ("notebook", 8)])
def test_the_explorer_runs_where_notebooks_run(front, facts, world, tmp_path):
    """Notebook 1 in JupyterLab, a short one in Notebook 7."""
    forget, _ = load_facts("factworld/sport").prompts(world).split(forget=facts, seed=0)
    expected = attribution_patching(world, forget).top(weights=0.05)
    short = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in SHORT])
    notebook = nbformat.read(NOTEBOOK, as_version=4) if front == "lab" else short
    with jupyter(front, tmp_path, notebook) as (address, work), chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(60_000)
        opened(page, address)
        run_all(page)
        used(page)
        page.locator(".mu-explorer").screenshot(path=screenshots(tmp_path) / f"jupyter-{front}.png")
        for complaint in ("vnd.jupyter.stderr", "vnd.jupyter.error"):
            told = page.locator(f".jp-OutputArea-output[data-mime-type='application/{complaint}']").all_text_contents()
            assert not told
        assert ComponentMask.load(work / "explored.mask.json") == expected
