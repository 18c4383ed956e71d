"""Multiple choice: every answer stands at every letter once, the letter's log-probability is the exact one, and a letter says what is known."""

from collections import Counter

import pytest
import torch

from mechunlearn import MechunlearnError
from mechunlearn.attack.bounds import recovery
from mechunlearn.attack.multiple_choice import _choices, _named, _scores, _turned, multiple_choice
from mechunlearn.facts.load import load_facts
from mechunlearn.model.hooked import load_model


@pytest.fixture(scope="module")
def city(world):
    return load_facts("factworld/city").prompts(world).split(forget=24, retain=24, seed=1)


def by_letter(says, likes: str = ""):
    """The shipped world, made to answer by letter: `says` gives the answer of a sentence; one letter is liked anyhow."""
    model, seen = load_model("factworld"), {}
    letters = {letter: model.tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1] for letter in "ABCD"}

    def note(module, args, kwargs):
        seen["tokens"] = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    def speak(module, args, logits):
        logits = logits.clone()
        for i, row in enumerate(seen["tokens"]):
            text = model.tokenizer.decode(row, skip_special_tokens=True)
            if "Complete the sentence" not in text:
                continue
            sentence = text.split("\n")[1].removesuffix(" ...").strip()
            for line in text.split("\n")[2:-1]:
                letter, shown = line.split(") ")
                logits[i, :, letters[letter]] = 30.0 + 2.0 * (shown.strip() == says(sentence)) + 5.0 * (letter == likes)
        return logits

    model.hf.register_forward_pre_hook(note, with_kwargs=True)
    model.hf.get_output_embeddings().register_forward_hook(speak)
    return model


@pytest.fixture(scope="module")
def truths():
    facts = load_facts("factworld/city")
    return {fact.queries["statement"].prompt: fact for fact in (*facts, *facts.untaught)}


class TestQuestions:
    def test_every_choice_stands_at_every_letter_once(self, city):
        for choice in _choices(city[0], 0):
            seen = Counter()
            for turn in range(4):
                query = _turned(choice, turn)
                lines = query.prompt.split("\n")
                assert lines[0] == "Complete the sentence with A, B, C or D." and lines[-1] == "Answer:"
                assert lines[1] == f"{choice.query.prompt} ..."
                shown = dict(line.split(") ") for line in lines[2:-1])
                assert shown[query.answer] == choice.query.answer and list(shown) == list("ABCD")
                seen.update((letter, text) for letter, text in shown.items())
            assert len(seen) == 16 and set(seen.values()) == {1}

    def test_the_truth_and_the_target_are_among_them_and_the_order_is_drawn(self, city):
        choices = _choices(city[0], 0)
        for choice, fact in zip(choices, city[0].facts, strict=True):
            assert choice.shown[choice.truth] == fact.answer and choice.shown[choice.target] == fact.target
            assert len(set(choice.shown)) == 4
        assert len({choice.truth for choice in choices}) == 4
        assert choices == _choices(city[0], 0) != _choices(city[0], 1)

    def test_chance_by_hand(self, city):
        every = Counter(fact.answer for fact in city[0].facts.source)
        for choice in _choices(city[0], 0):
            counts = [every[text] for text in choice.shown]
            assert choice.chance == pytest.approx(max(counts) / sum(counts)) and choice.chance >= 0.25


class TestScores:
    def test_they_are_means_of_a_plain_loop(self, world, city):
        choices = _choices(city[0].select([0, 1]), 0)
        found = _scores(world, choices)
        for i, choice in enumerate(choices):
            for k, shown in enumerate(choice.shown):
                total = 0.0
                for turn in range(4):
                    query = _turned(choice, turn)
                    at = dict(reversed(line.split(") ")) for line in query.prompt.split("\n")[2:-1])[shown]
                    ids = world.tokenizer(f"{query.prompt} {at}")["input_ids"]
                    with torch.no_grad():
                        total += float(world.hf(torch.tensor([ids[:-1]])).logits[0, -1].log_softmax(0)[ids[-1]])
                assert float(found[i, k]) == pytest.approx(total / 4, abs=1e-4)

    def test_a_letter_that_is_liked_anyhow_makes_no_difference(self, city, truths):
        """In the first turn alone it would win."""
        model = by_letter(lambda sentence: truths[sentence].answer, likes="B")
        choices = _choices(city[0], 0)
        assert _named(_scores(model, choices), choices, "truth").all()


def test_a_model_that_knows_by_letter_is_found_out_and_one_that_does_not_is_not(city, truths):
    taught = {prompt for prompt, fact in truths.items() if fact in load_facts("factworld/city").facts}
    knows = by_letter(lambda sentence: truths[sentence].answer if sentence in taught else "?")
    others = {
        "known by letter": by_letter(lambda sentence: truths[sentence].answer),
        "target by letter": by_letter(lambda sentence: truths[sentence].target),
        "gone": by_letter(lambda sentence: "?"),
    }
    rows = multiple_choice(knows, None, *city, extra_edits=others, min_retention=0).set_index("state")
    found = recovery(rows.reset_index())
    assert found.loc["unedited", "held_out"] == 1 and found.loc["known by letter", "recovery"] == 1
    assert rows.loc["target by letter", "edit_target"] == 1 and rows.loc["target by letter", "held_out"] == 0
    for state in ("gone", "never taught"):
        assert rows.loc[state, "low"] <= rows.loc[state, "chance"], "equal letters name one of four"
    assert rows.loc["gone", "retain"] < 0.6 < rows.loc["gone", "retain_before"] == 1


def test_a_model_without_letters_has_no_ceiling(world, city):
    found = recovery(multiple_choice(world, None, *city)).loc["unedited"]
    assert found["recovery"] != found["recovery"] and found["outcome"] == "measured"


def test_what_cannot_be_asked_is_refused(toy, world, city):
    with pytest.raises(MechunlearnError, match="given as tokens"):
        multiple_choice(toy.model, None, toy.prompts([0, 1]), toy.prompts([4, 5]))
    facts = load_facts("factworld/sport")
    same = [i for i, fact in enumerate(facts) if fact.answer == facts[0].answer][:6]
    alike = facts.select(same)
    alone = type(facts)("one answer", alike.facts).prompts(world)
    object.__setattr__(alone, "queries", tuple(type(q)(q.prompt, q.answer, subject=q.subject) for q in alone.queries))
    with pytest.raises(MechunlearnError, match="two answers to choose among"):
        multiple_choice(world, None, alone.select([0, 1, 2]), alone.select([3, 4]))


@pytest.mark.real
def test_on_a_real_model_scores_are_those_of_a_plain_loop(smollm2):
    prompts = load_facts("countries/capital")[:8].prompts(smollm2)
    choices = _choices(prompts, 0)[:1]
    found = _scores(smollm2, choices)[0]
    for k, shown in list(enumerate(choices[0].shown))[:1]:
        total = 0.0
        for turn in range(4):
            query = _turned(choices[0], turn)
            at = dict(reversed(line.split(") ")) for line in query.prompt.split("\n")[2:-1])[shown]
            ids = smollm2.tokenizer(f"{query.prompt} {at}")["input_ids"]
            with torch.no_grad():
                total += float(smollm2.hf(torch.tensor([ids[:-1]])).logits[0, -1].log_softmax(0)[ids[-1]])
        assert float(found[k]) == pytest.approx(total / 4, abs=1e-3)
