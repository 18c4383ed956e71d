"""The budget of an attack: it is the one that teaches facts which the model does not know, and edits share it."""

import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

from mechunlearn import ComponentMask, MechunlearnError, load_facts, load_model
from mechunlearn.attack import recovery, relearning, soft_prompt
from mechunlearn.attack.relearning import RATES, _same_template
from mechunlearn.attack.search import Budget, searched
from mechunlearn.attack.states import NEVER_TAUGHT, SEARCHED, halved
from mechunlearn.edit import masked_gradient
from mechunlearn.evaluation.robustness import Attacked, attack_all
from mechunlearn.facts.prompts import PAD
from mechunlearn.plots.curves import attack_curves
from mechunlearn.world.toy import planted_facts

DECADES = {"full": [1e-5, 1e-4, 1e-3, 1e-2]}


def found(teaches, breaks, steps=(20, 50)):
    """What a search finds where rates from `teaches(steps)` on teach, and rates from `breaks` on break the model."""
    tried = []

    def curve(budget: Budget) -> list[dict]:
        tried.append((round(budget.lr, 7), budget.steps))
        known = 1.0 if budget.lr >= teaches(budget.steps) else 0.5 + budget.lr
        kept = 0.0 if budget.lr >= breaks else 1.0
        return [{"step": 0, "trained": 0.0, "retain": 1.0}, {"step": budget.steps, "trained": known, "retain": kept}]

    going = searched(curve, DECADES, steps, 0.9)
    while True:
        try:
            next(going)
        except StopIteration as end:
            return [(round(budget.lr, 7), budget.steps) for budget in end.value], tried


class TestSearched:
    def test_the_gentlest_and_the_strongest_that_teach(self):
        chosen, tried = found(lambda steps: 3e-4, 1.0)
        assert tried == [(1e-5, 20), (1e-4, 20), (1e-3, 20), (0.0003162, 20), (0.0031623, 20)]
        assert chosen == [(0.0003162, 20), (0.0031623, 20)]

    def test_a_rate_that_breaks_the_model_is_not_chosen(self):
        chosen, tried = found(lambda steps: 5e-4, 2e-3)
        assert chosen == [(1e-3, 20)] and (0.0031623, 20) in tried

    def test_between_too_weak_and_too_strong(self):
        chosen, tried = found(lambda steps: 2e-4, 5e-4)
        assert tried == [(1e-5, 20), (1e-4, 20), (1e-3, 20), (0.0003162, 20)] and chosen == [(0.0003162, 20)]

    def test_more_steps_where_none_of_few_teaches(self):
        chosen, tried = found(lambda steps: 1.0 if steps == 20 else 9e-4, 1.0)
        assert chosen == [(1e-3, 50), (0.0031623, 50)]
        assert [steps for _, steps in tried] == [20] * 4 + [50] * 5

    def test_where_nothing_teaches_the_one_that_taught_most(self):
        chosen, _ = found(lambda steps: 2.0, 1.0)
        assert chosen == [(1e-2, 20)], "of equals the first"
        chosen, _ = found(lambda steps: 2.0, 5e-4)
        assert chosen == [(0.0003162, 20)], "and none that breaks the model"

    def test_where_every_rate_breaks_the_model_the_smallest(self):
        chosen, tried = found(lambda steps: 0.0, 0.0, steps=(20,))
        assert tried == [(1e-5, 20), (1e-4, 20), (1e-3, 20), (1e-2, 20)] and chosen == [(1e-5, 20)]

    def test_a_small_rate_that_leaves_the_model_disturbed_does_not_end_the_search(self):
        tried = []

        def curve(budget: Budget) -> list[dict]:
            tried.append(budget.lr)
            undone = budget.lr < 5e-4
            return [{"step": 20, "trained": 0.1 if undone else 1.0, "retain": 0.8 if undone else 1.0}]

        going = searched(curve, DECADES, (20,), 0.9)
        with pytest.raises(StopIteration) as end:
            while True:
                next(going)
        assert tried[:3] == [1e-5, 1e-4, 1e-3]
        assert [round(budget.lr, 7) for budget in end.value.value] == [1e-3, 0.0031623]

    def test_each_method_by_itself(self):
        def curve(budget: Budget) -> list[dict]:
            return [{"step": 1, "trained": float(budget.method == "a" or budget.lr > 1), "retain": 1.0}]

        going = searched(curve, {"a": [0.1, 1.0], "b": [0.1, 1.0]}, [1], 0.9)
        with pytest.raises(StopIteration) as end:
            while True:
                next(going)
        assert [budget.method for budget in end.value.value] == ["a", "a", "b"]


@pytest.fixture(scope="module")
def planted():
    toy = planted_facts()
    return toy, toy.prompts(list(range(8))), toy.prompts(list(range(8, 24)))


class TestOnModels:
    def test_budgets_teach_facts_that_the_model_does_not_know(self, planted):
        """Toy facts have nothing that was never taught: foils stand in, and the model does not say them before."""
        toy, forget, retain = planted
        rows = relearning(toy.model, None, forget, retain, steps=50, eval_every=25)
        tried = rows[rows.state == SEARCHED]
        assert set(tried["method"]) == set(RATES) and (tried[tried.step == 0]["trained"] == 0).all()
        for (method, lr), _ in rows[rows.state == "unedited"].groupby(["method", "lr"]):
            mine = tried[(tried.method == method) & (tried.lr == lr) & (tried.step > 0) & tried.valid]
            assert mine["trained"].max() >= 0.9
        assert "search" not in recovery(rows).index
        used = rows[rows.state == "unedited"]["setting"].nunique()
        assert (
            Attacked({"relearning": rows}).outcomes()["settings"].tolist() == [used]
            and used < tried["setting"].nunique()
        )
        drawn = attack_curves("relearning", rows)
        assert {trace.name for trace in drawn.data} == {"unedited"}, "what was tried is no arm of the figure"

    def test_a_search_is_the_same_training_as_that_of_never_taught_facts(self):
        model = load_model("factworld")
        forget, retain = load_facts("factworld/sport").prompts(model).split(forget=4, retain=8, seed=0)
        rows = soft_prompt(model, None, forget, retain, tokens=2, steps=2, eval_every=1)
        never, tried = rows[rows.state == NEVER_TAUGHT], rows[rows.state == SEARCHED]
        for lr in never["lr"].unique():
            given = soft_prompt(model, None, forget, retain, tokens=2, steps=2, eval_every=1, lrs=[float(lr)])
            again = given[given.state == NEVER_TAUGHT]
            for found in (never[never.lr == lr], tried[tried.lr == lr]):
                same = ["step", "held_out", "trained", "retain", "chance", "n"]
                assert found[same].values.tolist() == again[same].values.tolist()

    def test_edits_share_what_was_searched(self, planted, monkeypatch):
        toy, forget, retain = planted
        edit = masked_gradient(toy.model, _mask(toy), forget, retain, steps=4, lr=0.1)
        bounds = relearning(toy.model, None, forget, retain, steps=4)
        monkeypatch.setattr(sys.modules["mechunlearn.attack.search"], "searched", _never)
        rows = relearning(toy.model, edit, forget, retain, steps=4, baseline_rows=bounds)
        key = ["method", "lr", "steps"]
        assert rows[rows.state == "edited"][key].drop_duplicates().values.tolist() == (
            bounds[bounds.state == "unedited"][key].drop_duplicates().values.tolist()
        )
        assert (rows["state"] == SEARCHED).sum() == (bounds["state"] == SEARCHED).sum()
        other = relearning(toy.model, edit, forget, retain, steps=4, on="same template", search_rows=bounds)
        strongest = bounds[bounds.state == "unedited"].groupby("method")["lr"].max()
        assert other.groupby("method")["lr"].unique().map(list).to_dict() == {m: [lr] for m, lr in strongest.items()}

    def test_rows_of_something_else_have_no_budgets(self, planted):
        toy, forget, retain = planted
        for rows in (
            pd.DataFrame(),
            pd.DataFrame({"state": ["edited"], "method": ["lora"], "lr": [1.0], "steps": [2]}),
        ):
            with pytest.raises(MechunlearnError, match="Budgets are taken from rows"):
                relearning(toy.model, None, forget, retain, search_rows=rows)

    def test_ways_of_relearning_share_one_search(self, planted, monkeypatch):
        toy, forget, retain = planted
        module, calls = sys.modules["mechunlearn.attack.search"], []
        search = module.searched
        monkeypatch.setattr(module, "searched", lambda *given: calls.append(1) or search(*given))
        monkeypatch.setattr(sys.modules["mechunlearn.attack.relearning"], "STEPS", (2,))
        done = attack_all(toy.model, None, forget, retain, attacks=["relearning", "relearning_on_same_template"])
        assert len(calls) == 1 and not done.failed

    def test_facts_without_foils_have_nothing_to_search_on(self, planted):
        toy, forget, retain = planted
        alike = replace(forget, foils=torch.full_like(forget.foils, PAD))
        with pytest.raises(MechunlearnError, match="Give learning rates"):
            relearning(toy.model, None, alike, retain)


def _never(*given):
    raise AssertionError("nothing is searched twice")


def _mask(toy):
    return ComponentMask.of([toy.neuron(i) for i in range(8)], toy.model.signature)


class TestSameTemplate:
    def test_it_trains_on_all_other_subjects_of_the_relation(self):
        model = load_model("factworld")
        data = load_facts("factworld/sport")
        forget, retain = data.prompts(model).split(forget=16, retain=32, seed=0)
        watched = halved(retain, 0)[1]
        found = _same_template(model, forget, retain, watched, 0)
        out = forget.facts.subjects | watched.facts.subjects
        assert found.facts.subjects == data.subjects - out and len(out) == 32
        assert {fact.relation for fact in found.facts} == {"sport"} and found.format == forget.format

    def test_nothing_left_is_said(self):
        model = load_model("factworld")
        few = load_facts("factworld/sport").select(range(8))
        prompts = few.prompts(model)
        forget, retain = prompts.select([0, 1, 2, 3]), prompts.select([4, 5])
        with pytest.raises(MechunlearnError, match="same relation about other subjects"):
            _same_template(model, _alone(forget), _alone(retain), _alone(retain), 0)


def _alone(prompts):
    return replace(prompts, facts=replace(prompts.facts, source=None))
