"""`mechunlearn reproduce`: the claims of four papers, measured here, and their pages."""

from pathlib import Path
from typing import Annotated

import typer

from mechunlearn.cli.options import CellCpus, CellGpus, CellMemory, Where
from mechunlearn.cli.shared import checked_suffix, console, goes_on, on_ray, resumable
from mechunlearn.core.spread import Ray

app = typer.Typer(help="A paper's claims on worlds of our own, with controls and intervals.", no_args_is_help=True)
Output = Annotated[Path, typer.Option("--output", "-o", help="A folder; a half-done run in it is continued.")]
Page = Annotated[Path | None, typer.Option(help="Where to write the page, if not in the folder: .md")]


PAPERS = {
    "mechanistic-unlearning": (
        (
            "Mechanistic Unlearning: edits of the look-up MLPs beside every other localizer and every set of as many "
            "layers."
        ),
        "One small world, one relation, one forget set.",
    ),
    "codeunlearn": (
        "CodeUnlearn: topics deleted from a codebook, beside random codes, SAE clamps and gradient difference.",
        "The shipped world, two seeds, no sweeps.",
    ),
    "law": (
        "LAW: facts washed in closed form, beside MEMIT, AlphaEdit and gradient methods at the same forget accuracy.",
        "The shipped world, two forget sets, no scaling.",
    ),
    "loku": (
        "LoKU: the inverted hinge beside other losses, Fisher-initialised adapters beside other initialisations.",
        "One world, two forget sets, passages only.",
    ),
}


def _add(paper: str, claims: str, shortened: str) -> None:
    """Add the command of a paper."""
    about = f"{claims}\n\nWrites the page and, beside it, its numbers (.json)."

    @app.command(paper, help=about, epilog=f"Example: mechunlearn reproduce {paper} --quick -o {paper}")
    def command(
        output: Output,
        quick: Annotated[bool, typer.Option("--quick", help=shortened)] = False,
        page: Page = None,
        ray: Where = None,
        cell_cpus: CellCpus = None,
        cell_gpus: CellGpus = None,
        cell_memory: CellMemory = None,
    ) -> None:
        _reproduce(paper, output, quick, page, on_ray(ray, cell_cpus, cell_gpus, cell_memory))


for _paper, _texts in PAPERS.items():
    _add(_paper, *_texts)


@app.command(epilog="Example: mechunlearn reproduce summary docs/reproductions")
def summary(
    folder: Annotated[Path, typer.Argument(help="Where the four result files (.json) lie.")],
) -> None:
    """The four papers side by side: writes their pages and the summary (index.md) anew from the result files."""
    from mechunlearn.reproduce.summary import write_pages

    for written in write_pages(folder):
        console.print(f"page -> {written}")


def _reproduce(paper: str, output: Path, quick: bool, page: Path | None, ray: Ray | None) -> None:
    """Run a paper's plan; write the page and, beside it, its numbers; the headline comparisons on the console."""
    written = page or output / f"{paper}.md"
    checked_suffix(written, ".md")
    resumable(output, "about.json", "cells", "worlds", "failed")
    from mechunlearn.reproduce.summary import PAPERS, headlines
    from mechunlearn.reproduce.tables import shown

    with goes_on(output):
        found = PAPERS[paper].reproduce(output, quick, ray)
    PAPERS[paper].write(found, written)
    for claim in headlines(paper, found):
        told = f"{claim.text}{claim.note}: {shown(claim.difference, '+.2f')}, n = {claim.n}"
        console.print(f"{told}: [bold]{claim.verdict}[/bold]")
    console.print(f"page -> {written}")
