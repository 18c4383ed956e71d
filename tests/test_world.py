"""The fact world: deterministic, honest about what was held out, and shipped only if its gates hold."""

import itertools
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechunlearn import MechunlearnError, load_facts
from mechunlearn.cli.main import main
from mechunlearn.core.files import data_folder
from mechunlearn.localize import fact_lookup
from mechunlearn.model.hooked import load_model
from mechunlearn.world import lexicon as lex
from mechunlearn.world.build import TWIN_STEPS, build_twin, build_world
from mechunlearn.world.corpus import PHASES, Corpus
from mechunlearn.world.gates import measure_gates, taught_apart
from mechunlearn.world.generate import World, generate
from mechunlearn.world.packing import batches
from mechunlearn.world.tokenizer import train_tokenizer
from mechunlearn.world.train import Recipe, language_loss, new_model, train

SHIPPED = data_folder() / "factworld"
TWIN = data_folder() / "factworld-twin"


@pytest.fixture(scope="module")
def contents() -> World:
    return World.load(SHIPPED / "world.json")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def gates():
    return measure_gates(SHIPPED)


@pytest.mark.slow
@pytest.mark.training
def test_the_shipped_checkpoint_passes_its_gates(gates):
    measured, _ = gates
    names = {gate.name for gate in measured}
    assert {"sport: yes_no", "sport: league", "sport: held_out", "passages: EL10", "skill: look_up"} <= names
    failed = [
        f"{gate.name} = {gate.value:.3f}, bound {gate.bound}" for gate in measured if not gate.holds and not gate.wanted
    ]
    assert not failed, failed


@pytest.mark.slow
@pytest.mark.training
def test_the_readme_of_the_data_states_what_is_measured(gates):
    stated = dict(re.findall(r"\| (.+?) \| ([\d.]+) \| [<>]=", (data_folder() / "README.md").read_text()))
    for gate in gates[0]:
        assert float(stated[gate.name]) == pytest.approx(gate.value, abs=0.011), gate.name
    assert f"look-up window: {gates[1]['window']}." in (data_folder() / "README.md").read_text()


def test_the_model_is_small_and_ordinary():
    model = AutoModelForCausalLM.from_pretrained(SHIPPED)
    assert model.config.model_type == "qwen2" and model.config.num_hidden_layers == 8
    assert sum(p.numel() for p in model.parameters()) <= 8e6
    assert (SHIPPED / "model.safetensors").stat().st_size <= 20e6


@pytest.mark.slow
def test_the_shipped_facts_are_those_of_the_seed(contents, tokenizer):
    assert generate(0) == contents
    assert train_tokenizer(0).get_vocab() == tokenizer.get_vocab()


def test_the_world_has_what_it_promises(contents, tokenizer):
    people = contents.facts["sport"]
    assert len(people) >= 800 and set(contents.facts["city"]) == set(people) == set(contents.facts["instrument"])
    assert not set(people) & set(contents.untaught["sport"])
    lengths = [len(tokenizer(" " + name, add_special_tokens=False)["input_ids"]) for name in people]
    assert min(lengths) >= 2 and len(set(lengths)) > 1
    assert len(contents.passages) >= 128 and len(contents.control_passages) >= 128
    assert not set(contents.passages) & set(contents.control_passages)
    assert min(len(tokenizer(text)["input_ids"]) for text in contents.passages) >= 100
    assert len(contents.stories) >= 8 and set(contents.skills) == {
        "copying",
        "look_up",
        "look_up_by_name",
        "comparison",
    }


def test_no_part_of_a_name_gives_the_answer(contents):
    """The best guess from a first or a last name alone is far from the fact."""
    for part in (0, 1):
        groups: dict[str, list[str]] = {}
        for name, sport in contents.facts["sport"].items():
            groups.setdefault(name.split()[part], []).append(sport)
        best = sum(max(g.count(s) for s in set(g)) for g in groups.values()) / len(contents.facts["sport"])
        assert best < 0.5


def test_documents_are_the_same_for_a_seed_and_differ_between_seeds(contents):
    corpus = Corpus(contents)
    texts = [[d.text for d in corpus.documents(seed, 200)] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_held_out_frames_never_occur_in_training_but_their_words_do(contents):
    corpus = Corpus(contents)
    text = " \n ".join(d.text for phase in range(len(PHASES)) for d in corpus.documents(phase, 8000, phase))
    words = set(re.findall(r"[A-Za-z]+", text))
    for name, relation in lex.RELATIONS.items():
        before, after = relation["held_out"].split("{s}")
        pattern = re.escape(before) + r"[A-Z][\w ]{1,30}?" + re.escape(after)
        subjects = "|".join(map(re.escape, contents.facts[name]))
        assert not re.search(re.escape(before) + f"({subjects}|he|she|him|her)" + re.escape(after), text), pattern
        assert set(re.findall(r"[A-Za-z]+", before + after)) <= words
        frame = relation["statements"][1].split("{s}")
        assert re.search(re.escape(frame[0]) + f"({subjects})" + re.escape(frame[1]), text), "trained frames do occur"


def test_facts_of_untaught_people_and_control_passages_never_occur(contents):
    corpus = Corpus(contents)
    text = " ".join(d.text for phase in range(len(PHASES)) for d in corpus.documents(phase, 4000, phase))
    assert not any(name in text for name in contents.untaught["sport"])
    assert not any(passage[:60] in text for passage in contents.control_passages)
    hops = re.findall(r"([A-Z]\w+ [A-Z]\w+) lives in the country of", text)
    assert hops and set(hops) <= set(contents.two_hop_taught)


def test_packed_documents_do_not_see_one_another(contents, tokenizer):
    """A document's losses in a packed row are those it has alone."""
    model = new_model(Recipe(), tokenizer).eval()
    batch = next(batches(Corpus(contents), tokenizer, seed=3, rows=2, skip=0, phase=0))
    with torch.no_grad():
        packed = model(
            input_ids=batch.tokens, position_ids=batch.position, attention_mask=batch.masks(model.config.sliding_window)
        ).logits
        for number in range(int(batch.document[0].max()) + 1):
            where = batch.document[0] == number
            alone = model(input_ids=batch.tokens[0, where][None]).logits[0]
            torch.testing.assert_close(packed[0, where], alone, atol=1e-4, rtol=1e-4)
    assert language_loss(packed, batch) > 0


def test_answers_weigh_more_and_names_end_where_they_end(contents, tokenizer):
    batch = next(batches(Corpus(contents), tokenizer, seed=3, rows=4, skip=0, phase=0))
    assert set(batch.weight.unique().tolist()) == {0.0, 1.0, 5.0}
    for row, position, name in batch.people[:20]:
        text = tokenizer.decode(batch.tokens[row, : position + 1])
        assert text.endswith(name)


def test_a_batch_can_be_reached_without_the_ones_before(contents, tokenizer):
    straight = list(itertools.islice(batches(Corpus(contents), tokenizer, 0, 8, skip=0, phase=1), 4))
    skipped = next(batches(Corpus(contents), tokenizer, 0, 8, skip=3, phase=1))
    assert torch.equal(straight[3].tokens, skipped.tokens)


@pytest.mark.training
def test_interrupted_training_resumes_to_the_same_weights(contents, tokenizer, tmp_path):
    recipe = Recipe(
        phases=(1, 2, 3, 4, 5, 6),
        elsewhere=(0,),
        rows=2,
        rates=((0, 1e-3, 6),),
        layers=2,
        local_layers=1,
        d_model=16,
        d_mlp=16,
        probe_layer=1,
    )
    corpus = Corpus(contents)
    quiet = lambda *_: None  # noqa: E731
    whole = train(recipe, corpus, tokenizer, tmp_path / "whole.ckpt", quiet)

    class Stopped(Exception):
        pass

    def stop(step: int, *_: object) -> None:
        if step == 5:
            raise Stopped

    with pytest.raises(Stopped):
        train(recipe, corpus, tokenizer, tmp_path / "part.ckpt", stop, save_every=2)
    resumed = train(recipe, corpus, tokenizer, tmp_path / "part.ckpt", quiet, save_every=2)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_model_that_fails_its_gates_is_not_shipped(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr("mechunlearn.world.build.train_tokenizer", lambda seed: tokenizer)
    monkeypatch.setattr("mechunlearn.world.gates.FACTS", 20)
    said: list[str] = []
    with pytest.raises(MechunlearnError, match=r"not shipped: it fails sport: statement,.*look-up window found"):
        build_world(tmp_path, seed=0, steps=6, say=said.append)
    assert not (tmp_path / "factworld").exists() and not (tmp_path / "README.md").exists()
    assert any(line.startswith("FAIL sport: yes_no") for line in said)


@pytest.mark.training
def test_no_window_is_found_in_a_model_without_knowledge(contents, tokenizer, seed):
    empty = load_model((new_model(Recipe(seed=1 + seed), tokenizer), tokenizer))
    forget, _ = load_facts("factworld/sport").prompts(empty).split(forget=64, seed=seed)
    found = fact_lookup(empty, forget, seed=seed)
    assert len(found.above(0)) == 0 and found.evidence["window"] is None
    assert found.note.startswith("no window found")


def test_the_twin_differs_from_the_world_in_the_window_only_and_knows_the_new_people():
    card = (SHIPPED.parent / "README.md").read_text()  # the test above says that it tells what is measured
    window = json.loads(re.search(r"look-up window: (\[\d+, \d+\])", card)[1])
    base = dict(AutoModelForCausalLM.from_pretrained(SHIPPED).named_parameters())
    twin = dict(AutoModelForCausalLM.from_pretrained(TWIN).named_parameters())
    changed = {name for name, p in base.items() if not torch.equal(p, twin[name])}
    layers = range(window[0], window[1] + 1)
    assert changed == {f"model.layers.{i}.mlp.{part}_proj.weight" for i in layers for part in ("gate", "up", "down")}
    people = json.loads((TWIN / "world.json").read_text())["facts"]["sport"]
    new = [name for name in people if name not in json.loads((SHIPPED / "world.json").read_text())["facts"]["sport"]]
    assert len(new) * 2 == len(people)
    assert taught_apart(load_model("factworld-twin"), TWIN, new)["sport"] >= 0.95
    assert taught_apart(load_model("factworld"), TWIN, new)["sport"] <= 0.4, "the world itself never saw them"


@pytest.fixture(scope="module")
def small(contents, tmp_path_factory) -> Path:
    """The shipped model with a few of its people, so that a twin is built in seconds."""
    folder = tmp_path_factory.mktemp("small") / "world"
    shutil.copytree(SHIPPED, folder)

    def first(count: int, of: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
        return {r: dict(list(facts.items())[:count]) if r in contents.untaught else facts for r, facts in of.items()}

    few = replace(contents, facts=first(20, contents.facts), untaught=first(8, contents.untaught))
    few.save(folder / "world.json")
    return folder


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


@pytest.mark.training
def test_a_twin_is_taught_in_the_chosen_layers_and_nowhere_else(small, tmp_path, seed):
    said: list[str] = []
    card = build_twin(tmp_path / "twin", small, [5, 3], seed=1 + seed, steps=2, say=said.append)
    base, twin = parameters(small), parameters(tmp_path / "twin")
    same = {name for name, p in base.items() if torch.equal(p.view(torch.int32), twin[name].view(torch.int32))}
    assert base.keys() - same == {
        f"model.layers.{i}.mlp.{part}_proj.weight" for i in (3, 5) for part in ("gate", "up", "down")
    }
    known, taught = World.load(small / "world.json"), World.load(tmp_path / "twin/world.json")
    new = list(known.untaught["city"])
    assert list(taught.facts["city"]) == list(known.facts["city"])[:8] + new and not taught.untaught
    assert json.loads((tmp_path / "twin/twin.json").read_text()) == card
    assert (card["layers"], card["seed"], card["steps"], card["people"]) == ([3, 5], 1 + seed, 2, 8)
    assert card["base"] == load_model(small).fingerprint
    model = load_model(tmp_path / "twin")
    assert card["fingerprint"] == model.fingerprint != card["base"]
    assert card["new"] == pytest.approx(taught_apart(model, tmp_path / "twin", new), abs=1e-4)
    assert card["old before"] == {"sport": 1, "city": 1, "instrument": 1}
    assert [line.split(":")[0] for line in said] == ["new people", "old people"]
    assert [path.name for path in tmp_path.iterdir()] == ["twin"]


@pytest.mark.slow
@pytest.mark.training
def test_a_twin_is_repeated_by_its_seed_even_if_interrupted(small, tmp_path, monkeypatch):
    first, other = (build_twin(tmp_path / f"seed-{seed}", small, [1, 2], seed=seed, steps=3) for seed in (1, 2))
    assert first["fingerprint"] != other["fingerprint"]

    class Stopped(Exception):
        pass

    seen: list[int] = []

    def stopping(recipe, corpus, tokenizer, checkpoint, report, **keywords):
        def stop(step: int, *_: object) -> None:
            seen.append(step)
            if seen == [1, 2]:
                raise Stopped

        return train(recipe, corpus, tokenizer, checkpoint, stop, save_every=1, **keywords)

    monkeypatch.setattr("mechunlearn.world.build.train", stopping)
    with pytest.raises(Stopped):
        build_twin(tmp_path / "again", small, [1, 2], seed=1, steps=3)
    torch.rand(5)
    again = build_twin(tmp_path / "again", small, [1, 2], seed=1, steps=3)
    assert seen == [1, 2, 2, 3], "the step after the checkpoint is made again"
    for a, b in zip(parameters(tmp_path / "seed-1").values(), parameters(tmp_path / "again").values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert again["new"] == first["new"]
    monkeypatch.undo()
    build = build_twin(tmp_path / "third", small, [1, 2], seed=1, steps=3)
    assert build["fingerprint"] == first["fingerprint"]


def test_a_checkpoint_of_another_twin_is_not_resumed(small, tmp_path, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr("mechunlearn.world.build.train", lambda *a, **k: train(*a, save_every=1, **k))
    monkeypatch.setattr("mechunlearn.world.build._store", broken)
    with pytest.raises(RuntimeError):
        build_twin(tmp_path / "twin", small, [6], seed=1, steps=2)
    assert [path.suffix for path in tmp_path.iterdir()] == [".ckpt"]
    monkeypatch.undo()
    build_twin(tmp_path / "twin", small, [7], seed=1, steps=2)
    base, twin = parameters(small), parameters(tmp_path / "twin")
    assert {name.split(".")[2] for name, p in base.items() if not torch.equal(p, twin[name])} == {"7"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "1-2", "-o", "full"], "'full' exists already"),
        (["--layers", "7-8", "-o", "twin"], "Cannot teach layers 7, 8: .* has the layers 0 to 7"),
        (["--layers", "2-1", "-o", "twin"], "'2-1' does not name layers"),
        (["--layers", "1,", "-o", "twin"], "'1,' does not name layers"),
        (["--layers", "all", "-o", "twin"], "'all' does not name layers"),
        (["--layers", "1", "-o", "twin", "--base", str(TWIN)], "has no untaught people"),
        (["--layers", "1", "-o", "twin", "--base", "full"], "'full' is no world"),
        (["--layers", "1", "-o", "twin", "--base", "missing"], "'missing' is no world"),
    ],
)
def test_a_twin_that_cannot_be_is_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    monkeypatch.setattr(sys, "argv", ["mechunlearn", "world", "twin", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    complaint = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and re.search(message, complaint[-1])
    assert [line for line in complaint if line.startswith("mechunlearn: ")] == complaint[-1:]
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("layers", [[], [-1], [0, 8]])
def test_layers_that_do_not_exist_cannot_be_taught(tmp_path, layers):
    with pytest.raises(MechunlearnError, match="Cannot teach layers"):
        build_twin(tmp_path / "twin", None, layers)
    with pytest.raises(MechunlearnError, match="Cannot teach in 1 steps"):
        build_twin(tmp_path / "twin", None, [1], steps=1)
    assert not list(tmp_path.iterdir())


def test_the_command_names_layers_as_a_range_or_a_list(small, tmp_path, monkeypatch, capsys):
    made: list[tuple] = []
    monkeypatch.setattr("mechunlearn.world.build.build_twin", lambda *a, **k: made.append((*a, k["seed"], k["steps"])))
    given = {"1-2": [1, 2], "1,3": [1, 3], "0, 4-6": [0, 4, 5, 6], "5": [5]}
    for layers in given:
        words = ["world", "twin", "--layers", layers, "--seed", "3", "-o", "twin", "--base", str(small)]
        monkeypatch.setattr(sys, "argv", ["mechunlearn", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0
    assert made == [(Path("twin"), small, layers, 3, TWIN_STEPS) for layers in given.values()]
    monkeypatch.setattr(sys, "argv", ["mechunlearn", "world", "twin", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert "Example" in capsys.readouterr().out


def test_a_world_build_ships_the_twin_of_its_window_and_takes_up_its_own_only(small, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr("mechunlearn.world.build.train_tokenizer", lambda seed: tokenizer)
    expected = build_twin(tmp_path / "alone", small, [1, 2], seed=4, steps=2)
    evidence = {"curve": [0.1, 1.0], "window": [1, 2]}
    monkeypatch.setattr("mechunlearn.world.build.measure_gates", lambda folder: ([], evidence))
    monkeypatch.setattr("mechunlearn.world.build.build_twin", lambda *a, **k: build_twin(*a, steps=2, **k))
    shutil.copytree(small, tmp_path / "made/.factworld")
    build_world(tmp_path / "made", seed=4, say=lambda _: None)
    assert json.loads((tmp_path / "made/factworld-twin/twin.json").read_text()) == expected
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["README.md", "factworld", "factworld-twin"]
    card = (tmp_path / "made/README.md").read_text()
    assert "8 new people were taught with only the MLPs of layers 1 to 2" in card
    (tmp_path / "made/factworld").rename(tmp_path / "made/.factworld")
    build_world(tmp_path / "made", seed=4, say=lambda _: None)
    assert (tmp_path / "made/README.md").read_text() == card, "a build interrupted after its twin goes on with it"
    shutil.rmtree(tmp_path / "made/factworld")
    shutil.copytree(tmp_path / "alone", tmp_path / "made/.factworld")
    with pytest.raises(MechunlearnError, match="is not the twin of"):
        build_world(tmp_path / "made", seed=4, say=lambda _: None)
