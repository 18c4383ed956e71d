"""The command line: the same nouns, one clear line and exit code 2 on bad input."""

import os
import sys
import warnings
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mechunlearn.cli.dictionary import app as dictionary_app
from mechunlearn.cli.doctor import doctor
from mechunlearn.cli.reproduce import app as reproduce_app
from mechunlearn.cli.shared import (
    MOST_SEED,
    checked_suffix,
    console,
    names,
    new_folder,
    open_model,
    resumable,
    seed_in_range,
    steps_in_range,
)
from mechunlearn.cli.world import app as world_app
from mechunlearn.core.methods import method_named, ready_methods
from mechunlearn.errors import MechunlearnError

if TYPE_CHECKING:
    import pandas as pd

    from mechunlearn.evaluation.report import Report
    from mechunlearn.facts.prompts import Prompts
    from mechunlearn.model.hooked import HookedModel

app = typer.Typer(
    help="Find where a language model keeps a fact, change it there and nowhere else, and prove that it is gone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(world_app, name="world")
app.add_typer(reproduce_app, name="reproduce")
app.add_typer(dictionary_app, name="dictionary")
app.command(epilog="Example: mechunlearn doctor smollm2")(doctor)


class Role(str, Enum):
    """Tokens that a closed form can act at."""

    subject_last = "subject last"
    last = "last"


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
Rate = Annotated[float, typer.Option(help="Learning rate.", min=0)]
Weights = Annotated[
    float | None, typer.Option(help="Share of the editable weights to select, by rank.", metavar="SHARE")
]


@app.command(epilog="Example: mechunlearn run factworld factworld/sport -o result")
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


@app.command(epilog="Example: mechunlearn demo -o demo")
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


@app.command(epilog="Example: mechunlearn localize factworld factworld/sport --weights 0.05 -o sport.mask.json")
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
    hooked, forgotten, _ = _load(model, facts, forget, seed, device, dtype)
    made = localizer(hooked, forgotten, seed=seed)
    found = made.nodes() if circuit else made
    mask = found.above(0) if weights is None else found.top(weights=weights)
    if made.note:
        console.print(made.note)
    if scores is not None:
        made.save(scores)
    mask.save(output)
    console.print(f"{len(mask)} units, {found.share(mask):.2%} of the editable weights -> {output}")


@app.command(epilog="Example: mechunlearn edit factworld factworld/sport sport.mask.json -o sport.edit.safetensors")
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
    hooked, forgotten, retained = _load(model, facts, forget, seed, device, dtype)
    chosen.check(hooked.signature)
    from mechunlearn.edit.objective import objective_named

    if "loss" in editor.takes:
        given |= objective_named("injection" if objective is None else objective, chosen)
    made = editor(hooked, chosen, forgotten, retained, **given, seed=seed, progress=True)
    if made.card.stopped:
        console.print(f"{made.card.stopped} after {len(made.card.trajectory)} steps")
    made = _with_sets(made, facts, forget, seed)
    made.save(output)
    console.print(f"{made} -> {output}")
    if adapter is not None:
        made.save_adapter(hooked, adapter)
        console.print(f"PEFT adapter -> {adapter}")
    if export is not None:
        made.export(hooked, export)
        console.print(f"edited model -> {export}")


@app.command(
    epilog="Example: mechunlearn wash factworld factworld/sport sport.mask.json "
    "--covariance-weight 400 --overshoot 1.5 -o washed.safetensors"
)
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
    overshoot: Annotated[float, typer.Option(help="How far beyond their targets values are set.")] = 1.0,
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
    hooked, forgotten, retained = _load(model, facts, forget, seed, device, dtype)
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
    made = _with_sets(made, facts, forget, seed)
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


@app.command(
    epilog="Example: mechunlearn evaluate factworld factworld/sport sport.edit.safetensors --attacks all -o report.html"
)
def evaluate(
    model: Model,
    facts: Facts,
    edit: Annotated[Path, typer.Argument(help="An edit file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Report: .html")] = Path("report.html"),
    attacks: Annotated[
        str, typer.Option(help=f"Attacks that try to get the knowledge back: all, or names with commas: {ATTACKS}.")
    ] = "",
    text: Annotated[
        str | None, typer.Option(help="The text that the edit was washed with (wash --text), for its control.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Where finished attacks and floors are kept; by default beside the report, in <report>.attacks."
        ),
    ] = None,
    forget: Annotated[
        int | None,
        typer.Option(help="How many facts the edit forgot.", min=1, show_default="what the edit says, else 64"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the sets and of the attacks.", callback=seed_in_range, show_default="the edit's, else 0"
        ),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Measure an edit in every format, with side effects, beside a random mask of the same weight; try to break it.

    The forget and retain sets are those that the edit was made with, if `mechunlearn edit` or `wash` made it. The report
    is written before the first attack and again after each. A killed run goes on where it was.
    """
    checked_suffix(output, ".html")
    from mechunlearn.evaluation.robustness import check_attacks
    from mechunlearn.features.feature_edit import load_edit

    wanted = check_attacks(names(attacks)) if attacks else []
    made = load_edit(edit)
    forget, seed = _drawn(made.card.sets, "count", forget, 64), _drawn(made.card.sets, "seed", seed, 0)
    hooked, forgotten, retained = _load(model, facts, forget, seed, device, dtype)
    from mechunlearn.evaluation.controls import random_control
    from mechunlearn.evaluation.evaluate import evaluate as measured
    from mechunlearn.evaluation.same import check_same
    from mechunlearn.evaluation.status import ASKED
    from mechunlearn.evaluation.workflow import warnings_said
    from mechunlearn.facts.tables import read_texts

    texts = () if text is None else read_texts(text)
    told: set[str] = set()

    def written(report: "Report") -> None:
        report.to_html(output, edit=made)
        for row in report.outcomes().to_dict("records"):
            if row["attack"] not in {ASKED, *told}:
                told.add(row["attack"])
                back = f", recovery {row['recovery']}, truth {row['truth_came_back']}" * (row["outcome"] != "failed")
                note = f"; {row['note']}" if row["note"] else ""
                console.print(f"{row['attack']}: {row['outcome']}{back}{note}", highlight=False)

    console.print("control edit, then every format", *(["; attacks: " + ", ".join(wanted)] if wanted else []), sep="")
    with warnings_said(_say):
        check_same(hooked, made, forgotten, retained)  # before the control is made
        control = random_control(hooked, made, forgotten, retained, seed, texts)
    report = measured(
        hooked,
        made,
        forget=forgotten,
        retain=retained,
        control=control,
        attacks=wanted,
        cache=cache or output.with_suffix(".attacks"),
        seed=seed,
        watch=written,
    )
    written(report)
    _print(report)
    console.print(f"report -> {output}")


@app.command(epilog="Example: mechunlearn explore factworld factworld/sport --forget 32")
def explore(
    model: Model,
    facts: Facts,
    host: Annotated[str, typer.Option(help="Address of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for any that is free.", min=0, max=65535)] = 8765,
    remote: Annotated[bool, typer.Option("--remote", help="Allow an address that other machines can reach.")] = False,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    mask: Annotated[Path | None, typer.Option(help="A mask file to begin with.")] = None,
    forget: Forget = 64,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Open the explorer of circuits as a page of this machine: see where facts live, click, save a mask.

    Ctrl-C ends it.

    Masks are saved in the folder where the command was started.
    """
    from mechunlearn.explore.server import ExplorerServer

    begun = None
    if mask is not None:
        from mechunlearn.artifacts.mask import ComponentMask

        begun = ComponentMask.load(mask)
    with ExplorerServer(host, port, remote) as server:
        hooked, forgotten, _ = _load(model, facts, forget, seed, device, dtype)
        from mechunlearn.explore.state import Workbench

        bench = Workbench(hooked, forgotten, mask=begun)
        with console.status(bench.method.replace("_", " ")):
            bench.view()
        console.print(f"explorer of {len(forgotten)} facts -> {server.url}", soft_wrap=True)
        console.print("Ctrl-C ends it")
        with suppress(KeyboardInterrupt), server.page_for_the_browser() as page:
            if browser:
                import webbrowser

                webbrowser.open(page)
            server.show(bench)


@app.command(
    epilog="Example: mechunlearn compare factworld factworld/sport --objectives injection,npo --seeds 3 -o sport-grid"
)
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
    resumable(output, "about.json")
    hooked, forgotten, _ = _load(model, facts, forget, 0, device, dtype)
    assert forgotten.facts is not None and forgotten.facts.source is not None
    grid |= {"forget": forget, "steps": steps, "attack": attack}
    made = compared(hooked, forgotten.facts.source, folder=output, **grid)
    _print_arms(made.summary(short=True))
    console.print("± is half of the 95 % interval over seeds, all of one model; how to read it: table.md")
    for name in ("results.parquet", "table.md", "figure.html"):
        console.print(f"{name:<16} {output / name}")


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
    made = edit_facts(data, hooked, forget=forget, attacks=attacks, cache=cache, seed=seed, say=_say)
    written = made.save(hooked, output)
    _print(made.report)
    for name, path in written.items():
        _say(f"{name:<10} {path}")


def _say(line: str) -> None:
    """A line as it is: nothing in it is markup, and nothing is cut off."""
    console.print(line, markup=False, soft_wrap=True)


def _load(
    model: str, facts: str, forget: int, seed: int, device: str, dtype: str | None
) -> tuple["HookedModel", "Prompts", "Prompts"]:
    """The model, and the facts to forget and to retain."""
    from mechunlearn.facts.load import load_facts

    data = load_facts(facts, seed=0)
    hooked = open_model(model, device, dtype)
    with console.status(f"loading {facts}"):
        forgotten, retained = data.prompts(hooked).split(forget=forget, seed=seed)
    return hooked, forgotten, retained


def _with_sets(edit: Any, facts: str, count: int, seed: int) -> Any:
    """An edit whose card says how its sets were drawn, so that `evaluate` draws them again."""
    sets = {**edit.card.sets, "facts": facts, "count": count, "seed": seed}
    return replace(edit, card=replace(edit.card, sets=sets))


def _drawn(sets: dict[str, Any], name: str, given: int | None, usual: int) -> int:
    """A number that says how sets were drawn: the user's, else the edit's, else the usual one."""
    stored = sets.get(name, usual)
    if given is None and not (type(stored) is int and 0 <= stored <= MOST_SEED):
        raise MechunlearnError(
            f"The edit's card says {name}={stored!r}. Expected a whole number: give --forget and --seed."
        )
    return stored if given is None else given


def _print(report: "Report") -> None:
    """What the numbers say, the numbers to read first, what the model writes, and the attacks."""
    from mechunlearn.evaluation.words import MEANING

    _say(str(report))
    for name in report.columns:
        _say(f"{name}: {MEANING.get(name, 'another edit')}")
    _say("Accuracy of the truth unless marked target; ± is half of the 95 % interval over facts.")


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
