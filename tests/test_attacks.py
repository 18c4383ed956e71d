"""Invariants, over every attack: the folder is walked, so a new file is tested before anyone writes a test for it."""

import json

import pytest
import torch

from mechunlearn import ComponentMask, MechunlearnError
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.attack.relearning import relearning
from mechunlearn.attack.states import COLUMNS, recovery
from mechunlearn.core.runcard import RunCard
from mechunlearn.edit import feature_clamp, masked_gradient
from mechunlearn.evaluation.robustness import PLACED
from mechunlearn.features.feature_edit import FeatureEdit
from mechunlearn.world.toy import LOOKED_UP, planted_facts
from tests.handmade import axes, mask_of
from tests.test_invariants import functions, named, parameters_of

ATTACKS = functions("attack")
SHORT = {
    "relearning": {"lrs": {"full": [1e-3]}, "steps": 2, "eval_every": 1},
    "soft_prompt": {"lrs": [1e-4], "steps": 2, "eval_every": 1},
    "activation_perturbation": {"lrs": [1e-2], "steps": 2, "eval_every": 1},
}


@pytest.fixture(scope="module")
def setup():
    toy = planted_facts()
    forget, retain = toy.prompts(list(range(8))), toy.prompts(list(range(8, 24)))
    mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    return toy.model, masked_gradient(toy.model, mask, forget, retain, steps=20, lr=0.1), forget, retain


def states_to_attack(attack, setup, **settings):
    model, edit, forget, retain = setup
    return attack(model, edit, forget, retain, **SHORT.get(attack.__name__, {}), **settings)


@pytest.mark.parametrize("attack", ATTACKS, ids=named)
class TestEveryAttack:
    def test_leaves_no_trace(self, attack, setup):
        model = setup[0]
        for parameter in model.hf.parameters():
            parameter.grad = torch.ones_like(parameter)
        before, flags, random_state = (
            parameters_of(model),
            [p.requires_grad for p in model.hf.parameters()],
            torch.get_rng_state(),
        )
        states_to_attack(attack, setup)
        assert all(torch.equal(before[name], p) for name, p in parameters_of(model).items())
        assert [p.requires_grad for p in model.hf.parameters()] == flags and not model.hf.training
        assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.hf.parameters())
        assert torch.equal(torch.get_rng_state(), random_state)
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.hf.modules())

    def test_gives_the_rows_that_recovery_reads(self, attack, setup):
        rows = states_to_attack(attack, setup)
        assert set(COLUMNS) <= set(rows) and set(rows["state"]) == {"edited", "unedited"}
        card = json.loads(json.dumps(rows.attrs["card"]))
        assert card["method"] == attack.__name__ and card["model"] == setup[0].fingerprint
        assert ((rows["low"] <= rows["held out"]) & (rows["held out"] <= rows["high"])).all() and (rows["n"] > 0).all()
        assert "edited" in recovery(rows).index

    def test_the_same_seed_gives_the_same_rows(self, attack, setup):
        one, two = states_to_attack(attack, setup, seed=3), states_to_attack(attack, setup, seed=3)
        assert one.equals(two)

    def test_an_edit_of_nothing_is_the_ceiling(self, attack, setup):
        model, _, forget, retain = setup
        same = {"L0.mlp.out": model.rows("L0.mlp.out")}
        nothing = WeightEdit(
            {"L0.mlp.out": torch.arange(32)}, same, model.signature, RunCard("none", model=model.fingerprint)
        )
        rows = attack(model, nothing, forget, retain, **SHORT.get(attack.__name__, {}))
        states = {state: part.drop(columns="state").reset_index(drop=True) for state, part in rows.groupby("state")}
        assert states["edited"].equals(states["unedited"])
        found = recovery(rows)["recovery"]
        assert found["edited"] == pytest.approx(found["unedited"], nan_ok=True)
        if attack.__name__ != "soft_prompt":  # the hand-made model takes no prefix at all
            assert found["edited"] == pytest.approx(1.0)

    def test_known_rows_stand_for_ceiling_and_floor(self, attack, setup):
        first = states_to_attack(attack, setup)
        again = states_to_attack(attack, setup, baseline_rows=first)
        assert sorted(again["state"]) == sorted(first["state"])
        ceiling = [rows[rows.state == "unedited"].reset_index(drop=True)[list(COLUMNS)] for rows in (first, again)]
        assert ceiling[0].equals(ceiling[1])
        with pytest.raises(MechunlearnError, match="another attack"):
            states_to_attack(attack, setup, baseline_rows=first, seed=9)

    def test_ceiling_and_floor_can_be_run_alone(self, attack, setup):
        if attack.__name__ in PLACED:
            pytest.skip("its ceiling depends on where the edit is")
        model, _, forget, retain = setup
        rows = attack(model, None, forget, retain, **SHORT.get(attack.__name__, {}))
        assert set(rows["state"]) == {"unedited"}
        assert set(states_to_attack(attack, setup, baseline_rows=rows)["state"]) == {"edited", "unedited"}

    def test_feature_edits_are_attacked_with_their_hooks_on(self, attack, setup):
        model, _, forget, retain = setup
        dictionary = axes(model, "L0.resid_post")
        mask = mask_of(model, dictionary, range(LOOKED_UP, LOOKED_UP + 4))
        edit = feature_clamp(model, mask, forget, retain, dictionary=dictionary, scale=0.0)
        assert isinstance(edit, FeatureEdit)
        rows = attack(model, edit, forget, retain, **SHORT.get(attack.__name__, {}))
        start = rows[(rows.state == "edited") & (rows["step"] == 0)]
        unedited = rows[(rows.state == "unedited") & (rows["step"] == 0)]
        assert start["held out"].min() < unedited["held out"].max()

    def test_a_name_that_is_taken_is_refused(self, attack, setup):
        with pytest.raises(MechunlearnError, match="cannot be named"):
            states_to_attack(attack, setup, extra_edits={"unedited": None})


class TestRelearningOnOtherThings:
    @pytest.fixture(scope="class")
    def world(self):
        from mechunlearn import load_facts, load_model

        model = load_model("factworld")
        forget, retain = load_facts("factworld/sport").prompts(model).split(forget=8, retain=64, seed=0)
        last = ComponentMask.of(["L7.attn.o", "L7.mlp.out"], model.signature)
        return model, masked_gradient(model, last, forget, retain, steps=15, batch_size=16, lr=5e-3), forget, retain

    def test_other_facts_share_no_name_and_no_relation(self, world):
        from mechunlearn.attack.relearning import _unrelated

        model, _, forget, retain = world
        shown = _unrelated(model, forget, retain)
        names = {word for subject in forget.facts.subjects for word in subject.split()}
        assert len(shown) > 10 and not any(names & set(asked.subject.split()) for asked in shown.asked)
        sports = {fact.answer for fact in forget.facts.source}
        assert not sports & {asked.answer for asked in shown.asked}

    @pytest.mark.parametrize("on", ["other facts", "text"])
    def test_all_forgotten_facts_are_held_out(self, world, on):
        rows = relearning(*world, on=on, lrs={"full": [5e-4]}, steps=2, eval_every=2, batch_size=8)
        assert (rows["n"] == 8).all() and rows["trained"].isna().all()
        assert set(rows["state"]) == {"edited", "unedited", "never taught"}

    def test_data_without_other_relations_or_text_say_so(self, setup):
        with pytest.raises(MechunlearnError, match="come without any"):
            relearning(*setup, on="other facts")
        with pytest.raises(MechunlearnError, match="without text"):
            relearning(*setup, on="text")
