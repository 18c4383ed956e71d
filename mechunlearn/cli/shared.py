"""What commands share: the console, checks of what was given, a loaded model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mechunlearn.core.files import writable
from mechunlearn.core.spread import Ray
from mechunlearn.errors import MechunlearnError

if TYPE_CHECKING:
    from mechunlearn.evaluation.report import Report
    from mechunlearn.facts.prompts import Prompts
    from mechunlearn.model.hooked import HookedModel

console = Console(highlight=False)
MOST_SEED = 2**32 - 1


def _at_most(most: int) -> Callable[[int | None], int | None]:
    """A check of a number that says its range where it is missed; as a range of typer's it would fill the help."""

    def check(value: int | None) -> int | None:
        if value is not None and not 0 <= value <= most:
            raise MechunlearnError(f"{value} is out of range. Expected a whole number from 0 to {most}.")
        return value

    return check


seed_in_range, steps_in_range = _at_most(MOST_SEED), _at_most(1_000_000)
size_in_range = _at_most(2**24)


def open_model(model: str, device: str = "cpu", dtype: str | None = None) -> "HookedModel":
    """Load a model on a device.

    Args:
        model: What `load_model` reads.
        device: Such as `cpu` or `cuda`.
        dtype: Such as `bfloat16`; by default as stored.

    Raises:
        MechunlearnError: There is no such model or device.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    from mechunlearn.model.hooked import load_model

    with console.status(f"loading {model}"):
        return load_model(model, device=device, dtype=dtype)


def open_edit(path: Path, model: "HookedModel") -> Any:
    """Load an edit: a file of one, or what turns a model into the one that a folder holds.

    Args:
        path: The file, or the folder of a model that was trained elsewhere.
        model: The model from before the edit.

    Raises:
        MechunlearnError: There is no such edit, or what is between the models is none.
    """
    if not path.is_dir():
        from mechunlearn.features.feature_edit import load_edit

        return load_edit(path)
    from mechunlearn.artifacts.weight_edit import WeightEdit

    made = WeightEdit.between(model, open_model(str(path), str(model.device), str(model.dtype).removeprefix("torch.")))
    say(repr(made))
    return made


def names(text: str) -> list[str]:
    """Split names that are separated by commas.

    Args:
        text: What the user gave.
    """
    return [name.strip() for name in text.split(",") if name.strip()]


def checked_suffix(path: Path, *allowed: str) -> None:
    """Check how an output is named, before any work is done for it.

    Args:
        path: What the user gave.
        allowed: How it may end.

    Raises:
        MechunlearnError: It ends otherwise.
    """
    if path.suffix not in allowed:
        raise MechunlearnError(
            f"'{path}' is not named {' or '.join(f'*{s}' for s in allowed)}. Give such a name to -o."
        )
    if path.is_dir():
        raise MechunlearnError(f"'{path}' is a folder. Give the name of a file.")
    writable(path)


def new_folder(path: Path | None) -> None:
    """Check that a folder to write is new or empty.

    Args:
        path: What the user gave; None for none.

    Raises:
        MechunlearnError: It holds files, or is the folder in which the command was started.
    """
    if path is not None and path.resolve() == Path.cwd():
        raise MechunlearnError(f"'{path}' is the folder that you are in. Give the name of a new one.")
    if path is not None and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise MechunlearnError(f"'{path}' exists and is not an empty folder. Give another name, or remove it first.")
    if path is not None:
        writable(path)


def resumable(path: Path, *marks: str) -> None:
    """Check that a folder to write is new, empty, or that of a run that was stopped.

    Args:
        path: What the user gave.
        marks: Patterns of names, one of which a stopped run has left in it.

    Raises:
        MechunlearnError: It holds other files, or cannot be written.
    """
    if any(next(path.glob(mark), None) for mark in marks):
        writable(path / marks[0])
    else:
        new_folder(path)


@contextmanager
def goes_on(path: Path) -> Iterator[None]:
    """Say after Ctrl-C within the block that a run can be continued.

    Args:
        path: The folder of the run.
    """
    try:
        yield
    except KeyboardInterrupt:
        stopped = f"mechunlearn: stopped. What is finished is kept in '{path}': the same command goes on."
        Console(stderr=True, highlight=False).print(stopped, markup=False, soft_wrap=True)
        raise


def on_ray(
    where: str | None, cpus: int | None, gpus: float | None, memory: float | None, device: str = "cpu"
) -> Ray | None:
    """Return the cluster that the options name, or None for this process.

    Args:
        where: What `--ray` says.
        cpus: Cores of a cell.
        gpus: GPUs of a cell.
        memory: GiB of a cell.
        device: Where the model is.

    Raises:
        MechunlearnError: There are resources and no cluster, or a number is out of range, or the device is one GPU by its
            number, which is another one in a worker.
    """
    given: dict[str, Any] = {
        name: each for name, each in (("cpus", cpus), ("gpus", gpus), ("memory", memory)) if each is not None
    }
    if where is None:
        if given:
            raise MechunlearnError(f"--cell-{next(iter(given))} is for cells on Ray. Give --ray too, or leave it out.")
        return None
    if device.startswith("cuda:"):
        raise MechunlearnError(f"Ray chooses the GPU of each cell. Give --device cuda in place of {device}.")
    return Ray(where, **({"gpus": 1} if device == "cuda" else {}) | given)


def say(line: str) -> None:
    """Print a line unchanged: nothing in it is markup, and nothing is cut off.

    Args:
        line: The line.
    """
    console.print(line, markup=False, soft_wrap=True)


def load(
    model: str, facts: str, forget: int, seed: int, device: str, dtype: str | None
) -> tuple["HookedModel", "Prompts", "Prompts"]:
    """Load a model, and the facts to forget and to retain.

    Args:
        model: What `load_model` reads.
        facts: What `load_facts` reads.
        forget: How many facts to forget.
        seed: Draws them.
        device: Such as `cpu` or `cuda`.
        dtype: Such as `bfloat16`; by default as stored.
    """
    from mechunlearn.facts.load import load_facts

    data = load_facts(facts, seed=0)
    hooked = open_model(model, device, dtype)
    with console.status(f"loading {facts}"):
        forgotten, retained = data.prompts(hooked).split(forget=forget, seed=seed)
    return hooked, forgotten, retained


def with_sets(edit: Any, facts: str, count: int, seed: int) -> Any:
    """Return an edit whose card states how its sets were drawn, so that `evaluate` draws them again.

    Args:
        edit: The edit.
        facts: What the user gave.
        count: How many facts it forgets.
        seed: Drew them.
    """
    sets = {**edit.card.sets, "facts": facts, "count": count, "seed": seed}
    return replace(edit, card=replace(edit.card, sets=sets))


def print_report(report: "Report") -> None:
    """Print what the numbers say, the numbers to read first, what the model writes, and the attacks.

    Args:
        report: The report.
    """
    from mechunlearn.evaluation.words import MEANING

    say(str(report))
    for name in report.columns:
        say(f"{name}: {MEANING.get(name, 'another edit')}")
    say("Accuracy of the truth unless marked target; ± is half of the 95 % interval over facts.")
