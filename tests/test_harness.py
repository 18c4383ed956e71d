"""The lm-evaluation-harness on tasks of local files: right before an edit, wrong after it, and nothing left behind."""

import copy
import json
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from mechunlearn import MechunlearnError
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.evaluation.harness import _beside, _change, _rows, _same_random_numbers, benchmark
from mechunlearn.model.hooked import load_model
from tests.models import random_hf

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
  cache_dir: {cache}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: options
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture(scope="module")
def setup(sixteen, gone):
    return gone, sixteen[0], sixteen[1].select(range(24))


@pytest.fixture
def folder(setup, tmp_path, monkeypatch):
    """Two tasks: the forgotten facts and the retained ones, each with its sport among eight."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    for name, prompts in (("forgotten", setup[1]), ("retained", setup[2])):
        data = tmp_path / f"{name}.jsonl"
        rows = [
            {"prompt": a.prompt, "options": list(a.options), "label": a.options.index(a.answer)}
            for a in prompts.queries
        ]
        data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        task = TASK.format(name=name, data=data, cache=tmp_path / "cache")
        (tmp_path / f"{name}.yaml").write_text(task, encoding="utf-8")
    return tmp_path


def accuracy(rows: pd.DataFrame) -> dict:
    return rows[rows.metric == "acc"].set_index("task")["value"].to_dict()


@pytest.mark.training
def test_an_edit_shows_in_the_benchmark_and_leaves_no_trace(world, setup, folder):
    weights = [p.detach().clone() for p in world.hf.parameters()]
    places = [p.data_ptr() for p in world.hf.parameters()]
    numbers = torch.get_rng_state()
    special, side = dict(world.tokenizer.special_tokens_map), world.tokenizer.padding_side
    numpy = np.random.get_state()[1].copy()

    before = benchmark(world, ["forgotten", "retained"], folder=folder)
    after = benchmark(world, ["forgotten", "retained"], folder=folder, edit=setup[0])

    assert accuracy(before) == {"forgotten": 1, "retained": 1}
    found = accuracy(after)
    assert found["forgotten"] <= 1 / 16 and found["retained"] >= 0.9
    assert list(before.columns) == ["task", "metric", "value", "low", "high", "stderr", "n"]
    low, high = before[["low", "high"]].iloc[0]
    assert (round(low, 4), high) == (0.7941, 1)  # 16 of 16, exactly
    assert before["n"].tolist() == [16, 16, 24, 24]
    assert set(before["metric"]) == {"acc", "acc_norm"} and (before["stderr"] == 0).all()
    card = json.loads(json.dumps(after.attrs["card"]))
    assert (card["method"], card["mask"]) == ("benchmark", setup[0].card.mask)
    assert card["model"] == world.fingerprint == before.attrs["card"]["model"]

    assert all(torch.equal(p, old) for p, old in zip(world.hf.parameters(), weights))
    assert [p.data_ptr() for p in world.hf.parameters()] == places
    assert not world.hf.training
    assert (dict(world.tokenizer.special_tokens_map), world.tokenizer.padding_side) == (special, side)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert (np.random.get_state()[1] == numpy).all()


def test_python_s_random_numbers_are_put_back_too():
    """Apart from the rest, because the type checks of these tests draw such numbers themselves."""
    before = random.getstate()
    with pytest.raises(KeyError), _same_random_numbers():
        random.seed(5)
        raise KeyError
    assert random.getstate() == before


def test_fewer_documents_and_a_tokenizer_that_cannot_pad(world, setup, folder, monkeypatch):
    """The harness gives such a tokenizer a padding token: a copy of it gets that."""
    bare = copy.deepcopy(world.tokenizer)
    bare.pad_token = None
    monkeypatch.setattr(world, "tokenizer", bare)
    rows = benchmark(world, ["forgotten"], folder=folder, limit=5, edit=setup[0])
    assert rows["n"].tolist() == [5, 5]
    assert bare.pad_token is None


@pytest.fixture
def file(setup, tmp_path):
    setup[0].save(tmp_path / "edit.safetensors")
    return tmp_path / "edit.safetensors"


@pytest.fixture
def command(call, file, folder):
    """`mechunlearn benchmark lm-eval` on the tasks of the folder."""
    fixed = ["benchmark", "lm-eval", "factworld", "--edit", file, "--include", folder, "-o", "out"]

    def run(*more):
        return call(*fixed, *more)

    return run


@pytest.mark.training
class TestCommand:
    def test_it_says_what_benchmark_says_before_and_after(self, command, world, setup, folder, file):
        code, out, err = command("--tasks", "forgotten, retained")
        assert code == 0, err
        found = pd.read_csv("out/results.csv")
        for state, edit in (("before", None), ("after", setup[0])):
            direct = benchmark(world, ["forgotten", "retained"], folder=folder, edit=edit)
            for column, name in ((state, "value"), (f"{state}_low", "low"), (f"{state}_high", "high")):
                assert np.allclose(found[column], direct[name]), column
            assert found["n"].tolist() == direct["n"].tolist() and found["task"].tolist() == direct["task"].tolist()
        assert np.allclose(found["change"], found["after"] - found["before"])
        assert (found["change_low"] <= found["change"]).all() and (found["change"] <= found["change_high"]).all()
        assert "0.00 [0.00, 0.2" in out and "1.00 [0.79, 1.00]" in out and "-1.00 [-1.00, " in out
        told = json.loads(Path("out/results.json").read_text())
        assert told["model"].startswith("HookedModel(factworld") and told["card"]["method"] == "masked_gradient"
        assert [row["before"] for row in told["results"]] == found["before"].tolist()
        assert told["versions"]["lm-eval"]

    def test_a_stopped_run_goes_on_and_more_tasks_are_added(self, command, monkeypatch):
        import lm_eval

        plain, asked = lm_eval.simple_evaluate, []

        def counted(*args, **kwargs):
            asked.append(kwargs["tasks"])
            if len(asked) == 2:
                raise KeyboardInterrupt
            return plain(*args, **kwargs)

        monkeypatch.setattr(lm_eval, "simple_evaluate", counted)
        assert command("--tasks", "forgotten")[0] != 0
        assert not Path("out/results.csv").exists()
        assert command("--tasks", "forgotten")[0] == 0
        assert asked == [["forgotten"]] * 3  # before, the stopped one, after
        assert command("--tasks", "forgotten,retained")[0] == 0
        assert asked[3:] == [["retained"]] * 2
        assert pd.read_csv("out/results.csv")["task"].tolist() == ["forgotten"] * 2 + ["retained"] * 2

    def test_another_edit_or_another_task_of_this_name_wants_another_folder(self, command, file, folder):
        assert command("--tasks", "forgotten", "--limit", 2)[0] == 0
        code, _, err = command("--tasks", "forgotten", "--limit", 3)
        assert code == 2 and err.count("\n") == 1 and "limit (2 there, 3 given)" in err
        with (folder / "forgotten.yaml").open("a") as task:
            task.write("description: 'Think.'\n")
        code, _, err = command("--tasks", "forgotten", "--limit", 2)
        assert code == 2 and "include (" in err
        edit = WeightEdit.load(file)
        halved = replace(edit, rows={site: rows / 2 for site, rows in edit.rows.items()})
        halved.save(file)
        code, _, err = command("--tasks", "forgotten", "--limit", 2)
        assert code == 2 and "edit (" in err


class TestCommandMistakes:
    def test_more_examples_than_there_are(self, command):
        code, _, err = command("--tasks", "forgotten", "--shots", 99)
        assert code == 2 and err.strip().splitlines()[-1].startswith(
            "mechunlearn: forgotten: there are fewer documents"
        )
        code, _, err = command("--tasks", "forgotten", "--shots", 10**20)
        assert code == 2 and "out of range" in err

    def test_a_task_that_there_is_not(self, command, monkeypatch):
        from lm_eval.tasks import TaskManager

        listed = partial(TaskManager, include_defaults=False)
        monkeypatch.setattr(
            "lm_eval.tasks.TaskManager", lambda include_path, include_defaults=True: listed(include_path=include_path)
        )
        code, _, err = command("--tasks", "nothing_of_the_kind")
        assert code == 2 and err.count("\n") == 1 and "lm-eval knows no task nothing_of_the_kind. Expected" in err

    def test_data_that_cannot_be_reached(self, command, folder, monkeypatch):
        def unreachable(*args, **kwargs):
            raise ConnectionError("Couldn't reach 'nobody/none' on the Hub\n(a second line)")

        monkeypatch.setattr("datasets.load_dataset", unreachable)
        code, _, err = command("--tasks", "forgotten")
        assert code == 2 and err.count("\n") == 1
        assert (
            "Could not load the data of forgotten: Couldn't reach 'nobody/none' on the Hub. Expected data that" in err
        )
        assert not Path("out/results.csv").exists()

    def test_files_that_there_are_not(self, command, call):
        code, _, err = call(
            "benchmark", "lm-eval", "factworld", "--edit", "none.json", "--tasks", "arc_easy", "-o", "out"
        )
        assert code == 2 and err.count("\n") == 1 and "none.json" in err
        code, _, err = command("--tasks", ",")
        assert code == 2 and "No tasks are given" in err


def test_the_interval_of_a_change_pairs_the_documents():
    """Shares: what was gained and lost, each exactly; other numbers: Student's t of the differences, by hand."""
    was, now = np.array([1.0, 1, 1, 1, 0, 0, 0, 0]), np.array([0.0, 0, 0, 1, 1, 0, 0, 0])
    low, high = _change(was, now)
    gained, lost = stats.binomtest(1, 8), stats.binomtest(3, 8)
    gained, lost = (each.proportion_ci(0.975, "exact") for each in (gained, lost))
    assert np.allclose((low, high), (gained.low - lost.high, gained.high - lost.low))
    assert _change(was, was)[0] < 0 < _change(was, was)[1]  # nothing moved in eight documents, which says little
    was, now = np.array([0.3, 1.7, 2.2, 0.1]), np.array([0.5, 1.1, 2.9, 1.4])
    mean, half = (now - was).mean(), stats.t.ppf(0.975, 3) * (now - was).std(ddof=1) / 2
    assert np.allclose(_change(was, now), (mean - half, mean + half))


def test_a_metric_that_is_no_mean_over_documents_has_the_harness_s_error():
    """As a perplexity: its documents hold pairs of numbers. A group has no documents."""
    samples = {"books": [{"filter": "none", "perplexity": (-3.0, 2), "acc": value} for value in (0.0, 1.0)]}
    results = {
        "books": {
            "alias": "books",
            "perplexity,none": 4.5,
            "perplexity_stderr,none": "N/A",
            "acc,none": 0.5,
            "acc_stderr,none": 0.5,
        },
        "all": {"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 9},
    }
    found = {"results": results, "samples": samples, "n-samples": {"books": {"effective": 2}}}
    rows = {(row["task"], row["metric"]): row for row in _rows(found)}
    assert np.isnan(rows["books", "perplexity"]["low"]) and rows["books", "perplexity"]["values"] == []
    assert rows["books", "acc"]["values"] == [0, 1] and rows["books", "acc"]["low"] == pytest.approx(0.0126, abs=1e-4)
    assert (rows["all", "acc"]["low"], rows["all", "acc"]["high"]) == pytest.approx((0.304, 0.696))
    assert rows["all", "acc"]["n"] == 9
    pair = _beside(rows["all", "acc"], rows["all", "acc"])
    assert pair["change"] == 0 and np.isnan(pair["change_low"])


class TestMistakes:
    def test_without_lm_eval_the_way_to_install_it_is_named(self, world, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(MechunlearnError, match=r'not installed. Run: pip install "mechunlearn\[benchmarks\]"'):
            benchmark(world, ["arc_easy"])

    def test_a_task_that_there_is_not(self, world, folder, monkeypatch):
        from lm_eval.tasks import TaskManager

        def listed(include_path, include_defaults=True):
            """Without the harness's own 14 000 files."""
            return TaskManager(include_path=include_path, include_defaults=False)

        monkeypatch.setattr("lm_eval.tasks.TaskManager", listed)
        with pytest.raises(MechunlearnError, match="lm-eval knows no task nothing of the kind. Expected names"):
            benchmark(world, ["forgotten", "nothing of the kind"], folder=folder)

    def test_a_folder_that_there_is_not(self, world, tmp_path):
        with pytest.raises(MechunlearnError, match="There is no folder .*none'. Expected one with the YAML files"):
            benchmark(world, ["forgotten"], folder=tmp_path / "none")

    @pytest.mark.parametrize("tasks", [[], "arc_easy"])
    def test_names_are_several(self, world, tasks):
        with pytest.raises(MechunlearnError, match="Expected names of tasks, for example"):
            benchmark(world, tasks)

    def test_a_model_without_a_tokenizer(self):
        with pytest.raises(MechunlearnError, match="no tokenizer, and benchmarks are text"):
            benchmark(load_model((random_hf("gpt2"), None)), ["arc_easy"])
