"""`mechunlearn benchmark`: methods of unlearning on the field's benchmarks, the models that they need, and lm-eval."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from mechunlearn.cli.options import CellCpus, CellGpus, CellMemory, Device, Dtype, Model, Seed, Steps, Where
from mechunlearn.cli.shared import (
    console,
    goes_on,
    names,
    new_folder,
    on_ray,
    open_edit,
    open_model,
    resumable,
    say,
    seed_in_range,
    size_in_range,
)

app = typer.Typer(help="Methods of unlearning side by side on a public benchmark.", no_args_is_help=True)
Data = Annotated[str, typer.Option(help="A folder with TOFU's files, or a hub name.")]


@app.command(
    epilog="Example: mechunlearn benchmark tofu my/full --retain my/retain99 --split forget01 "
    "--methods full+npo,lora+ihl,masked:random_units:0.05+npo -o tofu01"
)
def tofu(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder, or that of a stopped run.")],
    methods: Annotated[
        str,
        typer.Option(
            help="WHERE+OBJECTIVE, separated by commas. WHERE: full, lora, masked:LOCALIZER:SHARE. OBJECTIVE: npo, ga, "
            "gd, ihl, or a name in docs/objectives.md."
        ),
    ] = "full+ga, full+gd, full+npo, lora+ihl, masked:random_units:0.05+npo",
    split: Annotated[str, typer.Option(help="forget01, forget05 or forget10.")] = "forget10",
    data: Data = "locuslab/TOFU",
    retain: Annotated[
        str | None, typer.Option(help="A model that was finetuned without the forget set: the gold.", metavar="MODEL")
    ] = None,
    rows: Annotated[int, typer.Option(help="How many rows of each split to measure.")] = 300,
    seeds: Annotated[int, typer.Option(help="How often each method is run, with the seeds 0, 1, ...")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate of all methods; fewer weights need a larger one.")] = 1e-5,
    steps: Steps = 50,
    device: Device = "cpu",
    dtype: Dtype = None,
    ray: Where = None,
    cell_cpus: CellCpus = None,
    cell_gpus: CellGpus = None,
    cell_memory: CellMemory = None,
) -> None:
    """Edit a model that was finetuned on TOFU by each method, and measure what is forgotten and what stays.

    Goes on if killed.

    Writes results.csv, .parquet and .html, table.md and .tex, and open-unlearning's files.
    """
    resumable(output, "about.json")
    from mechunlearn.benchmarks import tofu as benchmark
    from mechunlearn.benchmarks.compare import check_numbers, compare_methods, needed_splits
    from mechunlearn.benchmarks.leaderboard import NO_GOLD
    from mechunlearn.benchmarks.methods import check_methods

    wanted, given = needed_splits(split), names(methods)
    check_numbers(seeds, rows, lr, steps)
    check_methods(given, ())
    cluster = on_ray(ray, cell_cpus, cell_gpus, cell_memory, device)
    with console.status(f"loading {data}"):
        loaded = benchmark.load(data, wanted)
    check_methods(given, loaded[split])
    hooked = open_model(model, device, dtype)
    gold = open_model(retain, device, dtype) if retain is not None else None
    with goes_on(output):
        made = compare_methods(
            hooked,
            loaded,
            given,
            folder=output,
            forget=split,
            retain_model=gold,
            seeds=seeds,
            lr=lr,
            steps=steps,
            rows=rows,
            ray=cluster,
        )
    say(repr(made.summary().set_index("method").T))
    if gold is None:
        say(NO_GOLD)
    for name in ("results.csv", "results.html", "table.md", "table.tex", "open-unlearning"):
        console.print(f"{name:<16} {output / name}")


@app.command(epilog="Example: mechunlearn benchmark tofu-train smollm2 --split retain99 -o my/retain99")
def tofu_train(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the model.")],
    split: Annotated[str, typer.Option(help="full, or for the gold retain90, retain95 or retain99.")] = "full",
    data: Data = "locuslab/TOFU",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-5,
    epochs: Annotated[int, typer.Option(help="How often each row is seen.")] = 5,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Finetune every weight of a model on the answers of a split: the full model, or the retain model.

    Goes on after the last whole epoch if killed, from a file next to the folder. Ctrl-C stops training after the step
    in progress and writes the model so far.
    """
    new_folder(output)
    from mechunlearn.benchmarks import tofu as benchmark
    from mechunlearn.benchmarks.finetune import check_finetuning, finetune
    from mechunlearn.model.hooked import export

    check_finetuning(lr, epochs)
    with console.status(f"loading {data}"):
        rows = benchmark.load(data, [split])[split]
    hooked = open_model(model, device, dtype)
    kept = output.with_name(f"{output.name}.checkpoint.safetensors")
    done = finetune(hooked, rows, lr=lr, epochs=epochs, seed=seed, progress=True, checkpoint=kept)
    export(hooked, output)
    kept.unlink(missing_ok=True)  # not before: what is not written could still be lost
    stopped = f", {done.stopped}" if done.stopped else ""
    first, last = (done.trajectory[i]["answers"] for i in (0, -1))
    console.print(
        f"{len(rows)} rows, {len(done.trajectory)} steps{stopped}: loss {first:.3g} to {last:.3g} nats a token"
    )
    say(f"model -> {output}")


@app.command(
    epilog="Example: mechunlearn benchmark lm-eval smollm2 --edit edit.safetensors --tasks arc_easy,lambada_openai -o lm-eval"
)
def lm_eval(
    model: Model,
    edit: Annotated[Path, typer.Option(help="An edit file, or the folder of a model that was trained elsewhere.")],
    tasks: Annotated[str, typer.Option(help="Names that `lm-eval ls tasks` prints, separated by commas.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder, or that of a stopped run.")],
    include: Annotated[Path | None, typer.Option(help="A folder with the YAML files of tasks of your own.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="How many documents of each task.", min=1, callback=size_in_range)
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            help="Examples in front of each document.",
            min=0,
            show_default="what the task says",
            callback=size_in_range,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Requests a forward pass.", min=1, callback=size_in_range)] = 16,
    seed: Annotated[int, typer.Option(help="Draws the examples.", callback=seed_in_range)] = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Run tasks of the lm-evaluation-harness before and after an edit.

    Goes on if killed. Data of its own tasks are downloaded. Writes results.csv and results.json.
    """
    resumable(output, "about.json")
    from mechunlearn.core.tables import intervals
    from mechunlearn.evaluation.harness import before_and_after

    for library in ("lm_eval", "huggingface_hub"):  # a page of warnings about what is meant so; errors are still told
        logging.getLogger(library).setLevel(logging.ERROR)
    hooked = open_model(model, device, dtype)
    made = open_edit(edit, hooked)
    with goes_on(output):
        found = before_and_after(
            hooked,
            made,
            names(tasks),
            folder=output,
            include=include,
            limit=limit,
            shots=shots,
            batch_size=batch_size,
            seed=seed,
        )
    shown = found[["task", "metric", "n"]].copy()
    for name in ("before", "after", "change"):
        shown[name] = intervals(found, name, f"{name}_low", f"{name}_high")
    say(repr(shown))
    say("In brackets: the 95 % interval over documents.")
    for name in ("results.csv", "results.json"):
        console.print(f"{name:<16} {output / name}")
