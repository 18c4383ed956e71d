"""Comparisons: one selection rule, numbers that can be made again by hand, and runs that survive being killed."""

import dataclasses
import importlib
import inspect
import json
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch

import mechunlearn.localize as localize
from mechunlearn import MechunlearnError, load_facts
from mechunlearn.cli.main import main
from mechunlearn.core.methods import ready_methods
from mechunlearn.edit import losses, masked_gradient
from mechunlearn.evaluation.compare import check_grid, compare
from mechunlearn.evaluation.comparison import COLUMNS, Comparison
from mechunlearn.evaluation.selection import select
from mechunlearn.metrics.answers import measure
from mechunlearn.metrics.text import text_loss

module = importlib.import_module("mechunlearn.evaluation.compare")

GRID = {
    "localizers": ["fact_lookup", "attribution_patching", "random_units"],
    "objectives": ["injection", "log_one_minus_p"],
    "budgets": ["window"],
    "seeds": 2,
    "lrs": [1e-5, 5e-3],
    "forget_weights": [1.0],
    "forget": 5,
    "steps": 3,
    "validation": 1,
}
ONE = {**GRID, "localizers": ["random_units"], "objectives": ["injection"], "budgets": [0.02], "lrs": [5e-3]}
ONE |= {"seeds": 1}


@pytest.fixture(scope="module")
def facts(seed):
    """Forty facts with one other relation and few passages, so that a cell is quick."""
    whole = load_facts("factworld/sport")
    return dataclasses.replace(whole, related={"city": whole.related["city"]}, texts=whole.texts[:5]).select(
        range(40 * seed, 40 * seed + 40)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compare") / "grid"


@pytest.fixture(scope="module")
def made(world, facts, folder) -> Comparison:
    return compare(world, facts, folder=folder, **GRID)


def cells(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}


def rows(made: Comparison, **names: object) -> pd.DataFrame:
    frame = made.frame
    for name, value in names.items():
        frame = frame[frame[name] == value]
    return frame


TRIAL = {"lr": 1e-3, "forget_weight": 1.0, "share": 0.1, "efficacy": 1.0, "truth": 0.0, "retention": 0.9}


class TestSelect:
    def chosen(self, *trials: dict) -> tuple:
        return tuple(select([TRIAL | trial for trial in trials]).values())

    def test_the_best_retain_accuracy_among_those_that_qualify(self):
        better, weak, leaky = {"retention": 0.95, "lr": 2e-3}, {"efficacy": 0.98}, {"truth": 0.06}
        spoilt = [{"retention": 1.0, "lr": 3e-3 + i / 1e3} | flaw for i, flaw in enumerate((weak, leaky))]
        assert self.chosen({}, better, *spoilt) == (2e-3, 1.0, "qualifies")

    def test_the_limits_qualify(self):
        assert self.chosen({"efficacy": 0.99, "truth": 0.05}) == (1e-3, 1.0, "qualifies")

    def test_the_mean_over_validation_sets_counts(self):
        assert self.chosen({"efficacy": 1.0}, {"efficacy": 0.98}) == (1e-3, 1.0, "qualifies")
        assert self.chosen({"efficacy": 1.0}, {"efficacy": 0.97})[2] == "none qualifies"
        two = [{"lr": lr, "retention": retain} for lr in (1e-3, 2e-3) for retain in (0.8, 0.9 + lr)]
        assert self.chosen(*two)[0] == 2e-3

    def test_ties_go_to_the_smallest_rate_then_the_smallest_weight(self):
        settings = [{"lr": lr, "forget_weight": weight} for lr in (2e-3, 1e-3) for weight in (5.0, 0.5)]
        assert self.chosen(*settings) == (1e-3, 0.5, "qualifies")
        assert self.chosen(*({**each, "efficacy": 0.5} for each in settings)) == (1e-3, 0.5, "none qualifies")

    def test_if_none_qualifies_the_strongest_edit_is_taken(self):
        weak = {"efficacy": 0.5, "retention": 1.0}
        assert self.chosen(weak, {"efficacy": 0.9, "retention": 0.1, "lr": 2e-3}) == (2e-3, 1.0, "none qualifies")

    def test_no_robustness_metric_is_looked_at(self):
        robust = {"generalization": 0.0, "same_subject": 1.0, "recovery": 0.0, "text_loss": 0.0, "lr": 2e-3}
        assert self.chosen({"generalization": 1.0, "recovery": 1.0, "retention": 0.91}, robust)[0] == 1e-3

    def test_a_setting_that_diverged_on_any_set_is_out(self):
        diverged = {"lr": 2e-3, "retention": 1.0, "forget_weight": 1.0, "share": 0.1, "note": "loss is inf"}
        good = TRIAL | {"lr": 2e-3, "retention": 1.0}
        assert select([TRIAL, TRIAL, good, diverged])["lr"] == 1e-3
        assert select([diverged])["lr"] is None

    def test_sets_on_which_nothing_was_found_do_not_count(self):
        assert select([TRIAL, {"lr": 1e-3, "forget_weight": 1.0, "note": "no window"}])["lr"] == 1e-3
        assert select([{"lr": 1e-3, "forget_weight": 1.0, "note": "no window"}])["lr"] is None


@pytest.mark.training
class TestRun:
    def test_there_is_a_row_for_every_cell(self, made, folder):
        counts = made.frame.stage.value_counts().to_dict()
        assert counts == {"validation": 3 * 2 * 2, "unedited": 2, "test": 3 * 2 * 2}
        assert len(cells(folder)) == len(made.frame)
        assert set(rows(made, stage="validation").seed) == {101} and set(rows(made, stage="test").seed) == {0, 1}

    def test_the_test_seeds_use_the_setting_that_the_rule_selects(self, made):
        arms = ["localizer", "objective", "budget"]
        for arm, tests in rows(made, stage="test").groupby(arms):
            trials = rows(made, stage="validation", **dict(zip(arms, arm)))
            chosen = select(trials.to_dict("records"))
            assert len(tests) == 2 and (tests.lr == chosen["lr"]).all(), arm
            assert (tests.selected == chosen["selected"]).all() and (trials.selected == "").all()
        assert set(rows(made, stage="test").lr) == {5e-3}, "1e-5 changes nothing in three steps"

    @pytest.mark.parametrize("objective", ["injection", "log_one_minus_p"])
    def test_its_numbers_are_those_of_the_edit_made_by_hand(self, made, world, facts, objective):
        row = rows(made, stage="test", localizer="attribution_patching", objective=objective, seed=1).iloc[0]
        forget, retain = facts.prompts(world).split(forget=5, seed=1)
        window = rows(made, stage="test", localizer="fact_lookup", seed=1).share.iloc[0]
        found = localize.attribution_patching(world, forget)
        mask = found.top(weights=window)
        settings = {"loss": getattr(losses, objective), "lr": row.lr, "forget_weight": 1.0}
        settings["text_loss"] = losses.cross_entropy
        edit = masked_gradient(world, mask, forget, retain, steps=3, seed=1, **settings)

        def accuracy(prompts, name="accuracy"):
            return measure(world, prompts)[name].mean().item()

        def efficacy(prompts):
            aimed = objective == "injection"
            return accuracy(prompts, "target_accuracy") if aimed else 1 - accuracy(prompts)

        with edit.applied(world):
            elsewhere = [efficacy(forget.facts.prompts(world, f)) for f in facts.formats if f != "statement"]
            expected = {
                "share": found.share(mask),
                "efficacy": efficacy(forget),
                "truth": accuracy(forget),
                "generalization": sum(elsewhere) / 10,
                "retention": accuracy(retain),
                "same_subject": accuracy(facts.related["city"].about(forget.facts.subjects).prompts(world)),
                "text_loss": text_loss(world, facts.texts[1::2]).mean().item(),
            }
        assert len(elsewhere) == 10 and "held_out" in facts.formats
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-6)
        assert row.generalization > 0.1 and row.seconds > 0, "an edit that does nothing would prove nothing"

    def test_the_unedited_model_stands_beside(self, made, world, facts):
        row = rows(made, stage="unedited", seed=0).iloc[0]
        forget, _ = facts.prompts(world).split(forget=5, seed=0)
        assert row.truth == 1 and pd.isna(row.efficacy) and pd.isna(row.generalization) and row.retention == 1
        assert row.text_loss == pytest.approx(text_loss(world, facts.texts[1::2]).mean().item(), abs=1e-6)
        assert measure(world, forget)["accuracy"].mean() == 1, "the model is left as it was"

    def test_a_window_budget_gives_every_localizer_the_weight_of_the_window(self, made, world):
        shares = rows(made, stage="test").pivot_table(index="seed", columns="localizer", values="share")
        largest = max(world.unit_weights(kind) for kind in ("attn.o", "mlp.out")) / 1e5
        for name in ("attribution_patching", "random_units"):
            less = shares["fact_lookup"] - shares[name]
            assert ((less >= 0) & (less < largest)).all()
        assert (shares["fact_lookup"] > 0.03).all()

    def test_files_hold_what_it_returns(self, made, folder):
        pd.testing.assert_frame_equal(pd.read_parquet(folder / "results.parquet"), made.frame, check_dtype=False)
        assert list(made.frame.columns) == list(COLUMNS)
        table = (folder / "table.md").read_text()
        assert table == made.to_markdown() and "n = 1" in table and "seconds" not in table
        for row in made.summary().itertuples():
            assert row.truth in table and row.localizer in table
        page = (folder / "figure.html").read_text()
        assert "https://cdn" not in page.split("plotly.js", 1)[0] and '<script src="http' not in page
        assert "| generalization" in table and "| text loss" in table and "..." not in str(made.summary())
        assert all(name in page for name in ("unedited", "fact_lookup", "same subject", "log_one_minus_p, window"))

    def test_a_second_call_makes_nothing_again(self, made, world, facts, folder, monkeypatch):
        for name in ("masked_gradient", "answered", "text_loss"):
            monkeypatch.setattr(module, name, pytest.fail)
        before = cells(folder)
        again = compare(world, facts, folder=folder, **GRID)
        pd.testing.assert_frame_equal(again.frame, made.frame)
        assert cells(folder) == before

    @pytest.mark.parametrize(
        "change",
        [{"seeds": 3}, {"lrs": [5e-3]}, {"forget": 6}, {"steps": 9}, {"objectives": ["injection"]}, {"attack": True}],
    )
    def test_another_grid_in_the_folder_is_refused(self, made, world, facts, folder, change):
        with pytest.raises(MechunlearnError, match=f"about something else: {next(iter(change))} "):
            compare(world, facts, folder=folder, **{**GRID, **change})

    def test_facts_that_differ_elsewhere_than_in_the_training_prompt_are_another_grid(self, made, world, facts, folder):
        for other in (dataclasses.replace(facts, texts=()), dataclasses.replace(facts, related={})):
            with pytest.raises(MechunlearnError, match="about something else: data "):
                compare(world, other, folder=folder, **GRID)


class TestWork:
    def test_each_localizer_runs_once_a_forget_set(self, world, facts, tmp_path, monkeypatch):
        asked = []

        def counted(model, prompts, real=localize.random_units, **settings):
            asked.append((prompts.fingerprint, settings["seed"]))
            return real(model, prompts, **settings)

        counted.__signature__ = inspect.signature(localize.random_units)
        monkeypatch.setattr(localize, "random_units", counted)
        grid = {**ONE, "objectives": ["injection", "entropy"], "lrs": [1e-3, 5e-3]}
        compare(world, facts, folder=tmp_path, **grid)
        sets = [facts.prompts(world).split(forget=5, seed=seed)[0].fingerprint for seed in (101, 0)]
        assert asked == list(zip(sets, (101, 0)))

    @pytest.mark.training
    def test_a_localizer_that_finds_nothing_is_a_row_with_a_note(self, world, facts, tmp_path, monkeypatch):
        real = localize.fact_lookup

        def blind(model, prompts, seed=0):
            if seed == 1:
                raise MechunlearnError("The probe needs more answers.")
            found = real(model, prompts)
            scores = {site: torch.zeros_like(score) for site, score in found.scores.items()}
            return dataclasses.replace(found, scores=scores, note="no window found")

        monkeypatch.setattr(localize, "fact_lookup", blind)
        grid = {**ONE, "localizers": ["fact_lookup", "random_units"], "budgets": ["window", 0.02], "seeds": 2}
        made = compare(world, facts, folder=tmp_path, **grid)
        notes = {(row.localizer, row.budget): row.note for row in made.summary().itertuples()}
        unset = "2 of 2: no setting: nothing was found on the validation sets, or every setting diverged"
        assert notes["fact_lookup", "0.02"] == f"none qualifies; {unset}"
        assert notes["random_units", "window"] == f"none qualifies; {unset}"
        assert notes["random_units", "0.02"] in ("", "none qualifies")
        trials = {(row.localizer, row.budget): row.note for row in rows(made, stage="validation").itertuples()}
        assert trials["fact_lookup", "0.02"] == "no window found"
        assert trials["random_units", "window"] == "no budget: no window found"
        assert made.summary().set_index("localizer").loc["fact_lookup", "truth"].tolist() == ["–", "–"]
        assert rows(made, localizer="random_units", budget="0.02").truth.notna().all()

    @pytest.mark.training
    def test_a_test_seed_on_which_nothing_is_found_does_not_count(self, world, facts, tmp_path, monkeypatch):
        real = localize.random_units

        def sometimes(model, prompts, *, seed=0):
            if seed == 1:
                raise MechunlearnError("Nothing here.")
            return real(model, prompts, seed=seed)

        monkeypatch.setattr(localize, "random_units", sometimes)
        made = compare(world, facts, folder=tmp_path, **{**ONE, "seeds": 2})
        row = made.summary().iloc[1]
        assert row.n == "1" and row.note == "none qualifies; 1 of 2: Nothing here." and "[" not in row.truth

    def test_no_unit_that_scores_zero_is_taken(self, made, world, facts):
        made_share = rows(made, stage="test", localizer="fact_lookup", seed=0).share.iloc[0]
        sets = module._Sets(world, facts, 5)
        window, share = sets.mask("fact_lookup", "window", 0)
        found = localize.fact_lookup(world, sets.split(0)[0])
        assert sets.mask("fact_lookup", "0.9", 0)[0] == window == found.above(0)
        assert share == found.share(window) == made_share
        less, part = sets.mask("fact_lookup", "0.01", 0)
        assert 0 < part <= 0.01 < share and less & window == less

    def test_a_budget_too_small_for_a_unit_says_so(self, world, facts):
        with pytest.raises(MechunlearnError, match=r"0.00% of the weights hold no unit"):
            module._Sets(world, facts, 5).mask("random_units", "1e-09", 0)

    def test_a_circuit_counts_by_its_components(self, world, facts):
        sets = module._Sets(world, facts, 5)
        mask, share = sets.mask("edge_attribution", "0.05", 0)
        found = localize.edge_attribution(world, sets.split(0)[0]).nodes()
        assert mask == found.top(weights=0.05) and 0 < share <= 0.05

    def test_an_edit_that_diverges_is_a_row_with_a_note(self, world, facts, tmp_path, monkeypatch):
        def fragile(*arguments, lr, **settings):
            if lr > 5e-3:
                raise MechunlearnError("The forget term is inf.")
            return masked_gradient(*arguments, lr=lr, **settings)

        monkeypatch.setattr(module, "masked_gradient", fragile)
        made = compare(world, facts, folder=tmp_path, **{**ONE, "lrs": [5e-3, 6e-3]})
        trials = rows(made, stage="validation").set_index("lr")
        assert (
            trials.note[6e-3] == "The forget term is inf." and pd.isna(trials.truth[6e-3]) and trials.note[5e-3] == ""
        )
        assert rows(made, stage="test").lr.tolist() == [5e-3]

    def test_an_interrupted_edit_is_not_kept(self, world, facts, tmp_path, monkeypatch):
        def interrupted(*arguments, **settings):
            edit = masked_gradient(*arguments, **settings)
            return dataclasses.replace(edit, card=dataclasses.replace(edit.card, stopped="interrupted"))

        monkeypatch.setattr(module, "masked_gradient", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(world, facts, folder=tmp_path, **ONE)
        assert not cells(tmp_path)

    def test_facts_without_text_and_relations_are_measured_as_far_as_they_go(self, world, tmp_path):
        chosen = load_facts("factworld/sport").facts[:40]
        lines = [f"{f.subject},{f.queries['statement'].prompt},{f.answer}" for f in chosen]
        (tmp_path / "mine.csv").write_text("\n".join(["subject,prompt,answer", *lines]) + "\n")
        made = compare(world, load_facts(tmp_path / "mine.csv"), folder=tmp_path / "grid", **ONE)
        assert made.frame[["generalization", "same_subject", "text_loss"]].isna().all(axis=None)
        assert {"efficacy", "truth", "retention"} <= set(made.summary()) and "text_loss" not in made.summary()


@pytest.mark.training
class TestAttack:
    @pytest.mark.parametrize("outcome", ["measured", "collapsed"])
    def test_the_edit_is_attacked_with_its_own_sets(self, world, facts, tmp_path, monkeypatch, outcome):
        seen = []

        def relearning(model, edit, forget, retain, *, seed):
            with edit.applied(model):
                seen.append((measure(model, forget)["accuracy"].mean(), retain.fingerprint, seed))
            return pd.DataFrame()

        def recovery(found):
            rows = [{"state": "unedited", "recovery": 1.0, "outcome": "measured"}]
            rows.append(
                {"state": "edited", "recovery": 0.25 if outcome == "measured" else float("nan"), "outcome": outcome}
            )
            return pd.DataFrame(rows).set_index("state")

        attack = importlib.import_module("mechunlearn.attack.relearning")  # its name is the function's too
        monkeypatch.setattr(attack, "relearning", relearning)
        monkeypatch.setattr("mechunlearn.attack.bounds.recovery", recovery)
        grid = {
            **ONE,
            "budgets": [0.1],
        }  # on each of five sets of facts the truth fell to 0 so, and to .8 or not at all with .02
        made = compare(world, facts, folder=tmp_path, **grid, attack=True)
        row = rows(made, stage="test").iloc[0]
        assert seen == [(row.truth, facts.prompts(world).split(5, seed=0)[1].fingerprint, 0)], "test cells only"
        if outcome == "measured":
            assert row.recovery == 0.25 and row.note == "" and made.summary().recovery[1] == "0.25"
        else:
            assert pd.isna(row.recovery) and row.note == "every attack setting broke the model" and row.truth < 1

    def test_an_attack_that_cannot_be_made_leaves_the_rest_of_the_row(self, world, facts, tmp_path):
        made = compare(world, facts, folder=tmp_path, **{**ONE, "forget": 1}, attack=True)
        row = rows(made, stage="test").iloc[0]
        assert pd.isna(row.recovery) and row.note and row.retention > 0


def test_every_localizer_of_facts_can_be_compared():
    names = ready_methods("localize")
    assert check_grid(names, ["npo"], [0.1], 1, [1e-3], [1], 1)["localizers"] == list(names)


class TestComparison:
    @pytest.fixture
    def frame(self) -> pd.DataFrame:
        """Two localizers on three seeds; one of them has no third."""
        values = {"fact_lookup": {0: 0.5, 1: 0.7}, "random_units": {2: 0.0, 1: 0.2, 0: 0.3}}
        tests = [
            {"stage": "test", "localizer": name, "objective": "npo", "budget": "0.1", "seed": seed, "truth": truth}
            for name, by_seed in values.items()
            for seed, truth in by_seed.items()
        ]
        gone = {"stage": "test", "localizer": "fact_lookup", "objective": "npo", "budget": "0.1", "seed": 2}
        return Comparison.of(
            [{"stage": "unedited", "seed": 0, "truth": 1.0}, *tests, {**gone, "note": "no window"}], {}
        ).frame

    def test_differences_are_paired_by_seed(self, frame):
        row = Comparison(frame, {}).differences().iloc[0]
        assert (row.localizer, row.n, row.truth) == ("fact_lookup", "2", "+0.35 [-1.56, +2.26]")
        assert len(Comparison(frame, {}).differences()) == 1
        assert Comparison(frame, {}).differences(short=True).truth[0] == "+0.35±1.91"

    def test_summary_has_means_with_intervals_and_says_what_is_missing(self, frame):
        shown = Comparison(frame, {}).summary().set_index("localizer")
        assert shown.truth["fact_lookup"] == "0.60 [-0.67, 1.87]" and shown.n["fact_lookup"] == "2"
        assert shown.note["fact_lookup"] == "1 of 3: no window"
        assert shown.truth["unedited"] == "1.00", "one seed has no interval"
        assert shown.truth["random_units"] == "0.17 [-0.21, 0.55]", "Student's t of 0, .2 and .3"

    def test_without_a_control_there_are_no_differences(self, frame):
        assert len(Comparison(frame[frame.localizer != "random_units"], {}).differences()) == 0


def call(*arguments: object) -> int:
    """Run the command line in this process."""
    sys.argv = ["mechunlearn", "compare", "factworld", "factworld/sport", *map(str, arguments)]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(autouse=True)
def arguments_are_put_back(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--localizers", "fact_lookup,rome"],
            "Unknown localizer 'rome'. Expected one or more of activation_patching, ",
        ),
        (["--objectives", "npo,oblivion"], "Unknown objective 'oblivion'. Expected one or more of injection, log_"),
        (["--objectives", ","], "Unknown objective ''"),
        (["--budgets", "0.05,1.5"], "A budget of 1.5 is out of range"),
        (["--budgets", "0"], "A budget of 0 is out of range"),
        (["--budgets", "half"], "A budget of half is out of range"),
        (["--budgets", "nan"], "A budget of nan is out of range"),
        (["--budgets", ""], "No budget is given"),
        (["--seeds", "0"], "0 seeds are out of range. Expected 1 to 100."),
        (["--seeds", "101"], "101 seeds are out of range"),
        (["--validation", "7"], "7 validation sets are out of range. Expected 1 to 6."),
        (["--validation", "0"], "0 validation sets are out of range"),
        (["--lrs", "0,1e-3"], "Expected one or more learning rates above 0, not 0, 0.001."),
        (["--lrs", "fast"], "--lrs fast is not a list of numbers"),
        (["--forget-weights", "-1"], "Expected one or more forget weights above 0, not -1."),
        (["--forget", "900"], "Cannot forget 900 of 800"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(tmp_path, capsys, arguments, message):
    assert call(*arguments, "-o", tmp_path / "grid") == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / "table.md").write_text("mine")
    quick = {"localizers": "random_units", "budgets": 0.01, "seeds": 1, "lrs": 1e-3, "validation": 1, "steps": 1}
    assert call(*(part for k, v in quick.items() for part in (f"--{k}", v)), "--forget", 2, "-o", tmp_path) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"] and (tmp_path / "table.md").read_text() == "mine"


def test_a_localization_is_no_name_of_a_localizer(world):
    """Past the type checker of the tests, as users call it."""
    with pytest.raises(MechunlearnError, match=r"got a Localization.*found.above\(0\) or found.top\(weights=0.05\)"):
        inspect.unwrap(check_grid)([localize.random_units(world)], ["npo"], ["window"], 1, [1], [1], 1)


def test_names_are_kept_in_order_once():
    kept = check_grid(
        ["random_units", "random_units"], ["npo", "kl", "npo"], [0.1, "0.10", "window"], 1, [2, 1, 2], [1], 1
    )
    assert kept["localizers"] == ["random_units"] and kept["objectives"] == ["npo", "kl"]
    assert kept["budgets"] == ["0.1", "window"] and kept["lrs"] == [1.0, 2.0]


TINY = {
    "localizers": ["attribution_patching", "random_units"],
    "objectives": ["injection", "npo"],
    "budgets": [0.01],
    "seeds": 2,
    "lrs": [1e-3],
    "forget_weights": [1.0],
    "forget": 8,
    "steps": 2,
    "validation": 1,
}


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_ends_as_one_that_ran_in_peace(world, tmp_path):
    """The real command, killed after 1, 2 and 3 new cells and a random delay; the reference ran here, undisturbed."""
    chosen = load_facts("factworld/sport").facts[:60]
    lines = [f"{f.subject},{f.queries['statement'].prompt},{f.answer},{f.target}" for f in chosen]
    (tmp_path / "sport.csv").write_text("\n".join(["subject,prompt,answer,target", *lines]) + "\n")
    facts = load_facts(tmp_path / "sport.csv")
    undisturbed = compare(world, facts, folder=tmp_path / "reference", **TINY)
    folder, total, rng = tmp_path / "grid", 4 + 2 + 8, random.Random(0)
    options = {
        name: ",".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in TINY.items()
    }
    command = [sys.executable, "-m", "mechunlearn.cli.main", "compare", "factworld", str(tmp_path / "sport.csv")]
    command += ["-o", str(folder), *(part for k, v in options.items() for part in (f"--{k.replace('_', '-')}", v))]
    started = partial(subprocess.Popen, command, stdout=subprocess.DEVNULL)  # with as many threads as here

    kept: dict[Path, int] = {}
    for new in (1, 2, 3):
        process = started()
        while len(cells(folder)) < len(kept) + new and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.wait()
        now = cells(folder)
        assert {path: now.get(path) for path in kept} == kept, "a finished cell was made again"
        assert len(kept) + new <= len(now) < total, "killed too late to show anything"
        kept = now
        assert not (folder / "table.md").exists()
    assert started().wait() == 0
    last = cells(folder)
    assert {path: last[path] for path in kept} == kept and len(last) == total
    assert (folder / "table.md").read_bytes() == (tmp_path / "reference/table.md").read_bytes()
    table = pd.read_parquet(folder / "results.parquet").drop(columns="seconds")
    pd.testing.assert_frame_equal(table, undisturbed.frame.drop(columns="seconds"), check_exact=True, check_dtype=False)
    assert json.loads((folder / "about.json").read_text())["seeds"] == 2
