"""`mechunlearn localize`: scores, and a mask of them."""

from pathlib import Path
from typing import Annotated

import typer

from mechunlearn.cli.options import LOCALIZERS, Device, Dtype, Facts, Forget, Model, Seed, Weights
from mechunlearn.cli.shared import checked_suffix, console, load
from mechunlearn.core.methods import method_named
from mechunlearn.errors import MechunlearnError


def localize(
    model: Model,
    facts: Facts,
    output: Annotated[Path, typer.Option("--output", "-o", help="Mask file: .json or .safetensors.")],
    method: Annotated[str, typer.Option(help=f"How to localize: {LOCALIZERS}.", metavar="NAME")] = "fact_lookup",
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

    A method that finds a circuit, such as edge_attribution: --scores writes it, and the mask is that of its components.
    """
    checked_suffix(output, ".json", ".safetensors")
    localizer = method_named("localize", method)
    circuit = localizer.returns == "Circuit"
    if scores is not None:
        checked_suffix(scores, ".json", ".safetensors", *((".graphml", ".dot") if circuit else ()))
    if weights is not None and not 0 <= weights <= 1:
        raise MechunlearnError(f"A budget of {weights} is out of range: a share of the weights lies in [0, 1].")
    hooked, forgotten, _ = load(model, facts, forget, seed, device, dtype)
    made = localizer(hooked, forgotten, seed=seed)
    found = made.nodes() if circuit else made
    mask = found.above(0) if weights is None else found.top(weights=weights)
    if made.note:
        console.print(made.note)
    if scores is not None:
        made.save(scores)
    mask.save(output)
    console.print(f"{len(mask)} units, {found.share(mask):.2%} of the editable weights -> {output}")
