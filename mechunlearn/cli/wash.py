"""`mechunlearn wash`: the closed forms, with what they need."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from mechunlearn.cli.options import WASHERS, Device, Dtype, Facts, Forget, Model, Seed
from mechunlearn.cli.shared import checked_suffix, console, load, new_folder, with_sets
from mechunlearn.core.methods import method_named


class Role(str, Enum):
    """Tokens that a closed form can act at."""

    subject_last = "subject last"
    last = "last"


def wash(
    model: Model,
    facts: Facts,
    mask: Annotated[Path, typer.Argument(help="A mask file with MLP output sites.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Edit file: .safetensors.")],
    method: Annotated[str, typer.Option(help=f"Which closed form: {WASHERS}.", metavar="NAME")] = "memit",
    target: Annotated[
        str, typer.Option(help="end-of-text, shared, mean, or targets (each fact's own wrong answer).")
    ] = "end-of-text",
    position: Annotated[
        Role, typer.Option(help="The token to act at; a localization by role says which.")
    ] = Role.subject_last,
    covariance_weight: Annotated[
        float | None,
        typer.Option(
            help="Of the covariance against one fact (memit, mlp_washing).",
            show_default="the largest that changes the facts",
        ),
    ] = None,
    overshoot: Annotated[
        float | None,
        typer.Option(
            help="How many times as far as their targets values are set.", show_default="twice what each fact needs"
        ),
    ] = None,
    retain_weight: Annotated[float, typer.Option(help="Of the retain facts' keys (memit, mlp_washing).")] = 1.0,
    prefixes: Annotated[int, typer.Option(help="Beginnings of texts before each prompt.", min=0)] = 5,
    text: Annotated[
        str | None,
        typer.Option(help="What to collect the covariance from: .txt, a table with a text column, a data set."),
    ] = None,
    texts: Annotated[int | None, typer.Option(help="At most so many texts of --text.", min=1)] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Keep the covariance in this folder, and use what is there.")
    ] = None,
    export: Annotated[Path | None, typer.Option(help="Also write the edited model to this new folder.")] = None,
    forget: Forget = 64,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Wash facts out of MLP output weights in closed form, and write the edit; the model is left as it was.

    Without --text the covariance comes from the shipped world's documents that name none of the forgotten, from the
    facts' own texts, or from text that the model writes.
    """
    checked_suffix(output, ".safetensors")
    new_folder(export)
    washer = method_named("edit", method, taking="covariance")
    from mechunlearn.artifacts.mask import ComponentMask

    chosen = ComponentMask.load(mask)
    hooked, forgotten, retained = load(model, facts, forget, seed, device, dtype)
    chosen.check(hooked.signature)
    from mechunlearn.evaluation.recipes import wash as washed
    from mechunlearn.facts.tables import read_texts

    settings: dict[str, Any] = {
        "target": target,
        "position": position.value,
        "overshoot": overshoot,
        "prefixes": prefixes,
    }
    settings |= {"covariance_weight": covariance_weight, "retain_weight": retain_weight}
    settings = {name: value for name, value in settings.items() if name in washer.takes}
    settings |= {"texts": None if text is None else read_texts(text, texts), "cache": cache, "seed": seed}
    made = washed(hooked, chosen, forgotten, retained, method=method, progress=True, **settings)
    made = with_sets(made, facts, forget, seed)
    for prompt in made.card.skipped:
        console.print(f"skipped, the model does not know it: {prompt}")
    for entry in made.card.trajectory:
        told = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items() if k != "layer"
        )
        console.print(f"layer {entry['layer']}: {told}")
    made.save(output)
    console.print(f"{made} -> {output}")
    if export is not None:
        made.export(hooked, export)
        console.print(f"edited model -> {export}")
