"""`mechunlearn edit`: any editor on a mask."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mechunlearn.cli.options import EDITORS, Device, Dtype, Facts, Forget, Model, Seed
from mechunlearn.cli.shared import checked_suffix, console, load, new_folder, steps_in_range, with_sets
from mechunlearn.core.methods import method_named
from mechunlearn.errors import MechunlearnError


def edit(
    model: Model,
    facts: Facts,
    mask: Annotated[Path, typer.Argument(help="A mask file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Edit file: .safetensors.")],
    method: Annotated[
        str | None, typer.Option(help=f"How to edit: {EDITORS}.", metavar="NAME", show_default="masked_gradient")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            "--loss",
            help="What to do with the forget facts; see docs/objectives.md.",
            show_default="injection",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimiser steps.", min=1, callback=steps_in_range, show_default="the method's"),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", min=0, show_default="the method's")] = None,
    stop_at: Annotated[
        float | None, typer.Option(help="Stop once this share of the forget facts is edited.", min=0, max=1)
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Train low-rank adapters of this rank: the method is then fisher_lora.", min=1)
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="With --rank: also write a PEFT adapter folder.")] = None,
    export: Annotated[Path | None, typer.Option(help="Also write the edited model to this new folder.")] = None,
    forget: Forget = 64,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Change only the masked units so that the forget facts change, and write the edit; the model is left as it was.

    Ctrl-C stops training after the step in progress and writes the edit so far.
    """
    checked_suffix(output, ".safetensors")
    new_folder(export)
    new_folder(adapter)
    if adapter is not None and rank is None:
        raise MechunlearnError("--adapter needs low-rank factors to write. Give --rank too, for example --rank 8.")
    usual = "masked_gradient" if rank is None else "fisher_lora"
    editor = method_named("edit", usual if method is None else method)
    options = {"loss": objective, "steps": steps, "lr": lr, "stop_at": stop_at, "rank": rank}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if unknown := [name for name in given if name not in editor.takes]:
        option = {"loss": "objective"}.get(unknown[0], unknown[0]).replace("_", "-")
        raise MechunlearnError(f"'{editor.name}' has no --{option}. Leave it out, or give another --method.")
    from mechunlearn.artifacts.mask import ComponentMask

    chosen = ComponentMask.load(mask)
    hooked, forgotten, retained = load(model, facts, forget, seed, device, dtype)
    chosen.check(hooked.signature)
    from mechunlearn.edit.objective import objective_named

    if "loss" in editor.takes:
        given |= objective_named("injection" if objective is None else objective, chosen)
    made = editor(hooked, chosen, forgotten, retained, **given, seed=seed, progress=True)
    if made.card.stopped:
        console.print(f"{made.card.stopped} after {len(made.card.trajectory)} steps")
    made = with_sets(made, facts, forget, seed)
    made.save(output)
    console.print(f"{made} -> {output}")
    if adapter is not None:
        made.save_adapter(hooked, adapter)
        console.print(f"PEFT adapter -> {adapter}")
    if export is not None:
        made.export(hooked, export)
        console.print(f"edited model -> {export}")
