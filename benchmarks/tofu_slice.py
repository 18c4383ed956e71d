"""Cut TOFU down to what a machine of two cores can finetune on: `python benchmarks/tofu_slice.py data/tofu slice`.

Of every ten authors one is forgotten, as in forget10: its last authors, and retain90's first, of whom retain_perturbed
asks. The files keep their names, so that the folder is read in place of the whole.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from mechunlearn.facts.tables import read_rows

ROWS = 20
"""Questions about each author."""


def cut(source: Path, target: Path, authors: Annotated[int, typer.Option(help="A multiple of ten.")] = 40) -> None:
    """Write the files of a slice."""
    if authors % 10 or not 0 < authors <= 200:
        raise typer.BadParameter(f"{authors} authors. Expected 10, 20, ... 200.")
    forgotten = read_rows(source / "forget10.jsonl")[-ROWS * authors // 10 :]
    retained = read_rows(source / "retain90.jsonl")[: ROWS * authors * 9 // 10]
    asked = {row["question"] for row in forgotten + retained}
    files = {
        "full.jsonl": retained + forgotten,
        "retain90.jsonl": retained,
        "forget10.jsonl": forgotten,
        **{
            f"{name}.json": [row for row in read_rows(source / f"{name}.json") if row["question"] in asked]
            for name in ("forget10_perturbed", "retain_perturbed")
        },
        **{
            f"{name}.json": read_rows(source / f"{name}.json")
            for name in ("real_authors", "real_authors_perturbed", "world_facts", "world_facts_perturbed")
        },
    }
    target.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows) if name.endswith("l") else json.dumps(rows)
        (target / name).write_text(text)
        print(name, len(rows))


if __name__ == "__main__":
    typer.run(cut)
