"""What commands share: the console, checks of what was given, a loaded model."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from mechunlearn.core.files import writable
from mechunlearn.errors import MechunlearnError

if TYPE_CHECKING:
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
size_in_range, jobs_in_range = _at_most(2**24), _at_most(1024)


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
