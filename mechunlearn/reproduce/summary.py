"""The four papers side by side: headline claims, our numbers, what became of them, and what the papers report."""

import json
from pathlib import Path

from mechunlearn.core.files import whole_file
from mechunlearn.errors import MechunlearnError
from mechunlearn.reproduce import codeunlearn, law, loku, mechanistic_unlearning
from mechunlearn.reproduce.engine import Found
from mechunlearn.reproduce.tables import Claim, render

PAPERS = {paper.name: paper for paper in (mechanistic_unlearning.PAPER, codeunlearn.PAPER, law.PAPER, loku.PAPER)}


def write_pages(folder: Path) -> list[Path]:
    """Write the four pages and the summary anew from the result files in a folder; return what was written.

    Args:
        folder: Where the result files are.

    Raises:
        MechunlearnError: If a result file is missing or damaged.
    """
    found = {}
    for name in PAPERS:
        path = folder / f"{name}.json"
        try:
            found[name] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MechunlearnError(
                f"'{path}' cannot be read ({error}). Expected the numbers that `mechunlearn reproduce {name} --page "
                f"{folder / name}.md` writes."
            ) from None
    texts = {name: paper.page(found[name]) for name, paper in PAPERS.items()} | {"index": summary(found)}
    for name, text in texts.items():
        with whole_file(folder / f"{name}.md") as beside:
            beside.write_text(text, encoding="utf-8")
    return [folder / f"{name}.md" for name in texts]


def summary(found: dict[str, Found]) -> str:
    """Return the summary as markdown.

    Args:
        found: The numbers of each page, by the paper's name.
    """
    claims = {name: headlines(name, found[name]) for name in PAPERS}
    quick = [paper.title for name, paper in PAPERS.items() if found[name].get("quick")]
    vacuous = mechanistic_unlearning.vacuous_pairs(found[mechanistic_unlearning.NAME])
    return render("index", papers=PAPERS, claims=claims, quick=quick, vacuous=vacuous)


def headlines(name: str, found: Found) -> list[Claim]:
    """Return the claims of a paper that the summary shows: all of its page, in the same words.

    Args:
        name: The paper's name.
        found: The numbers of its page.
    """
    return PAPERS[name].claims(found)
