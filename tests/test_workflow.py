"""The whole job in one call, from a table of facts to an attacked edit."""

import inspect
import json
import warnings
from dataclasses import replace

import pytest
import torch
import transformers

import mechunlearn as mu
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.edit import masked_gradient
from mechunlearn.evaluation.preview import preview
from mechunlearn.evaluation.workflow import SHARE, edit_facts, edit_prompts
from mechunlearn.localize import attribution_patching, fact_lookup
from mechunlearn.metrics.answers import measure
from mechunlearn.world.toy import planted_facts


def quicker(patch: pytest.MonkeyPatch) -> None:
    """Edits take fewer and smaller steps, `evaluate` looks at fewer facts."""
    patch.setattr("mechunlearn.evaluation.cells.LIMIT", 20)
    for name, value in {"steps": 12, "lr": 2e-3, "batch_size": 24}.items():
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
def made(world, sport, seed):
    with pytest.MonkeyPatch.context() as patch:
        quicker(patch)
        told: list[str] = []
        forget, retain = sport[0].select(range(24)), sport[1].select(range(32))
        return edit_prompts(world, forget, retain, attacks=["quantization"], seed=seed, say=told.append), told


@pytest.mark.training
def test_each_step_is_the_function_of_that_name(made, world, sport):
    (job, told), forget = made, sport[0].select(range(24))
    found = fact_lookup(world, forget)
    assert torch.equal(job.found.scores["L1.mlp.out"], found.scores["L1.mlp.out"])
    assert job.mask == found.above(0) == job.edit.mask
    assert job.report.columns == ["before", "after", "control", "patching"]
    assert job.report.outcomes()["attack"].tolist() == ["training prompt", "quantization"]
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


@pytest.mark.training
def test_subjects_by_name_from_a_table(table, world, seed):
    names = mu.load_facts(table).facts[3 + seed].subject, mu.load_facts(table).facts[7 + seed].subject
    told: list[str] = []
    job = mu.edit_facts(table, world, forget=list(names), attacks=(), seed=seed, say=told.append)
    assert job.report.about["forget"] == 2 and job.report.about["retain"] == 23
    assert len(job.report.outcomes()) == 0
    assert told[0].startswith("cost, measured on one batch: about "), "before long work begins"
    assert told[1].startswith("fact_lookup, probe: look-up window"), "the probe learns from the table's other facts"
    forget = mu.load_facts(table).prompts(world).select([3 + seed, 7 + seed])
    assert job.mask == fact_lookup(world, forget).above(0)
    with job.edit.applied(world):
        assert measure(world, forget)["target_accuracy"].mean() > measure(world, forget)["accuracy"].mean()


def test_where_the_probe_finds_no_window_the_paths_are_followed_and_it_is_said():
    toy = planted_facts()
    forget, retain, told = toy.prompts(list(range(4))), toy.prompts(list(range(4, 16))), []
    job = edit_prompts(toy.model, forget, retain, say=told.append)
    assert told[1].startswith("fact_lookup, probe: ") and "MLP" not in told[1], told
    assert told[2].startswith("fact_lookup, paths: look-up window: MLP 0"), told
    assert job.mask == fact_lookup(toy.model, forget, rule="paths").above(0) and "patching" in job.report.columns


def test_without_a_window_attribution_patching_chooses_and_it_is_said(monkeypatch):
    def nothing(model, prompts, rule, **_):
        if rule == "probe":
            raise mu.MechunlearnError("there is nothing to classify")
        return replace(mu.localize.random_units(model), scores={"L0.mlp.out": torch.zeros(32)}, note="token identity")

    monkeypatch.setattr("mechunlearn.evaluation.workflow.fact_lookup", nothing)
    toy = planted_facts()
    forget, retain, told = toy.prompts(list(range(4))), toy.prompts(list(range(4, 16))), []
    job = edit_prompts(toy.model, forget, retain, say=told.append)
    assert told[1:4] == [
        "fact_lookup, probe: there is nothing to classify",
        "fact_lookup, paths: token identity",
        "attribution_patching: the largest units of 5% of the weights are edited",
    ]
    assert job.mask == attribution_patching(toy.model, forget).top(weights=SHARE)
    assert job.found.card.method == "attribution_patching" and "patching" not in job.report.columns


class Reached(Exception):
    """The sets are chosen, and the edit would begin."""


@pytest.fixture
def chosen(monkeypatch):
    """The sets that an edit would be made with; it is not made."""
    seen: dict = {}

    def stop(model, forget, retain, **_):
        seen.update(forget=forget, retain=retain)
        raise Reached

    monkeypatch.setattr("mechunlearn.evaluation.workflow.edit_prompts", stop)
    return seen


class TestKnown:
    def facts(self, known: int, unknown: int):
        sport = mu.load_facts("factworld/sport")
        return type(sport)("mixed", (*sport.untaught.facts[:unknown], *sport.facts[:known]))

    def unknown(self, world, data):
        prompts = data.prompts(world)
        last = [
            int(world(prompts.tokens[i : i + 1, : prompts.start[i] + 1])[0, -1].argmax()) for i in range(len(prompts))
        ]
        return [
            fact.subject for fact, said, answer in zip(data, last, prompts.answers[:, 0].tolist()) if said != answer
        ]

    def test_what_the_model_does_not_know_is_dropped_and_what_it_says_is_told(self, world, chosen):
        data, told = self.facts(20, 8), []
        unknown = self.unknown(world, data)
        assert len(unknown) >= 4, "the case is one"
        with pytest.raises(Reached):
            edit_facts(data, world, say=told.append)
        assert told[0].startswith(f"dropped {len(unknown)} of 28 facts that the model does not know: '")
        first = next(fact for fact in data if fact.subject == unknown[0])
        prompt = first.queries["statement"].prompt
        said = world.generate(prompt, max_new_tokens=1).removeprefix(prompt).strip()
        assert f"'{prompt}' -> '{said}" in told[0] and f"(expected '{first.answer}')" in told[0]
        assert told[0].count("expected") == 3
        everyone = chosen["forget"].facts.source.subjects
        assert not everyone & set(unknown) and len(everyone) == 28 - len(unknown)

    def test_below_eight_it_refuses_and_says_what_to_do(self, world):
        data = self.facts(3, 6)
        right = 9 - len(self.unknown(world, data))
        with pytest.raises(mu.MechunlearnError, match=f"knows {right} of 9 facts .*Expected at least 8") as refused:
            edit_facts(data, world)
        told = str(refused.value)
        assert told.count("(expected '") == 3 and "one example in front" in told and "larger model" in told

    def test_a_subject_by_name_that_is_not_known_is_refused_by_name(self, world):
        data = self.facts(20, 8)
        lost = self.unknown(world, data)[0]
        with pytest.raises(mu.MechunlearnError, match=f"does not know the fact about '{lost}'.*-> '.*expected"):
            edit_facts(data, world, forget=[lost])


class TestTargets:
    def without(self, answers=None):
        facts = mu.load_facts("factworld/sport").facts[:24]
        only = [fact for fact in facts if answers is None or fact.answer in answers]
        bare = (
            replace(
                fact,
                queries={n: replace(q, target="") for n, q in fact.queries.items() if n in ("statement", "question")},
            )
            for fact in only
        )
        return type(mu.load_facts("factworld/sport"))("bare", tuple(bare))

    def test_missing_ones_are_drawn_from_the_relations_other_answers(self, world, chosen):
        data, told = self.without(), []
        with pytest.raises(Reached):
            edit_facts(data, world, say=told.append, seed=3)
        assert any("24 of 24 facts come without an edit target" in line for line in told)
        answers = {fact.answer for fact in data}
        for fact in chosen["forget"].facts:
            assert fact.target in answers - {fact.answer}
            assert fact.queries["question"].target == fact.target, "the same one in every format"

    def test_where_there_is_no_other_answer_it_says_what_is_missing(self, world):
        sport = mu.load_facts("factworld/sport")
        usual = max({fact.answer for fact in sport}, key=[fact.answer for fact in sport].count)
        same = tuple(
            replace(fact, queries={"statement": replace(fact.queries["statement"], target="")})
            for fact in sport
            if fact.answer == usual
        )
        with pytest.raises(mu.MechunlearnError, match="no edit target, and none can be drawn.*Add a 'target' column"):
            edit_facts(type(sport)("same", same[:12]), world)


def test_what_is_warned_of_while_editing_is_said_too(monkeypatch):
    plain = inspect.unwrap(masked_gradient)

    def warned(*args, **more):
        warnings.warn("No setting met the goal.", stacklevel=1)
        return masked_gradient(*args, **more)

    monkeypatch.setattr("mechunlearn.evaluation.workflow.masked_gradient", warned)
    toy, told = planted_facts(), []
    assert plain is not warned
    with pytest.warns(UserWarning, match="No setting met the goal"):
        edit_prompts(toy.model, toy.prompts([0, 1]), toy.prompts([2, 3]), say=told.append)
    assert "warning: No setting met the goal." in told


def test_the_preview_counts_what_is_done_and_leaves_no_trace():
    toy = planted_facts()
    forget, retain = toy.prompts([0, 1]), toy.prompts([2, 3])
    before = toy.model.fingerprint
    alone, attacked = preview(toy.model, forget, retain), preview(toy.model, forget, retain, ["relearning"])
    assert len(alone) == 1 and len(attacked) == 2 and attacked[1].startswith("attacks: about ")
    assert " GB of memory" in alone[0] and "2 edits of 50 steps" in alone[0]
    assert toy.model.fingerprint == before and all(p.grad is None for p in toy.model.hf.parameters())


def test_the_command_line_prints_the_first_screen_whole(call, table, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    code, out, err = call("run", "factworld", table, "-o", "result", "--forget", "4", "--attacks", "none")
    assert code == 0, err
    assert "specificity (unseen facts)" in out and "…" not in out and "text, own samples: KL to before" in out
    screen = out.split("On the training prompt")[1]
    assert "facts that no edit saw" in screen and "(random mask: " in screen and "  before: " in screen


def test_a_quarter_is_forgotten_unless_told(table, world, chosen):
    seen = []
    for facts, how in ((table, {}), (table, {"forget": 5}), (mu.load_facts("factworld/sport"), {})):
        with pytest.raises(Reached):
            edit_facts(facts, world, **how)
        seen.append((len(chosen["forget"]), len(chosen["retain"])))
    assert seen == [(12, 18), (5, 21), (64, 368)]


def test_mistakes(table, world):
    with pytest.raises(mu.MechunlearnError, match="No fact is about 'Nobody'. Expected subjects of"):
        edit_facts(table, world, forget=["Nobody"])
    with pytest.raises(mu.MechunlearnError, match="No fact is about"):
        edit_facts(table, world, forget=[])
    facts = mu.load_facts(table)
    with pytest.raises(mu.MechunlearnError, match="something to retain"):
        edit_facts(facts, world, forget=[fact.subject for fact in facts])
    with pytest.raises(mu.MechunlearnError, match="knows 1 of 1 facts"):
        edit_facts(facts.select([0]), world)
    with pytest.raises(mu.MechunlearnError, match="There is no facts file"):
        edit_facts("nothing.csv", world)
    with pytest.raises(mu.MechunlearnError, match="Unknown attack"):
        edit_facts(facts, world, attacks=["phrenology"])
