"""Sampling: the probability is the exact one, a truth just below the target is found, one that is gone is not, and more tries guess more."""

import json

import pandas as pd
import pytest
import torch

from mechunlearn import MechunlearnError
from mechunlearn.attack.bounds import recovery
from mechunlearn.attack.sampling import _found, _probability, sampling
from mechunlearn.attack.states import chance
from mechunlearn.facts.load import load_facts
from mechunlearn.facts.prompts import PAD
from mechunlearn.model.hooked import load_model
from tests.test_quantization import removing


def below_the_runner_up(module, args, logits):
    """The runner-up is said, and the word that the model would say stands half a nat below it."""
    top, at = logits.topk(2, dim=-1)
    return logits.scatter(-1, at, torch.cat([top[..., :1] - 0.5, top[..., :1]], -1))


def impossible(module, args, logits):
    """The word that the model would say is never said."""
    return logits.scatter(-1, logits.argmax(-1, keepdim=True), -1e4)


def speaking(hook):
    """The shipped world with a hook on its logits: what is known is planted."""
    model = load_model("factworld")
    model.hf.get_output_embeddings().register_forward_hook(hook)
    return model


def by_hand(model, prompts, temperature: float) -> list[float]:
    """A plain loop over facts and tokens of the answer."""
    found = []
    for tokens, start, answer in zip(prompts.tokens, prompts.start.tolist(), prompts.answers.tolist(), strict=True):
        ids, p = tokens[: start + 1].tolist(), 1.0
        for token in (each for each in answer if each != PAD):
            with torch.no_grad():
                logits = model.hf(torch.tensor([ids])).logits[0, -1].double()
            p *= float((logits / temperature).softmax(0)[token])
            ids.append(token)
        found.append(p)
    return found


@pytest.fixture(scope="module")
def city(world):
    return load_facts("factworld/city").prompts(world).split(forget=40, retain=24, seed=1)


@pytest.fixture(scope="module")
def rows(world, city):
    others = {"lowered": speaking(below_the_runner_up), "removed": speaking(impossible)}
    return sampling(world, None, *city, extra_edits=others, tries=[1, 5], min_retention=0)


class TestProbability:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_it_is_what_a_plain_loop_gives(self, world, temperature):
        prompts = load_facts("factworld/city")[:12].prompts(world)
        found = _probability(world, prompts, temperature)
        assert found.tolist() == pytest.approx(by_hand(world, prompts, temperature), rel=1e-4)

    def test_samples_find_the_truth_as_often(self):
        """4,000 times three samples, drawn from the model's own distribution."""
        model = speaking(below_the_runner_up)
        prompts = load_facts("factworld/sport")[:1].prompts(model)
        assert (prompts.answers != PAD).sum() == 1
        expected = float(_found(_probability(model, prompts, 1.5), 3)[0])
        with torch.no_grad():
            p = (model.hf(prompts.tokens).logits[0, int(prompts.start[0])] / 1.5).softmax(0)
        drawn = p.multinomial(12_000, replacement=True, generator=torch.Generator().manual_seed(0)).view(4_000, 3)
        share = float((drawn == prompts.answers[0, 0]).any(1).float().mean())
        assert 0.3 < expected < 0.9 and share == pytest.approx(expected, abs=0.03)

    def test_many_tries_of_a_rare_word_are_exact(self):
        found = _found(torch.tensor([0.0, 1e-12, 0.25, 1.0], dtype=torch.float64), 100)
        assert found.tolist() == pytest.approx([0.0, 1e-10, 1 - 0.75**100, 1.0], rel=1e-9)


class TestOnTheWorld:
    def test_a_truth_just_below_another_word_comes_back_and_an_impossible_one_does_not(self, rows):
        found = recovery(rows)
        assert found.loc["lowered", "recovery"] > 0.6 and found.loc["lowered", "setting"] == "best of 5"
        assert found.loc["removed", "held_out"] == 0
        assert found.loc["unedited", "recovery"] == 1 and found.loc["unedited", "held_out"] == 1

    def test_held_out_is_as_often_as_the_probability_says(self, rows, world, city):
        p = _probability(speaking(below_the_runner_up), city[0], 1.0)
        lowered = rows[rows.state == "lowered"].set_index("setting")
        assert lowered.loc["best of 1", "probability"] == pytest.approx(float(p.mean()))
        for n in (1, 5):
            expected = float((1 - (1 - p) ** n).mean())
            assert lowered.loc[f"best of {n}", "held_out"] == pytest.approx(expected, abs=0.2)
        assert lowered.loc["best of 1", "held_out"] < lowered.loc["best of 5", "held_out"]

    def test_never_taught_facts_are_found_no_more_often_than_by_guessing(self, rows):
        floor = rows[rows.state == "never taught"]
        assert (floor["low"] <= floor["chance"]).all() and (floor["held_out"] < 0.5).all()

    def test_more_tries_guess_more(self, rows, city):
        edited = rows[rows.state == "unedited"].set_index("setting")
        every = pd.Series([fact.answer for fact in city[0].facts.source]).value_counts(normalize=True)
        assert edited.loc["best of 1", "chance"] == pytest.approx(every.iloc[0])
        assert edited.loc["best of 5", "chance"] == pytest.approx(every.iloc[:5].sum())
        assert 1 - (1 - every.iloc[0]) ** 5 <= edited.loc["best of 5", "chance"]

    def test_tries_that_name_half_of_all_answers_are_left_out(self, world, city):
        found = sampling(world, None, *city, tries=[2, 1000])
        assert set(found["setting"]) == {"best of 2"}
        assert chance(city[0], 1000) == 1


class TestOnThePlantedModel:
    def test_what_is_gone_is_only_guessed(self, toy):
        forget, retain = toy.prompts(list(range(8))), toy.prompts(list(range(8, 24)))
        rows = sampling(toy.model, removing(toy), forget, retain).set_index("state")
        assert rows["setting"].tolist() == ["best of 1"] * 2, "two tries of four answers name half of them"
        assert rows.loc["edited", "probability"] < 0.1 and rows.loc["edited", "held_out"] <= 0.25
        assert rows["chance"].tolist() == [0.25] * 2

    def test_the_share_that_all_samples_are_the_target(self, toy):
        forget, retain = toy.prompts([0, 1, 2]), toy.prompts([4, 5])
        aim = torch.tensor(by_hand(toy.model, forget, 1.0)) ** 2
        swapped = type(forget)(**{**vars(forget), "answers": forget.targets, "targets": forget.answers})
        rows = sampling(toy.model, None, swapped, retain, tries=[2])
        assert rows["edit_target"].tolist() == pytest.approx([float(aim.mean())])

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"tries": []}, "The tries are .*Expected whole numbers"),
            ({"tries": [0, 2]}, "The tries are"),
            ({"temperature": 0.0}, "The temperature is 0.0. Expected a number above 0"),
        ],
    )
    def test_settings_out_of_range(self, toy, settings, message):
        with pytest.raises(MechunlearnError, match=message):
            sampling(toy.model, None, toy.prompts([0, 1]), toy.prompts([4, 5]), **settings)

    def test_the_rows_carry_a_run_card(self, toy):
        rows = sampling(toy.model, None, toy.prompts([0, 1]), toy.prompts([4, 5]), temperature=0.5)
        card = json.loads(json.dumps(rows.attrs["card"]))
        assert card["settings"] == {"tries": [1], "temperature": 0.5, "min_retention": 0.9}


@pytest.mark.real
def test_on_a_real_model_it_is_what_a_plain_loop_gives(smollm2):
    facts = load_facts("countries/capital")[:3]
    prompts = facts.prompts(smollm2)
    assert (prompts.answers != PAD).sum(1).max() > 1, "an answer of several tokens"
    assert _probability(smollm2, prompts, 1.0).tolist() == pytest.approx(by_hand(smollm2, prompts, 1.0), rel=1e-3)
