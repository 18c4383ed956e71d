"""Corrupt partners: the first row in a drawn order that can stand in, found without looking at every row."""

import itertools
import random

import pytest

from mechunlearn import MechunlearnError, load_facts
from mechunlearn.facts import pairs
from mechunlearn.facts.formats import Query
from mechunlearn.facts.join import Joiner

PLACES = ("Vika", "Lomi", "Zabe", "Tovi", "Kane", "Rudo", "Mito", "Bela")


def rows_of(count, answer, relation="capital", seed=0):
    rng = random.Random(seed)
    names = rng.sample(
        [f"{a} {b}" for a, b in itertools.product(PLACES, (f"{p}{q}" for p in PLACES for q in PLACES))], count
    )
    return [
        {"subject": name, "prompt": "The word of {} is", "answer": answer(i, rng), "relation": relation if isinstance(relation, str) else relation(i)}
        for i, name in enumerate(names)
    ]  # fmt: skip


KINDS = {
    "all the same": (lambda i, rng: "red", "capital"),
    "nearly all the same": (lambda i, rng: "blue" if i % 50 == 0 else "red", "capital"),
    "each its own": (lambda i, rng: f"word{i}", "capital"),
    "one begins the other": (lambda i, rng: rng.choice(("7", "7 9")), "capital"),
    "many relations": (lambda i, rng: rng.choice(("red", "blue")), lambda i: f"r{i // 4}"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_search_is_linear(kind, world, monkeypatch):
    """Twice the facts take about twice the steps, whatever the answers are."""
    answer, relation = KINDS[kind]
    steps = {"stand": 0, "join": 0}
    stand, join = pairs._Others._can_stand, Joiner.__call__

    def counted(self, *given):
        steps["stand"] += 1
        return stand(self, *given)

    def joined(self, *given):
        steps["join"] += 1
        return join(self, *given)

    monkeypatch.setattr(pairs._Others, "_can_stand", counted)
    monkeypatch.setattr(Joiner, "__call__", joined)
    found = []
    for count in (200, 400):
        steps.update(stand=0, join=0)
        load_facts(rows_of(count, answer, relation)).prompts(world)
        found.append(dict(steps))
    assert found[1]["stand"] <= 4 * max(found[0]["stand"], 100)
    assert found[1]["join"] <= found[0]["join"] + 4  # in batches, and never one for each pair of rows


def test_partners_agree_with_a_naive_search(world):
    """Same relation, another subject, another answer: none is missed, and none is random where one exists."""
    facts = load_facts(rows_of(120, lambda i, rng: rng.choice(("red", "blue", "green")), lambda i: f"r{i % 3}"))
    prompts = facts.prompts(world)

    def subject(tokens, i):
        return tuple(tokens[i, prompts.spans[i, 0] : prompts.spans[i, 1] + 1].tolist())

    alone = 0
    for i, fact in enumerate(facts):
        fitting = {
            subject(prompts.tokens, j): other.answer
            for j, other in enumerate(facts)
            if other.relation == fact.relation
            and other.answer != fact.answer
            and len(subject(prompts.tokens, j)) == len(subject(prompts.tokens, i))
        }
        alone += not fitting
        if fitting:
            assert prompts.queries[i].foil == fitting[subject(prompts.corrupt, i)]
    assert alone == prompts.random_corruptions < 20


def test_a_rare_answer_is_found_behind_many_that_fail(world):
    """One fact of 300 has another answer: it is everybody's partner."""
    facts = load_facts(rows_of(300, lambda i, rng: "blue" if i == 211 else "red"))
    prompts = facts.prompts(world)
    assert {query.foil for query in prompts.queries if query.answer == "red"} == {"blue"}
    assert prompts.random_corruptions == 0 or all(len(set(row.tolist())) for row in prompts.corrupt)


def test_a_given_foil_chooses_the_partner_that_says_it(world):
    rows = rows_of(60, lambda i, rng: f"word{i:02}")
    for i, row in enumerate(rows):
        row["foil"] = f"word{(i + 7) % 60:02}"
    facts = load_facts(rows)
    prompts = facts.prompts(world)
    names = [tuple(prompts.tokens[i, a : b + 1].tolist()) for i, (a, b) in enumerate(prompts.spans.tolist())]
    fitting = 0
    for i, query in enumerate(prompts.queries):
        a, b = prompts.spans[i].tolist()
        wanted = names[(i + 7) % 60]
        assert query.foil == f"word{(i + 7) % 60:02}"
        fitting += len(wanted) == len(names[i])
        assert len(wanted) != len(names[i]) or tuple(prompts.corrupt[i, a : b + 1].tolist()) == wanted
    assert fitting > 10


def test_one_subject_has_no_partner_but_a_foil(world):
    rows = [
        {"subject": "Vika", "prompt": f"In {year} Vika won in", "answer": f"word{year}"} for year in range(1900, 1960)
    ]
    prompts = load_facts(rows).prompts(world)
    assert prompts.random_corruptions == 60


def test_an_answer_that_begins_another_is_no_foil(world):
    queries = [
        Query("The word of Vika is", "red", subject="Vika"),
        Query("The word of Lomi is", "red sea", subject="Lomi"),
    ]
    rows = pairs.paired(queries, world.tokenizer, 0)
    assert [row.query.foil for row in rows] == ["", ""]


def test_a_split_shares_no_subject(world):
    rows = [
        {"subject": name, "prompt": f"The {what} of {{}} is", "answer": f"{what}{i}", "relation": what}
        for i, name in enumerate(PLACES)
        for what in ("word", "colour", "song")
    ]
    prompts = load_facts(rows).prompts(world)
    for seed in range(5):
        forget, retain = prompts.split(forget=4, seed=seed)
        assert not forget.facts.subjects & retain.facts.subjects
    with pytest.raises(
        MechunlearnError, match=r"Cannot retain 20 facts: \d+ about other subjects are left beside the 4"
    ):
        prompts.split(forget=4, retain=20)


def test_facts_without_subjects_can_be_split(world):
    rows = [{"question": f"What is {name}?", "answer": f"word {i}"} for i, name in enumerate(PLACES)]
    forget, retain = load_facts(rows).prompts(world).split(forget=3, retain=5)
    assert (len(forget), len(retain)) == (3, 5)
