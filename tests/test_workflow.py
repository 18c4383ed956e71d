"""The whole job in one call, from a table of facts to an attacked edit."""

import inspect
import json

import pytest
import torch
import transformers

import mechunlearn as mu
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.edit import masked_gradient
from mechunlearn.evaluation.workflow import SHARE, edit_facts, edit_prompts
from mechunlearn.localize import attribution_patching, fact_lookup
from mechunlearn.metrics.answers import measure
from mechunlearn.world.toy import planted_facts


def quicker(patch: pytest.MonkeyPatch) -> None:
    """Edits take fewer and smaller steps, `evaluate` looks at fewer facts."""
    patch.setattr("mechunlearn.evaluation.cells.LIMIT", 20)
    for name, value in {"steps": 12, "batch_size": 24}.items():
        patch.setitem(inspect.unwrap(masked_gradient).__kwdefaults__, name, value)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    quicker(monkeypatch)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """48 sports of the shipped world as somebody might write them down."""
    path = tmp_path_factory.mktemp("facts") / "my_facts.csv"
    facts = mu.load_facts("factworld/sport").facts[:48]
    rows = [f"{f.subject},{f.queries['statement'].prompt},{f.answer}" for f in facts]
    path.write_text("\n".join(["subject,prompt,answer", *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def made(world, sport):
    with pytest.MonkeyPatch.context() as patch:
        quicker(patch)
        told: list[str] = []
        forget, retain = sport[0].select(range(24)), sport[1].select(range(32))
        return edit_prompts(world, forget, retain, attacks=["quantization"], say=told.append), told


def test_each_step_is_the_function_of_that_name(made, world, sport):
    (job, told), forget = made, sport[0].select(range(24))
    found = fact_lookup(world, forget)
    assert torch.equal(job.found.scores["L1.mlp.out"], found.scores["L1.mlp.out"])
    assert job.mask == found.above(0) == job.edit.mask
    assert job.report.columns == ["before", "after", "control", "patching"]
    assert job.report.outcomes()["attack"].tolist() == ["quantization"]
    assert any("look-up window" in line for line in told) and any(line.startswith("mask: ") for line in told)
    before = measure(world, forget)["accuracy"].mean()
    with job.edit.applied(world):
        assert measure(world, forget)["accuracy"].mean() < before - 0.5
    assert measure(world, forget)["accuracy"].mean() == before, "the model is left as it came"
    assert "<table" in job._repr_html_()


def test_what_was_made_is_written_whole(made, world, tmp_path):
    job = made[0]
    files = job.save(world, tmp_path / "result")
    assert mu.ComponentMask.load(files["mask"]) == job.mask
    assert WeightEdit.load(files["edit"]).card == job.edit.card
    assert json.loads((files["model"] / "mechunlearn.json").read_text())["method"] == "masked_gradient"
    assert transformers.AutoModelForCausalLM.from_pretrained(files["model"])
    assert "quantization" in files["report"].read_text()
    with pytest.raises(mu.MechunlearnError, match="not.*empty"):
        job.save(world, tmp_path / "result")


def test_subjects_by_name_from_a_table(table, world):
    names = mu.load_facts(table).facts[3].subject, mu.load_facts(table).facts[7].subject
    told: list[str] = []
    job = mu.edit_facts(table, world, forget=list(names), attacks=(), say=told.append)
    assert job.report.about["forget"] == 2 and job.report.about["retain"] == 23
    assert len(job.report.outcomes()) == 0
    assert told[0].startswith("fact_lookup: look-up window"), "the probe learns from the table's other facts"
    forget = mu.load_facts(table).prompts(world).select([3, 7])
    assert job.mask == fact_lookup(world, forget).above(0)
    with job.edit.applied(world):
        assert measure(world, forget)["target_accuracy"].mean() > measure(world, forget)["accuracy"].mean()


def test_without_a_window_attribution_patching_chooses_and_it_is_said():
    toy = planted_facts()
    forget, retain, told = toy.prompts(list(range(4))), toy.prompts(list(range(4, 16))), []
    job = edit_prompts(toy.model, forget, retain, say=told.append)
    assert told[0].startswith("fact_lookup: "), told
    assert job.mask == attribution_patching(toy.model, forget).top(weights=SHARE)
    assert job.found.card.method == "attribution_patching" and "patching" not in job.report.columns


def test_a_quarter_is_forgotten_unless_told(table, world, monkeypatch):
    seen: list[tuple[int, int]] = []

    class Reached(Exception):
        pass

    def stop(model, forget, retain, **_):
        seen.append((len(forget), len(retain)))
        raise Reached

    monkeypatch.setattr("mechunlearn.evaluation.workflow.edit_prompts", stop)
    for facts, how in ((table, {}), (table, {"forget": 5}), (mu.load_facts("factworld/sport"), {})):
        with pytest.raises(Reached):
            edit_facts(facts, world, **how)
    assert seen == [(12, 18), (5, 21), (64, 368)]


def test_mistakes(table, world):
    with pytest.raises(mu.MechunlearnError, match="No fact is about 'Nobody'. Expected subjects of"):
        edit_facts(table, world, forget=["Nobody"])
    with pytest.raises(mu.MechunlearnError, match="No fact is about"):
        edit_facts(table, world, forget=[])
    facts = mu.load_facts(table)
    with pytest.raises(mu.MechunlearnError, match="something to retain"):
        edit_facts(facts, world, forget=[fact.subject for fact in facts])
    with pytest.raises(mu.MechunlearnError, match="at least one must be left"):
        edit_facts(facts.select([0]), world)
    with pytest.raises(mu.MechunlearnError, match="There is no facts file"):
        edit_facts("nothing.csv", world)
    with pytest.raises(mu.MechunlearnError, match="Unknown attack"):
        edit_facts(facts, world, attacks=["phrenology"])
