"""JupyterLab itself, in a real browser: notebook 1 runs, a click changes the details, the saved mask is Python's."""

import os
import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest

from mechunlearn import ComponentMask, load_facts
from mechunlearn.localize import attribution_patching
from tests.browser import chromium, missing, needs_browser, screenshots

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "1-find.ipynb"
SETTINGS = "@jupyterlab/notebook-extension"


@pytest.fixture
def lab(tmp_path):
    """A JupyterLab of its own on a free port: nothing of the user's is read or written. Gives its address."""
    if missing():
        pytest.fail(missing())
    work, own = tmp_path / "work", tmp_path / "jupyter"
    work.mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # so that what is seen has been run here
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, work / NOTEBOOK.name)
    (own / "settings" / SETTINGS).mkdir(parents=True)
    (own / "settings" / SETTINGS / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "JUPYTER_PREFER_ENV_PATH": "1", "IPYTHONDIR": str(own / "ipython"), "OMP_NUM_THREADS": "2"}
    env |= {f"JUPYTER_{name}_DIR": str(own / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    env |= {f"JUPYTERLAB_{name}_DIR": str(own / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--IdentityProvider.token=secret", f"--ServerApp.root_dir={work}", "--LabApp.news_url="]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (tmp_path / "lab.log").open("w") as log:
        process = subprocess.Popen(command, env=env, cwd=work, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK.name}?token=secret", work
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
    """Run all cells, and see the first one done. The kernel says idle before it listens, and then what was asked is lost: ask again."""
    from playwright.sync_api import TimeoutError

    prompts = page.locator(".jp-InputPrompt")
    for _ in range(60):
        with suppress(TimeoutError):
            if page.locator(".jp-Dialog").count():  # of a kernel that does not listen yet; it may come at any time
                page.locator(".jp-Dialog .jp-mod-accept").first.click(timeout=2000)
            if prompts.filter(has_text=re.compile(r"\[\d+\]")).count():
                return
            if not prompts.filter(has_text="[*]").count():
                page.get_by_role("menuitem", name="Run", exact=True).click(timeout=2000)
                page.get_by_text("Run All Cells", exact=True).click(timeout=2000)
        page.wait_for_timeout(2000)
    pytest.fail("JupyterLab runs no cell.")


@pytest.mark.slow
@needs_browser
def test_jupyterlab_runs_notebook_1_and_the_explorer_in_it(lab, world, tmp_path):
    address, work = lab
    forget, _ = load_facts("factworld/sport").prompts(world).split(forget=32, seed=0)
    expected = attribution_patching(world, forget).top(weights=0.05)
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(60_000)
        opened(page, address)
        run_all(page)
        page.locator(".mu-explorer").wait_for(timeout=300_000)
        assert page.locator(".jp-OutputArea-output[data-mime-type*='stderr']").count() == 0
        cell = page.locator('.mu-explorer [data-component="L1.mlp.out"]').first
        cell.scroll_into_view_if_needed()
        cell.click()
        page.locator(".mu-explorer .detail h3", has_text="L1.mlp.out").wait_for()
        page.locator('.mu-explorer [data-component="L2.mlp.out"]').first.click()
        page.locator(".mu-explorer .detail h3", has_text="L2.mlp.out").wait_for()
        total = page.locator(".mu-explorer .mask .total")
        page.locator('.mu-explorer [data-do="clear"]').click()
        total.filter(has_text=re.compile("^0 units")).wait_for()
        page.locator('.mu-explorer [data-do="take"]').click()
        total.filter(has_text=f"{len(expected)} units").wait_for()
        page.locator('.mu-explorer [data-do="save"]').click()
        page.locator(".mu-explorer .said", has_text="explored.mask.json").wait_for()
        page.locator(".mu-explorer").screenshot(path=screenshots(tmp_path) / "jupyterlab.png")
        errors = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").count()
    assert errors == 0
    assert ComponentMask.load(work / "explored.mask.json") == expected
