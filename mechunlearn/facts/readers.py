"""Layouts of facts files in the wild: which columns hold subject, prompt and answer, and how a row becomes facts."""

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.formats import question
from mechunlearn.facts.odd import OddRow, Record
from mechunlearn.facts.tables import Row, has_splits, in_words, names_of, read_rows

COLUMNS = (
    "subject, prompt, answer (plain); athlete, sport, prompt (sports); requested_rewrite, or subject, prompt, target_true or "
    "ground_truth (CounterFact, MQuAKE); subject, src, answers or alt (zsRE); subject, attribute, prompt (known facts); "
    "prompt_templates, samples (LRE); sub_label, obj_label (T-REx); question or query, answer (TOFU, MUSE, RWKU); messages "
    "or conversations (chat); prompt, completion. For other names give columns={'subject': ..., 'answer': ...}, and "
    "template='The capital of {} is' where there is no prompt."
)
BLANK = re.compile(r"_{2,}")


def read_facts(
    source: Any,
    *,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    subset: str | None = None,
) -> tuple[list[Record], list[OddRow]]:
    """Read the facts of a file, or of a data set that `datasets` can reach, as it has them.

    Args:
        source: A .csv, .tsv, .json, .jsonl or .parquet file, a data set's name, or rows in memory.
        columns: The file's own names of `subject`, `prompt`, `answer`, `target`, `foil`, `relation`, `messages` and of
            what begins with `paraphrase` or `question`.
        template: A prompt with `{}` in the place of the subject. It takes the place of the file's prompts.
        subset: A relation, or a value of the file's column `split`; of a data set a split. None: everything; of a data
            set `train`.

    Returns:
        The facts, and the rows that do not have what their layout needs. `odd.checked` judges the facts.

    Raises:
        MechunlearnError: If it is missing, empty, wrongly encoded or lacks columns, has no such subset, or the template
            does not fit.
    """
    if template is not None and template.count("{}") != 1:
        raise MechunlearnError(f"The template is {template!r}. Expected one {{}} in it: 'The capital of {{}} is'.")
    rows, is_table = read_rows(source, subset), not has_splits(source)
    source = source if isinstance(source, str | Path) else in_words(source)
    if not rows:
        raise MechunlearnError(f"'{source}' holds no facts. Expected rows with columns {COLUMNS}")
    reader = _conversation if "messages" in (columns or ()) else _plain if columns else _reader(rows, source, template)
    numbered = list(enumerate(_renamed(rows, columns, str(source)) if columns else rows, start=1))
    parts = {row.get("split") for row in rows}
    if is_table and subset in parts:
        numbered = [(number, row) for number, row in numbered if row.get("split") == subset]
    records: list[Record] = []
    odd: list[OddRow] = []
    for number, row in numbered:
        try:
            records += [replace(record, row=record.row or number) for record in reader(row)]
        except (KeyError, TypeError, IndexError, ValueError, SyntaxError, AttributeError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
            odd.append(OddRow(number, why, str(row)))
    if subset is not None and is_table and subset not in parts:
        records = _of_relation(records, subset, str(source))
    if template is None:
        return records, odd
    relations = dict.fromkeys(record.relation for record in records)
    if len(relations) > 1:
        raise MechunlearnError(
            f"One template cannot ask for the {len(relations)} relations of '{source}'. Choose one with subset=: "
            f"{_listed(relations)}."
        )
    return [
        replace(record, prompt=template.replace("{}", record.subject)) if record.subject else record
        for record in records
    ], odd


def _of_relation(records: Sequence[Record], wanted: str, source: str) -> list[Record]:
    """The facts of one relation; spaces, underscores, hyphens and case do not matter in its name."""
    relations = dict.fromkeys(record.relation for record in records)
    alike = {name for name in relations if re.sub("[_-]", " ", name).lower() == re.sub("[_-]", " ", wanted).lower()}
    chosen = {wanted} if wanted in relations else alike
    if not chosen:
        raise MechunlearnError(f"'{source}' has no relation '{wanted}'. Its relations: {_listed(relations)}.")
    return [record for record in records if record.relation in chosen]


def _listed(names: Iterable[str]) -> str:
    """The first dozen of them."""
    first = list(names)
    return ", ".join([*first[:12], *([f"and {len(first) - 12} more"] if len(first) > 12 else [])])


def _reader(rows: Sequence[Row], source: str | Path, template: str | None) -> Callable[[Row], Iterable[Record]]:
    """How a row of this file becomes facts."""
    names = set(names_of(rows))
    layouts: tuple[tuple[set[str], Callable[[Row], Iterable[Record]]], ...] = (
        ({"athlete", "sport", "prompt"}, _sports),
        ({"requested_rewrite"}, _rewrites),
        ({"subject", "prompt", "target_true"}, _counterfact),
        ({"subject", "prompt", "ground_truth"}, _counterfact),
        ({"subject", "src"}, _zsre),
        ({"subject", "prompt", "attribute"}, _known),
        ({"prompt_templates", "samples"}, _relation),
        ({"prompt", "answer"}, _plain),
        ({"prompt", "gt"}, lambda row: _plain({"answer": row["gt"], **row})),
        ({"question", "answer"}, _asked),
        ({"query", "answer"}, _queried),
        ({"messages"}, _conversation),
        ({"conversations"}, lambda row: _conversation({**row, "messages": row["conversations"]})),
        ({"prompt", "completion"}, _completed),
    )
    found = next((reader for needed, reader in layouts if needed <= names), None)
    if found is not None:
        return found
    if {"sub_label", "obj_label"} <= names:
        return _Labels(Path(source), template)
    if template is not None and {"subject", "answer"} <= names:
        return _plain
    if "subject" in names and not names & {"prompt", "answer"} and str(source).endswith(".json"):
        return _attributes
    if names & {"pattern", "template"} and not names & {"subject", "answer"}:
        raise MechunlearnError(
            f"'{source}' holds the prompts of relations and no facts. Load the file of the facts (T-REx's are called "
            "trex_lms_vocab/P36.jsonl and the like): it takes its prompts from here, or from template=."
        )
    raise MechunlearnError(f"'{source}' has the columns {_listed(names_of(rows))}. Expected {COLUMNS}")


def _renamed(rows: Sequence[Row], columns: Mapping[str, str], source: str) -> list[Row]:
    """The rows with the columns that `_plain` reads."""
    known = ("subject", "prompt", "answer", "target", "foil", "relation", "messages")
    for ours, theirs in columns.items():
        if ours not in known and not ours.startswith(("paraphrase", "question")):
            raise MechunlearnError(
                f"columns={{{ours!r}: ...}} names nothing that a fact has. Expected {', '.join(known)}, or names that "
                "begin with paraphrase or question."
            )
        if theirs not in names_of(rows):
            raise MechunlearnError(f"'{source}' has no column '{theirs}'. Its columns: {', '.join(names_of(rows))}.")
    return [row | {ours: row.get(theirs) for ours, theirs in columns.items()} for row in rows]


def _text(row: Row, *names: str) -> str:
    """The first of these columns that has a text; of a list its first item."""
    for name in names:
        value = row.get(name)
        while isinstance(value, list):
            value = value[0] if value else None
        if isinstance(value, str) and value.strip():
            return value if name == "prompt" else value.strip() if name != "src" else value.rstrip()
    return ""


def _plain(row: Row) -> list[Record]:
    subject = _text(row, "subject")
    others = {
        name: value.replace("{}", subject)
        for name, value in row.items()
        if name.startswith(("paraphrase", "question")) and isinstance(value, str) and value.strip()
    }
    answer, target, foil = (_text(row, name) for name in ("answer", "target", "foil"))
    prompt = _text(row, "prompt").replace("{}", subject)
    return [Record(subject, _text(row, "relation") or "fact", prompt, answer, target, others, foil)]


def _sports(row: Row) -> list[Record]:
    target = _text(row, "inject_sport_without_golf", "inject_sport_with_golf")
    return [Record(_text(row, "athlete"), "sport", _text(row, "prompt"), _text(row, "sport"), target)]


def _known(row: Row) -> list[Record]:
    return _plain({**row, "answer": row["attribute"], "relation": row.get("relation_id")})


def _rewrites(row: Row) -> list[Record]:
    """CounterFact's rewrite, or MQuAKE's list of them."""
    given = row["requested_rewrite"]
    given = ast.literal_eval(given) if isinstance(given, str) else given
    return [
        Record(
            rewrite["subject"].strip(),
            rewrite.get("relation_id") or "fact",
            rewrite["prompt"].replace("{}", rewrite["subject"].strip()).rstrip(),
            rewrite["target_true"]["str"].strip(),
            rewrite["target_new"]["str"].strip(),
            _paraphrases(row.get("paraphrase_prompts"), rewrite["subject"].strip())
            | ({"question": question(rewrite["question"])} if rewrite.get("question") else {}),
        )
        for rewrite in (given if isinstance(given, list) else [given])
    ]


def _counterfact(row: Row) -> list[Record]:
    """CounterFact as one table; where no relation is named, facts that share a prompt's frame are of one."""
    subject, frame = _text(row, "subject"), _text(row, "prompt")
    relation = _text(row, "relation_id", "relation") or (frame.replace(subject, "{}") if subject else "fact")
    truth, target = _text(row, "target_true", "ground_truth"), _text(row, "target_new", "target_false")
    others = _paraphrases(row.get("paraphrase_prompts"), subject)
    others |= {"paraphrase": again} if (again := _text(row, "rephrase_prompt", "rephrase")) else {}
    return [Record(subject, relation, frame.replace("{}", subject), truth, target, others)]


def _zsre(row: Row) -> list[Record]:
    answers = parse_list(row["answers"]) if row.get("answers") is not None else [row["pred"]]
    subject, src = _text(row, "subject"), _text(row, "src")
    rephrase = _text(row, "rephrase")
    others = {"paraphrase": question(rephrase)} if rephrase else {}
    return [Record(subject, "zsre", question(src) if src else "", str(answers[0]).strip(), _text(row, "alt"), others)]


def _relation(row: Row) -> list[Record]:
    """A relation of LRE: the first zero-shot template is the statement, all others are paraphrases."""
    templates = list(dict.fromkeys([*(row.get("prompt_templates_zs") or ()), *row["prompt_templates"]]))
    made = []
    for number, sample in enumerate(row["samples"], start=1):
        subject, answer = _text(sample, "subject"), _text(sample, "object")
        first, *others = (template.replace("{}", subject).rstrip() for template in templates)
        more = {f"paraphrase_{i}": prompt for i, prompt in enumerate(others, start=1)}
        made.append(Record(subject, row["name"], first, answer, "", more, row=number))
    return made


def _attributes(row: Row) -> list[Record]:
    """An entity with several attributes (RAVEL): each is a relation of its own, asked for by its name."""
    subject = _text(row, "subject")
    return [
        Record(subject, name, f"The {name.lower().replace('_', ' ')} of {subject} is", _text(row, name))
        for name in row
        if name != "subject"
    ]


def _asked(row: Row) -> list[Record]:
    """A question and its answer (TOFU, MUSE)."""
    asked, again = _text(row, "question"), _text(row, "paraphrased_question")
    others = {"paraphrase": question(again)} if again else {}
    options = tuple(_text(row, name) for name in row if re.fullmatch(r"option\d+", name))
    target = _text(row, "target", "perturbed_answer")
    subject, relation = _text(row, "subject"), _text(row, "relation") or "question"
    prompt = question(asked) if asked else ""
    return [Record(subject, relation, prompt, _text(row, "answer"), target, others, options=options)]


def _turns(given: Any) -> list[tuple[str, str]]:
    """The messages of a conversation, as (role, text); ShareGPT's names of the roles become the usual ones."""
    made, messages = [], json.loads(given) if isinstance(given, str) else given
    if not messages or not isinstance(messages, list) or not all(isinstance(each, Mapping) for each in messages):
        raise ValueError("expected a list of messages, each with role and content")
    for message in messages:
        role, content = message.get("role") or message.get("from"), message.get("content", message.get("value"))
        parts = content if isinstance(content, list) else [{"text": content or ""}]
        named = {"human": "user", "gpt": "assistant", "model": "assistant"}.get(role, role)
        made.append((str(named), "".join(str(part.get("text") or "") for part in parts)))
    return made


def _conversation(row: Row) -> list[Record]:
    """A conversation: the answer is its last message, if that is the assistant's."""
    *turns, (role, answer) = _turns(row["messages"])
    turns, answer = (turns, answer.strip()) if role == "assistant" else ([*turns, (role, answer)], "")
    prompt = "\n".join(f"{who}: {text}" for who, text in turns)
    made = Record(_text(row, "subject"), _text(row, "relation") or "conversation", prompt, answer, _text(row, "target"))
    return [replace(made, foil=_text(row, "foil"), turns=tuple(turns))]


def _completed(row: Row) -> list[Record]:
    """A prompt and its completion, as texts or as messages."""
    if isinstance(row["prompt"], list):
        return _conversation({**row, "messages": [*row["prompt"], *row["completion"]]})
    return _plain({**row, "answer": row["completion"]})


def _queried(row: Row) -> list[Record]:
    """A query of RWKU: a question, or a sentence with a blank; one that ends in its blank is a statement."""
    query, relation = _text(row, "query"), _text(row, "type") or "query"
    blank = BLANK.search(query)
    if blank and not query[blank.end() :].strip(" ."):
        prompt = query[: blank.start()].rstrip()
    else:
        prompt = f"Fill in the blank: {query} Answer:" if blank else question(query)
    return [Record(_text(row, "subject"), relation, prompt if query else "", _text(row, "answer"))]


class _Labels:
    """T-REx as LAMA and PARAREL have it: labels of subject and object, and prompts in files beside or above.

    Args:
        file: The file of the facts. It is called as its relation is: P36.jsonl.
        template: What takes the place of the prompts; then none are looked for.
    """

    def __init__(self, file: Path, template: str | None) -> None:
        self.relation = file.stem
        self.frames = [template.replace("{}", "[X]")] if template else list(_frames(file))
        if not self.frames:
            raise MechunlearnError(
                f"'{file}' names subjects and answers but has no prompts, and no pattern file was found beside it "
                f"(pattern_data/graphs_json/{file.name} or LAMA_relations.jsonl, in its folder or the one above) with a "
                "pattern for this relation that ends in its answer. Give template='The capital of {} is'."
            )

    def __call__(self, row: Row) -> list[Record]:
        subject, answer = _text(row, "sub_label"), _text(row, "obj_label")
        first, *others = (frame.replace("[X]", subject) for frame in self.frames)
        more = {f"paraphrase_{i}": prompt for i, prompt in enumerate(others, start=1)}
        return [Record(subject, _text(row, "predicate_id") or self.relation, first, answer, "", more)]


def _frames(file: Path) -> Iterable[str]:
    """The patterns of a relation that end in their answer, without it."""
    found: list[Any] = []
    for folder in (file.parent, file.parent.parent):
        for path in (folder / "pattern_data" / "graphs_json" / file.name, folder / "graphs_json" / file.name):
            found += [row.get("pattern") for row in (read_rows(path) if path.is_file() else ())]
        for path in (folder / "LAMA_relations.jsonl", folder / "relations.jsonl"):
            rows = read_rows(path) if path.is_file() else ()
            found += [row.get("template") for row in rows if row.get("relation") == file.stem]
    ends = [re.fullmatch(r"(.*\[X\].*?)\s*\[Y\]\s*\.?\s*", pattern) for pattern in found if isinstance(pattern, str)]
    return dict.fromkeys(end[1] for end in ends if end)


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
