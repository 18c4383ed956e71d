"""`mechunlearn world`: build the shipped fact world, its twin and its dictionaries."""

from pathlib import Path
from typing import Annotated

import typer

from mechunlearn.cli.shared import console, new_folder, resumable, seed_in_range, steps_in_range
from mechunlearn.core.files import writable
from mechunlearn.errors import MechunlearnError

app = typer.Typer(help="The shipped fact world.", no_args_is_help=True)


@app.command(epilog="Example: mechunlearn world dictionaries -o dictionaries")
def dictionaries(
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder for factworld-codebook and factworld-sae.")],
    seed: Annotated[int, typer.Option(help="Seed of text and training.", callback=seed_in_range)] = 0,
) -> None:
    """Train the codebook and the SAE that ship with the world, and print their quality on held-out text."""
    for name in ("factworld-codebook", "factworld-sae"):
        new_folder(output / name)
    from mechunlearn.world.dictionaries import build_dictionaries

    build_dictionaries(output, seed=seed, say=console.print)


@app.command(epilog="Example: mechunlearn world build --seed 1 -o my-world")
def build(
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder; a half-done build in it is resumed.")],
    seed: Annotated[int, typer.Option(help="Seed of facts, corpus and training.", callback=seed_in_range)] = 0,
    naive: Annotated[
        bool, typer.Option("--naive", help="No probe loss, no biographies: a world without look-up.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(help="Training steps, if not the recipe's.", min=1, callback=steps_in_range)
    ] = None,
) -> None:
    """Make facts, corpus, tokenizer, model and twin from nothing; refuses to ship a model that fails its gates."""
    resumable(output, "factworld*", ".factworld*")
    from mechunlearn.world.build import build_world

    build_world(output, seed=seed, naive=naive, steps=steps, say=console.print)


@app.command(epilog="Example: mechunlearn world twin --layers 1-2 --seed 1 -o my-twin")
def twin(
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder; a half-done build is resumed.")],
    layers: Annotated[str, typer.Option(help="Layers whose MLPs learn, from 0: 1-2, or 1,3.")],
    base: Annotated[Path | None, typer.Option(help="A world's folder, if not the shipped one.", metavar="DIR")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the batches.", callback=seed_in_range)] = 0,
    steps: Annotated[int, typer.Option(help="Training steps.", min=2, callback=steps_in_range)] = 1000,
) -> None:
    """Teach a world's untaught people with only the MLPs of some layers: where they are stored is then known."""
    chosen = _layers(layers)
    writable(output)
    from mechunlearn.world.build import build_twin

    build_twin(output, base, chosen, seed=seed, steps=steps, say=console.print)


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
