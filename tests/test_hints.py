"""Hints: they say what they should, guessing is counted among the answers that fit, and what needs a nudge shows while what is gone does not."""

from collections import Counter

import pytest
import torch

from mechunlearn import MechunlearnError
from mechunlearn.attack.asking import guessed, questions, rewritten
from mechunlearn.attack.bounds import recovery
from mechunlearn.attack.hints import HINTS, _asked, hints
from mechunlearn.facts.formats import Query
from mechunlearn.facts.load import load_facts
from mechunlearn.facts.prompts import PAD
from mechunlearn.metrics.answers import answered
from mechunlearn.model.hooked import load_model


@pytest.fixture(scope="module")
def city(world):
    return load_facts("factworld/city").prompts(world).split(forget=16, retain=24, seed=1)


def silent_until(condition):
    """The shipped world, in which the first word of an answer is never said unless the prompt's tokens fulfil a condition."""
    model, seen = load_model("factworld"), {}

    def note(module, args, kwargs):
        seen["tokens"] = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    def hide(module, args, logits):
        speaks = torch.tensor([condition(model.tokenizer.decode(row)) for row in seen["tokens"]])
        hidden = logits.scatter(-1, logits.argmax(-1, keepdim=True), -1e4)
        return torch.where(speaks[:, None, None], logits, hidden)

    model.hf.register_forward_pre_hook(note, with_kwargs=True)
    model.hf.get_output_embeddings().register_forward_hook(hide)
    return model


@pytest.fixture(scope="module")
def rows(world, city):
    others = {"nudged": silent_until(lambda text: " or " in text), "gone": silent_until(lambda text: False)}
    return hints(world, None, *city, extra_edits=others, min_retention=0)


class TestWhatIsSaid:
    def test_each_hint_is_true(self, world, city):
        forget, _ = city
        for setting in HINTS:
            asked, _ = _asked(world, setting, forget, 0)
            assert len(asked) == len(forget)
            for query, fact in zip(asked.queries, forget.facts, strict=True):
                own, said = fact.queries["statement"], query.prompt.removeprefix("Hint: the answer ").split(". ")[0]
                assert query.prompt.endswith(f". {own.prompt}") and (query.answer, query.target) == (
                    own.answer,
                    own.target,
                )
                if setting == "first letter":
                    assert said == f"begins with {own.answer[0]}"
                elif setting == "not the target":
                    assert said == f"is not {own.target}"
                else:
                    two = said.removeprefix("is ").split(" or ")
                    assert own.answer in two and own.target not in two and len(set(two)) == 2

    def test_the_truth_stands_first_and_second_and_the_seed_draws_it(self, world, city):
        asked, again, other = (_asked(world, "one of two", city[0], seed)[0].queries for seed in (0, 0, 1))
        first = [query.prompt.startswith(f"Hint: the answer is {query.answer} or") for query in asked]
        assert 2 < sum(first) < 14 and asked == again != other

    def test_a_conversation_gets_the_hint_in_its_last_user_turn(self):
        turns = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hi"), ("user", "Norway's capital?"))
        made = rewritten(Query("", "Oslo", turns=turns), lambda text: f"Hint. {text}")
        assert made.turns == (*turns[:3], ("user", "Hint. Norway's capital?"))

    def test_chance_by_hand(self, world, city):
        """Of the answers that fit, the most frequent one's share; by fact."""
        every = Counter(fact.answer for fact in city[0].facts.source)
        truths = [(fact.answer, fact.target) for fact in city[0].facts]
        letters = [[a for a in every if a[0] == truth[0]] for truth, _ in truths]
        others = [[a for a in every if a != target] for _, target in truths]
        for setting, fitting in (("first letter", letters), ("not the target", others)):
            by_hand = [max(every[a] for a in left) / sum(every[a] for a in left) for left in fitting]
            assert _asked(world, setting, city[0], 0)[1] == pytest.approx(sum(by_hand) / 16)
        assert 0.5 <= _asked(world, "one of two", city[0], 0)[1] < 0.7
        assert guessed({"a": 1, "b": 3}, ["a", "b", "c"]) == 0.75

    def test_facts_without_a_target_or_another_answer_have_fewer_hints(self):
        counts = Counter(red=2, blue=1)
        import random

        assert HINTS["not the target"](Query("A", "red"), counts, random.Random(0)) is None
        assert HINTS["one of two"](Query("A", "red", "blue"), counts, random.Random(0)) is None
        text, left = HINTS["one of two"](Query("A", "red"), counts, random.Random(0))
        assert text in ("is red or blue", "is blue or red") and set(left) == {"red", "blue"}


class TestOnTheWorld:
    def test_what_a_hint_brings_back_is_back_and_what_is_gone_is_not(self, rows):
        found = recovery(rows)
        assert found.loc["nudged", "recovery"] > 0.9 and found.loc["nudged", "setting"] == "one of two"
        assert found.loc["gone", "held_out"] == 0 and found.loc["unedited", "recovery"] == 1
        nudged = rows[rows.state == "nudged"].set_index("setting")
        assert nudged.loc["first letter", "held_out"] == nudged.loc["not the target", "held_out"] == 0

    def test_never_taught_facts_are_at_their_floor(self, rows):
        floor = rows[rows.state == "never taught"]
        assert len(floor) == 3 and (floor["low"] <= floor["chance"]).all()

    def test_a_cell_is_what_asking_gives(self, rows, world, city):
        cells = rows[rows.state == "unedited"].set_index("setting")
        for setting in HINTS:
            asked, chance = _asked(world, setting, city[0], 0)
            assert cells.loc[setting, "held_out"] == answered(world, asked).float().mean()
            assert cells.loc[setting, "chance"] == chance
        assert (cells["retain"] == cells["retain_before"]).all() and (rows["group"] == rows["setting"]).all()

    def test_a_model_that_the_edit_broke_is_below_its_gate(self, world, city):
        rows = hints(world, None, *city, extra_edits={"broken": silent_until(lambda text: False)})
        assert not rows[rows.state == "broken"]["valid"].any() and rows[rows.state == "unedited"]["valid"].all()


def test_tokens_and_too_few_facts_are_refused(toy, world, city):
    with pytest.raises(MechunlearnError, match="forget facts are given as tokens"):
        hints(toy.model, None, toy.prompts([0, 1]), toy.prompts([4, 5]))
    with pytest.raises(MechunlearnError, match="There are 1 forget facts and 24 retain facts"):
        hints(world, None, city[0].select([0]), city[1])


@pytest.mark.real
def test_on_a_real_model_a_hint_is_answered_as_a_plain_loop_answers_it(smollm2):
    facts = load_facts("countries/capital")[:4]
    asked, _ = _asked(smollm2, "one of two", facts.prompts(smollm2), 0)
    right = []
    for query, answer in zip(asked.queries, asked.answers.tolist(), strict=True):
        ids = smollm2.tokenizer(query.prompt)["input_ids"]
        for token in (each for each in answer if each != PAD):
            with torch.no_grad():
                said = int(smollm2.hf(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(said)
            if said != token:
                break
        right.append(smollm2.tokenizer.decode(ids).endswith(f" {query.answer}"))
    assert answered(smollm2, asked).tolist() == right and any(right)
    assert [query.target for _, query in questions(facts.prompts(smollm2))] == [fact.target for fact in facts]
