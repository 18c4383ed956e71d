"""`mechunlearn dictionary`: train a codebook or an SAE, look at it, and delete a topic with it."""

from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mechunlearn.cli.shared import (
    checked_suffix,
    console,
    names,
    new_folder,
    open_model,
    seed_in_range,
    size_in_range,
    steps_in_range,
)
from mechunlearn.errors import MechunlearnError

if TYPE_CHECKING:
    from mechunlearn.features.dictionaries import SAE, Codebook

app = typer.Typer(help="Codebooks and SAEs: train one, look at its units, delete a topic.", no_args_is_help=True)


class Kind(str, Enum):
    """What to train."""

    codebook = "codebook"
    sae = "sae"


class How(str, Enum):
    """What takes the place of deleted codes."""

    reselect = "reselect"
    zero = "zero"


Model = Annotated[str, typer.Argument(help="A shipped world, a folder, or a hub name.", metavar="MODEL")]
Source = Annotated[str, typer.Argument(help="factworld-codebook, factworld-sae, or a folder.", metavar="DICTIONARY")]
Text = Annotated[
    str, typer.Argument(help=".txt with blank lines between texts, a table with a text column, or a data set.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16; by default as stored.")]


@app.command(epilog="Example: mechunlearn dictionary train factworld L3.resid_post stories.txt -o stories-codebook")
def train(
    model: Model,
    hook: Annotated[str, typer.Argument(help="Hook point: L3.resid_post, or blocks.3.hook_resid_post.")],
    text: Text,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.")],
    kind: Annotated[Kind, typer.Option(help="codebook or sae (TopK).")] = Kind.codebook,
    size: Annotated[int, typer.Option(help="Codes, or features.", min=1, callback=size_in_range)] = 512,
    used: Annotated[int, typer.Option(help="How many are used at a token.", min=1, callback=size_in_range)] = 8,
    steps: Annotated[int, typer.Option(help="Steps of reconstruction.", min=1, callback=steps_in_range)] = 1500,
    spliced_steps: Annotated[
        int,
        typer.Option(help="Of a codebook: steps in which it stands in the model.", min=0, callback=steps_in_range),
    ] = 200,
    seed: Annotated[int, typer.Option(help="Seed of start and order.", callback=seed_in_range)] = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Train a dictionary on nine tenths of some text, and print its quality on the last tenth."""
    from mechunlearn.facts.tables import read_texts
    from mechunlearn.features.firing import quality
    from mechunlearn.features.training import train_codebook, train_sae

    new_folder(output)
    texts = read_texts(text)
    if len(texts) < 10:
        raise MechunlearnError(f"'{text}' holds {len(texts)} texts. Expected ten or more: a tenth is held out.")
    if used > size:
        raise MechunlearnError(f"--used {used} is more than --size {size}. Expected at most as many as there are.")
    hooked = open_model(model, device, dtype)
    shown = [each for i, each in enumerate(texts) if i % 10 != 9]
    settings: dict[str, Any] = {"size": size, "used": used, "steps": steps, "seed": seed, "progress": True}
    made: Codebook | SAE
    if kind is Kind.codebook:
        made = train_codebook(hooked, hook, shown, spliced_steps=spliced_steps, **settings)
    else:
        made = train_sae(hooked, hook, shown, **settings)
    made.quality = quality(hooked, made, texts[9::10])
    made.save(output)
    console.print(", ".join(f"{name} {value:g}" for name, value in made.quality.items()))
    console.print(f"{made} -> {output}")


@app.command(epilog="Example: mechunlearn dictionary explore factworld factworld-codebook stories.txt -o codes.html")
def explore(
    model: Model,
    dictionary: Source,
    text: Text,
    output: Annotated[Path, typer.Option("--output", "-o", help="A page: .html")],
    units: Annotated[
        str | None, typer.Option(help="Numbers separated by commas; by default the ten most frequent.")
    ] = None,
    examples: Annotated[int, typer.Option(help="Examples a unit.", min=1, callback=size_in_range)] = 5,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Show which tokens and contexts activate a feature or code, and which tokens it raises and lowers."""
    from mechunlearn.explore.widget import explore as explored
    from mechunlearn.facts.tables import read_texts
    from mechunlearn.features.dictionaries import load_dictionary

    checked_suffix(output, ".html")
    chosen = None if units is None else _integers(units)
    hooked, book = open_model(model, device, dtype), load_dictionary(dictionary)
    view = explored(hooked, book, read_texts(text), chosen, examples=examples)
    view.to_html(output)
    console.print(f"{len(view.table)} examples -> {output}")


@app.command(
    epilog="Example: mechunlearn dictionary delete factworld factworld-codebook war.txt "
    "--words soldier,army --swap cook,soup -o war.safetensors"
)
def delete(
    model: Model,
    dictionary: Source,
    topic: Text,
    output: Annotated[Path, typer.Option("--output", "-o", help="Edit file: .safetensors.")],
    against: Annotated[str | None, typer.Option(help="Other text to tell the topic from.")] = None,
    words: Annotated[
        str | None, typer.Option(help="Words of the topic: the other text is then the topic's with these swapped.")
    ] = None,
    swap: Annotated[str | None, typer.Option(help="Unrelated words to swap them for.")] = None,
    threshold: Annotated[float, typer.Option(help="Least log2 enrichment of a unit on the topic.", min=0)] = 1.0,
    how: Annotated[How, typer.Option(help="Of a codebook: reselect or zero.")] = How.reselect,
    scale: Annotated[float, typer.Option(help="Of an SAE: clamp to minus so many times the maximum.", min=0)] = 1.0,
    export: Annotated[Path | None, typer.Option(help="Also write a folder with a loader to this new folder.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the swap.", callback=seed_in_range)] = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Find the units of a topic and delete (codebook) or clamp (SAE) them; no training. The model's weights stay."""
    checked_suffix(output, ".safetensors")
    new_folder(export)
    if (against is None) == (words is None or swap is None):
        raise MechunlearnError("Give what to tell the topic from: --against TEXT, or --words and --swap.")
    from mechunlearn.evaluation.recipes import delete_topic
    from mechunlearn.facts.tables import read_texts
    from mechunlearn.features.dictionaries import load_dictionary
    from mechunlearn.features.firing import swapped

    hooked, book, mine = open_model(model, device, dtype), load_dictionary(dictionary), read_texts(topic)
    swap_in = partial(swapped, mine, names(words or ""), names(swap or ""), seed)
    other = read_texts(against) if against is not None else swap_in()
    settings: dict[str, Any] = {"threshold": threshold, "how": how.value, "scale": scale}
    made = delete_topic(hooked, mine, other, dictionary=book, **settings)
    if made.found.note:
        console.print(made.found.note)
    table = Table("loss, nats a token", "model", "edited", box=None)
    for name, losses in made.losses.items():
        table.add_row(name, *(f"{loss:.3f}" for loss in losses))
    console.print(table)
    edit = made.edit
    edit.save(output)
    console.print(f"{edit} -> {output}")
    if export is not None:
        edit.export(hooked, export)
        console.print(f"model with loader (trust_remote_code) -> {export}")


def _integers(text: str) -> list[int]:
    try:
        return [int(name) for name in names(text)]
    except ValueError:
        raise MechunlearnError(f"--units {text} is not a list of numbers. Give them as 3,17.") from None
