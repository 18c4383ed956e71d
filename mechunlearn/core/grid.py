"""Grids of experiments that can be stopped at any moment: each finished cell is one whole file, never made twice."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mechunlearn.core.files import clear, whole_file
from mechunlearn.core.runcard import Stopwatch, digest
from mechunlearn.errors import MechunlearnError


@dataclass(frozen=True)
class Grid:
    """The finished cells of one experiment, in `folder/cells`. Make or resume one with `Grid.open`.

    Several processes may work on one folder. Two that compute the same cell at the same time do the work twice; each
    writes a whole file, and the one that is written last stays.

    Attributes:
        folder: Where the grid lies, from the root, as workers may start elsewhere.
        key: A hash of what all cells share. A cell file with another key belongs to another grid and is not read.

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
    def open(cls, folder: str | Path, about: Mapping[str, Any]) -> "Grid":
        """Start a grid in a folder, or resume the one that is there.

        Args:
            folder: Where the grid lies, or will lie.
            about: What all cells share, such as model, data, settings and version; it is kept in `about.json`.

        Raises:
            MechunlearnError: The folder holds a grid about something else, or an `about.json` that cannot be read.
        """
        path, given = Path(folder) / "about.json", _plain(about, "about")
        for place in (path.parent, path.parent / "cells"):
            clear(place)
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
        return cls(Path(folder).absolute(), digest(_canonical(given)))

    @classmethod
    def open_alone(cls, folder: str | Path, about: Mapping[str, Any]) -> "Grid":
        """Start or resume a grid as `open` does, in a folder that holds nothing else.

        Args:
            folder: Where the grid lies, or will lie.
            about: What all cells share.

        Raises:
            MechunlearnError: As `open` does; and if the folder holds other things and no grid. Nothing is written then.
        """
        others = sorted(path.name for path in Path(folder).glob("[!.]*"))
        if others and "about.json" not in others:
            raise MechunlearnError(
                f"'{folder}' holds {others[0]} and no grid. Give a new or empty folder, or that of a stopped run."
            )
        return cls.open(folder, about)

    def cell(self, description: Mapping[str, Any], work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the result of a cell: the stored one, or that of `work()`, which is then stored.

        The result is plain JSON from the first call on: tuples are lists, keys are strings; NaN stays NaN. A file that
        is damaged, or belongs to another cell, is made again.

        Args:
            description: Everything that tells this cell from the others.
            work: Computes the result.

        Raises:
            MechunlearnError: One of the two holds something else than numbers, strings, None, lists and dicts, or both
                have an entry of the same name.
        """
        plain = _plain(description, "a description")
        path = self._path(plain)
        if kept := self._stored(path):
            stored: dict[str, Any] = kept["result"]
            return stored
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
        self._note(plain).unlink(missing_ok=True)
        return result

    def fail(self, description: Mapping[str, Any], reason: str) -> None:
        """Keep why a cell could not be made, in the folder's `failed`, until it is made.

        Args:
            description: Which cell.
            reason: What went wrong.
        """
        plain = _plain(description, "a description")
        with whole_file(self._note(plain)) as beside:
            beside.write_text(json.dumps({"cell": plain, "reason": reason}) + "\n", encoding="utf-8")

    def failures(self) -> list[dict[str, Any]]:
        """Return the cells that failed, each with its reason: `{"cell": ..., "reason": ...}`."""
        return [kept for path in sorted((self.folder / "failed").glob("*.json")) if (kept := _read(path))]

    def failed(self, description: Mapping[str, Any]) -> bool:
        """Return whether a cell failed when it was last tried.

        Args:
            description: Which cell.
        """
        return self._note(_plain(description, "a description")).exists()

    def done(self) -> int:
        """Count the finished cells."""
        return len(self._all())

    def frame(self) -> pd.DataFrame:
        """Return one row a cell: its description, then the numbers and strings of its result.

        Rows sorted by the former.

        Columns come in the order in which cells list them. Lists and dicts of a description are shown as JSON, those of
        a result are left out; `cell` returns them.
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

    def _note(self, plain: dict[str, Any]) -> Path:
        return self.folder / "failed" / f"{digest(_canonical(plain))}.json"

    def _path(self, plain: dict[str, Any]) -> Path:
        words = " ".join(f"{k} {plain[k]}" for k in sorted(plain))
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", words)[:80].strip("-.")
        return self.folder / "cells" / f"{slug}-{digest(_canonical(plain))}.json"

    def _stored(self, path: Path) -> dict[str, Any] | None:
        """A cell's file, if it is whole, of this grid, and in its place."""
        cell = _read(path) or {}
        whole = isinstance(cell.get("description"), dict) and isinstance(cell.get("result"), dict)
        return cell if whole and cell.get("grid") == self.key and self._path(cell["description"]) == path else None

    def _all(self) -> list[dict[str, Any]]:
        return [cell for path in sorted((self.folder / "cells").glob("*.json")) if (cell := self._stored(path))]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _plain(value: Any, what: str) -> dict[str, Any]:
    """As it comes back from JSON; scalars of numpy and torch become numbers."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(value), default=lambda other: other.item()))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        expected = "a dict of numbers, strings, None, and lists and dicts of these"
        raise MechunlearnError(f"In {what}: {error}. Expected {expected}.") from None
    return plain


def _canonical(plain: Any) -> str:
    return json.dumps(plain, sort_keys=True)


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then everything else by its text; what is missing comes last."""
    if isinstance(value, int | float) and value == value:
        return 0, value, ""
    return (2, 0, "") if value is None else (1, 0, value if isinstance(value, str) else _canonical(value))
