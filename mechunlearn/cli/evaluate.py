"""`mechunlearn evaluate`: every format, side effects, attacks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechunlearn.cli.options import ATTACKS, Device, Dtype, Facts, Model
from mechunlearn.cli.shared import (
    MOST_SEED,
    checked_suffix,
    console,
    load,
    names,
    open_edit,
    print_report,
    say,
    seed_in_range,
)
from mechunlearn.errors import MechunlearnError

if TYPE_CHECKING:
    from mechunlearn.evaluation.report import Report


def evaluate(
    model: Model,
    facts: Facts,
    edit: Annotated[Path, typer.Argument(help="An edit file, or the folder of a model that was trained elsewhere.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Report: .html")] = Path("report.html"),
    attacks: Annotated[
        str, typer.Option(help=f"Attacks that try to get the knowledge back: all, or names with commas: {ATTACKS}.")
    ] = "",
    text: Annotated[
        str | None, typer.Option(help="The text that the edit was washed with (wash --text), for its control.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Where finished attacks and floors are kept; by default beside the report, in <report>.attacks."
        ),
    ] = None,
    forget: Annotated[
        int | None,
        typer.Option(help="How many facts the edit forgot.", min=1, show_default="what the edit says, else 64"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the sets and of the attacks.", callback=seed_in_range, show_default="the edit's, else 0"
        ),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Measure an edit in every format, with side effects, beside a random mask of the same weight; try to break it.

    The forget and retain sets are those that the edit was made with, if `mechunlearn edit` or `wash` made it. Of a folder
    the edit is what turns MODEL into the model in it. The report is written before the first attack and again after each.
    A killed run goes on where it was.
    """
    checked_suffix(output, ".html")
    from mechunlearn.evaluation.robustness import check_attacks
    from mechunlearn.features.feature_edit import load_edit

    wanted = check_attacks(names(attacks)) if attacks else []
    made = None if edit.is_dir() else load_edit(edit)
    sets = made.card.sets if made is not None else {}
    forget, seed = _drawn(sets, "count", forget, 64), _drawn(sets, "seed", seed, 0)
    hooked, forgotten, retained = load(model, facts, forget, seed, device, dtype)
    made = made if made is not None else open_edit(edit, hooked)
    from mechunlearn.evaluation.controls import random_control
    from mechunlearn.evaluation.evaluate import evaluate as measured
    from mechunlearn.evaluation.same import check_same
    from mechunlearn.evaluation.status import ASKED
    from mechunlearn.evaluation.workflow import warnings_said
    from mechunlearn.facts.tables import read_texts

    texts = () if text is None else read_texts(text)
    told: set[str] = set()

    def written(report: "Report") -> None:
        report.to_html(output, edit=made)
        for row in report.outcomes().to_dict("records"):
            if row["attack"] not in {ASKED, *told}:
                told.add(row["attack"])
                back = f", recovery {row['recovery']}, truth {row['truth_came_back']}" * (row["outcome"] != "failed")
                note = f"; {row['note']}" if row["note"] else ""
                console.print(f"{row['attack']}: {row['outcome']}{back}{note}", highlight=False)

    console.print("control edit, then every format", *(["; attacks: " + ", ".join(wanted)] if wanted else []), sep="")
    with warnings_said(say):
        check_same(hooked, made, forgotten, retained)  # before the control is made
        control = random_control(hooked, made, forgotten, retained, seed, texts)
    report = measured(
        hooked,
        made,
        forget=forgotten,
        retain=retained,
        control=control,
        attacks=wanted,
        cache=cache or output.with_suffix(".attacks"),
        seed=seed,
        watch=written,
    )
    written(report)
    print_report(report)
    console.print(f"report -> {output}")


def _drawn(sets: dict[str, Any], name: str, given: int | None, usual: int) -> int:
    """A number that says how sets were drawn: the user's, else the edit's, else the usual one."""
    stored = sets.get(name, usual)
    if given is None and not (type(stored) is int and 0 <= stored <= MOST_SEED):
        raise MechunlearnError(
            f"The edit's card says {name}={stored!r}. Expected a whole number: give --forget and --seed."
        )
    return stored if given is None else given
