"""The lm-evaluation-harness on tasks of local files: right before an edit, wrong after it, and nothing left behind."""

import copy
import json
import random
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from mechunlearn import MechunlearnError
from mechunlearn.evaluation.harness import _same_random_numbers, benchmark
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
    assert list(before.columns) == ["task", "metric", "value", "stderr", "n"]
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
