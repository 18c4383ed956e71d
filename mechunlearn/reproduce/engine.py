"""The engine of every reproduction: a plan's cells are run here or on a Ray cluster, kept, and shown on a page.

A paper's module plans cells and measures them. Everything is kept in the plan's folder: a killed run continues where it
stopped, and what failed is noted and tried again by the next run.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from rich.console import Console
from rich.progress import track

from mechunlearn.core.files import data_folder, whole_file
from mechunlearn.core.grid import Grid
from mechunlearn.core.spread import Ray, Spread, reason_of, spreading
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.hooked import HookedModel, load_model
from mechunlearn.reproduce.tables import Claim

Made = TypeVar("Made")
Found = dict[str, Any]
"""Plain JSON: the result of a cell, or every number of a page."""
Work = Callable[[Path, Grid, Any], Mapping[str, Any]]
"""What makes a cell's result from the plan's folder, the finished cells and the cell."""


@runtime_checkable
class Cell(Protocol):
    """One unit of work; the same description is the same cell, in a later run too."""

    def description(self) -> Found:
        """Return what names the cell in full."""


@dataclass(frozen=True)
class Plan:
    """How much of a paper is run.

    Attributes:
        folder: Where worlds and cells are kept.
        worlds: The worlds.
        seeds: The forget sets of a world, or the seeds of its dictionaries.
        quick: Whether this is the short run.
    """

    folder: Path
    worlds: tuple[Any, ...]
    seeds: tuple[int, ...]
    quick: bool = False


@dataclass(frozen=True)
class Run:
    """A plan that is being run.

    Attributes:
        plan: What is run.
        about: What its cells share.
        grid: The finished cells.
        spread: Does the work of cells, here or on a cluster.
        progress: Whether to show bars.
    """

    plan: Plan
    about: Found
    grid: Grid
    spread: Spread
    progress: bool

    def build(self, title: str, makers: Mapping[Path, Callable[[], object]]) -> None:
        """Make the folders that do not exist yet.

        Args:
            title: What the progress bar says.
            makers: For each folder, what makes it.
        """
        missing = {path: make for path, make in makers.items() if not path.exists()}
        self._each(partial(_built, missing), list(missing), _unbuilt, title)

    def cells(self, title: str, work: Work, batches: Iterable[Sequence[Cell]]) -> None:
        """Run the cells that are not finished.

        Args:
            title: What the progress bar says.
            work: Makes a cell's result.
            batches: Cells that one worker runs one after another, as they share a model.
        """
        attempted = partial(_attempted, work, self.plan.folder, self.about)
        self._each(attempted, list(batches), partial(_lost, self.grid), title)

    def _each(
        self,
        work: Callable[[Any], list[str]],
        items: Sequence[Any],
        failed: Callable[[Any, str], list[str]],
        title: str,
    ) -> None:
        """Do the work of every item; the lines that it returns for what failed are printed, and the rest goes on."""
        done = track(self.spread(work, items, failed), title, total=len(items), disable=not self.progress)
        for line in (line for lines in done for line in lines):
            Console(stderr=True).print(f"failed: {line}", highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Paper:
    """A paper, and how its claims are tested.

    Attributes:
        name: Its name on the command line.
        title: Its title and number.
        full: Worlds and seeds of the full run.
        short: Worlds and seeds of a run that fits into a quarter of an hour of two cores.
        about: Returns what all cells of a plan share; a folder with cells about something else is refused.
        run: Runs what is missing, and returns the settings that were chosen.
        results: Returns every number of the page, from the plan, the finished cells and the chosen settings.
        claims: Returns what became of each claim, from these numbers.
        page: Returns the page as markdown, from these numbers.
    """

    name: str
    title: str
    full: tuple[tuple[Any, ...], tuple[int, ...]]
    short: tuple[tuple[Any, ...], tuple[int, ...]]
    about: Callable[[Plan], Found]
    run: Callable[[Run], Any]
    results: Callable[[Plan, Grid, Any], Found]
    claims: Callable[[Found], list[Claim]]
    page: Callable[[Found], str]

    def reproduce(self, folder: Path, quick: bool = False, ray: Ray | None = None, progress: bool = True) -> Found:
        """Run what is missing and return every number of the page.

        Args:
            folder: Where worlds and cells are kept.
            quick: Whether to take the short run.
            ray: The cluster that runs cells; None runs them here, one after another and with one thread.
            progress: Whether to show bars.

        Raises:
            MechunlearnError: If the folder holds cells about something else, or cells that the page needs failed, or
                the cluster cannot be used.
        """
        folder = folder.resolve()  # workers may start elsewhere
        plan = Plan(folder, *(self.short if quick else self.full), quick=quick)
        with _one_thread(), spreading(ray, folder) as spread:
            grid = Grid.open(folder, self.about(plan))
            chosen = self.run(Run(plan, self.about(plan), grid, spread, progress))
        return self.results(plan, grid, chosen)

    def write(self, found: Found, path: Path) -> None:
        """Write the page and, beside it, its numbers as JSON.

        Args:
            found: Every number of the page.
            path: The page's file, `.md`.
        """
        for file, content in ((path.with_suffix(".json"), json.dumps(found) + "\n"), (path, self.page(found))):
            with whole_file(file) as beside:
                beside.write_text(content, encoding="utf-8")


@contextmanager
def _one_thread() -> Iterator[None]:
    """As a cell has on Ray: the numbers of a page do not depend on how many cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _built(makers: Mapping[Path, Callable[[], object]], path: Path) -> list[str]:
    """Make a folder, unless a worker that died had made it."""
    if not path.exists():
        makers[path]()
    return []


def _unbuilt(path: Path, reason: str) -> list[str]:
    return [f"{path}: {reason}"]


def _attempted(work: Work, folder: Path, about: Found, cells: Sequence[Cell]) -> list[str]:
    """Run cells one after another, and return a line for each that fails."""
    grid = Grid.open(folder, about)
    reasons = [(cell, attempt(grid, cell, partial(work, folder, grid, cell))) for cell in cells]
    return [f"{cell}: {reason}" for cell, reason in reasons if reason]


def _lost(grid: Grid, cells: Sequence[Cell], reason: str) -> list[str]:
    """Note the cells that a worker which died has not made."""
    left = [cell for cell in cells if finished(grid, cell) is None]
    for cell in left:
        grid.fail(cell.description(), reason)
    return [f"{cell}: {reason}" for cell in left]


def attempt(grid: Grid, cell: Cell, work: Callable[[], Mapping[str, Any]]) -> str:
    """Make a cell unless it is finished; return why it failed, or nothing.

    The reason is also kept in the folder's `failed` until the cell is made.

    Args:
        grid: The finished cells.
        cell: What is made.
        work: Makes its result.
    """
    try:
        grid.cell(cell.description(), work)
    except Exception as error:
        grid.fail(cell.description(), reason_of(error))
        return reason_of(error)
    return ""


def finished(grid: Grid, cell: Cell) -> Found | None:
    """Return the result of a cell, or None if it is not finished.

    Args:
        grid: The finished cells.
        cell: Whose result.
    """
    try:
        return dict(grid.cell(cell.description(), _absent))
    except _Absent:
        return None


def stored(grid: Grid, cell: Cell) -> Found:
    """Return the result of a finished cell.

    Args:
        grid: The finished cells.
        cell: Whose result.

    Raises:
        MechunlearnError: If the cell is not finished.
    """
    found = finished(grid, cell)
    if found is None:
        raise MechunlearnError(f"{cell} is not finished. Run the same command again to continue.")
    return found


def settled(grid: Grid, cell: Cell) -> bool:
    """Return whether a cell is finished or has failed.

    Args:
        grid: The finished cells.
        cell: Which one.
    """
    return finished(grid, cell) is not None or grid.failed(cell.description())


def options(make: Callable[..., Made], **values: Iterable[Any]) -> tuple[Made, ...]:
    """Return one value for every combination of arguments.

    Args:
        make: What takes the arguments.
        values: For each argument, what it may be.

    >>> options(complex, real=(0, 1), imag=(2, 3))
    (2j, 3j, (1+2j), (1+3j))
    """
    return tuple(make(**dict(zip(values, chosen))) for chosen in product(*values.values()))


def world_folder(folder: Path, world: str | int, variant: str = "") -> Path:
    """Return where a world is: numbers are small worlds in the plan's folder, names are worlds of the package.

    Args:
        folder: The plan's folder.
        world: Number or name.
        variant: The end of its folder's name, such as `-gold`.
    """
    return folder / "worlds" / f"{world}{variant}" if str(world).isdigit() else data_folder() / str(world)


@cache
def model_in(folder: Path) -> HookedModel:
    """Return the model of a folder, loaded once a process.

    Args:
        folder: Where it is.
    """
    return load_model(folder)


class _Absent(Exception):
    """A cell is not finished."""


def _absent() -> Found:
    raise _Absent
