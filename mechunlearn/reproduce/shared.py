"""What reproductions share: workers, cells that may fail without ending the run, and finished cells."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from mechunlearn.core.files import whole_file
from mechunlearn.core.grid import Grid
from mechunlearn.core.runcard import digest
from mechunlearn.errors import MechunlearnError

Each = Callable[[Callable[[Any], object], Sequence[Any], str], None]


@contextmanager
def workers(jobs: int, progress: bool) -> Iterator[Each]:
    """Processes of one thread each: `each(work, items, title)` within the block does the work of every item.

    An item whose work fails is told, with its reason, and the others go on.
    """
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=one_thread) as pool:

        def each(work: Callable[[Any], object], items: Sequence[Any], title: str) -> None:
            done = pool.map(partial(tried, work), items)
            for item, reason in track(zip(items, done, strict=True), title, total=len(items), disable=not progress):
                if reason:
                    Console(stderr=True).print(f"failed: {item}: {reason}", highlight=False, markup=False)

        yield each


def tried(work: Callable[[Any], object], item: Any) -> str:
    """Do the work of an item; the reason if it fails, else nothing."""
    try:
        work(item)
    except Exception as error:
        return reason_of(error)
    return ""


def reason_of(error: Exception) -> str:
    return str(error) if isinstance(error, MechunlearnError) else f"{type(error).__name__}: {error}"


def one_thread() -> None:
    """What each worker begins with."""
    torch.set_num_threads(1)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"


def finished(grid: Grid, description: Mapping) -> dict | None:
    """A finished cell's result, or None."""

    def absent() -> dict:
        raise _Absent

    try:
        return grid.cell(description, absent)
    except _Absent:
        return None


def attempt(grid: Grid, description: Mapping, work: Callable[[], Mapping]) -> dict | None:
    """The result of a cell, made now if need be; None if it fails, with the reason kept in the folder's `failed`.

    What has failed is tried again by the next run.
    """
    note = _note(grid, description)
    try:
        made = grid.cell(description, work)
    except Exception as error:
        with whole_file(note) as beside:
            beside.write_text(
                json.dumps({"cell": dict(description), "reason": reason_of(error)}) + "\n", encoding="utf-8"
            )
        return None
    note.unlink(missing_ok=True)
    return made


def settled(grid: Grid, description: Mapping) -> bool:
    """Whether a cell is finished or has failed."""
    return finished(grid, description) is not None or _note(grid, description).exists()


def _note(grid: Grid, description: Mapping) -> Path:
    return grid.folder / "failed" / f"{digest(json.dumps(dict(description), sort_keys=True))}.json"


def failures(folder: Path) -> list[dict]:
    """The cells that failed, each with its reason."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "failed").glob("*.json"))]


def verdict(told: Sequence[float], sign: int, least: float = 0.1) -> str:
    """What became of a claim that a difference has this sign: `told` are its mean and interval; one pair settles nothing.

    >>> verdict((0.3, 0.2, 0.4), 1), verdict((0.05, 0.01, 0.1), 1), verdict((0.3, -0.1, 0.7), 1), verdict((0.3, 0.2, 0.4), -1)
    ('holds', 'weak', 'null', 'reversed')
    >>> verdict((0.3, 0.3, 0.3), 1)
    'one pair'
    """
    mean, low, high = told[:3]
    if low <= 0 <= high:
        return "null"
    if low == high:
        return "one pair"
    if (mean > 0) != (sign > 0):
        return "reversed"
    return "holds" if abs(mean) >= least else "weak"


class _Absent(Exception):
    """A cell is not finished."""
