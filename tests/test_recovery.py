"""What attacks share: states, rows, and how much came back."""

import math
import os
import signal

import pandas as pd
import pytest
import torch

from mechunlearn import load_facts
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.attack.bounds import recovery
from mechunlearn.attack.states import Attack, cell, never_taught, states_to_attack
from mechunlearn.edit import masked_gradient
from mechunlearn.errors import MechunlearnError
from mechunlearn.world.toy import planted_facts


@pytest.fixture(scope="module")
def setup():
    toy = planted_facts()
    forget, retain = toy.prompts(list(range(8))), toy.prompts(list(range(8, 16)))
    edit = masked_gradient(toy.model, ComponentMask.of(["L0.mlp.out"], toy.model.signature), forget, retain, steps=1)
    return toy.model, edit, forget, retain


def row(state, setting, held_out, **more) -> dict:
    shared = {
        "low": held_out - 0.1,
        "high": held_out + 0.1,
        "n": 20,
        "trained": math.nan,
        "retain": 1.0,
        "chance": 0.25,
    }
    return {"state": state, "setting": setting, "step": 0, "held_out": held_out, "valid": True, **shared, **more}


class TestStates:
    def test_the_edited_and_the_unedited_model_and_strangers(self, world, sixteen, hidden):
        forget, _ = sixteen
        extra = {"again": hidden, "other": world, "none": None}
        states = {state.name: state for state in states_to_attack(world, hidden, forget, extra)}
        assert list(states) == ["edited", "unedited", "never taught", *extra]
        strangers = states["never taught"].facts
        assert len(strangers) == 16 and not strangers.facts.subjects & forget.facts.source.subjects
        clean = world.fingerprint
        changed = {"edited": True, "unedited": False, "again": True, "other": False, "none": False}
        for name, moved in changed.items():
            with states[name].applied() as target:
                assert (target.fingerprint != clean) == moved, name
        assert world.fingerprint == clean
        assert [state.name for state in states_to_attack(world, None, forget)] == ["unedited", "never taught"]

    def test_strangers_are_drawn_by_the_seed_and_asked_in_the_same_format(self, world):
        asked = load_facts("factworld/sport").prompts(world, "question").split(forget=4, retain=4)[0]
        one, same, other = (never_taught(world, asked, seed) for seed in (0, 0, 1))
        assert one.format == "question" and one.facts.subjects == same.facts.subjects != other.facts.subjects

    def test_facts_as_tokens_have_no_strangers(self, setup):
        model, edit, forget, _ = setup
        assert [state.name for state in states_to_attack(model, edit, forget)] == ["edited", "unedited"]

    def test_a_taken_name_is_refused(self, setup):
        model, edit, forget, _ = setup
        with pytest.raises(MechunlearnError, match="cannot be named 'unedited'"):
            states_to_attack(model, edit, forget, {"unedited": None})


class TestKnown:
    """What is known of the unedited model from an earlier call."""

    def run(self, setup, settings, known=None) -> tuple[pd.DataFrame, list[str]]:
        model, edit, forget, retain = setup
        ran: list[str] = []

        def tried(state):
            ran.append(state.name)
            yield [cell(state.name, "int4", torch.ones(4), retain=1.0, chance=0.25)]

        attack = Attack("rounding", model, edit, forget, retain, retain, baseline_rows=known)
        return attack.run(tried, settings), ran

    def test_ceiling_and_floor_are_not_run_again(self, setup):
        known, ran = self.run(setup, {"bits": [4]})
        assert ran == ["edited", "unedited"]
        again, ran = self.run(setup, {"bits": [4]}, known)
        assert ran == ["edited"], "the old edited rows are not this edit's"
        assert again["state"].tolist() == ["edited", "unedited"]

    def test_rows_of_other_settings_are_refused(self, setup):
        known, _ = self.run(setup, {"bits": [8]})
        with pytest.raises(MechunlearnError, match="another attack: settings"):
            self.run(setup, {"bits": [4]}, known)

    def test_ctrl_c_ends_an_attack_without_rows_and_whoever_makes_them(self, setup):
        model, edit, forget, retain = setup
        closed: list[str] = []

        def tried(state):
            try:
                os.kill(os.getpid(), signal.SIGINT)
                yield [cell(state.name, "int4", torch.ones(4), retain=1.0, chance=0.25)]
                closed.append("the next setting was tried")
            finally:
                closed.append(state.name)

        with pytest.raises(KeyboardInterrupt):
            Attack("rounding", model, edit, forget, retain, retain).run(tried, {})
        assert closed == ["edited"]


class TestRecovery:
    def test_ways_of_asking_have_floors_of_their_own(self):
        def asked(state, yes_no, statement):
            return [
                row(state, "yes/no", yes_no, group="yes/no", chance=0.5),
                row(state, "statement", statement, group="statement"),
            ]

        rows = pd.DataFrame(asked("edited", 0.5, 0.4) + asked("unedited", 1.0, 1.0) + asked("never taught", 0.5, 0.25))
        found = recovery(rows).loc["edited"]
        assert found["setting"] == "statement", "half of the yes/no questions is no recovery at all"
        assert found["recovery"] == pytest.approx(0.2) and found["floor"] == 0.25

    def test_weights_make_a_mean_of_the_settings(self):
        def by_depth(state, early, late):
            return [row(state, "after 1 block", early, weight=0.25), row(state, "after 2 blocks", late, weight=0.75)]

        rows = pd.DataFrame(by_depth("edited", 1.0, 0.25) + by_depth("unedited", 1.0, 1.0))
        found = recovery(rows).loc["edited"]
        assert found["held_out"] == pytest.approx(0.4375) and found["recovery"] == pytest.approx(0.25)

    def test_an_attack_without_steps_counts_where_it_leaves_the_retain_facts(self):
        rows = pd.DataFrame(
            [
                row("edited", "int4", 0.9, valid=False),
                row("edited", "int8", 0.3),
                row("unedited", "int8", 1.0),
            ]
        )
        found = recovery(rows).loc["edited"]
        assert found["collapsed"] == ("int4",) and found["held_out"] == 0.3

    def test_without_room_between_floor_and_ceiling_nothing_is_said(self):
        rows = pd.DataFrame([row("edited", "a", 0.3), row("unedited", "a", 0.4)])
        assert math.isnan(recovery(rows).loc["edited", "recovery"])
