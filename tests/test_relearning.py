"""The relearning attack: it leaves no trace, it tells a fact that is gone from one that is hidden, and collapse is no robustness."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from mechunlearn import ComponentMask, MechunlearnError
from mechunlearn.attack import relearning
from mechunlearn.attack.bounds import recovery
from mechunlearn.attack.relearning import _Sets
from mechunlearn.attack.states import halved
from mechunlearn.edit import masked_gradient
from mechunlearn.metrics.answers import measure
from mechunlearn.world.toy import planted_facts

ONE_EACH = {"lora": [0.01], "full": [0.01]}


def sets_of(model, forget, retain, seed=3, texts=()) -> _Sets:
    return _Sets.of(model, forget, retain, halved(retain, seed)[1], texts, "facts", seed)


@pytest.mark.training
class TestOnThePlantedModel:
    """Its facts share nothing: each has a neuron of its own, so none can come back with another."""

    @pytest.fixture(scope="class")
    def setup(self):
        toy = planted_facts()
        forget, retain = toy.prompts(list(range(8))), toy.prompts(list(range(8, 24)))
        mask = ComponentMask.of([toy.neuron(i) for i in range(8)], toy.model.signature)
        edit = masked_gradient(toy.model, mask, forget, retain, steps=100, lr=0.1)
        return toy.model, edit, forget, retain

    def test_what_shares_nothing_does_not_come_back(self, setup, seed):
        """The half that trains comes back whole, and of the other half nothing in the median attack."""
        held_out, recovered = [], []
        for each in range(seed, seed + 3):
            rows = relearning(*setup, lrs={"lora": [5e-3], "full": [3e-3]}, steps=80, eval_every=40, seed=each)
            edited = rows[rows.state == "edited"]
            assert (edited[edited.step == 80]["trained"] == 1).all()
            assert (edited["held_out"] <= edited["chance"]).all()
            held_out.append(edited["held_out"].max())
            recovered.append(recovery(rows).loc["edited", "recovery"])
        assert np.median(held_out) == 0
        assert np.nanmax(recovered) < 0, "below chance, and not every attack broke the model"

    def test_step_0_is_the_model_as_it_is(self, setup):
        model, edit, forget, _ = setup
        rows = relearning(*setup, lrs={"full": [1e-3]}, steps=1)
        start = rows[rows.step == 0].set_index("state")
        whole = (start["held_out"] + start["trained"]) / 2
        with edit.applied(model):
            assert whole["edited"] == measure(model, forget)["accuracy"].mean()
        assert whole["unedited"] == measure(model, forget)["accuracy"].mean() == 1
        assert start.loc["edited", "n"] == 4 and set(start.index) == {"edited", "unedited"}

    def test_chance_is_the_share_of_the_most_frequent_truth_held_out(self, setup):
        model, _, forget, retain = setup
        sets = sets_of(model, forget, retain)
        counts = pd.Series(forget.answers[sets.held_out][:, 0].tolist()).value_counts()
        rows = relearning(*setup, lrs={"full": [1e-3]}, steps=1, seed=3)
        assert set(rows["chance"]) == {counts.max() / 4}

    def test_nothing_is_measured_that_is_trained_on(self, setup):
        model, _, forget, retain = setup
        sets = sets_of(model, forget, retain)
        assert {*sets.taught.tolist(), *sets.held_out.tolist()} == set(range(8))
        assert len(sets.taught) == len(sets.held_out) == 4

        def subjects(tokens):
            return {int(row[1]) for row in tokens}

        assert subjects(sets.trained_on["truth"].tokens) == subjects(forget.tokens[sets.taught])
        assert len(subjects(sets.trained_on["retain"].tokens)) == len(subjects(sets.watched.tokens)) == 8
        assert not subjects(sets.trained_on["retain"].tokens) & subjects(sets.watched.tokens)

    def test_the_same_seed_gives_the_same_rows(self, setup):
        given = {"lrs": ONE_EACH, "steps": 2}
        one, again = relearning(*setup, **given), relearning(*setup, **given)
        pd.testing.assert_frame_equal(one, again)

    def test_another_seed_draws_other_halves(self, setup):
        model, _, forget, retain = setup
        drawn = [set(sets_of(model, forget, retain, seed).taught.tolist()) for seed in (0, 1)]
        assert drawn[0] != drawn[1]

    def test_extra_edits_and_models_are_attacked_alike(self, setup):
        edit = setup[1]
        extra = {"again": edit, "as it is": None, "a model": planted_facts().model}
        rows = relearning(*setup, extra_edits=extra, lrs={"full": [0.01]}, steps=4)
        cells = {state: part.drop(columns="state").reset_index(drop=True) for state, part in rows.groupby("state")}
        pd.testing.assert_frame_equal(cells["again"], cells["edited"])
        pd.testing.assert_frame_equal(cells["as it is"], cells["unedited"])
        pd.testing.assert_frame_equal(cells["a model"], cells["unedited"])
        assert not cells["edited"].equals(cells["unedited"])

    def test_a_loss_that_is_not_finite_is_a_collapse_and_no_error(self, setup):
        model = setup[0]
        embedding = model.hf.get_input_embeddings().weight
        start = embedding.detach().clone()

        def breaks(resid):
            """Not a number once full fine-tuning has moved the embedding."""
            return None if torch.equal(embedding, start) else resid * torch.nan

        with model.hooks({"L0.resid_post": breaks}):
            rows = relearning(*setup, lrs={"full": [0.01], "lora": [5e-3]}, steps=6, eval_every=2)
        found = recovery(rows).loc["edited"]
        assert found["collapsed"] == ("full 0.01",)
        assert found["outcome"] == "measured" and found["setting"] == "lora 0.005"
        ended = rows[(rows.state == "edited") & (rows.method == "full")]
        assert ended["step"].tolist() == [0, 1] and ended["retain"].tolist() == [1, 0]

    def test_the_rows_carry_a_run_card(self, setup):
        model, edit, *_ = setup
        rows = relearning(*setup, lrs={"full": [0.01]}, steps=1, seed=4)
        card = json.loads(json.dumps(rows.attrs["card"]))
        assert (card["method"], card["seed"], card["mask"]) == ("relearning", 4, edit.card.mask)
        assert card["model"] == model.fingerprint and card["settings"]["lrs"] == {"full": [0.01]}

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"forget": [0]}, "The forget set has 1 facts: .*Expected at least 2"),
            ({"retain": [9]}, "The retain set has 1 facts"),
            ({"lrs": {}}, r"lrs is \{\}. Expected .*'lora', 'full' or both"),
            ({"lrs": {"lora": []}}, "Expected learning rates for 'lora', 'full' or both"),
            ({"lrs": {"full": [0.1, 0]}}, "Expected learning rates above 0"),
            ({"lrs": {"full": [0.1, 1e4]}}, "Expected learning rates above 0 and up to 1000"),
            ({"lrs": {"soft prompt": [0.1]}}, "soft prompt.*Expected learning rates .*for 'lora', 'full'"),
            ({"rank": 33}, "A rank of 33 does not fit.*smallest matrix has 32.*from 1 to 32"),
            ({"rank": 0}, "rank=0. Expected a whole number, 1 or more"),
            ({"eval_every": 0}, "eval_every=0. Expected a whole number, 1 or more"),
            ({"steps": 0}, "steps=0. Expected a whole number, 1 or more"),
            ({"batch_size": 0}, "batch_size=0. Expected a whole number, 1 or more"),
            ({"extra_edits": {"unedited": None}}, "cannot be named 'unedited'"),
        ],
    )
    def test_mistakes_are_named(self, setup, changed, message):
        model, edit, forget, retain = setup
        sets = {"forget": forget, "retain": retain}
        for name in sets:
            if name in changed:
                sets[name] = planted_facts().prompts(changed.pop(name))
        with pytest.raises(MechunlearnError, match=message):
            relearning(model, edit, sets["forget"], sets["retain"], **changed)


@pytest.mark.slow
@pytest.mark.training
class TestOnTheWorld:
    """The last layer writes the answer, MLP 1 and 2 look the fact up."""

    @pytest.fixture(scope="class")
    def rows(self, world, sixteen, hidden, gone, seed):
        forget, retain = sixteen
        return relearning(
            world,
            gone,
            forget,
            retain.select(range(100)),
            extra_edits={"last layer": hidden},
            lrs={"lora": [5e-3], "full": [1e-4, 1.0]},
            steps=8,
            eval_every=8,
            batch_size=16,
            seed=seed,
        )

    def test_what_is_hidden_at_the_output_comes_back_and_what_is_gone_from_the_look_up_does_not(self, rows):
        """Recovery was .5 to 1 of what is hidden and -.6 to -.3 of what is gone on five seeds, of eight facts each; of the
        half that trains .75 to 1 came back.
        """
        found = recovery(rows)
        assert found.loc["last layer", "recovery"] > 0.3
        assert found.loc["edited", "recovery"] + 0.5 < found.loc["last layer", "recovery"]
        edited = rows[rows.state == "edited"]
        assert edited["trained"].max() > 0.5 and edited["held_out"].max() <= 0.3, "it learns the half it is shown"

    def test_floor_and_ceiling_are_where_they_belong(self, rows):
        found = recovery(rows)
        assert found.loc["unedited", "held_out"] == 1
        assert found.loc["never taught", "low"] <= found.loc["never taught", "chance"]
        assert 1 / 8 <= found.loc["edited", "floor"] <= 0.5
        assert rows["n"].unique().tolist() == [8]

    def test_a_collapsed_setting_is_listed_and_not_counted(self, rows):
        found = recovery(rows)
        assert all("full 1" in collapsed for collapsed in found["collapsed"])
        assert (found["setting"] != "full 1").all()
        broken = rows[(rows["lr"] == 1.0) & (rows["step"] > 0)]
        assert (broken["retain"] < 0.5).all() and not broken["valid"].any()

    def test_every_state_trains_on_text_and_measures_it(self, rows, world, sixteen):
        assert rows["text_loss"].notna().all()
        text = sixteen[0].facts.texts
        sets = sets_of(world, *sixteen, texts=text)
        assert 16 <= len(sets.passages) <= 32
        assert set(sets.passages) <= set(text[1::2])
        assert len(sets.trained_on["text"]) == len(text[::2])

    def test_option_probability_goes_with_accuracy(self, rows):
        start = rows[rows.step == 0].groupby("state").first()
        assert start.loc["unedited", "option_probability"] > 0.9 > 0.3 > start.loc["edited", "option_probability"]

    def test_intervals_hold_their_value(self, rows):
        assert ((rows["low"] <= rows["held_out"]) & (rows["held_out"] <= rows["high"])).all()
        between = rows[(rows["held_out"] > 0) & (rows["held_out"] < 1)]
        assert (between["low"] < between["high"]).all()


def frame(*curves) -> pd.DataFrame:
    """Rows from (state, method, rate, [(held out, retain), ...])."""
    rows = []
    for state, method, rate, cells in curves:
        for step, (held_out, retain) in enumerate(cells):
            rows.append(
                {
                    "state": state,
                    "setting": f"{method} {rate:g}",
                    "step": step,
                    "n": 10,
                    "held_out": held_out,
                    "low": held_out - 0.1,
                    "high": held_out + 0.1,
                    "trained": held_out / 2 + 0.5,
                    "retain": retain,
                    "chance": 0.2,
                    "valid": retain >= 0.9,
                }
            )
    return pd.DataFrame(rows)


UNEDITED = ("unedited", "full", 0.1, [(1.0, 1.0), (0.9, 1.0)])


class TestRecovery:
    def test_the_best_cell_that_counts_is_the_number(self):
        rows = frame(
            ("edited", "lora", 0.1, [(0.0, 1.0), (0.3, 0.95), (0.8, 0.89)]),
            ("edited", "full", 0.2, [(0.0, 1.0), (0.4, 0.9), (0.4, 1.0)]),
            UNEDITED,
        )
        found = recovery(rows).loc["edited"]
        assert (found["held_out"], found["setting"], found["step"]) == (0.4, "full 0.2", 1)
        assert (found["low"], found["high"], found["retain"]) == (pytest.approx(0.3), 0.5, 0.9)
        assert found["outcome"] == "measured" and found["collapsed"] == ()
        assert found["recovery"] == pytest.approx((0.4 - 0.2) / 0.8)

    def test_a_collapsed_setting_counts_nowhere(self):
        rows = frame(
            ("edited", "lora", 0.1, [(0.5, 1.0), (0.9, 0.5), (0.0, 0.1)]),
            ("edited", "full", 0.2, [(0.5, 0.1), (0.3, 0.95)]),
            UNEDITED,
        )
        found = recovery(rows).loc["edited"]
        assert found["collapsed"] == ("lora 0.1",)
        assert found["held_out"] == 0.3 and found["trained"] == 0.65, "not even its step 0"

    def test_a_model_that_collapses_everywhere_is_not_robust(self):
        rows = frame(
            ("edited", "lora", 0.1, [(0.0, 1.0), (0.0, 0.5)]),
            ("edited", "full", 1e-3, [(0.0, 1.0), (0.0, 0.8)]),
            UNEDITED,
        )
        found = recovery(rows).loc["edited"]
        assert found["outcome"] == "collapsed"
        assert pd.isna(found["recovery"]) and pd.isna(found["held_out"])
        assert found["collapsed"] == ("lora 0.1", "full 0.001")
        assert recovery(rows[rows.state == "edited"]).loc["edited", "outcome"] == "collapsed"

    def test_floor_and_ceiling_get_the_same_maximum_over_settings(self):
        rows = frame(
            ("edited", "full", 0.1, [(0.0, 1.0), (0.6, 1.0)]),
            ("unedited", "lora", 0.1, [(0.7, 1.0), (0.8, 1.0)]),
            ("unedited", "full", 0.1, [(0.7, 1.0), (0.9, 1.0), (1.0, 0.2)]),
            ("never taught", "lora", 0.1, [(0.1, 1.0), (0.4, 1.0)]),
            ("never taught", "full", 0.1, [(0.1, 1.0), (0.3, 1.0), (0.8, 0.2)]),
            ("other", "full", 0.1, [(0.0, 1.0), (0.2, 1.0)]),
        )
        found = recovery(rows)
        assert found["floor"].tolist() == [0.4] * 4 and found["ceiling"].tolist() == [0.9] * 4
        assert found["recovery"].round(6).to_dict() == {
            "edited": 0.4,
            "unedited": 1.0,
            "never taught": 0.0,
            "other": -0.4,
        }

    def test_the_floor_is_at_least_chance(self):
        edited = ("edited", "full", 0.1, [(0.0, 1.0), (0.6, 1.0)])
        floors = {
            "below chance": ("never taught", "full", 0.1, [(0.1, 1.0), (0.15, 1.0)]),
            "collapsed": ("never taught", "full", 0.1, [(0.1, 1.0), (0.9, 0.3)]),
        }
        for floor in floors.values():
            assert recovery(frame(edited, UNEDITED, floor)).loc["edited", "floor"] == 0.2
        assert recovery(frame(edited, UNEDITED)).loc["edited", "floor"] == 0.2

    def test_without_room_between_floor_and_ceiling_there_is_no_recovery(self):
        edited = ("edited", "full", 0.1, [(0.0, 1.0), (0.6, 1.0)])
        for ceiling in (
            [],
            [("unedited", "full", 0.1, [(0.2, 1.0), (0.2, 1.0)])],
            [("unedited", "full", 0.1, [(1.0, 0)])],
        ):
            found = recovery(frame(edited, *ceiling)).loc["edited"]
            assert pd.isna(found["recovery"]) and found["outcome"] == "measured" and found["held_out"] == 0.6

    def test_states_keep_their_order_and_rows_are_not_changed(self):
        rows = frame(("zeta", "full", 0.1, [(0.1, 1.0), (0.6, 1.0)]), UNEDITED, ("edited", "full", 0.1, [(0.0, 1.0)]))
        before = rows.copy()
        assert recovery(rows).index.tolist() == ["zeta", "unedited", "edited"]
        pd.testing.assert_frame_equal(rows, before)

    def test_what_it_cannot_read_is_named(self):
        with pytest.raises(MechunlearnError, match="2 rows and lacks valid.*an attack returns"):
            recovery(frame(UNEDITED).drop(columns="valid"))
        with pytest.raises(MechunlearnError, match="0 rows"):
            recovery(frame(UNEDITED).iloc[:0])
