"""`mechunlearn benchmark tofu`: its table is what `tofu.evaluate` says of each edit, it resumes, and results of open-unlearning mix in."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from mechunlearn import ComponentMask, MechunlearnError
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.benchmarks import asking, tofu
from mechunlearn.benchmarks.compare import compare_methods, needed_splits
from mechunlearn.benchmarks.finetune import _Checkpoint, finetune
from mechunlearn.benchmarks.leaderboard import FULL, OTHERS, RETAIN
from mechunlearn.benchmarks.methods import best_units, check_methods, method_of
from mechunlearn.benchmarks.open_unlearning import from_open_unlearning, to_open_unlearning
from mechunlearn.benchmarks.published import METRICS, SPLITS, published
from mechunlearn.core.runcard import RunCard
from mechunlearn.edit import fisher_lora, masked_gradient
from mechunlearn.edit.objective import objective_named
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import load_model
from tests.plain import bytewise, rows_of

FORGET, TOKENS = "forget01", 3
SETTINGS = {"forget": FORGET, "tokens": TOKENS, "lr": 3e-3, "steps": 2, "progress": False}


@pytest.fixture(scope="module")
def tiny():
    return bytewise()


@pytest.fixture(scope="module")
def gold(tiny):
    """The same with other numbers in one matrix."""
    other = bytewise()
    with torch.no_grad():
        next(other.hf.parameters()).mul_(0.5)
    return other


@pytest.fixture(scope="module")
def data():
    rows = rows_of(10)
    splits = needed_splits(FORGET)
    return {split: rows[i : i + 4] for i, split in enumerate(splits)} | {"forget01_perturbed": rows[:4]}


def made_plainly(model, data, name: str, seed: int) -> WeightEdit:
    """The edit of a method, made by calling localizer and editor."""
    forget, retain = (asking.as_prompts(model, data[split], split) for split in (FORGET, "retain99"))
    given = {"lr": 3e-3, "steps": 2, "text_weight": 0, "seed": seed}
    everything = ComponentMask.everything(model)
    if name == "lora+ihl":
        return fisher_lora(model, everything, forget, retain, **given | objective_named("inverted_hinge", everything))
    mask = everything
    if name.startswith("masked"):
        from mechunlearn.localize import random_units

        mask = random_units(model, seed=seed).top(weights=0.1)
    return masked_gradient(model, mask, forget, retain, **given | objective_named("npo", mask))


class TestTable:
    METHODS = ("full+npo", "lora+ihl", "masked:random_units:0.1+npo")

    @pytest.fixture(scope="class")
    def board(self, tiny, gold, data, tmp_path_factory):
        folder = tmp_path_factory.mktemp("board")
        return folder, compare_methods(tiny, data, self.METHODS, folder=folder, retain_model=gold, seeds=2, **SETTINGS)

    def test_its_figures_are_those_of_evaluate(self, tiny, gold, data, board):
        frame = pd.DataFrame(board[1].to_frame())
        direct = {"forget": FORGET, "tokens": TOKENS, "retain_model": gold}
        expected = {(FULL, 0): tofu.evaluate(tiny, data, **direct), (RETAIN, 0): tofu.evaluate(gold, data, **direct)}
        for name in self.METHODS:
            for seed in (0, 1):
                with made_plainly(tiny, data, name, seed).applied(tiny):
                    expected[name, seed] = tofu.evaluate(tiny, data, **direct)
        assert list(dict.fromkeys(zip(frame["method"], frame["seed"]))) == list(expected)
        told = []
        for (name, seed), scores in expected.items():
            mine = frame[(frame["method"] == name) & (frame["seed"] == seed)].drop(columns=["method", "seed"])
            columns = list(scores.to_frame().columns)
            found = mine[columns].sort_values(["split", "metric"]).reset_index(drop=True)
            wanted = pd.DataFrame(scores.to_frame()).sort_values(["split", "metric"]).reset_index(drop=True)
            pd.testing.assert_frame_equal(found, wanted, rtol=1e-6)
            told.append((name, scores[FORGET, "probability"]))
        assert len({value for _, value in told}) >= 6  # the seeds of full+npo see the same batch
        assert len({value for name, value in told if name.startswith("masked")}) == 2  # those of a mask draw its units
        assert expected[RETAIN, 0][FORGET, "forget_quality"] == 1

    def test_the_share_is_that_of_the_mask(self, board):
        shares = pd.DataFrame(board[1].to_frame()).groupby("method")["share"].first()
        assert shares["full+npo"] == 1 and 0.08 < shares["masked:random_units:0.1+npo"] <= 0.1
        assert math.isnan(shares[FULL])

    def test_the_short_table_has_means_over_seeds(self, board):
        frame = pd.DataFrame(board[1].to_frame())
        at = (frame["split"] == FORGET) & (frame["metric"] == "truth_ratio_closeness")
        found = frame[at].groupby("method")["value"].apply(list)
        low = frame[at & (frame["method"] == FULL)].iloc[0]
        short = pd.DataFrame(board[1].summary()).set_index("method")
        quality = frame[frame["metric"] == "forget_quality"].groupby("method")["value"].apply(list)
        for name in self.METHODS:
            half = stats.t.ppf(0.975, 1) * stats.sem(found[name])
            ends = ", ".join(f"{np.mean(found[name]) + end:.2f}" for end in (-half, half))
            assert short.loc[name, "n"] == "2"
            assert short.loc[name, "forget truth ratio"] == f"{np.mean(found[name]):.2f} [{ends}]"
            low_high = f"[{min(quality[name]):.2g}, {max(quality[name]):.2g}]"
            assert short.loc[name, "forget quality"] == f"{np.median(quality[name]):.2g} {low_high}"
        assert short.loc[FULL, "forget truth ratio"] == f"{low.value:.2f} [{low.low:.2f}, {low.high:.2f}]"

    def test_its_files_are_whole_and_agree(self, board):
        folder, made = board
        names = ["about.json", "cells", "open-unlearning", "results.csv", "results.html", "results.parquet"]
        assert sorted(path.name for path in folder.iterdir()) == [*names, "table.md", "table.tex"]
        frame = pd.DataFrame(made.to_frame())
        pd.testing.assert_frame_equal(pd.read_parquet(folder / "results.parquet"), frame)
        assert list(pd.read_csv(folder / "results.csv")["value"].round(9)) == list(frame["value"].round(9))
        page = (folder / "results.html").read_text()
        assert "http" not in page and "<script" not in page and "</html>" in page
        for text in ((folder / "table.md").read_text(), (folder / "table.tex").read_text().replace("\\_", "_"), page):
            assert all(name in text for name in (*self.METHODS, FULL, RETAIN))

    def test_what_others_published_is_apart_and_has_its_source(self, board):
        folder, _ = board
        for name, heading in (("results.html", "<h2>"), ("table.md", "## ")):
            own, _, theirs = (folder / name).read_text().partition(f"{heading}{OTHERS}")
            theirs = theirs.partition("<details>")[0]
            assert all(each in own and each not in theirs for each in (FULL, RETAIN, "lora+ihl"))
            for part in (
                "IdkDPO",
                "Llama-3.2-1B-Instruct",
                "0.92",
                "3.02e-03",
                "docs/repro.md at commit 7fa0b55",
                "2026",
            ):
                assert part in theirs and part not in own, part
            assert "not comparable" in theirs and "1.06e-239" not in theirs  # that is forget10's
        for name in ("results.csv", "table.tex"):
            assert "IdkDPO" not in (folder / name).read_text()

    def test_without_a_retain_model_it_says_what_is_left_out(self, tiny, data, tmp_path):
        made = compare_methods(tiny, data, ["full+ga"], folder=tmp_path, **SETTINGS)
        assert "forget quality" not in made.summary().columns and [row.method for row in made.rows] == [FULL, "full+ga"]
        assert "no forget quality" in (tmp_path / "table.md").read_text()


def test_the_published_figures_are_whole():
    """24 rows of three figures: probabilities and shares, the retain model's forget quality being 1."""
    for forget in SPLITS:
        frame = published(forget)
        assert frame.groupby("model")["method"].apply(list).str.len().tolist() == [8, 8]
        numbers = frame[list(METRICS)].astype(float)
        assert ((numbers >= 0) & (numbers <= 1)).all(axis=None)
        retain = frame[frame["method"] == "Retain"]
        assert (
            retain["forget quality"].tolist() == ["1.0", "1.0"]
            and (retain["forget truth ratio"].astype(float) > 0.6).all()
        )
    at = published("forget05").set_index(["model", "method"]).loc[("Llama-2-7b-hf-chat", "SimNPO")]
    assert at.tolist() == ["1.06e-106", "0.6", "3.94e-05"]
    with pytest.raises(
        MechunlearnError, match="no forget set 'forget02'. Expected one of forget01, forget05, forget10"
    ):
        published("forget02")


class TestResume:
    def test_a_second_call_makes_and_measures_nothing(self, tiny, gold, data, tmp_path, monkeypatch):
        calls = []

        def mine(model, forget, retain, seed):
            calls.append(seed)
            return made_plainly(model, data, "full+npo", seed)

        given = {"folder": tmp_path, "seeds": 2, **SETTINGS}
        first = compare_methods(tiny, data, [mine, "full+npo"], retain_model=gold, **given)
        assert calls == [0, 1]
        for name in ("tofu.evaluate", "methods.masked_gradient"):
            monkeypatch.setattr(f"mechunlearn.benchmarks.{name}", lambda *given, **settings: pytest.fail("made again"))
        again = compare_methods(tiny, data, [mine, "full+npo"], retain_model=gold, **given)
        assert calls == [0, 1]
        pd.testing.assert_frame_equal(pd.DataFrame(first.to_frame()), pd.DataFrame(again.to_frame()))

    def test_a_killed_run_goes_on_and_methods_can_be_added(self, tiny, gold, data, tmp_path):
        calls = []

        def first(model, forget, retain, seed):
            calls.append(f"first {seed}")
            return made_plainly(model, data, "full+npo", seed)

        def second(model, forget, retain, seed):
            calls.append(f"second {seed}")
            if len(calls) == 3:
                raise KeyboardInterrupt
            return made_plainly(model, data, "full+npo", seed)

        given = {"folder": tmp_path, "seeds": 2, **SETTINGS}
        with pytest.raises(KeyboardInterrupt):
            compare_methods(tiny, data, [first, second], **given)
        assert not (tmp_path / "table.md").exists()
        made = compare_methods(tiny, data, [first, second, "full+ga"], retain_model=gold, **given)
        assert calls == ["first 0", "first 1", "second 0", "second 0", "second 1"]
        assert len(made.rows) == 8 and all(row.scores is not None for row in made.rows)

    def test_an_edit_that_was_interrupted_is_no_result(self, tiny, data, tmp_path):
        def mine(model, forget, retain):
            return WeightEdit({}, {}, model.signature, RunCard("mine", stopped="interrupted"))

        with pytest.raises(KeyboardInterrupt):
            compare_methods(tiny, data, [mine], folder=tmp_path, **SETTINGS)
        assert len(list((tmp_path / "cells").iterdir())) == 1  # the full model

    def test_a_changed_function_is_run_again_and_one_without_a_seed_once(self, tiny, data, tmp_path):
        calls = []

        def mine(model, forget, retain):
            calls.append("one")
            return made_plainly(model, data, "full+npo", 0)

        one = mine

        def mine(model, forget, retain):
            calls.append("another")
            return made_plainly(model, data, "lora+ihl", 0)

        for method in (one, mine, one):
            compare_methods(tiny, data, [method], folder=tmp_path, seeds=3, **SETTINGS)
        assert calls == ["one", "another"]

    def test_another_model_or_setting_is_refused(self, tiny, gold, data, tmp_path):
        compare_methods(tiny, data, ["full+ga"], folder=tmp_path, **SETTINGS)
        with pytest.raises(MechunlearnError, match="something else: lr"):
            compare_methods(tiny, data, ["full+ga"], folder=tmp_path, **SETTINGS | {"lr": 1e-3})
        with pytest.raises(MechunlearnError, match="something else: weights"):
            compare_methods(gold, data, ["full+ga"], folder=tmp_path, **SETTINGS)


class TestFailures:
    def test_a_failing_method_keeps_its_reason_and_the_others_go_on(self, tiny, data, tmp_path):
        calls = []

        def broken(model, forget, retain):
            calls.append(1)
            raise ZeroDivisionError("nothing left to divide")

        def diverged(model, forget, retain):
            edit = made_plainly(model, data, "full+npo", 0)
            rows = {site: 1e30 * row for site, row in edit.rows.items()}
            return replace(edit, rows=rows)

        methods = [broken, diverged, "masked:random_units:0.00001+npo", "full+npo"]
        for _ in range(2):
            made = compare_methods(tiny, data, methods, folder=tmp_path, **SETTINGS)
        assert calls == [1, 1], "the next run tries it again"
        rows = {row.method: row for row in made.rows}
        assert rows["broken"].note == "ZeroDivisionError: nothing left to divide"
        assert rows["full+npo"].scores is not None and not rows["full+npo"].note
        assert rows["diverged"].note and rows["diverged"].scores is None
        assert "no unit within" in rows["masked:random_units:0.00001+npo"].note
        assert "nothing left to divide" in (tmp_path / "table.md").read_text()
        frame = pd.read_csv(tmp_path / "results.csv")
        assert frame[frame["method"] == "broken"]["value"].isna().tolist() == [True]

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("npo", "Expected WHERE\\+OBJECTIVE"),
            ("half+npo", "Expected WHERE\\+OBJECTIVE"),
            ("masked+npo", "Expected WHERE\\+OBJECTIVE"),
            ("full:0.1+npo", "Expected WHERE\\+OBJECTIVE"),
            ("full+nqo", "Unknown objective 'nqo'.*npo"),
            ("masked:random_unit+npo", "Unknown localizer 'random_unit'. Did you mean random_units"),
            ("masked:feature_discovery+npo", "needs dictionary too"),
            ("masked:random_units:2+npo", "share '2'"),
            ("masked:random_units:0+npo", "share '0'"),
            ("masked:random_units:x+npo", "share 'x'"),
            ("masked:random_units:+npo", "share ''"),
            ("masked:attribution_patching:0.1+npo", "needs the subject of each question"),
        ],
    )
    def test_a_bad_name_is_one_line_before_any_work(self, tiny, data, tmp_path, name, said):
        with pytest.raises(MechunlearnError, match=said):
            compare_methods(tiny, data, ["full+npo", name], folder=tmp_path / "new", **SETTINGS)
        assert not (tmp_path / "new").exists()

    def test_names_of_objectives_and_twins(self, data):
        assert [each.name for each in check_methods(["full+ga", "full+gradient_ascent"], data[FORGET])] == [
            "full+ga",
            "full+gradient_ascent",
        ]
        with pytest.raises(MechunlearnError, match="Two methods are called"):
            check_methods([lambda model, forget, retain: None, lambda model, forget, retain: 1], data[FORGET])
        with pytest.raises(MechunlearnError, match="No method"):
            check_methods([], data[FORGET])


def test_questions_that_name_a_subject_can_be_localized(tiny, data, tmp_path):
    rows = [
        replace(row, subject=row.question.removeprefix("Where was ").removesuffix(" born?")) for row in data[FORGET]
    ]
    (method,) = check_methods(["masked:attribution_patching:0.1+npo"], rows)
    prompts = asking.as_prompts(tiny, rows)
    assert [query.subject for query in prompts.queries] == [row.subject for row in rows]
    mask = best_units(tiny, method.localizer, 0.1, prompts, seed=0)
    assert 0 < mask.weights(tiny) <= 0.1 * ComponentMask.everything(tiny).weights(tiny)
    (tmp_path / "forget01.json").write_text(json.dumps([{"question": "Who is Ann?", "answer": "x", "subject": "Ann"}]))
    assert tofu.load(tmp_path)["forget01"][0].subject == "Ann"
    without = asking.as_prompts(tiny, data[FORGET])
    with pytest.raises(MechunlearnError, match="nothing can be found"):
        best_units(tiny, "attribution_patching", 0.1, without, seed=0)


THEIRS = {
    "forget_Q_A_Prob": {"agg_value": 0.25, "value_by_index": {"0": {"prob": 0.125}, "1": {"prob": 0.375}}},
    "forget_Q_A_ROUGE": {"agg_value": 0.5, "value_by_index": {"0": {"rougeL_recall": 0.5, "rougeL_f1": 0.1}}},
    "forget_truth_ratio": {"agg_value": 0.9, "value_by_index": {"0": {"score": 0.5}, "1": {"score": 4.0}}},
    "forget_quality": {"agg_value": 0.0625},
    "model_utility": {"agg_value": 0.6},
    "ra_Truth_Ratio": {"agg_value": 0.25, "value_by_index": {"0": {"score": 0.5}, "1": {"score": 4.0}}},
    "mia_loss": {"agg_value": 0.3},
}


class TestOpenUnlearning:
    def test_a_file_of_theirs_is_a_row_beside_ours(self, tiny, data, tmp_path):
        (tmp_path / "theirs.json").write_text(json.dumps(THEIRS))
        (tmp_path / "short.json").write_text(json.dumps({name: each["agg_value"] for name, each in THEIRS.items()}))
        made = compare_methods(tiny, data, ["full+ga"], folder=tmp_path / "out", **SETTINGS)
        both = made.beside("their NPO", tmp_path / "theirs.json").beside("short", tmp_path / "short.json")
        frame = pd.DataFrame(both.to_frame()).set_index(["method", "split", "metric"])["value"]
        for name, closeness in (("their NPO", 0.375), ("short", 0.9)):  # min(R, 1/R) of .5 and 4
            assert frame[name, FORGET, "probability"] == 0.25 and frame[name, FORGET, "rouge_l_recall"] == 0.5
            assert frame[name, FORGET, "truth_ratio_closeness"] == closeness
            assert frame[name, FORGET, "forget_quality"] == 0.0625 and frame[name, "all", "model_utility"] == 0.6
            assert frame[name, "real_authors", "truth_preference"] == 0.25
        short = pd.DataFrame(both.summary()).set_index("method")
        assert short.loc["their NPO", "model utility"] == "0.60" and short.loc["full+ga", "forget quality"] == "–"
        assert short.loc["short", "forget probability"] == "0.25"

    def test_ours_are_in_their_layout_and_come_back(self, tiny, gold, data, tmp_path):
        made = compare_methods(tiny, data, ["full+ga"], folder=tmp_path, retain_model=gold, **SETTINGS)
        files = sorted((tmp_path / "open-unlearning").rglob("*.json"))
        assert [file.name for file in files] == ["TOFU_EVAL.json", "TOFU_SUMMARY.json"] * 3
        row = next(row for row in made.rows if row.method == "full+ga")
        file = tmp_path / "open-unlearning/full+ga/seed0/TOFU_EVAL.json"
        told, short = json.loads(file.read_text()), json.loads(file.with_name("TOFU_SUMMARY.json").read_text())
        assert short == {name: each["agg_value"] for name, each in told.items()}
        assert set(short) == {
            *(f"forget_{name}" for name in ("quality", "Q_A_Prob", "Q_A_ROUGE", "truth_ratio")),
            *(f"{name}_Q_A_Prob" for name in ("retain",)),
            *(f"{name}_Q_A_Prob_normalised" for name in ("ra", "wf")),
            *(f"{name}_{each}" for name in ("retain", "ra", "wf") for each in ("Q_A_ROUGE", "Truth_Ratio")),
            *("exact_memorization", "extraction_strength", "model_utility"),
        }
        ratios = row.scores.values[FORGET, "truth_ratio"].tolist()
        assert [each["score"] for each in told["forget_truth_ratio"]["value_by_index"].values()] == ratios
        assert told["forget_Q_A_ROUGE"]["value_by_index"]["0"].keys() == {"rougeL_recall"}
        back = from_open_unlearning(file, FORGET)
        again = to_open_unlearning(back, FORGET)
        assert again.keys() == told.keys()
        for name, each in told.items():
            assert again[name]["agg_value"] == pytest.approx(each["agg_value"], rel=1e-6), name
            assert again[name].get("value_by_index") == each.get("value_by_index"), name
        assert back[FORGET, "forget_quality"] == row.scores[FORGET, "forget_quality"]

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"mia_loss": 1}', '{"forget_quality": "x"}',
                                      '{"forget_Q_A_Prob": {"value_by_index": {"0": 1}}}'])  # fmt: skip
    def test_another_file_is_one_line(self, tmp_path, text):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(MechunlearnError, match=r"x\.json'"):
            from_open_unlearning(tmp_path / "x.json", FORGET)
        with pytest.raises(MechunlearnError, match="none.json"):
            from_open_unlearning(tmp_path / "none.json", FORGET)


@pytest.fixture
def given(tiny, gold, data, tmp_path, capsys):
    """Models and data in folders, as a user has them."""
    for name, model in (("full", tiny), ("retain", gold)):
        model.hf.save_pretrained(tmp_path / name)
        model.tokenizer.save_pretrained(tmp_path / name)
    for split, rows in data.items():
        lines = [
            {
                "question": row.question,
                "answer": row.answer,
                "paraphrased_answer": row.paraphrased_answer,
                "perturbed_answer": list(row.perturbed_answers),
            }
            for row in rows
        ]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.json").write_text(json.dumps(lines))
    capsys.readouterr()  # the bars of save_pretrained
    return ["benchmark", "tofu", "full", "--data", "data", "--split", FORGET, "--lr", "1e-3", "--steps", 1]


class TestCommand:
    def test_the_command_is_the_function(self, call, given, tiny, gold, data, tmp_path, monkeypatch):
        import mechunlearn.benchmarks.compare as module

        monkeypatch.setattr(module, "compare_methods", partial(compare_methods, tokens=TOKENS))
        methods = "full+npo, masked:random_units:0.1+ihl"
        code, out, err = call(*given, "--methods", methods, "--retain", "retain", "--rows", 3, "-o", "out")
        assert code == 0, err
        assert "forget quality" in out and "out/results.html" in out
        settings = SETTINGS | {"rows": 3, "lr": 1e-3, "steps": 1}
        names = methods.split(", ")
        made = compare_methods(tiny, data, names, folder=tmp_path / "by hand", retain_model=gold, **settings)
        here, there = (pd.read_csv(tmp_path / name / "results.csv") for name in ("out", "by hand"))
        pd.testing.assert_frame_equal(here, there, rtol=1e-4)
        assert set(here["n"]) == {3, 9} and len(made.rows) == 4

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            (["--methods", "full+nqo"], "Unknown objective"),
            (["--methods", ""], "No method is given"),
            (["--methods", "masked:causal_tracing+npo"], "needs the subject"),
            (["--split", "forget02"], "no forget set 'forget02'"),
            (["--split", "forget05"], "lacks forget05.json"),
            (["--data", "no/such/data"], "no/such/data"),
            (["--retain", "nothing"], "nothing"),
            (["--rows", 0], "0 rows"),
            (["--seeds", 0], "0 seeds"),
            (["--steps", 10**7], "10000000 is out of range"),
            (["--lr", "nan"], "learning rate of nan"),
            (["-o", "data"], "not an empty folder"),
        ],
    )
    def test_a_wrong_value_is_one_line_and_leaves_nothing(self, call, given, tmp_path, wrong, said):
        before = sorted(tmp_path.rglob("*"))
        code, _, err = call(*given, "--methods", "full+npo", "-o", "out", *wrong)
        assert code == 2 and said in err and len(err.splitlines()) == 1, err
        assert sorted(tmp_path.rglob("*")) == before

    def test_it_says_that_the_gold_is_missing(self, call, given, monkeypatch, tmp_path):
        import mechunlearn.benchmarks.compare as module

        monkeypatch.setattr(module, "compare_methods", partial(compare_methods, tokens=TOKENS))
        code, out, err = call(*given, "--methods", "full+npo", "-o", "out")
        assert code == 0 and "No retain model was given" in out and "full+npo" in out, err


def test_an_editor_sees_the_questions_and_the_named_seed(tiny, data, tmp_path):
    seen = []

    def mine(model, forget, retain, seed):
        seen.append((forget, retain, seed))
        return WeightEdit({}, {}, model.signature, RunCard("mine"))

    made = compare_methods(tiny, data, [mine], folder=tmp_path, **SETTINGS)
    ((forget, retain, seed),) = seen
    assert isinstance(forget, Prompts) and [query.answer for query in forget.queries] == [
        row.answer for row in data[FORGET]
    ]
    assert [query.answer for query in retain.queries] == [row.answer for row in data["retain99"]] and seed == 0
    full, edited = made.rows
    assert edited.scores[FORGET, "probability"] == full.scores[FORGET, "probability"]  # an edit of nothing


def test_a_method_by_name_knows_its_localizer():
    assert method_of("masked:random_units+npo").localizer == "random_units" and not method_of("lora+ihl").localizer
    assert not method_of("full+npo").code


class TestFinetuning:
    def test_it_is_adamw_on_the_answers_and_their_end(self, data):
        """As a plain loop over plain transformers does it."""
        model, plain = bytewise(), bytewise()
        rows = data[FORGET][:3]
        done = finetune(model, rows, lr=1e-3, epochs=4)
        tokenizer, end = plain.tokenizer, plain.tokenizer.eos_token_id
        mover = torch.optim.AdamW(plain.hf.parameters(), weight_decay=0.01)
        plain.hf.requires_grad_(True)
        losses = []
        for step in range(4):
            told = []
            for row in rows:
                before = tokenizer(f"Question: {row.question}\nAnswer:")["input_ids"]
                ids = torch.tensor([before + tokenizer(" " + row.answer)["input_ids"] + [end]])
                logits = plain.hf(ids).logits[0, len(before) - 1 : -1]
                told.append(torch.nn.functional.cross_entropy(logits, ids[0, len(before) :], reduction="none"))
            loss = torch.cat(told).mean()
            losses.append(loss.item())
            mover.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.hf.parameters(), 1.0)
            mover.param_groups[0]["lr"] = 1e-3 * (1 if step == 0 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 3)))
            mover.step()
        assert [entry["answers"] for entry in done.trajectory] == pytest.approx(losses, rel=1e-3)
        assert losses[-1] < losses[0] and model.fingerprint != bytewise().fingerprint
        for mine, theirs in zip(model.hf.parameters(), plain.hf.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-4)
            assert float(mine.norm()) == pytest.approx(float(theirs.norm()), rel=2e-4)

    @pytest.fixture
    def killed(self, data, tmp_path, monkeypatch):
        """A checkpoint of two epochs out of four of two steps: the call was killed in the third."""
        rows, settings, file = (
            data[FORGET][:3],
            {"lr": 1e-3, "epochs": 4, "batch_size": 2},
            tmp_path / "kept.safetensors",
        )
        note = _Checkpoint.note

        def noted(kept: _Checkpoint, entry: dict) -> bool:
            if entry["step"] == 5:
                raise ValueError("killed")
            return note(kept, entry)

        with monkeypatch.context() as patch, pytest.raises(ValueError, match="killed"):
            patch.setattr(_Checkpoint, "note", noted)
            finetune(bytewise(), rows, **settings, checkpoint=file)
        return rows, settings, file

    def test_killed_it_goes_on_after_the_last_whole_epoch(self, killed, monkeypatch):
        rows, settings, file = killed
        whole, again, steps, note = bytewise(), bytewise(), [], _Checkpoint.note
        done = finetune(whole, rows, **settings)
        monkeypatch.setattr(_Checkpoint, "note", lambda kept, entry: steps.append(entry["step"]) or note(kept, entry))
        resumed = finetune(again, rows, **settings, checkpoint=file)
        assert steps == [5, 6, 7, 8] and resumed.trajectory == done.trajectory
        assert again.fingerprint == whole.fingerprint
        once_more = bytewise()  # killed while the model was written
        assert finetune(once_more, rows, **settings, checkpoint=file).trajectory == done.trajectory
        assert len(steps) == 4 and once_more.fingerprint == whole.fingerprint

    @pytest.mark.parametrize("other", [{"lr": 2e-3}, {"epochs": 2}, {"seed": 1}, {"batch_size": 1}])
    def test_a_checkpoint_of_another_call_is_refused(self, killed, other):
        rows, settings, file = killed
        with pytest.raises(MechunlearnError, match=r"another model, other rows or settings\. Remove it"):
            finetune(bytewise(), rows, **{**settings, **other}, checkpoint=file)
        with pytest.raises(MechunlearnError, match="other rows"):
            finetune(bytewise(), rows[:2], **settings, checkpoint=file)

    def test_a_damaged_checkpoint_is_refused(self, killed):
        rows, settings, file = killed
        flipped, model = bytearray(file.read_bytes()), bytewise()
        flipped[-5] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(MechunlearnError, match="changed or damaged") as refused:
            finetune(model, rows, **settings, checkpoint=file)
        assert "\n" not in str(refused.value) and model.fingerprint == bytewise().fingerprint

    def test_the_command_writes_a_model_that_the_other_reads(self, call, given, tmp_path):
        made = [
            "benchmark",
            "tofu-train",
            "full",
            "--data",
            "data",
            "--split",
            "retain99",
            "--lr",
            "1e-3",
            "--epochs",
            2,
        ]
        code, out, err = call(*made, "-o", "trained")
        assert code == 0 and "4 rows, 2 steps" in out, err
        before, after = (load_model(name) for name in ("full", "trained"))
        assert not torch.equal(next(before.hf.parameters()), next(after.hf.parameters()))
        assert after.tokenizer.eos_token == "<end>" and not list(tmp_path.glob("*.checkpoint*"))

    def test_a_model_that_could_not_be_written_is_not_trained_again(self, call, given, tmp_path, monkeypatch):
        made = ["benchmark", "tofu-train", "full", "--data", "data", "--split", "retain99", "--lr", "1e-3", "-o", "out"]

        def full(*given: object) -> None:
            raise MechunlearnError("The disk is full.")

        with monkeypatch.context() as patch:
            patch.setattr("mechunlearn.model.hooked.export", full)
            assert call(*made)[0] == 2 and (tmp_path / "out.checkpoint.safetensors").exists()
        with monkeypatch.context() as patch:
            patch.setattr("mechunlearn.benchmarks.finetune.cross_entropy", full)  # no step is taken
            code, out, err = call(*made)
        assert code == 0 and "4 rows, 5 steps" in out and not list(tmp_path.glob("*.checkpoint*")), err

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            (["--split", "zz"], "no split 'zz'"),
            (["--epochs", 0], "0 epochs"),
            (["--lr", -1], "learning rate of -1"),
            (["-o", "data"], "not an empty folder"),
        ],
    )
    def test_a_wrong_value_is_one_line(self, call, given, tmp_path, wrong, said):
        before = sorted(tmp_path.rglob("*"))
        code, _, err = call(
            "benchmark", "tofu-train", "full", "--data", "data", "--split", "retain99", "-o", "out", *wrong
        )
        assert code == 2 and said in err and len(err.splitlines()) == 1, err
        assert sorted(tmp_path.rglob("*")) == before
