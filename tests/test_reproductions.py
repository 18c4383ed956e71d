"""The committed pages are those of the committed result files, number by number, and the summary is theirs."""

import json
import re
import shutil
from pathlib import Path

import pytest

from mechunlearn.errors import MechunlearnError
from mechunlearn.reproduce import loku_page
from mechunlearn.reproduce.summary import PAPERS, summary, write_pages

DOCS = Path(__file__).parents[1] / "docs" / "reproductions"


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """Every page, written anew from copies of the result files."""
    folder = tmp_path_factory.mktemp("pages")
    for name in PAPERS:
        shutil.copy(DOCS / f"{name}.json", folder)
    write_pages(folder)
    return folder


@pytest.mark.parametrize("name", [*PAPERS, "index"])
def test_a_committed_page_is_that_of_its_numbers(name, again):
    assert (again / f"{name}.md").read_text(encoding="utf-8") == (DOCS / f"{name}.md").read_text(encoding="utf-8")


def test_a_changed_number_changes_the_page_and_the_summary():
    found = {name: json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8")) for name in PAPERS}
    before = summary(found), loku_page.page(found["loku"])
    for world in found["loku"]["runs"]["passages"]["IHL"]:
        for run in world:
            run["at end"]["retain"] -= 0.5
    after = summary(found), loku_page.page(found["loku"])
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert "**holds**" in before[0] and re.search(r"retain set than GD.*\*\*reversed\*\*", after[0])


def test_every_claim_of_the_summary_has_an_interval_an_n_and_a_verdict():
    page = (DOCS / "index.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and not line.startswith("| claim")]
    assert len(rows) >= 20
    for _, number, n, said, _ in rows:
        if "not measured" not in said:
            assert re.fullmatch(r"[+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]", number) and re.search(r"\d", n)
        assert said.strip("*") in ("holds", "weak", "null", "reversed", "not measured")
    assert all(title in page for title, _ in PAPERS.values())


def test_quick_results_are_marked_as_such():
    found = {name: json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8")) for name in PAPERS}
    assert "Quick runs" not in summary(found)
    for name in ("codeunlearn", "loku"):
        assert "quick run" not in (DOCS / f"{name}.md").read_text(encoding="utf-8")
        found[name]["quick"] = True
        assert "**This is a quick run" in PAPERS[name][1](found[name])
    assert "Quick runs, which settle nothing: CodeUnlearn (arXiv 2410.10866), LoKU" in summary(found)


def test_a_missing_result_file_is_one_clear_line(tmp_path):
    with pytest.raises(MechunlearnError, match=r"mechanistic-unlearning\.json' cannot be read"):
        write_pages(tmp_path)
    assert list(tmp_path.iterdir()) == []
