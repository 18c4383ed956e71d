"""Rows of public data sets: from the hub by name, from a local folder, or from one file."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mechunlearn.core.hub import is_hub_name, look_up
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.tables import SUFFIXES, Row, as_text, read_rows, read_text

Item = TypeVar("Item")
STRINGS = re.compile(r'\s*\[\s*"')
"""The beginning of a JSON list of texts, as MUSE's files are."""


class Place(NamedTuple):
    """Where a split lies.

    Attributes:
        file: Its file in a local folder, without the suffix; folders are parted by a slash.
        config: Its configuration on the hub; empty for a data set that has only one.
        split: Its split on the hub.
        data_file: The file on the hub, for a data set that is a folder of files.
    """

    file: str
    config: str = ""
    split: str = "train"
    data_file: str = ""


def read_splits(
    source: str | Path, places: Mapping[str, Place], wanted: Sequence[str] | None, parse: Callable[[str, Row], Item]
) -> dict[str, tuple[Item, ...]]:
    """Read splits of a data set. Every value of a row is text, a list or a mapping of texts, or None.

    Args:
        source: A name on the hub, a folder, or one file.
        places: The splits that there are, by name.
        wanted: The splits to read; None for all of the hub's, or all that the folder has.
        parse: Makes a typed row of the split's name and a row; it may raise KeyError, TypeError or ValueError.

    Returns:
        The rows of each split, by name.

    Raises:
        MechunlearnError: There is no such split, file or name on the hub, the hub does not answer, or a row lacks what it
            needs.
    """
    if unknown := [name for name in wanted or () if name not in places]:
        raise MechunlearnError(f"There is no split '{unknown[0]}'. Expected {', '.join(places)}.")
    path = Path(source).expanduser()
    if path.is_file():
        found = _from_file(path, places, wanted)
    elif path.is_dir():
        found = _from_folder(path, places, wanted)
    else:
        found = _from_hub(str(source), places, wanted or tuple(places))
    return {name: _parsed(str(source), name, rows, parse) for name, rows in found.items()}


def text(row: Row, *names: str) -> str:
    """Return the first of these columns that has a text, without space around it; empty if none has.

    Args:
        row: A row.
        names: Its columns.

    >>> text({"alt": None, "answer": " Oslo "}, "alt", "answer")
    'Oslo'
    """
    values = (row.get(name) for name in names)
    return next((value.strip() for value in values if isinstance(value, str) and value.strip()), "")


def needed(row: Row, *names: str) -> str:
    """Return the first of these columns that has a text.

    Args:
        row: A row.
        names: Its columns.

    Raises:
        KeyError: None has a text.
    """
    if not (found := text(row, *names)):
        raise KeyError(" or ".join(names))
    return found


def texts(row: Row, name: str) -> tuple[str, ...]:
    """Return a column of texts; one text is a column of one.

    Args:
        row: A row.
        name: The column.

    >>> texts({"perturbed_answer": ["Rome", "Oslo"]}, "perturbed_answer"), texts({}, "perturbed_answer")
    (('Rome', 'Oslo'), ())
    """
    value = row.get(name)
    given = value if isinstance(value, list) else [value]
    return tuple(each for each in given if isinstance(each, str) and each.strip())


def _parsed(source: str, name: str, rows: Sequence[Row], parse: Callable[[str, Row], Item]) -> tuple[Item, ...]:
    made = []
    for number, row in enumerate(rows, start=1):
        try:
            made.append(parse(name, row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = f"has no {error}" if isinstance(error, KeyError) else f"makes no sense ({error})"
            have = ", ".join(row)
            raise MechunlearnError(f"'{source}', split {name}, row {number} {why}. Its columns: {have}.") from None
    return tuple(made)


def _rows(path: Path) -> list[Row]:
    """The rows of a file; a JSON list of texts has one column, `text`."""
    if path.suffix.lower() == ".json" and STRINGS.match(given := read_text(path)):
        import json

        return [{"text": each} for each in json.loads(given)]
    return read_rows(path)


def _from_file(path: Path, places: Mapping[str, Place], wanted: Sequence[str] | None) -> dict[str, list[Row]]:
    """The split that is called as the file is, or the only one that is wanted."""
    alike = [name for name, place in places.items() if path.stem in (name, place.file.rpartition("/")[2])]
    names = list(wanted or alike or (places if len(places) == 1 else ()))
    if len(names) != 1:
        raise MechunlearnError(
            f"'{path}' is one file. Say which split it is: splits=[...], one of {', '.join(places)}."
        )
    return {names[0]: _rows(path)}


def _from_folder(folder: Path, places: Mapping[str, Place], wanted: Sequence[str] | None) -> dict[str, list[Row]]:
    tried = {name: [folder / f"{places[name].file}{suffix}" for suffix in SUFFIXES] for name in wanted or places}
    there = {name: next((path for path in paths if path.is_file()), None) for name, paths in tried.items()}
    missing = [name for name, path in there.items() if path is None]
    if missing and (wanted or len(missing) == len(places)):
        files = ", ".join(f"{places[name].file}.json" for name in missing[:6])
        raise MechunlearnError(f"'{folder}' lacks {files}. Expected files of these names ({', '.join(SUFFIXES)}).")
    return {name: _rows(path) for name, path in there.items() if path is not None}


def _from_hub(name: str, places: Mapping[str, Place], wanted: Sequence[str]) -> dict[str, list[Row]]:
    import datasets

    if not is_hub_name(name):
        raise MechunlearnError(f"There is no file or folder '{name}', and it is no name on the hub (owner/name).")
    loaded: dict[tuple[str, str], Any] = {}
    found = {}
    try:
        look_up(name, "dataset")
        for split in wanted:
            place = places[split]
            key = place.config, place.data_file
            if key not in loaded:
                files = {"data_files": place.data_file} if place.data_file else {}
                loaded[key] = datasets.load_dataset(name, *([place.config] if place.config else []), **files)
            parts = loaded[key]
            part = parts[place.split] if place.split in parts or len(parts) > 1 else next(iter(parts.values()))
            found[split] = [as_text(row) for row in part]
    except Exception as error:  # whatever the library raises, the user asked for a name that gives no data
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise MechunlearnError(
            f"Could not load '{name}' from the hub: {reason}. Expected a data set that can be reached, or its files in a "
            "local folder."
        ) from None
    return found
