"""Unlearning depth: erased where the knowledge was stored, intact where only the answer is suppressed, and no trace."""

import json
import math

import pandas as pd
import pytest
import torch

from mechunlearn import ComponentMask, MechunlearnError
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.attack.bounds import recovery
from mechunlearn.attack.unlearning_depth import depth, unlearning_depth
from mechunlearn.core.files import data_folder
from mechunlearn.core.runcard import RunCard
from mechunlearn.edit import masked_gradient
from mechunlearn.facts.load import load_facts, world_facts
from mechunlearn.metrics.answers import answered, measure
from mechunlearn.model.hooked import load_model
from mechunlearn.world.toy import planted_facts
from tests.models import random_hf, token_prompts


def silenced(model, site: str, units: list[int]) -> WeightEdit:
    """Some units write nothing."""
    chosen = torch.tensor(units)
    rows = torch.zeros_like(model.rows(site)[chosen]).float()
    return WeightEdit({site: chosen}, {site: rows}, model.signature, RunCard("hand", mask="a mask"))


class TestOnThePlantedModel:
    """Neuron i of MLP 0 writes fact i at the subject; attention 1 carries it to the end."""

    @pytest.fixture(scope="class")
    def setup(self):
        toy = planted_facts()
        forget, retain = toy.prompts(list(range(8))), toy.prompts(list(range(8, 24)))
        return toy.model, silenced(toy.model, "L0.mlp.out", list(range(8))), forget, retain

    @pytest.fixture(scope="class")
    def rows(self, setup):
        carried = silenced(setup[0], "L1.attn.o", [0])
        return unlearning_depth(*setup, extra_edits={"not carried": carried})

    def test_a_silenced_look_up_is_erased_from_the_block_that_holds_it(self, rows):
        edited = rows[rows.state == "edited"]
        assert edited["setting"].tolist() == ["after 0 blocks", "after 1 blocks", "after 2 blocks"]
        assert edited["weight"].iloc[0] == 0 and (edited["weight"].iloc[1:] > 1).all()
        assert edited["held_out"].tolist() == [1, 0, 0]
        assert math.isnan(edited["erased"].iloc[0]) and (edited["erased"].iloc[1:] > 0.8).all()
        assert edited["retain_here"].tolist() == [1, 1, 1]
        assert edited["holding"].tolist() == [0, 8, 8]

    def test_the_score_is_the_mean_of_erased_by_what_each_depth_holds(self, setup):
        model, edit, forget, retain = setup
        half = silenced(model, "L0.mlp.out", [0, 1, 2, 3])
        rows = unlearning_depth(model, half, forget, retain)
        found = depth(rows).loc["edited"]
        whole = depth(unlearning_depth(model, edit, forget, retain)).loc["edited"]
        assert found["score"] == pytest.approx(whole["score"] / 2, abs=1e-4), "four of eight facts"
        assert found["score_low"] < found["score"] < found["score_high"] and found["scored"] == 8
        assert rows["erased"].iloc[1] == pytest.approx(whole["score"] / 2, abs=1e-2)

    def test_what_is_not_carried_to_the_end_is_intact_until_then(self, rows):
        lost = rows[rows.state == "not carried"]
        assert lost["held_out"].tolist()[:2] == [1, 1] and lost["held_out"].iloc[2] < 1
        assert lost["erased"].iloc[1] == 0 and lost["erased"].iloc[2] > 0.5

    def test_that_model_is_wrecked_so_it_has_collapsed_at_every_depth(self, rows):
        wrecked = rows[rows.state == "not carried"]
        assert not wrecked["valid"].any() and wrecked["retain"].nunique() == 1
        assert wrecked["retain_here"].tolist()[:2] == [1, 1]
        assert recovery(rows).loc["not carried", "outcome"] == "collapsed"
        found = depth(rows).loc["not carried"]
        assert found["outcome"] == "collapsed" and math.isnan(found["score"])

    def test_floor_and_ceiling(self, rows):
        found = recovery(rows)
        assert found.loc["edited", "held_out"] == 0 and found.loc["unedited", "recovery"] == 1
        assert depth(rows).loc["unedited", ["score", "score_low", "score_high"]].tolist() == [0, 0, 0]

    def test_the_gold_model_says_what_a_depth_holds(self, setup):
        model, edit, forget, retain = setup
        gold = planted_facts().model
        silenced(gold, "L0.mlp.out", list(range(8))).apply_(gold)
        rows = unlearning_depth(model, edit, forget, retain, gold=gold)
        assert depth(rows).loc["edited", "score"] == pytest.approx(1)
        assert rows.attrs["card"]["settings"]["gold"] == gold.fingerprint
        with pytest.raises(
            MechunlearnError, match="loses 0 nats at most, and the threshold is 0.05: no depth holds it"
        ):
            unlearning_depth(model, edit, forget, retain, gold=planted_facts().model)

    def test_depths_below_the_threshold_do_not_count(self, setup, rows):
        most = rows["weight"].max()
        with pytest.raises(MechunlearnError, match="no depth holds it"):
            unlearning_depth(*setup, threshold=most + 1)

    def test_an_edit_of_another_model_is_refused(self, setup):
        elsewhere = silenced(load_model((random_hf("gpt2"), None)), "L0.mlp.out", [0])
        with pytest.raises(MechunlearnError, match="The edit is for"):
            unlearning_depth(*setup, extra_edits={"of another model": elsewhere})

    def test_known_ceilings_are_not_run_again(self, setup, rows, monkeypatch):
        again = unlearning_depth(*setup, baseline_rows=rows)
        assert again["state"].drop_duplicates().tolist() == ["edited", "unedited"]
        for state in ("edited", "unedited"):
            one, other = (part[part.state == state].reset_index(drop=True) for part in (rows, again))
            pd.testing.assert_frame_equal(one, other)
        with pytest.raises(MechunlearnError, match="are of another attack: settings"):
            unlearning_depth(*setup, baseline_rows=rows, threshold=0.1)
        assert json.loads(json.dumps(again.attrs["card"]))["method"] == "unlearning_depth"

    def test_facts_without_a_subject_and_models_of_another_shape_are_refused(self, setup):
        model, edit, forget, retain = setup
        bare = type(forget).from_tokens(forget.tokens, forget.corrupt, forget.answers[:, 0], forget.foils[:, 0])
        with pytest.raises(MechunlearnError, match="8 of the 8 forget facts say nothing of where their subject is"):
            unlearning_depth(model, edit, bare, retain)
        other = load_model((random_hf("gpt2"), None))
        with pytest.raises(MechunlearnError, match="'other' is .*Give models of one architecture"):
            unlearning_depth(model, edit, forget, retain, extra_edits={"other": other})
        with pytest.raises(MechunlearnError, match="'gold' is "):
            unlearning_depth(model, edit, forget, retain, gold=other)
        with pytest.raises(MechunlearnError, match="The frame lacks score"):
            depth(pd.DataFrame([{"state": "edited", "valid": True}]))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2"])
def test_after_all_blocks_the_accuracy_is_the_edited_models_own(family):
    model, prompts = load_model((random_hf(family), None)), token_prompts(facts=8)
    said = model.forward(prompts.tokens)[:, -1].argmax(-1)
    answers = torch.where(torch.arange(8) < 6, said, (said + 1) % 97)
    prompts = type(prompts).from_tokens(prompts.tokens, prompts.corrupt, answers, (answers + 5) % 97, prompts.spans)
    edit = silenced(model, "L1.mlp.out", list(range(40)))
    gold = load_model((random_hf(family), None))
    silenced(gold, "L0.attn.o", [0, 1, 2]).apply_(gold)
    rows = unlearning_depth(
        model, edit, prompts.select(range(4)), prompts.select(range(4, 8)), gold=gold, min_retention=0
    )
    with edit.applied(model):
        own = measure(model, prompts)["accuracy"]
    edited = rows[rows.state == "edited"]
    assert edited["held_out"].iloc[-1] == own[:4].mean() and edited["retain"].iloc[0] == own[4:].mean()
    assert edited["held_out"].iloc[1] == 1, "the edited layer is not reached yet"


@pytest.mark.training
class TestOnTheTwin:
    """New people were taught with MLP 1 and 2 alone, so the base's MLPs put back there remove them exactly."""

    @pytest.fixture(scope="class")
    def rows(self, world, seed):
        twin = load_model("factworld-twin")
        known = {fact.subject for fact in load_facts("factworld/sport").facts}
        facts = world_facts(data_folder() / "factworld-twin", "sport")
        new = facts.select([i for i, fact in enumerate(facts.facts) if fact.subject not in known]).prompts(twin)
        old = facts.select([i for i, fact in enumerate(facts.facts) if fact.subject in known]).prompts(twin)
        forget = new.select(range(40))
        forget = forget.select(answered(twin, forget).nonzero().flatten()[:32])
        retain = old.split(forget=1, retain=48, seed=seed)[1]
        sites = [f"L{layer}.mlp.{kind}" for layer in (1, 2) for kind in ("in", "gate", "out")]
        rows = {site: world.rows(site).float() for site in sites}
        units = {site: torch.arange(len(each)) for site, each in rows.items()}
        removed = WeightEdit(units, rows, twin.signature, RunCard("put back"))
        last = ComponentMask.of(["L7.attn.o", "L7.mlp.out"], twin.signature)
        hidden = masked_gradient(twin, last, forget, retain, steps=60, lr=2e-3, batch_size=16, seed=seed)
        given = {"extra_edits": {"hidden": hidden}, "seed": seed}
        return {
            None: unlearning_depth(twin, removed, forget, retain, **given),
            "gold": unlearning_depth(twin, removed, forget, retain, gold=world, **given),
        }

    @pytest.mark.parametrize(("gold", "least"), [(None, 0.6), ("gold", 0.999)])
    def test_removed_is_deep_and_hidden_is_shallow(self, rows, gold, least):
        score = depth(rows[gold])["score"]
        assert score["edited"] > least and score["hidden"] < 0.15 and score["unedited"] == pytest.approx(0, abs=1e-6)
        found = recovery(rows[gold])
        assert found.loc["edited", "recovery"] < 0.15
        assert found.loc["hidden", "below"] == 8 and found.loc["hidden", "recovery"] < 0.2, (
            "no block behind it reads them"
        )
        mine = rows[gold][rows[gold].state == "hidden"]
        assert mine["below"].tolist() == [True] * 8 + [False] and mine["held_out"].iloc[7] > 0.9

    def test_no_depth_before_the_look_up_holds_the_facts(self, rows):
        for found in rows.values():
            weight = found[found.state == "edited"]["weight"]
            assert weight.tolist()[:2] == [0, 0] and (weight.iloc[3:] > 1).all()

    def test_hidden_facts_are_there_until_the_last_block(self, rows):
        hidden = rows[None][rows[None].state == "hidden"]
        assert (hidden["held_out"].iloc[:8] == 1).all() and hidden["held_out"].iloc[8] < 0.5


def test_never_taught_facts_are_at_chance_and_have_no_score(world, sport):
    forget, retain = sport[0].select(range(16)), sport[1].select(range(32))
    rows = unlearning_depth(world, silenced(world, "L2.mlp.out", [0, 1]), forget, retain)
    never = rows[rows.state == "never taught"]
    assert len(never) == 9 and (never["held_out"] <= 0.4).all() and never["held_out"].nunique() == 1
    assert never["score"].isna().all() and never["erased"].isna().all()
    assert never["weight"].tolist() == rows[rows.state == "edited"]["weight"].tolist()
