"""Arguments and options that several commands have."""

from typing import Annotated

import typer

from mechunlearn.cli.shared import seed_in_range, steps_in_range
from mechunlearn.core.methods import ready_methods

Model = Annotated[
    str, typer.Argument(help="smollm2, gemma3, factworld, a folder, a .gguf file, or a hub name.", metavar="MODEL")
]
Facts = Annotated[str, typer.Argument(help="factworld/<relation>, a facts file, or a data set.", metavar="FACTS")]
LOCALIZERS, EDITORS, ATTACKS = (", ".join(ready_methods(folder)) for folder in ("localize", "edit", "attack"))
WASHERS = ", ".join(ready_methods("edit", taking="covariance"))
Forget = Annotated[int, typer.Option(help="How many facts to forget, drawn by --seed.", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of the forget set and of the method.", callback=seed_in_range)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16; by default as stored.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps.", min=1, callback=steps_in_range)]
Where = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Run cells on Ray: local (this machine), auto (the running cluster), or host:port.",
        metavar="WHERE",
    ),
]
CellCpus = Annotated[
    int | None, typer.Option(help="With --ray: cores of a cell, which computes with as many threads. Default 1.")
]
CellGpus = Annotated[float | None, typer.Option(help="With --ray: GPUs of a cell. Default 0, or 1 with --device cuda.")]
CellMemory = Annotated[float | None, typer.Option(help="With --ray: GiB of a cell, so that no more start than fit.")]
Weights = Annotated[
    float | None, typer.Option(help="Share of the editable weights to select, by rank.", metavar="SHARE")
]
