"""`mechunlearn compare`: localizers, objectives and budgets on one grid."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mechunlearn.cli.options import (
    LOCALIZERS,
    CellCpus,
    CellGpus,
    CellMemory,
    Device,
    Dtype,
    Facts,
    Model,
    Steps,
    Where,
)
from mechunlearn.cli.shared import console, goes_on, load, names, on_ray, resumable
from mechunlearn.errors import MechunlearnError

if TYPE_CHECKING:
    import pandas as pd


def compare(
    model: Model,
    facts: Facts,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder, or that of a stopped run.")],
    localizers: Annotated[
        str, typer.Option(help=f"Names, separated by commas: {LOCALIZERS}.")
    ] = "fact_lookup, attribution_patching, random_units",
    objectives: Annotated[str, typer.Option(help="Names, separated by commas.")] = "injection",
    budgets: Annotated[
        str, typer.Option(help="Shares of the editable weights, or 'window': as many as fact_lookup finds.")
    ] = "window",
    seeds: Annotated[int, typer.Option(help="How many forget sets to test on, drawn by seeds 0, 1, ...")] = 5,
    lrs: Annotated[str, typer.Option(help="Learning rates to choose from.")] = "1e-3, 2e-3, 3e-3",
    forget_weights: Annotated[str, typer.Option(help="Weights of the objective to choose from.")] = "0.2, 1",
    validation: Annotated[int, typer.Option(help="How many forget sets to choose on.")] = 2,
    attack: Annotated[bool, typer.Option("--attack", help="Try to get the facts back by relearning, too.")] = False,
    steps: Steps = 50,
    forget: Annotated[int, typer.Option(help="How many facts to forget.", min=1)] = 64,
    device: Device = "cpu",
    dtype: Dtype = None,
    ray: Where = None,
    cell_cpus: CellCpus = None,
    cell_gpus: CellGpus = None,
    cell_memory: CellMemory = None,
) -> None:
    """Edit what each localizer finds with each objective, budget and seed, settings chosen by one rule.

    Goes on if killed.

    Writes results.parquet, table.md and figure.html, and a file for each finished cell.
    """
    from mechunlearn.evaluation.compare import check_grid
    from mechunlearn.evaluation.compare import compare as compared

    grid: dict[str, Any] = {
        "localizers": names(localizers),
        "objectives": names(objectives),
        "budgets": names(budgets),
        "seeds": seeds,
        "lrs": _numbers(lrs, "--lrs"),
        "forget_weights": _numbers(forget_weights, "--forget-weights"),
        "validation": validation,
    }
    check_grid(**grid)
    cluster = on_ray(ray, cell_cpus, cell_gpus, cell_memory, device)
    resumable(output, "about.json")
    hooked, forgotten, _ = load(model, facts, forget, 0, device, dtype)
    assert forgotten.facts is not None and forgotten.facts.source is not None
    grid |= {"forget": forget, "steps": steps, "attack": attack, "ray": cluster}
    with goes_on(output):
        made = compared(hooked, forgotten.facts.source, folder=output, **grid)
    _print_arms(made.summary(short=True))
    console.print("± is half of the 95 % interval over seeds, all of one model; how to read it: table.md")
    for name in ("results.parquet", "table.md", "figure.html"):
        console.print(f"{name:<16} {output / name}")


def _print_arms(frame: "pd.DataFrame") -> None:
    """Rows of a comparison: what was edited and how, then each measure."""
    from mechunlearn.core.tables import label

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    named = ("localizer", "objective", "budget", "lr", "forget_weight", "n", "share", "note")
    table.add_column("", min_width=20)
    for name in (measures := [name for name in frame.columns if name not in named]):
        table.add_column(label(name).replace(" ", "\n"), justify="right", no_wrap=True)
    for row in frame.to_dict("records"):
        how = ", ".join(filter(None, (row["objective"], row["budget"], f"n={row['n']}")))
        table.add_row("\n".join(filter(None, (row["localizer"], how, row["note"]))), *(row[name] for name in measures))
    console.print(table)


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(name) for name in names(text)]
    except ValueError:
        raise MechunlearnError(f"{option} {text} is not a list of numbers. Give them as 1e-3,2e-3.") from None
