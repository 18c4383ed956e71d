"""How long a report's page takes to open in a headless Chromium: first paint, load, first figure, and all the others at once (as printing does).

Run: python benchmarks/report_page.py [--rounds 5]   (a report of the planted toy under every attack; needs playwright and a Chromium)
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

import mechunlearn as mu
from mechunlearn.edit import masked_gradient
from mechunlearn.world.toy import planted_facts

PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"
PRINT = "dispatchEvent(new Event('beforeprint'))"


def page(folder: Path) -> Path:
    """A report with as many figures as one can have."""
    toy = planted_facts()
    forget, retain = toy.prompts(list(range(8))), toy.prompts(list(range(8, 24)))
    mask = mu.ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    edit = masked_gradient(toy.model, mask, forget, retain, steps=30, lr=0.1)
    report = mu.evaluate(toy.model, edit, forget=forget, retain=retain, attacks="all")
    report.to_html(path := folder / "report.html", edit=edit)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {"first paint": [], "load": [], "first figure": [], "all other figures": []}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = page(Path(folder))
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(rounds):
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            start = time.perf_counter()
            tab.goto(path.as_uri())
            times["load"].append(time.perf_counter() - start)
            tab.locator(".plot .main-svg").first.wait_for(state="attached")
            times["first figure"].append(time.perf_counter() - start)
            times["first paint"].append(tab.evaluate(PAINT))
            start = time.perf_counter()
            tab.evaluate(PRINT)
            times["all other figures"].append(time.perf_counter() - start)
            figures = tab.locator(".plot").count()
            tab.close()
        browser.close()
    print(f"{figures} figures; seconds, median of {rounds} (range)")
    for name, found in times.items():
        print(f"{name:18} {statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})")


if __name__ == "__main__":
    main()
