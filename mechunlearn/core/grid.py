"""Grids of experiments that can be stopped at any moment: each finished cell is one whole file, never made twice."""

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mechunlearn.core.files import whole_file
from mechunlearn.core.runcard import Stopwatch, digest
from mechunlearn.errors import MechunlearnError


@dataclass(frozen=True)
class Grid:
    """The finished cells of one experiment, in `folder/cells`. Make or resume one with `Grid.open`.

    `key` names what the cells have in common: a cell file with another key is not this grid's, and is not read.
    Several processes may work on one folder: a cell that two of them make is the later one's.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     grid = Grid.open(folder, {"model": "factworld"})
    ...     for seed in (1, 2, 1):
    ...         _ = grid.cell({"editor": "rome", "seed": seed}, lambda: {"accuracy": seed / 10})
    ...     grid.done(), grid.frame().to_dict("list")
    (2, {'editor': ['rome', 'rome'], 'seed': [1, 2], 'accuracy': [0.1, 0.2]})
    """

    folder: Path
    key: str

    @classmethod
    def open(cls, folder: str | Path, about: Mapping) -> "Grid":
        """A new grid in this folder, or the one that is there, if it is about the same.

        `about` is what all cells share and no cell says: model, data, settings, version. It is kept in `about.json`.

        Raises `MechunlearnError` if the folder holds a grid about something else.
        """
        path, given = Path(folder) / "about.json", _plain(about, "about")
        if not path.exists():
            with whole_file(path) as beside:
                beside.write_text(json.dumps(given, indent=2) + "\n")
        kept = _read(path)
        if kept is None:
            raise MechunlearnError(f"'{path}' cannot be read, so nobody knows what its cells are. Take another folder.")
        there, here = ({k: _canonical(v) for k, v in side.items()} for side in (kept, given))
        if differ := [k for k in sorted(there.keys() | here.keys()) if there.get(k) != here.get(k)]:
            changes = ", ".join(f"{k} ({_short(there.get(k))} there, {_short(here.get(k))} given)" for k in differ)
            raise MechunlearnError(
                f"'{folder}' holds a grid about something else: {changes}. Take another folder, or give what is there."
            )
        return cls(Path(folder), digest(_canonical(given)))

    def cell(self, description: Mapping, work: Callable[[], Mapping]) -> dict:
        """The result of the cell that `description` names in full: the stored one, or that of `work()`, then stored.

        Both are plain JSON values, so the first call gives what later ones give: tuples are lists, keys are strings; NaN
        stays NaN. A file that is damaged, or not this cell's, is made anew.

        Raises `MechunlearnError` if either is not made of numbers, strings, None, lists and dicts, or if a name is in both.
        """
        plain = _plain(description, "a description")
        path = self._path(plain)
        if kept := self._stored(path):
            return kept["result"]
        watch = Stopwatch()
        result = _plain(work(), f"the result of {_short(description)}")
        if shared := sorted(plain.keys() & result.keys()):
            raise MechunlearnError(
                f"{', '.join(shared)} in both the description and the result of {_short(description)}. Expected "
                "different names, as both are columns of one table: rename those of the result."
            )
        made = {"grid": self.key, "description": plain, "result": result, "seconds": watch.seconds()}
        with whole_file(path) as beside:
            beside.write_text(json.dumps(made) + "\n")
        return result

    @contextmanager
    def claim(self, description: Mapping) -> Iterator[bool]:
        """True within the block if no other worker holds this cell, which is then ours until the block ends.

            for description, work in cells:
                with grid.claim(description) as ours:
                    if ours:
                        grid.cell(description, work)

        The system takes the claim from a process that dies, however it dies: go over the list again for cells that were
        skipped for such a worker. Not for folders shared between machines.
        """
        path = self._path(_plain(description, "a description")).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.fstat(handle).st_nlink > 0  # else it was let go, and removed, since it was opened
        except BlockingIOError:
            ours = False
        try:
            if ours:
                os.truncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())  # for people who wonder whose it is
            yield ours
        finally:
            if ours:
                path.unlink(missing_ok=True)
            os.close(handle)

    def done(self) -> int:
        """The number of finished cells."""
        return len(self._all())

    def frame(self) -> pd.DataFrame:
        """One row a cell: what describes it, then each number or string of its result; rows sorted by the description.

        Columns come in the order in which cells list them. Lists and dicts of a description are shown as JSON, those of
        a result are left out: `cell` gives them.
        """
        cells = self._all()
        names = list(dict.fromkeys(name for cell in cells for name in cell["description"]))
        cells.sort(key=lambda cell: [_order(cell["description"].get(name)) for name in names])
        rows = [
            {k: _canonical(v) if isinstance(v, list | dict) else v for k, v in cell["description"].items()}
            | {k: v for k, v in cell["result"].items() if not isinstance(v, list | dict)}
            for cell in cells
        ]
        return pd.DataFrame(rows, columns=list(dict.fromkeys([*names, *(k for row in rows for k in row)])))

    def _path(self, plain: dict) -> Path:
        words = " ".join(f"{k} {plain[k]}" for k in sorted(plain))
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", words)[:80].strip("-.")
        return self.folder / "cells" / f"{slug}-{digest(_canonical(plain))}.json"

    def _stored(self, path: Path) -> dict | None:
        """A cell's file, if it is whole, of this grid, and in its place."""
        cell = _read(path) or {}
        whole = isinstance(cell.get("description"), dict) and isinstance(cell.get("result"), dict)
        return cell if whole and cell.get("grid") == self.key and self._path(cell["description"]) == path else None

    def _all(self) -> list[dict]:
        return [cell for path in sorted((self.folder / "cells").glob("*.json")) if (cell := self._stored(path))]


def _read(path: Path) -> dict | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _plain(value: Any, what: str) -> dict:
    """As it comes back from JSON; scalars of numpy and torch become numbers."""
    try:
        return json.loads(json.dumps(dict(value), default=lambda other: other.item()))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        expected = "a dict of numbers, strings, None, and lists and dicts of these"
        raise MechunlearnError(f"In {what}: {error}. Expected {expected}.") from None


def _canonical(plain: Any) -> str:
    return json.dumps(plain, sort_keys=True)


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _order(value: Any) -> tuple[int, float | int, str]:
    """Numbers by size, then everything else by its text; what is missing comes last."""
    if isinstance(value, int | float) and value == value:
        return 0, value, ""
    return (2, 0, "") if value is None else (1, 0, value if isinstance(value, str) else _canonical(value))
