"""Asking otherwise: every way is the same fact, what is hidden shows, what is gone does not, and options are read as options."""

import json
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

from mechunlearn import ComponentMask, MechunlearnError
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.attack.bounds import recovery
from mechunlearn.attack.prompting import _answered, _ways, prompting
from mechunlearn.core.runcard import RunCard
from mechunlearn.edit import masked_gradient
from mechunlearn.evaluation.drift import next_token_kl
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.formats import Fact, Query
from mechunlearn.facts.load import TWO_HOP, load_facts
from mechunlearn.metrics.answers import measure, option_logprobs
from mechunlearn.model.hooked import load_model
from mechunlearn.world import lexicon as lex
from mechunlearn.world.toy import planted_facts
from tests.models import random_hf

LOOK_UP = [f"L{layer}.mlp.{kind}" for layer in (1, 2) for kind in ("in", "gate", "out")]


def edited(model, sites, forget, retain, **settings):
    mask = ComponentMask.of(sites, model.signature)
    return masked_gradient(model, mask, forget, retain, batch_size=12, **{"lr": 2e-3} | settings)


def in_few_ways(prompts, *formats):
    """The same facts, known in some formats only: quicker to ask."""

    def fewer(facts):
        kept = [replace(fact, queries={name: fact.queries[name] for name in formats}) for fact in facts]
        return replace(facts, facts=tuple(kept), untaught=facts.untaught and fewer(facts.untaught))

    return replace(prompts, facts=fewer(prompts.facts))


def wrecked(model) -> WeightEdit:
    """The last block's MLP writes noise."""
    units = torch.arange(model.signature.d_mlp)
    rows = 5 * torch.randn(model.rows("L7.mlp.out").shape, generator=torch.Generator().manual_seed(0))
    return WeightEdit({"L7.mlp.out": units}, {"L7.mlp.out": rows}, model.signature, RunCard("wrecked"))


@pytest.fixture(scope="module")
def sport(sixteen):
    split = sixteen[0], sixteen[1].select(range(24))
    return [in_few_ways(part, "statement", "question", "one_shot", "held_out", "league", "yes_no") for part in split]


@pytest.fixture(scope="module")
def city(world):
    return load_facts("factworld/city").prompts(world).split(forget=12, retain=24, seed=1)


@pytest.fixture(scope="module")
def rows(world, sport, gone, hidden):
    return prompting(world, gone, *sport, extra_edits={"hidden": hidden, "wrecked": wrecked(world)})


@pytest.mark.training
class TestOnTheWorld:
    def test_what_is_hidden_shows_in_another_way_and_what_is_gone_does_not(self, rows):
        found = recovery(rows)
        assert found.loc["hidden", "recovery"] > 0.7
        assert found.loc["edited", "recovery"] < 0.2
        assert found.loc["unedited", "recovery"] == 1
        trained = rows[rows.setting == "statement"].set_index("state")
        assert trained.loc["edited", "held_out"] == 0 and trained.loc["edited", "edit_target"] == 1

    def test_a_wrecked_model_is_collapsed_and_not_robust(self, rows):
        found = recovery(rows).loc["wrecked"]
        assert found["outcome"] == "collapsed" and pd.isna(found["recovery"])
        assert not rows[rows.state == "wrecked"]["valid"].any()

    def test_never_taught_facts_are_at_their_floor_in_every_way(self, rows):
        floor = rows[rows.state == "never taught"]
        assert (floor["low"] <= floor["chance"]).all()
        assert len(floor) == len(rows[rows.state == "unedited"])

    def test_every_format_is_asked_each_with_its_own_chance(self, rows, sport):
        settings = rows[rows.state == "edited"].set_index("setting")
        formats = set(sport[0].facts.formats)
        assert set(settings.index) == formats | {"few-shot, 4", "statement, among options"}
        assert (rows["group"] == rows["setting"]).all() and (rows["n"] == 16).all() and rows["trained"].isna().all()
        every = sport[0].facts.source
        answers = pd.Series([fact.answer for fact in every]).value_counts(normalize=True)
        truths = pd.Series([fact.queries["yes_no"].answer for fact in every]).value_counts(normalize=True)
        assert settings.loc["statement", "chance"] == settings.loc["league", "chance"] == answers.max()
        assert settings.loc["yes_no", "chance"] == truths.max() >= 0.5

    def test_a_cell_is_what_measuring_gives(self, rows, world, sport, gone):
        cells = rows[rows.state == "edited"].set_index("setting")
        forget, retain = sport
        for setting in ("question", "yes_no"):
            with gone.applied(world):
                found = measure(world, forget.facts.prompts(world, setting))
                kept = measure(world, retain.facts.prompts(world, setting))
            assert cells.loc[setting, "held_out"] == found["accuracy"].mean()
            assert cells.loc[setting, "edit_target"] == found["target_accuracy"].mean()
            assert cells.loc[setting, "retain"] == kept["accuracy"].mean()

    def test_known_rows_stand_for_the_bounds(self, world, sport, gone, rows):
        again = prompting(world, gone, *sport, baseline_rows=rows)
        assert set(again["state"]) == {"edited", "unedited", "never taught"}
        own = rows[rows.state.isin(set(again["state"]))]
        pd.testing.assert_frame_equal(again, own.reset_index(drop=True)[list(again)])
        with pytest.raises(MechunlearnError, match="settings"):
            prompting(world, gone, *sport, baseline_rows=rows, shots=2)

    def test_the_rows_carry_a_run_card(self, rows, gone):
        card = json.loads(json.dumps(rows.attrs["card"]))
        assert (card["method"], card["mask"]) == ("prompting", gone.card.mask)
        assert card["settings"] == {"shots": 4, "min_retention": 0.9}


class TestFewShot:
    def test_examples_are_true_and_about_retained_subjects_alone(self, world, sport):
        forget, retain = sport
        both = retain.facts.source.about(retain.facts.subjects | {next(iter(forget.facts.subjects))}).prompts(world)
        truth = {fact.subject: fact.answer for fact in retain.facts}
        ask = _ways(forget, both, 3, 0)["few-shot, 3"]
        for prompts in (forget, retain):
            asked = ask(world, prompts)
            assert len(asked) == len(prompts)
            for entry, fact in zip(asked.queries, prompts.facts):
                *shown, last = entry.prompt.split(". ")
                assert last == fact.queries["statement"].prompt and entry.answer == fact.answer
                drawn = [line.split(" plays the sport of ") for line in shown]
                assert len({name for name, _ in drawn}) == 3 and fact.subject not in dict(drawn)
                assert all(truth[name] == answer for name, answer in drawn)
        again, other = (_ways(forget, both, 3, seed)["few-shot, 3"](world, forget) for seed in (0, 1))
        assert again.queries == ask(world, forget).queries != other.queries

    def test_examples_are_of_the_same_relation_and_facts_without_enough_are_left_out(self, world):
        facts = load_facts("factworld/sport")
        cities = load_facts("factworld/city").facts
        mixed = replace(facts, facts=(*facts.facts[:10], *cities[10:12]))
        forget = mixed.select([0, 1, 10, 11]).prompts(world)
        asked = _ways(forget, mixed.select([2, 3, 4, 5]).prompts(world), 4, 0)["few-shot, 4"](world, forget)
        assert [entry.subject for entry in asked.queries] == [fact.subject for fact in facts.facts[:2]]
        assert "city" not in " ".join(entry.prompt for entry in asked.queries)

    def test_none_if_none_are_wanted(self, sport):
        assert not any("few-shot" in name for name in _ways(*sport, 0, 0))


class TestTwoHop:
    def test_a_question_needs_the_city_and_its_country(self, world, city):
        forget, _ = city
        country = {fact.subject: fact.answer for fact in load_facts("factworld/country")}
        asked = _ways(*city, 0, 0)["two-hop"](world, forget)
        facts = {fact.subject: fact for fact in forget.facts}
        for entry in asked.queries:
            assert entry.prompt == f"{entry.subject} lives in the country of"
            assert entry.answer == country[facts[entry.subject].answer]
            assert entry.target == country[facts[entry.subject].target] != entry.answer
        left_out = facts.keys() - {entry.subject for entry in asked.queries}
        assert all(country[facts[name].answer] == country[facts[name].target] for name in left_out)
        assert measure(world, asked)["accuracy"].mean() > 0.9, "this world can answer it"
        assert lex.TWO_HOP["statement"] == TWO_HOP

    def test_other_relations_and_reports_know_nothing_of_it(self, sport, city):
        assert "two-hop" not in _ways(*sport, 4, 0) and sport[0].facts.two_hop == {}
        assert "two-hop" not in city[0].facts.formats
        assert city[0].facts.untaught.two_hop and len(load_facts("factworld/city").two_hop) > 700

    @pytest.mark.training
    def test_it_follows_the_edit_where_the_city_was_looked_up(self, world, city, seed):
        edit = edited(world, LOOK_UP, *city, steps=20, seed=seed)
        few = [in_few_ways(prompts, "statement") for prompts in city]
        found = prompting(world, edit, *few, shots=0).set_index(["state", "setting"])
        assert found.loc[("unedited", "two-hop"), "held_out"] == 1
        assert found.loc[("edited", "two-hop"), "held_out"] <= 0.2
        assert found.loc[("edited", "two-hop"), "edit_target"] >= 0.8
        assert found.loc[("edited", "two-hop"), "n"] <= 12


class TestOptions:
    def test_the_largest_of_the_options_counts_and_no_other_token(self, world, sport):
        """An edit to a word that is no option: greedy is always wrong, among the options the truth stays first."""
        forget = sport[0]
        asked = _ways(*sport, 0, 0)["statement, among options"](world, forget)
        loud = world.tokenizer(" river", add_special_tokens=False)["input_ids"][0]
        head = world.hf.get_output_embeddings()

        def shout(module, args, logits):
            logits = logits.clone()
            logits[..., loud] = 1e3
            return logits

        handle = head.register_forward_hook(shout)
        try:
            assert _answered(world, asked, "statement")[0].sum() == 0
            right, hit = _answered(world, asked, "statement, among options")
        finally:
            handle.remove()
        assert right.sum() == len(forget) and hit.sum() == 0

    def test_log_probabilities_of_options_by_hand(self, world):
        """Options of one and of several tokens, and not equally many."""
        queries = [
            Query("Anna Belton plays the sport of", "golf", "tennis", options=("golf", "tennis", "a purple basket")),
            Query("The sport of Marco Belton is", "hockey", "golf", options=("hockey", "golf")),
        ]
        names = ("Anna Belton", "Marco Belton")
        data = FactDataset("two", tuple(Fact(n, "sport", {"statement": q}) for n, q in zip(names, queries)))
        found = option_logprobs(world, data.prompts(world), batch_size=1)
        assert found.shape == (2, 3) and found[1, 2] == -torch.inf
        for i, query in enumerate(queries):
            for k, option in enumerate(query.options):
                prompt = world.tokenizer(query.prompt)["input_ids"]
                answer = world.tokenizer(" " + option, add_special_tokens=False)["input_ids"]
                logprobs = world.forward(torch.tensor([[*prompt, *answer]])).log_softmax(-1)[0]
                by_hand = sum(logprobs[len(prompt) - 1 + j, token] for j, token in enumerate(answer))
                assert found[i, k] == pytest.approx(float(by_hand), abs=1e-4)
        with pytest.raises(MechunlearnError, match="list no options"):
            option_logprobs(world, replace(data.prompts(world), options=((), ())))

    @pytest.mark.parametrize("count", [1, 27])
    def test_too_few_or_too_many_options_are_not_asked(self, world, sport, count):
        def with_options(fact):
            query = fact.queries["statement"]
            options = (query.answer, *[f"other {i}" for i in range(count - 1)])
            return replace(fact, queries={"statement": replace(query, options=options)})

        facts = replace(sport[0].facts, facts=tuple(map(with_options, sport[0].facts)))
        asked = facts.prompts(world)
        assert _ways(asked, sport[1], 0, 0)["statement, among options"](world, asked) is None

    def test_facts_with_a_multiple_choice_of_their_own_are_asked_that(self, sport):
        def with_choice(fact):
            choice = Query(f"Question: Which sport does {fact.subject} play? golf A, tennis B. Answer:", "A", "B")
            return replace(fact, queries={**fact.queries, "multiple_choice": choice})

        facts = replace(sport[0].facts, facts=tuple(map(with_choice, sport[0].facts)))
        ways = _ways(replace(sport[0], facts=facts), sport[1], 0, 0)
        assert "multiple_choice" in ways and "statement, among options" not in ways


class TestWhatIsGiven:
    def test_a_way_that_some_facts_have_is_asked_of_those(self, world, sport, gone):
        forget, retain = [in_few_ways(prompts, "statement", "question") for prompts in sport]
        facts = list(forget.facts.facts)
        for i in range(3):
            facts[i] = replace(facts[i], queries={**facts[i].queries, "rare": facts[i].queries["question"]})
        facts[3] = replace(facts[3], queries={**facts[3].queries, "single": facts[3].queries["question"]})
        given = replace(forget, facts=replace(forget.facts, facts=tuple(facts)))
        found = prompting(world, gone, given, retain, shots=0)
        rare = found[found.setting == "rare"].set_index("state")
        assert rare["n"].to_dict() == {"edited": 3, "unedited": 3}, "no stranger has it"
        assert (rare["retain"] >= 0.9).all(), "of the retain facts as they were given"
        assert "single" not in set(found["setting"])

    @pytest.mark.training
    def test_tokens_are_asked_in_their_one_format(self, seed):
        toy = planted_facts()
        forget, retain = toy.prompts(list(range(8))), toy.prompts(list(range(8, 24)))
        mask = ComponentMask.of([toy.neuron(i) for i in range(8)], toy.model.signature)
        edit = masked_gradient(toy.model, mask, forget, retain, steps=100, lr=0.1, seed=seed)
        found = prompting(toy.model, edit, forget, retain, extra_edits={"same": toy.model}).set_index("state")
        assert found["setting"].tolist() == ["statement"] * 3
        assert found["held_out"].tolist() == [0, 1, 1] and found["edit_target"].tolist() == [1, 0, 0]
        assert found["retain"].tolist() == [1, 1, 1] and found["chance"].tolist() == [0.25] * 3

    @pytest.mark.parametrize(
        ("forget", "retain", "settings", "message"),
        [
            ([0], [4, 5], {}, "There are 1 forget facts and 2 retain facts. Expected at least 2 of each"),
            ([0, 1], [4], {}, "1 retain facts"),
            ([0, 1], [4, 5], {"shots": -1}, "got shots=-1. Expected a whole number, 0 or more"),
            ([0, 1], [4, 5], {"extra_edits": {"edited": None}}, "cannot be named 'edited'"),
        ],
    )
    def test_mistakes_are_named(self, forget, retain, settings, message):
        toy = planted_facts()
        edit = WeightEdit({}, {}, toy.model.signature, RunCard("none"))
        with pytest.raises(MechunlearnError, match=message):
            prompting(toy.model, edit, toy.prompts(forget), toy.prompts(retain), **settings)

    def test_text_needs_a_tokenizer(self, world, sport, gone):
        bare = load_model((world.hf, None))
        with pytest.raises(MechunlearnError, match="no tokenizer"):
            prompting(bare, gone, *sport, shots=0)


class TestKL:
    TEXTS = ("The sailor carried the lantern.", "One day the queen saw a river and found it.", "Snow")

    def test_an_edit_that_changes_nothing_moves_nothing(self, world):
        units = torch.tensor([0, 3])
        same = WeightEdit(
            {"L1.mlp.out": units}, {"L1.mlp.out": world.rows("L1.mlp.out")[units]}, world.signature, RunCard("same")
        )
        assert next_token_kl(world, same, self.TEXTS).tolist() == [0, 0, 0]

    def test_by_hand(self, world, hidden):
        found = next_token_kl(world, hidden, self.TEXTS)
        for text, value in zip(self.TEXTS, found):
            tokens = torch.tensor([world.tokenizer(text)["input_ids"]])
            with torch.no_grad():
                p = world.forward(tokens)[0].double().softmax(-1)
                with hidden.applied(world):
                    q = world.forward(tokens)[0].double().softmax(-1)
            assert value == pytest.approx(float((p * (p.log() - q.log())).sum(-1).mean()), rel=1e-4)
            assert abs(float((q * (q.log() - p.log())).sum(-1).mean()) / value - 1) > 1e-3, "it has a direction"

    def test_padding_and_batches_change_nothing(self, world, hidden):
        alone = torch.cat([next_token_kl(world, hidden, [text]) for text in self.TEXTS])
        together = next_token_kl(world, hidden, self.TEXTS)
        in_pairs = next_token_kl(world, hidden, self.TEXTS, batch_size=2)
        assert torch.allclose(together, alone, rtol=1e-4) and torch.allclose(in_pairs, alone, rtol=1e-4)
        assert together.min() > 0

    def test_batches_get_smaller_where_logits_would_not_fit(self, world, hidden, monkeypatch):
        sizes, forward = [], world.forward
        monkeypatch.setattr("mechunlearn.evaluation.drift.LOGITS", 2 * 16 * world.hf.config.vocab_size)
        monkeypatch.setattr(world, "forward", lambda tokens: sizes.append(len(tokens)) or forward(tokens))
        next_token_kl(world, hidden, self.TEXTS)
        assert sizes == [2, 2, 1, 1]

    def test_what_cannot_be_compared_is_named(self, world, hidden, monkeypatch):
        with pytest.raises(MechunlearnError, match="after 0 texts: there are none"):
            next_token_kl(world, hidden, [])
        monkeypatch.setattr("mechunlearn.evaluation.drift.encode", lambda model, texts: [[5], []])
        with pytest.raises(MechunlearnError, match="after 2 texts: one has no token"):
            next_token_kl(world, hidden, ["A", ""])

    def test_a_model_without_a_tokenizer_is_named(self):
        model = load_model((random_hf("llama"), None))
        with pytest.raises(MechunlearnError, match="no tokenizer"):
            next_token_kl(model, WeightEdit({}, {}, model.signature, RunCard("none")), ["Snow"])


def test_a_way_that_the_model_knows_fewer_facts_in_still_brings_facts_back(world, monkeypatch):
    """The gate asks whether the edit broke the model, not whether the model was good at this way of asking."""
    forget, retain = load_facts("factworld/sport").prompts(world).split(forget=8, retain=20, seed=0)
    nothing = WeightEdit(
        {"L0.mlp.out": torch.arange(4)}, {"L0.mlp.out": world.rows("L0.mlp.out")[:4]}, world.signature, RunCard("none")
    )
    module = sys.modules["mechunlearn.attack.prompting"]
    whole = module._answered

    def half(model, prompts, setting):
        """Every second retain fact is not known as a question; those to forget are."""
        right, hit = whole(model, prompts, setting)
        if setting == "question" and len(prompts) == len(retain):
            right[::2] = 0
        return right, hit

    monkeypatch.setattr(module, "_answered", half)
    rows = prompting(world, nothing, forget, retain, shots=0)
    question = rows[(rows.state == "edited") & (rows.setting == "question")].iloc[0]
    assert question["retain"] == question["retain_before"] == 0.5 and question["held_out"] == 1 and question["valid"]
