"""Membership: scores are those of a plain loop, the threshold holds its false alarms, what is left shows and what is gone does not."""

import sys
import zlib
from dataclasses import replace
from functools import partial

import pytest
import torch

from mechunlearn import MechunlearnError
from mechunlearn.attack.bounds import recovery
from mechunlearn.attack.membership_inference import _scores, _strangers, membership_inference
from mechunlearn.facts.load import load_facts
from mechunlearn.facts.prompts import PAD
from mechunlearn.metrics.membership import auc
from tests.test_sampling import below_the_runner_up, impossible, speaking


@pytest.fixture(scope="module")
def city(world):
    """With a hundred people whom nobody was taught, so that it is quick."""
    facts = load_facts("factworld/city")
    facts = replace(facts, untaught=facts.untaught.select(range(104)))
    return facts.prompts(world).split(forget=16, retain=24, seed=1)


@pytest.fixture(scope="module")
def rows(world, city):
    others = {"lowered": speaking(below_the_runner_up), "gone": speaking(impossible)}
    return membership_inference(world, None, *city, extra_edits=others, min_retention=0)


def token_logprobs(model, prompt: str, answer: str) -> list[float]:
    """Of each token of an answer, by a plain loop."""
    ids, found = model.tokenizer(prompt)["input_ids"], []
    for token in model.tokenizer(f"{prompt} {answer}")["input_ids"][len(ids) :]:
        with torch.no_grad():
            found.append(float(model.hf(torch.tensor([ids])).logits[0, -1].log_softmax(0)[token]))
        ids = [*ids, token]
    return found


def scores_by_hand(model, fact, references) -> dict[str, float]:
    truth = token_logprobs(model, fact.queries["statement"].prompt, fact.answer)
    elsewhere = [token_logprobs(model, other.queries["statement"].prompt, fact.answer) for other in references]
    level = sum(truth) / len(truth)
    return {
        "loss": level,
        "min-k": min(truth),  # of fewer than ten tokens a fifth is one
        "zlib": level / len(zlib.compress(fact.answer.encode())),
        "reference": level - sum(sum(each) / len(each) for each in elsewhere) / len(elsewhere),
    }


def test_scores_are_those_of_a_plain_loop(world, city):
    forget, references = city[0].select([0, 1, 2]), _strangers(world, city[0], 0)[0]
    found = _scores(world, forget, references)
    for i, fact in enumerate(forget.facts):
        by_hand = scores_by_hand(world, fact, references.facts)
        assert {name: float(found[name][i]) for name in found} == pytest.approx(by_hand, abs=1e-3)


def test_the_least_likely_fifth_of_a_long_truth(world, city, monkeypatch):
    said = torch.tensor([[-1.0, -9.0, *[-2.0] * 7, -8.0], [-3.0, *[torch.nan] * 9]])
    module = sys.modules["mechunlearn.attack.membership_inference"]
    monkeypatch.setattr(module, "answer_logprobs", lambda model, prompts: said)
    monkeypatch.setattr(module, "_elsewhere", lambda *given: torch.zeros(2))
    found = _scores(world, city[0].select([0, 1]), city[0])
    assert found["min-k"].tolist() == [-8.5, -3.0] and found["loss"].tolist() == pytest.approx([-3.2, -3.0])


class TestStrangers:
    def test_they_are_apart_and_of_the_facts_relations(self, world, city):
        parts = _strangers(world, city[0], 0)
        names = [part.facts.subjects for part in parts]
        assert [len(part) for part in parts] == [4, 50, 50] and len(frozenset.union(*names)) == 104
        again, other = _strangers(world, city[0], 0), _strangers(world, city[0], 1)
        assert again[1].facts.subjects == names[1] != other[1].facts.subjects

    def test_data_without_them_say_so(self, world, city, toy):
        none = replace(city[0], facts=replace(city[0].facts, untaught=None))
        few = replace(city[0], facts=replace(city[0].facts, untaught=city[0].facts.untaught.select(range(7))))
        with pytest.raises(MechunlearnError, match="0 facts that the model was never taught.*Expected at least 8"):
            membership_inference(world, None, none, city[1])
        with pytest.raises(MechunlearnError, match="7 facts that the model was never taught of the relation 'city'"):
            membership_inference(world, None, few, city[1])
        with pytest.raises(MechunlearnError, match="0 facts that the model was never taught"):
            membership_inference(toy.model, None, toy.prompts([0, 1]), toy.prompts([4, 5]))


class TestOnTheWorld:
    def test_a_truth_that_is_lowered_is_still_a_member_and_one_that_is_gone_is_not(self, rows):
        found = recovery(rows)
        assert found.loc["unedited", "held_out"] > 0.9 and found.loc["unedited", "recovery"] == 1
        assert found.loc["lowered", "recovery"] > 0.3
        gone = rows[rows.state == "gone"].set_index("setting")
        assert gone.loc["loss", "held_out"] == gone.loc["min-k", "held_out"] == 0 and gone.loc["loss", "auc"] < 0.3

    def test_never_taught_facts_are_called_members_as_seldom_as_the_threshold_says(self, rows):
        floor = rows[rows.state == "never taught"]
        assert (floor["chance"] == 2 / 51).all() and (floor["n"] == 50).all()
        assert (floor["low"] <= floor["chance"]).all() and (floor["auc"] - 0.5).abs().max() < 0.2

    def test_a_cell_by_hand(self, rows, world, city):
        references, outside, _ = _strangers(world, city[0], 0)
        inside, others = (_scores(world, part, references)["loss"].tolist() for part in (city[0], outside))
        line = sorted(others)[-2]  # 2 of 50: .05 of 51, rounded down
        cell = rows[(rows.state == "unedited") & (rows.setting == "loss")].iloc[0]
        assert cell["held_out"] == sum(score > line for score in inside) / 16
        pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in others]
        assert cell["auc"] == pytest.approx(sum(pairs) / len(pairs))


def test_equal_scores_count_half():
    assert auc(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])) == pytest.approx((0.5 + 0 + 1 + 0) / 4)


@pytest.mark.real
def test_on_a_real_model_scores_are_those_of_a_plain_loop(smollm2):
    facts = load_facts("countries/capital")
    data = replace(facts[:4], untaught=facts[20:32])
    prompts = data.prompts(smollm2)
    assert (prompts.answers != PAD).sum(1).max() > 1
    references = _strangers(smollm2, prompts, 0)[0]
    found = _scores(smollm2, prompts.select([0, 1]), references)
    for i, by_hand in enumerate(map(partial(scores_by_hand, smollm2, references=references.facts), data.facts[:1])):
        assert {name: float(found[name][i]) for name in found} == pytest.approx(by_hand, abs=2e-3)
