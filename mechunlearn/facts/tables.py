"""Rows of files and of data sets that `datasets` can reach: every value is the text that the file has."""

import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime, time
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mechunlearn.core.hub import is_hub_name, look_up
from mechunlearn.errors import MechunlearnError

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
Row = dict[str, Any]
EXPECTED = (
    "factworld/<relation>, a shipped set such as countries/capital, a .csv, .tsv, .json, .jsonl or .parquet file, rows in "
    "memory, or a data set"
)


def read_rows(source: Any, split: str | None = None) -> list[Row]:
    r"""Read a table without giving its values a type: 007 stays "007", NA stays "NA", true stays "true".

    JSON may be an array of objects, one object a line (whatever the suffix), an object of columns, an object of objects
    (its keys become the column `subject`), or one object, which is then the only row. A comma or a tab parts the columns
    of a CSV or TSV file, whichever its first line has more of.

    Args:
        source: A .csv, .tsv, .json, .jsonl or .parquet file, the name of a data set, or rows in memory: a `DataFrame`, a
            `datasets.Dataset`, a list of mappings or a mapping of columns.
        split: The split of a data set. None: `train`.

    Returns:
        One mapping a row, from column to text. JSON and parquet may also hold lists and mappings of texts, and None.

    Raises:
        MechunlearnError: The file is missing or cannot be read.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder) / "some.json"
    ...     _ = path.write_text('{"answer": 1.50, "known": true}\n{"answer": "NA", "known": null}\n')
    ...     read_rows(path)
    [{'answer': '1.50', 'known': 'true'}, {'answer': 'NA', 'known': None}]
    """
    if not isinstance(source, str | Path):
        return _in_memory(source, split)
    path = Path(source)
    if has_splits(source):
        return _from_datasets(str(source), split)
    if not path.is_file():
        raise MechunlearnError(f"There is no facts file '{source}'.")
    kind = path.suffix.lower()[1:]
    try:
        if kind == "parquet":
            import pyarrow.parquet

            return [as_text(row) for row in pyarrow.parquet.read_table(path).to_pylist()]
        text = read_text(path)
        return _from_json(text, str(source)) if kind in ("json", "jsonl") else _from_csv(path, text)
    except pd.errors.EmptyDataError:
        return []
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MechunlearnError(f"'{source}' could not be read as {kind}: {reason}") from None


def in_words(source: Any) -> str:
    """Return a name for rows that are in memory.

    Args:
        source: The rows.

    >>> in_words([{"subject": "Oslo"}])
    'the given list'
    """
    return f"the given {type(source).__name__}"


def has_splits(source: Any) -> bool:
    """Return whether a source is one of several splits: the name of a data set, or a `DatasetDict`; all others are a table.

    Args:
        source: The source.

    >>> has_splits("my_facts.csv"), has_splits("owner/name"), has_splits([{"subject": "Oslo"}])
    (False, True, False)
    """
    if isinstance(source, str | Path):
        return Path(source).suffix.lower() not in SUFFIXES
    return isinstance(source, Mapping) and hasattr(source, "num_rows")


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Args:
        path: The file.

    Raises:
        MechunlearnError: It is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MechunlearnError(
            f"'{path}' is not UTF-8 text (byte {error.start}). Save it as UTF-8, for example with iconv -t UTF-8."
        ) from None


def read_texts(source: str | Path, limit: int | None = None) -> list[str]:
    r"""Read texts from a text file (parted by empty lines), a table's `text` column, or a data set.

    Args:
        source: The file or data set.
        limit: Read no more than the first so many texts.

    Raises:
        MechunlearnError: If it is missing, empty, wrongly encoded or without that column.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder) / "some.txt"
    ...     _ = path.write_text("One passage,\nstill the same.\n\nAnother one.")
    ...     read_texts(path)
    ['One passage,\nstill the same.', 'Another one.']
    """
    path = Path(source)
    if path.suffix == ".txt":
        if not path.is_file():
            raise MechunlearnError(f"There is no text file '{source}'.")
        found = re.split(r"\n\s*\n", read_text(path))
    else:
        rows = read_rows(source)
        column = next((name for name in names_of(rows) if name.lower() == "text"), None)
        if column is None:
            raise MechunlearnError(
                f"'{source}' has the columns {', '.join(names_of(rows)) or '(none)'}. Expected one named 'text'."
            )
        found = [row[column] for row in rows if row.get(column)]
    texts = [text.strip() for text in found if text.strip()][:limit]
    if not texts:
        raise MechunlearnError(f"'{source}' holds no text. Expected texts parted by empty lines, or a 'text' column.")
    return texts


def names_of(rows: Iterable[Row]) -> list[str]:
    """Return the columns that any of these rows has, in order.

    Args:
        rows: The rows.

    >>> names_of([{"a": "1"}, {"b": "2", "a": None}])
    ['a', 'b']
    """
    return list(dict.fromkeys(name for row in rows for name in row))


def as_text(value: Any) -> Any:
    """Return a value as text, a list or a mapping with its values as text, and what is missing as None.

    Args:
        value: What a library gave.

    >>> as_text([7, 1.5, True, "NA", None, pd.Timestamp("1969-07-20")])
    ['7', '1.5', 'true', 'NA', None, '1969-07-20']
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return {str(name): as_text(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_text(each) for each in value]
    if isinstance(value, np.datetime64):
        value = pd.Timestamp(value)  # its nanoseconds would be a number
    if isinstance(value, datetime) and value is not pd.NaT and value.time() == time():
        return value.date().isoformat()  # as pandas shows it
    if isinstance(value, bytes):
        return _decoded(value)
    if hasattr(value, "tolist"):  # numpy's
        return as_text(value.tolist())
    missing = value is pd.NA or value is pd.NaT or (isinstance(value, float) and isnan(value))
    return None if missing else str(value)


def _decoded(value: bytes) -> str:
    """Bytes as text."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise MechunlearnError(
            f"{value[:20]!r} is not UTF-8 text. Decode the column first: bytes.decode(...)."
        ) from None


def _from_csv(path: Path, text: str) -> list[Row]:
    first = text.lstrip("\r\n").partition("\n")[0]
    comma = "," if path.suffix.lower() == ".csv" else "\t"
    separator = comma if first.count(",") == first.count("\t") else max(",\t", key=first.count)
    frame = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    return frame.to_dict("records")  # type: ignore[return-value]  # its columns are texts


def _in_memory(given: Any, split: str | None) -> list[Row]:
    """The rows of a table that is no file."""
    name = in_words(given)
    if isinstance(given, pd.DataFrame):
        columns = {str(title): _whole(given.iloc[:, place]) for place, title in enumerate(given.columns)}
        return [as_text(dict(zip(columns, values))) for values in zip(*columns.values())]
    if has_splits(given):
        wanted = split or ("train" if "train" in given else next(iter(given), ""))
        if wanted not in given:
            raise MechunlearnError(f"{name} has no split '{wanted}'. Its splits: {', '.join(given)}.")
        given = given[wanted]
    rows = given if isinstance(given, Mapping) else list(given) if isinstance(given, Iterable) else [given]
    return _checked(_rows_of(as_text(rows)), name)


def _whole(column: "pd.Series[Any]") -> list[Any]:
    """A column's values; whole numbers that pandas made floats of, because one is missing, are whole again."""
    if column.dtype.kind == "f" and column.isna().any() and (column.dropna() % 1 == 0).all():
        return [None if isnan(value) else int(value) for value in column]
    return list(column)


def _from_json(text: str, source: str) -> list[Row]:
    as_written: Any = {"parse_float": str, "parse_int": str, "parse_constant": str}
    try:
        given = json.loads(text, **as_written) if text.strip() else []
    except json.JSONDecodeError as whole:
        try:
            given = [json.loads(line, **as_written) for line in text.split("\n") if line.strip()]
        except json.JSONDecodeError:
            raise whole from None
    return _checked(_rows_of(as_text(given)), source)


def _checked(rows: list[Any], source: str) -> list[Row]:
    """The rows, if each is an object."""
    if wrong := next((i for i, row in enumerate(rows, start=1) if not isinstance(row, dict)), 0):
        raise MechunlearnError(
            f"'{source}', row {wrong}: {str(rows[wrong - 1])[:40]!r} is no object. Expected objects with the columns "
            'as keys, such as {"subject": "France", "prompt": "The capital of France is", "answer": "Paris"}.'
        )
    return rows


def _rows_of(given: Any) -> list[Any]:
    """The rows of a JSON value: see `read_rows`."""
    if not isinstance(given, dict):
        return given if isinstance(given, list) else [given]
    inner = list(given.values())
    if len(inner) == 1 and isinstance(inner[0], list) and all(isinstance(each, dict) for each in inner[0]):
        return inner[0]
    if inner and all(isinstance(each, list) for each in inner) and len({len(each) for each in inner}) == 1:
        return [dict(zip(given, values)) for values in zip(*inner)]
    if inner and all(isinstance(each, dict) for each in inner):
        numbers = dict.fromkeys(number for each in inner for number in each)
        if all(number.isdigit() for number in numbers):
            return [{name: given[name].get(number) for name in given} for number in numbers]
        return [{"subject": name, **each} for name, each in given.items()]
    return [given]


def _from_datasets(name: str, split: str | None) -> list[Row]:
    import datasets

    hub = {"counterfact": "NeelNanda/counterfact-tracing", "zsre": "zjunlp/KnowEdit"}.get(name, name)
    local = Path(name).is_dir()
    if not local and not is_hub_name(hub):
        raise MechunlearnError(
            f"'{name}' is not a facts file ({', '.join(SUFFIXES)}) and not a name on the hub (owner/name). Expected "
            f"{EXPECTED} that can be reached."
        )
    try:
        if not local:
            look_up(hub, "dataset")
        return [as_text(row) for row in datasets.load_dataset(hub, split=split or "train")]
    except Exception as error:  # whatever the library raises, the user asked for a name that gives no data
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MechunlearnError(
            f"Could not load facts '{name}': {reason.rstrip('.')}. Expected {EXPECTED} that can be reached."
        ) from None
