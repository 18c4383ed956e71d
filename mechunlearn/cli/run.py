"""`mechunlearn run` and `mechunlearn demo`: the whole job."""

from pathlib import Path
from typing import Annotated

import typer

from mechunlearn.cli.options import ATTACKS, Device, Dtype, Facts, Model, Seed
from mechunlearn.cli.shared import names, new_folder, open_model, print_report, say


def run(
    model: Model,
    facts: Facts,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new or empty folder.")] = Path("result"),
    attacks: Annotated[
        str,
        typer.Option(help=f"Attacks that try to get the knowledge back: all, none, or names with commas: {ATTACKS}."),
    ] = "prompting, quantization, unlearning_depth, relearning",
    forget: Annotated[
        int | None,
        typer.Option(help="How many facts to forget, drawn by --seed.", show_default="a quarter, at most 64"),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Localize, mask, edit, evaluate, attack and export.

    The whole job, beside attribution patching and random controls. Facts that the model does not know are dropped.
    """
    if attacks == "none":
        wanted = []
    else:
        from mechunlearn.evaluation.robustness import check_attacks

        wanted = check_attacks(names(attacks))
    _run(model, facts, output, forget, seed, device, dtype, wanted)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="A new or empty folder.")] = Path("demo"),
    model: Annotated[
        str, typer.Option(help="A shipped world, or a language model such as smollm2.", metavar="MODEL")
    ] = "factworld",
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """The whole job: 64 invented athletes forget their sport, or a language model some capitals."""
    facts, forget = ("factworld/sport", None) if model.startswith("factworld") else ("countries/capital", 8)
    _run(model, facts, output, forget, seed, device, None, [])


def _run(
    model: str,
    facts: str,
    output: Path,
    forget: int | None,
    seed: int,
    device: str,
    dtype: str | None,
    attacks: list[str],
) -> None:
    new_folder(output)
    from mechunlearn.evaluation.workflow import edit_facts
    from mechunlearn.facts.load import load_facts

    data = load_facts(facts, seed=0)
    hooked = open_model(model, device, dtype)
    cache = output.with_name(output.name + ".attacks") if attacks else None
    made = edit_facts(data, hooked, forget=forget, attacks=attacks, cache=cache, seed=seed, say=say)
    written = made.save(hooked, output)
    print_report(made.report)
    for name, path in written.items():
        say(f"{name:<10} {path}")
