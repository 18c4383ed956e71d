"""The command line: the same nouns, one clear line and exit code 2 on bad input."""

import inspect
import os
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mechunlearn.errors import MechunlearnError

if TYPE_CHECKING:
    from mechunlearn.report import Report

app = typer.Typer(
    help="Find where a language model keeps a fact, change it there and nowhere else, and prove that it is gone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
world_app = typer.Typer(help="The shipped fact world.", no_args_is_help=True)
app.add_typer(world_app, name="world")
console = Console(highlight=False)


class Method(str, Enum):
    """Localizers by name."""

    fact_lookup = "fact_lookup"
    activation_patching = "activation_patching"
    attribution_patching = "attribution_patching"
    causal_tracing = "causal_tracing"
    direct_logit_attribution = "direct_logit_attribution"
    edge_attribution = "edge_attribution"
    path_patching = "path_patching"
    random_units = "random_units"


class Objective(str, Enum):
    """Losses on the forget facts by name."""

    injection = "injection"
    log_one_minus_p = "log_one_minus_p"
    gradient_ascent = "gradient_ascent"


Model = Annotated[
    str, typer.Argument(help="factworld, factworld-twin, factworld-naive, a folder, or a hub name.", metavar="MODEL")
]
Facts = Annotated[str, typer.Argument(help="factworld/<relation>, a facts file, or a data set.", metavar="FACTS")]
Forget = Annotated[int, typer.Option(help="How many facts to forget, drawn by --seed.")]
Seed = Annotated[int, typer.Option(help="Seed of the forget set and of the edit.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16; by default as stored.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps.", min=1)]
Rate = Annotated[float, typer.Option(help="Learning rate.", min=0)]
Weights = Annotated[
    float | None, typer.Option(help="Share of the editable weights to select, by rank.", metavar="SHARE")
]


@app.command(epilog="Example: `mechunlearn run factworld factworld/sport -o result`")
def run(
    model: Model,
    facts: Facts,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new or empty folder.")] = Path("result"),
    forget: Forget = 64,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Localize, mask, edit, evaluate and export: the whole job, beside attribution patching and random controls."""
    _run(model, facts, output, forget, seed, device, dtype)


@app.command(epilog="Example: `mechunlearn demo -o demo`")
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="A new or empty folder.")] = Path("demo"),
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """The whole job on the shipped world: 64 athletes forget their sport."""
    _run("factworld", "factworld/sport", output, 64, seed, device, None)


@app.command(epilog="Example: `mechunlearn localize factworld factworld/sport --weights 0.05 -o sport.mask.json`")
def localize(
    model: Model,
    facts: Facts,
    output: Annotated[Path, typer.Option("--output", "-o", help="Mask file: .json or .safetensors.")],
    method: Annotated[Method, typer.Option(help="How to localize.")] = Method.fact_lookup,
    weights: Weights = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="Write the scores too: .json or .safetensors; a circuit also .graphml or .dot."),
    ] = None,
    forget: Forget = 64,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Find the components of some facts and write their mask: every unit above zero, or a share of the weights.

    edge_attribution finds a circuit: --scores writes it, and the mask is that of its components.
    """
    _suffix(output, ".json", ".safetensors")
    circuit = method is Method.edge_attribution
    if scores is not None:
        _suffix(scores, ".json", ".safetensors", *((".graphml", ".dot") if circuit else ()))
    if weights is not None and not 0 <= weights <= 1:
        raise MechunlearnError(f"A budget of {weights} is out of range: a share of the weights lies in [0, 1].")
    hooked, forgotten, _ = _load(model, facts, forget, seed, device, dtype)
    import mechunlearn.localize as localizers

    localizer = getattr(localizers, method.value)
    if "progress" in inspect.signature(localizer).parameters:
        made = localizer(hooked, forgotten, progress=True)
    else:
        with console.status(f"{method.value} on {len(forgotten)} facts"):
            made = localizer(hooked, forgotten)
    found = made.nodes() if circuit else made
    mask = found.above(0) if weights is None else found.top(weights=weights)
    if made.note:
        console.print(made.note)
    if scores is not None:
        made.save(scores)
    mask.save(output)
    console.print(f"{len(mask)} units, {found.share(mask):.2%} of the editable weights -> {output}")


@app.command(epilog="Example: `mechunlearn edit factworld factworld/sport sport.mask.json -o sport.edit.safetensors`")
def edit(
    model: Model,
    facts: Facts,
    mask: Annotated[Path, typer.Argument(help="A mask file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Edit file: .safetensors.")],
    loss: Annotated[Objective, typer.Option(help="What to do with the forget facts.")] = Objective.injection,
    steps: Steps = 50,
    rate: Rate = 2e-3,
    export: Annotated[Path | None, typer.Option(help="Also write the edited model to this new folder.")] = None,
    forget: Forget = 64,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Train only the masked units so that the forget facts change, and write the edit; the model is left as it was."""
    _suffix(output, ".safetensors")
    _new_folder(export)
    from mechunlearn.components import ComponentMask

    chosen = ComponentMask.load(mask)
    hooked, forgotten, retained = _load(model, facts, forget, seed, device, dtype)
    chosen.check(hooked.signature)
    from mechunlearn.edit import losses, masked_gradient

    made = masked_gradient(
        hooked,
        chosen,
        forgotten,
        retained,
        loss=getattr(losses, loss.value),
        steps=steps,
        rate=rate,
        seed=seed,
        progress=True,
    )
    made.save(output)
    console.print(f"{made} -> {output}")
    if export is not None:
        made.export(hooked, export)
        console.print(f"edited model -> {export}")


@app.command(epilog="Example: `mechunlearn evaluate factworld factworld/sport sport.edit.safetensors -o report.html`")
def evaluate(
    model: Model,
    facts: Facts,
    edit: Annotated[Path, typer.Argument(help="An edit file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Report: .html")] = Path("report.html"),
    forget: Forget = 64,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Measure an edit in every format, with side effects, beside a random mask of the same weight."""
    _suffix(output, ".html")
    from mechunlearn.edits import WeightEdit

    made = WeightEdit.load(edit)
    hooked, forgotten, retained = _load(model, facts, forget, seed, device, dtype)
    from mechunlearn.evaluation import evaluate as measured

    with console.status("control edit on a random mask, then every format"):
        report = measured(hooked, made, forget=forgotten, retain=retained, seed=seed)
    report.to_html(output, edit=made)
    _print(report)
    console.print(f"report -> {output}")


@world_app.command(epilog="Example: `mechunlearn world build --seed 1 -o my-world`")
def build(
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder; a half-done build in it is resumed.")],
    seed: Annotated[int, typer.Option(help="Seed of facts, corpus and training.")] = 0,
    naive: Annotated[
        bool, typer.Option("--naive", help="No probe loss, no biographies: a world without look-up.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Training steps, if not the recipe's.", min=1)] = None,
) -> None:
    """Make facts, corpus, tokenizer, model and twin from nothing; refuses to ship a model that fails its gates."""
    from mechunlearn.world.build import build_world

    build_world(output, seed=seed, naive=naive, steps=steps, say=console.print)


@world_app.command(epilog="Example: `mechunlearn world twin --layers 1-2 --seed 1 -o my-twin`")
def twin(
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder; a half-done build is resumed.")],
    layers: Annotated[str, typer.Option(help="Layers whose MLPs learn, from 0: 1-2, or 1,3.")],
    base: Annotated[Path | None, typer.Option(help="A world's folder, if not the shipped one.", metavar="DIR")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the batches.")] = 0,
    steps: Annotated[int, typer.Option(help="Training steps.", min=2)] = 1000,
) -> None:
    """Teach a world's untaught people with only the MLPs of some layers: where they are stored is then known."""
    chosen = _layers(layers)
    from mechunlearn.world.build import build_twin

    build_twin(output, base, chosen, seed=seed, steps=steps, say=console.print)


def _run(model: str, facts: str, output: Path, forget: int, seed: int, device: str, dtype: str | None) -> None:
    _new_folder(output)
    hooked, forgotten, retained = _load(model, facts, forget, seed, device, dtype)
    from mechunlearn.workflow import whole_job

    report, found = whole_job(hooked, forgotten, retained, output, seed, console)
    _print(report)
    for name, path in found.items():
        console.print(f"{name:<10} {path}")


def _load(model: str, facts: str, forget: int, seed: int, device: str, dtype: str | None):
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    from mechunlearn.facts import load_facts
    from mechunlearn.hooked import load_model

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise MechunlearnError(f"Device '{device}' is not available on this machine. Use --device cpu.") from None
    with console.status(f"loading {model}"):
        data = load_facts(facts, seed=0)
        hooked = load_model(model, device=device, dtype=dtype)
        forgotten, retained = data.prompts(hooked).split(forget=forget, seed=seed)
    return hooked, forgotten, retained


def _print(report: "Report") -> None:
    """The verdict, and the numbers to read first."""
    from mechunlearn.report import MEANING

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    summary = report.summary(short=True)
    for column in summary.columns:
        table.add_column(column, justify="left" if column == "what" else "right", no_wrap=True)
    for row in summary.itertuples(index=False):
        table.add_row(*map(str, row))
    console.print(table)
    for name in report.columns:
        console.print(f"{name}: {MEANING.get(name, 'another edit')}")
    console.print("Accuracy of the truth unless marked target; ± is half of the 95 % bootstrap interval over facts.")
    console.print(report.verdict())


def _layers(text: str) -> list[int]:
    """The layers that '1-2' or '1,3' names."""
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        first, dash, last = part.partition("-")
        ends = (first, last if dash else first)
        if not all(end.isdecimal() and len(end) < 4 for end in ends) or int(ends[0]) > int(ends[1]):
            raise MechunlearnError(f"'{text}' does not name layers. Give --layers a range such as 1-2, or a list: 1,3.")
        found += range(int(ends[0]), int(ends[1]) + 1)
    return found


def _suffix(path: Path, *allowed: str) -> None:
    if path.suffix not in allowed:
        raise MechunlearnError(
            f"'{path}' is not named {' or '.join(f'*{s}' for s in allowed)}. Give such a name to -o."
        )


def _new_folder(path: Path | None) -> None:
    if path is not None and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise MechunlearnError(f"'{path}' exists and is not an empty folder. Give another name, or remove it first.")


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except MechunlearnError as error:
        print(f"mechunlearn: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except OSError as error:
        print(f"mechunlearn: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)  # noqa: T201
        sys.exit(2)


if __name__ == "__main__":
    main()
