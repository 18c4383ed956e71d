"""Real facts that come with the package: what common language models know, in the formats of the shipped world."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from mechunlearn.core.files import data_folder
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.formats import Query, ask_all

SKILLS = "skills"


@lru_cache(maxsize=1)
def shipped_sets() -> dict[str, tuple[str, ...]]:
    """Return the relations of each shipped set of real facts, by the set's name.

    >>> shipped_sets()["elements"]
    ('symbol', 'number')
    """
    files = sorted((data_folder() / "facts").glob("*.json"))
    return {file.stem: tuple(_contents(file.stem)["facts"]) for file in files if file.stem != SKILLS}


def shipped_facts(name: str, seed: int = 0) -> FactDataset:
    """Load real facts that come with the package.

    Args:
        name: A relation of a set ("countries/capital"), whose other relations of the same subjects come with it in
            `related`; or a set ("countries"): all its relations in one data set, and none in `related`.
        seed: Draws the edit targets from the other answers of the relation, and what the formats need.

    Returns:
        The facts with their `skills`, and of one relation in which no two subjects share an answer, such as capitals,
        the questions the other way round (`reverse`). They bring no ordinary texts: a model's own samples do better.

    Raises:
        MechunlearnError: If there is no such set or relation.

    >>> capitals = shipped_facts("countries/capital")
    >>> capitals.facts[0].subject, capitals.facts[0].answer, "language" in capitals.related
    ('Afghanistan', 'Kabul', True)
    """
    whole, _, relation = name.partition("/")
    sets = shipped_sets()
    if whole not in sets:
        raise MechunlearnError(f"No set of facts is called '{whole}'. Shipped sets: {', '.join(sets)}.")
    if relation and relation not in sets[whole]:
        raise MechunlearnError(
            f"The shipped facts '{whole}' have no relation '{relation}'. Relations: {', '.join(sets[whole])}."
        )
    if not relation:
        facts = tuple(fact for each in sets[whole] for fact in _asked(whole, each, seed))
        return FactDataset(whole, facts, skills=_skills())
    frames = _contents(whole)["relations"]
    kind = frames[relation]["subject"]
    same = [other for other in sets[whole] if other != relation and frames[other]["subject"] == kind]
    related = {other: _asked(whole, other, seed) for other in same}
    return replace(_asked(whole, relation, seed), related=related, skills=_skills())


@lru_cache(maxsize=32)
def _asked(whole: str, relation: str, seed: int) -> FactDataset:
    """One relation's facts in every format."""
    contents = _contents(whole)
    facts: Mapping[str, str] = contents["facts"][relation]
    frames = contents["relations"][relation] | {"answers": tuple(dict.fromkeys(facts.values()))}
    frame = frames.get("reverse")
    turned = {s: Query(frame.format(a=a), s, "", "", a) for s, a in facts.items()} if frame else {}
    return FactDataset(f"{whole}/{relation}", ask_all(frames, relation, facts, seed), reverse=turned)


@lru_cache(maxsize=1)
def _skills() -> Mapping[str, Sequence[Query]]:
    """Tasks that need none of the facts."""
    tasks = _contents(SKILLS)
    return {
        name: tuple(Query(task["prompt"], task["answer"], task["foil"], task["foil"]) for task in tasks[name])
        for name in tasks
    }


@lru_cache(maxsize=16)
def _contents(name: str) -> dict[str, Any]:
    return dict(json.loads((data_folder() / "facts" / f"{name}.json").read_text(encoding="utf-8")))
