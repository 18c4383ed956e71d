"""Facts from the shipped world, from files, and from data sets that `datasets` can reach."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mechunlearn.core.files import data_folder
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.formats import MOST_OPTIONS, Fact, Query, ask_all
from mechunlearn.facts.odd import as_written, checked, line
from mechunlearn.facts.readers import read_facts
from mechunlearn.facts.shipped import shipped_facts, shipped_sets
from mechunlearn.facts.tables import in_words

TWO_HOP = "{s} lives in the country of"


def load_facts(
    source: Any,
    *,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    subset: str | None = None,
    separator: str | None = None,
    seed: int = 0,
) -> FactDataset:
    """Load a relation of the shipped world, a shipped set of real facts, a file, a data set, or rows in memory.

    Shipped sets of real facts: `shipped_sets()` names them and their relations. "countries/capital" is one relation of
    a set, with the others of the same subjects in `related`; "countries" is all of its relations in one data set.

    Files: CSV, TSV, JSON, JSON lines or parquet with the columns `subject`, `prompt`, `answer` and perhaps `target`,
    `foil`, `relation`, `paraphrase...`; CounterFact (nested, flat), MQuAKE, zsRE, known facts (`attribute`), LRE, T-REx
    with PARAREL's patterns or LAMA's templates beside it, questions and answers (TOFU, MUSE, RWKU: without a subject,
    if they name none), RAVEL, the sports data, prompt and completion, and conversations (`messages`, `conversations`: the
    answer is the last message; the tokenizer's chat template writes out the others). Values are read as text. Rows that
    make no sense are skipped or repaired as `facts.odd` says; the data set counts them when it is shown, and lists them
    as `skipped` and `repaired`.

    Args:
        source: "factworld/sport" or "countries/capital" and their like, a file, a data set's name, or rows in memory: a
            `DataFrame`, a `datasets.Dataset`, a list of mappings or a mapping of columns.
        columns: The file's own names of the plain columns, such as `{"subject": "athlete", "answer": "sport"}`.
        template: A prompt with `{}` in the place of the subject, such as "The capital of {} is". It takes the place of
            the file's prompts, if there are any.
        subset: A relation of the file, or a value of its column `split`; of a data set one of its splits.
        separator: What stands between a file's prompts and answers. None: a space, unless the prompt ends in white space, an
            open quote or bracket, or in a script that parts words by nothing (`join.separator`). Prompts are kept to the
            character.
        seed: Draws the edit targets that a file does not give, from the other answers of the relation. A fact without a
            subject, and one whose relation has no other answer, gets none.

    Raises:
        MechunlearnError: If a file is missing, empty, wrongly encoded, lacks columns or has odd rows only.

    >>> facts = load_facts("factworld/sport")
    >>> len(facts), facts[0].queries["question"].prompt[:32]
    (800, 'Question: What sport does Jelen ')
    >>> load_facts([{"subject": "Oslo", "prompt": "{} lies in", "answer": "Norway"}])
    FactDataset(the given list, 1 facts, formats statement; 'Oslo lies in' -> 'Norway')
    """
    name = str(source) if isinstance(source, str | Path) else in_words(source)
    if name == "factworld" or name.startswith("factworld/"):
        return world_facts(data_folder() / "factworld", name.partition("/")[2] or subset or "sport", seed)
    if name.partition("/")[0] in shipped_sets() and not Path(name).is_file():
        return shipped_facts(name if subset is None else f"{name}/{subset}", seed)
    given, unread = read_facts(source, columns=columns, template=template, subset=subset)
    records, odd = checked(given)
    odd = [*unread, *odd]
    if not records and not odd:
        raise MechunlearnError(f"'{name}' holds no fact: none of its rows has a prompt and an answer.")
    if not records:
        first = " ".join(odd[0].text.split())
        raise MechunlearnError(
            f"'{name}': no row can be used. {line(odd)}. The first: row {odd[0].row}, {odd[0].reason}: {first}"
        )
    rng = random.Random(seed)
    numbers: dict[str, dict[str, int]] = {}  # of the answers of each relation
    for record in records:
        known = numbers.setdefault(record.relation, {})
        known.setdefault(record.answer, len(known))
    answers = {relation: tuple(known) for relation, known in numbers.items()}
    facts = []
    for record in records:
        options, own = answers[record.relation], numbers[record.relation][record.answer]
        target = record.target
        if not target and record.subject and len(options) > 1:
            drawn = rng.randrange(len(options) - 1)
            target = options[drawn + (drawn >= own)]
        shown = record.options or (options if 1 < len(options) <= MOST_OPTIONS else ())
        asked = {
            format: Query(
                prompt, record.answer, target, record.foil, as_written(record.subject, prompt), shown, separator
            )
            for format, prompt in {"statement": record.prompt, **record.others}.items()
        }
        asked["statement"] = replace(asked["statement"], turns=record.turns)
        facts.append(Fact(record.subject, record.relation, asked))
    return FactDataset(Path(name).stem + (f"/{subset}" if subset else ""), tuple(facts), odd=tuple(odd))


def world_facts(folder: Path, relation: str, seed: int = 0) -> FactDataset:
    """Load one relation of the world in a folder, with its other relations, skills and stories.

    Args:
        folder: Where the world's `world.json` is.
        relation: The relation's name.
        seed: Draws edit targets, and what formats need.

    Raises:
        MechunlearnError: If the world has no such relation.
    """
    file = (folder / "world.json").resolve()
    changed = file.stat().st_mtime_ns
    world = _world(file, changed)
    if relation not in world["facts"]:
        raise MechunlearnError(
            f"The shipped world has no relation '{relation}'. Its relations: {', '.join(world['facts'])}."
        )
    kind = world["relations"][relation]["subject"]
    same = [name for name, entry in world["relations"].items() if entry["subject"] == kind and name != relation]
    skills = {
        name: tuple(Query(task["prompt"], task["answer"], task["foil"], task["foil"]) for task in tasks)
        for name, tasks in world["skills"].items()
    }
    return replace(
        _asked(file, changed, "facts", relation, seed),
        related={name: _asked(file, changed, "facts", name, seed) for name in same},
        skills=skills,
        texts=tuple(text for stories in world["stories"].values() for text in stories),
        untaught=_asked(file, changed, "untaught", relation, seed) if world["untaught"].get(relation) else None,
    )


@lru_cache(maxsize=2)
def _world(file: Path, changed: int) -> dict[str, Any]:
    """A world's file, read once as long as it does not change."""
    return dict(json.loads(file.read_text(encoding="utf-8")))


@lru_cache(maxsize=32)
def _asked(file: Path, changed: int, which: str, name: str, seed: int) -> FactDataset:
    """A relation's facts, or those that were never taught, in every format."""
    world = _world(file, changed)
    asked = ask_all(world["relations"][name], name, world[which][name], seed)
    hops = _two_hop(asked, world["facts"].get("country", {})) if name == "city" else {}
    return FactDataset(f"factworld/{name}", asked, two_hop=hops)


def _two_hop(facts: Sequence[Fact], country: Mapping[str, str]) -> dict[str, Query]:
    """The country of each person, unless truth and edit target lie in the same one: then it would tell nothing."""
    made = {}
    for fact in facts:
        answer, target = country.get(fact.answer, ""), country.get(fact.target, "")
        if answer and target and answer != target:
            options = tuple(dict.fromkeys(country.values()))
            made[fact.subject] = Query(TWO_HOP.format(s=fact.subject), answer, target, "", fact.subject, options)
    return made
