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
from mechunlearn.facts.formats import MOST_OPTIONS, Fact, Query, ask_all
from mechunlearn.facts.prompts import FactDataset
from mechunlearn.facts.readers import read_facts
from mechunlearn.facts.shipped import shipped_facts, shipped_sets

TWO_HOP = "{s} lives in the country of"


def load_facts(source: str | Path, *, seed: int = 0) -> FactDataset:
    """Load a relation of the shipped world, a shipped set of real facts, a file, or a data set known to `datasets`.

    Shipped sets of real facts: `shipped_sets()` names them and their relations. "countries/capital" is one relation of
    a set, with the others of the same subjects in `related`; "countries" is all of its relations in one data set.

    Files: CSV, JSON, JSONL or parquet with the columns of the sports data (`athlete`, `sport`, `prompt`), CounterFact
    (nested or flattened), zsRE (`subject`, `src`, `answers`), or plain `subject`, `prompt`, `answer` and perhaps
    `target`, `foil`, `relation`.

    Args:
        source: "factworld/sport" or "countries/capital" and their like, a file, or a data set's name.
        seed: Draws the edit targets that a file does not give, from the other answers of the relation.

    Raises:
        MechunlearnError: If a file is missing, empty, wrongly encoded or lacks columns.

    >>> facts = load_facts("factworld/sport")
    >>> len(facts), facts[0].queries["question"].prompt[:32]
    (800, 'Question: What sport does Jelen ')
    """
    name = str(source)
    if name == "factworld" or name.startswith("factworld/"):
        return world_facts(data_folder() / "factworld", name.partition("/")[2] or "sport", seed)
    if name.partition("/")[0] in shipped_sets():
        return shipped_facts(name, seed)
    records = read_facts(source)
    rng = random.Random(seed)
    answers: dict[str, list[str]] = {}
    for record in records:
        known = answers.setdefault(record.relation, [])
        if record.answer not in known:
            known.append(record.answer)
    facts = []
    for record in records:
        options = answers[record.relation]
        others = [answer for answer in options if answer != record.answer]
        target = record.target or (rng.choice(others) if others else "")
        if not target:
            raise MechunlearnError(
                f"'{name}': every fact of relation '{record.relation}' has the answer '{record.answer}', so no wrong "
                "answer can be drawn. Add a 'target' column, or facts with other answers."
            )
        shown = tuple(options) if 1 < len(options) <= MOST_OPTIONS else ()
        asked = {
            format: Query(prompt, record.answer, target, record.foil, record.subject, shown)
            for format, prompt in {"statement": record.prompt, **record.others}.items()
        }
        facts.append(Fact(record.subject, record.relation, asked))
    return FactDataset(Path(name).stem, tuple(facts))


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
