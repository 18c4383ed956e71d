"""The committed pages are those of the committed result files, number by number, and the summary is theirs."""

import json
import re
import shutil
from pathlib import Path

import pytest

from mechunlearn.core.grid import Grid
from mechunlearn.errors import MechunlearnError
from mechunlearn.reproduce import codeunlearn_bench, law_bench, loku_bench, mechanistic_unlearning_bench
from mechunlearn.reproduce.engine import Plan
from mechunlearn.reproduce.summary import PAPERS, headlines, summary, write_pages
from tests.pages import flat

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
    before = summary(found), PAPERS["loku"].page(found["loku"])
    for world in found["loku"]["runs"]["passages"]["IHL"]:
        for run in world:
            run["at end"]["retain"] -= 5
    after = summary(found), PAPERS["loku"].page(found["loku"])
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert "**holds**" in before[0] and re.search(r"retain set than GD.*\*\*reversed\*\*", after[0])


def test_every_claim_of_the_summary_has_an_interval_an_n_and_a_verdict():
    page = flat((DOCS / "index.md").read_text(encoding="utf-8"))
    lines = page[page.index("| claim") :].splitlines()
    rows = [line.split(" | ") for line in lines if len(line.split(" | ")) == 5 and not line.startswith("| claim")]
    shown = [headlines(name, json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))) for name in PAPERS]
    assert len(rows) == sum(map(len, shown)) and all(shown)
    for _, number, n, said, _ in rows:
        if "not measured" not in said:
            assert re.fullmatch(r"[+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]", number) and re.search(r"\d", n)
        assert re.fullmatch(
            r"\*\*(holds|weak|reversed|equivalent|not measured|inconclusive)\*\*( \(could see [\d.]+\))?", said
        )
    assert all(paper.title in page for paper in PAPERS.values())


def claim_rows(page: str) -> list[str]:
    """The rows of a page's tables of claims without the numbers, whose digits differ between page and index."""
    text = flat(page)
    parts = [line.strip("| ").split(" | ") for line in text[text.index("| claim") :].splitlines() if "| " in line]
    return [" | ".join((part[0], *part[2:])) for part in parts if len(part) == 5 and "**" in part[3]]


@pytest.mark.parametrize("name", PAPERS)
def test_every_claim_of_a_page_is_in_the_index_with_the_same_verdict(name):
    index, page = ((DOCS / f"{one}.md").read_text(encoding="utf-8") for one in ("index", name))
    section = index[index.index(f"({name}.md)") :].split("\n## ")[0]
    claims = PAPERS[name].claims(json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8")))
    assert claim_rows(page) == claim_rows(section) and len(claim_rows(page)) == len(claims)
    assert any(claim.paper == "ours" for claim in claims) and any("ours" not in claim.paper for claim in claims)


def test_no_vacuous_pair_is_averaged_in():
    """Counted from the overlaps of the committed cells: 32 of the 240 pairs with other localizers, all of them apart."""
    name = "mechanistic-unlearning"
    found = json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))
    claims = {claim.text: claim for claim in PAPERS[name].claims(found)}
    every, compared = 0, 0
    for rival in mechanistic_unlearning_bench.LOCALIZERS:
        if (told := claims.get(f"C2: relearned: fact_lookup minus {rival}")) is None:
            continue
        shared = [
            overlap > 0.5
            for world, of in found["world"].items()
            if world != mechanistic_unlearning_bench.NAIVE
            for here in of.values()
            for overlap in here["overlap"][rival][1:]
        ]
        assert told.apart == sum(shared) and told.difference.pairs == len(shared) - sum(shared), rival
        every, compared = every + len(shared), compared + told.difference.pairs
    assert (every, compared) == (240, 208)
    for page in (name, "index"):
        assert "32 pairs are vacuous" in (DOCS / f"{page}.md").read_text(encoding="utf-8")


def test_quick_results_are_marked_as_such():
    found = {name: json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8")) for name in PAPERS}
    assert "Quick runs" not in summary(found)
    for name in ("codeunlearn", "loku"):
        assert "quick run" not in (DOCS / f"{name}.md").read_text(encoding="utf-8")
        found[name]["quick"] = True
        assert "**This is a quick run" in PAPERS[name].page(found[name])
    assert "Quick runs, which settle nothing: CodeUnlearn (arXiv 2410.10866), LoKU" in summary(found)


def test_a_missing_result_file_is_one_clear_line(tmp_path):
    with pytest.raises(MechunlearnError, match=r"mechanistic-unlearning\.json' cannot be read"):
        write_pages(tmp_path)
    assert list(tmp_path.iterdir()) == []


SETTING = codeunlearn_bench.Setting(1.5, 8)
KEPT = {
    "mechanistic-unlearning": (
        "f5ed4a1228fad6e4",
        mechanistic_unlearning_bench.Cell("test", "1", "city", 2, "MLP 1+2", 1e-2, 4.0),
        {"kind": "test", "world": "1", "relation": "city", "seed": 2, "arm": "MLP 1+2", "rate": 0.01, "weight": 4.0},
    ),
    "codeunlearn": (
        "dd210f94d9a36ab6",
        codeunlearn_bench.Cell("zero", codeunlearn_bench.Book("0", "joint", 3), {"war": SETTING}),
        {"method": "zero", "world": "0", "arm": "joint", "seed": 3, "size": 512, "used": 2, "site": ""}
        | {"settings": {"war": [1.5, 8, 0.0, 0.0]}},
    ),
    "law": (
        "39e714f815633f72",
        law_bench.Cell("GA", "2", 4, law_bench.Setting(own=3e-3)),
        {"method": "GA", "world": "2", "seed": 4, "size": 0}
        | {"towards": "end-of-text", "reach": 1.0, "retain_weight": 0.0, "own": 0.003},
    ),
    "loku": (
        "e3859cebb7ad3ed6",
        loku_bench.Cell("facts", "IHL", 1, 3, 4e-3),
        {"task": "facts", "method": "IHL", "world": 1, "forget": 3, "rate": 0.004},
    ),
}


@pytest.mark.parametrize("name", PAPERS)
def test_grids_and_cells_keep_their_names_so_that_finished_runs_still_load(name, tmp_path):
    """A new name for a key is a new grid: hours of cells would be made again. Change these only with the numbers."""
    key, cell, description = KEPT[name]
    paper = PAPERS[name]
    assert Grid.open(tmp_path, paper.about(Plan(tmp_path, *paper.full))).key == key
    assert cell.description() == description
