"""Facts files in the wild: sports CSV, CounterFact nested or flattened, zsRE, and plain columns."""

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from mechunlearn.errors import MechunlearnError

COLUMNS = (
    "subject, prompt, answer (plain); athlete, sport, prompt (sports); requested_rewrite, or subject, prompt, target_true, "
    "target_new (CounterFact); subject, src, answers or alt (zsRE)"
)


Columns = Mapping[Any, Any]


@dataclass(frozen=True)
class Record:
    """One fact as a file gives it.

    Args:
        subject: Whom or what it is about.
        relation: What it says of the subject; "fact" if the file does not name it.
        prompt: What stands before the answer.
        answer: The true answer.
        target: The answer that an edit injects; empty if the file has none.
        others: Further prompts, by format.
        foil: What the truth is compared with; empty if the file has none.
    """

    subject: str
    relation: str
    prompt: str
    answer: str
    target: str = ""
    others: Mapping[str, str] = field(default_factory=dict)
    foil: str = ""


def read_facts(source: str | Path) -> list[Record]:
    """Read a file, or the training split of a data set that `datasets` can reach.

    Args:
        source: A .csv, .tsv, .json, .jsonl or .parquet file, or a data set's name.

    Raises:
        MechunlearnError: If it is missing, empty, wrongly encoded or lacks columns, or a row makes no sense.
    """
    frame = _frame(source)
    if frame.empty:
        raise MechunlearnError(f"'{source}' holds no facts. Expected at least two rows with columns {COLUMNS}.")
    columns = set(frame.columns)
    reader = next(
        (
            reader
            for needed, reader in (
                ({"athlete", "sport", "prompt"}, _sports),
                ({"requested_rewrite"}, _counterfact),
                ({"subject", "prompt", "target_true"}, _flat_counterfact),
                ({"subject", "src"}, _zsre),
                ({"subject", "prompt", "answer"}, _plain),
            )
            if needed <= columns
        ),
        None,
    )
    if reader is None:
        raise MechunlearnError(f"'{source}' has the columns {', '.join(map(str, frame.columns))}. Expected {COLUMNS}.")
    records = []
    for number, row in enumerate(frame.to_dict("records"), start=1):
        try:
            record = reader(row)
        except (KeyError, TypeError, IndexError, ValueError, SyntaxError) as error:
            raise MechunlearnError(f"'{source}', row {number}: {type(error).__name__}: {error}.") from None
        if not record.prompt.strip() or not record.answer.strip():
            raise MechunlearnError(f"'{source}', row {number}: the prompt or the answer is empty.")
        if record.subject not in record.prompt:
            raise MechunlearnError(
                f"'{source}', row {number}: the subject '{record.subject}' is not in its prompt '{record.prompt}'."
            )
        for name in ("target", "foil"):
            if getattr(record, name).strip() == record.answer.strip():
                raise MechunlearnError(f"'{source}', row {number}: truth and {name} are both '{record.answer}'.")
        records.append(record)
    return records


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
        try:
            found = re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise MechunlearnError(f"'{source}' is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    else:
        frame = _frame(source)
        if "text" not in frame.columns:
            raise MechunlearnError(
                f"'{source}' has the columns {', '.join(map(str, frame.columns)) or '(none)'}. Expected one named "
                "'text'."
            )
        found = [str(text) for text in frame["text"]]
    texts = [text.strip() for text in found if text.strip()][:limit]
    if not texts:
        raise MechunlearnError(f"'{source}' holds no text. Expected texts parted by empty lines, or a 'text' column.")
    return texts


def _frame(source: str | Path) -> pd.DataFrame:
    path = Path(source)
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".csv": lambda path: pd.read_csv(path, keep_default_na=False),
        ".tsv": lambda path: pd.read_csv(path, sep="\t", keep_default_na=False),
        ".json": pd.read_json,
        ".jsonl": lambda path: pd.read_json(path, lines=True),
        ".parquet": pd.read_parquet,
    }
    if path.suffix in readers:
        if not path.is_file():
            raise MechunlearnError(f"There is no facts file '{source}'.")
        try:
            return readers[path.suffix](path)
        except UnicodeDecodeError as error:
            raise MechunlearnError(
                f"'{source}' is not UTF-8 text (byte {error.start}). Save it as UTF-8, for example with iconv -t UTF-8."
            ) from None
        except pd.errors.EmptyDataError:
            return pd.DataFrame()
        except (ValueError, OSError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise MechunlearnError(f"'{source}' could not be read as {path.suffix[1:]}: {reason}") from None
    return _from_datasets(str(source))


def _from_datasets(name: str) -> pd.DataFrame:
    import datasets

    hub = {"counterfact": "NeelNanda/counterfact-tracing", "zsre": "zjunlp/KnowEdit"}.get(name, name)
    try:
        return pd.DataFrame(datasets.load_dataset(hub, split="train").to_pandas())
    except Exception as error:  # whatever the library raises, the user asked for a name that gives no data
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MechunlearnError(
            f"Could not load facts '{name}': {reason} Expected factworld/<relation>, a .csv, .tsv, .json, .jsonl or "
            ".parquet file, or a data set that can be reached."
        ) from None


def _text(row: Columns, *names: str) -> str:
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip() if name not in ("prompt", "src") else value.rstrip()
    return ""


def _plain(row: Columns) -> Record:
    subject = _text(row, "subject")
    prompt = _text(row, "prompt").replace("{}", subject)
    others = {
        str(name): str(value).rstrip().replace("{}", subject)
        for name, value in row.items()
        if str(name).startswith(("paraphrase", "question")) and isinstance(value, str) and value.strip()
    }
    answer, target, foil = (_text(row, name) for name in ("answer", "target", "foil"))
    return Record(subject, _text(row, "relation") or "fact", prompt, answer, target, others, foil)


def _sports(row: Columns) -> Record:
    target = _text(row, "inject_sport_without_golf", "inject_sport_with_golf")
    return Record(_text(row, "athlete"), "sport", _text(row, "prompt"), _text(row, "sport"), target)


def _counterfact(row: Columns) -> Record:
    rewrite = row["requested_rewrite"]
    rewrite = ast.literal_eval(rewrite) if isinstance(rewrite, str) else rewrite
    subject = rewrite["subject"]
    return Record(
        subject,
        rewrite.get("relation_id", "fact"),
        rewrite["prompt"].replace("{}", subject),
        rewrite["target_true"]["str"].strip(),
        rewrite["target_new"]["str"].strip(),
        _paraphrases(row.get("paraphrase_prompts"), subject),
    )


def _flat_counterfact(row: Columns) -> Record:
    subject = _text(row, "subject")
    return Record(
        subject,
        _text(row, "relation_id", "relation") or "fact",
        _text(row, "prompt").replace("{}", subject),
        _text(row, "target_true"),
        _text(row, "target_new", "target_false"),
        _paraphrases(row.get("paraphrase_prompts"), subject),
    )


def _zsre(row: Columns) -> Record:
    answers = parse_list(row["answers"]) if row.get("answers") is not None else [row["pred"]]
    subject, src = _text(row, "subject"), _text(row, "src")
    rephrase = _text(row, "rephrase")
    others = {"paraphrase": f"Question: {rephrase} Answer:"} if rephrase else {}
    return Record(subject, "zsre", f"Question: {src} Answer:", str(answers[0]), _text(row, "alt"), others)


def _paraphrases(given: object, subject: str) -> dict[str, str]:
    found = parse_list(given) if given is not None else []
    return {f"paraphrase_{i}": str(p).rstrip() for i, p in enumerate(found, start=1) if subject in str(p)}


def parse_list(given: Any) -> list[Any]:
    """Return a list column, also where a table holds its Python text, with or without commas between the items.

    Args:
        given: A list, an array, or a text.

    >>> parse_list("['a b' 'c']"), parse_list('["a", "b"]'), parse_list(["a"])
    (['a b', 'c'], ['a', 'b'], ['a'])
    """
    if not isinstance(given, str):
        return list(given) if isinstance(given, Sequence) or hasattr(given, "tolist") else [given]
    items = re.findall(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", given)
    return [ast.literal_eval(item) for item in items] if items else ([given] if given.strip() else [])
