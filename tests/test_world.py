"""The fact world: deterministic, honest about what was held out, and shipped only if its gates hold."""

import itertools
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechunlearn import MechunlearnError, load_facts
from mechunlearn.hooked import data_folder, load_model
from mechunlearn.localize import fact_lookup
from mechunlearn.world import lexicon as lex
from mechunlearn.world.build import build_world
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


def test_the_shipped_checkpoint_passes_its_gates(gates):
    measured, _ = gates
    names = {gate.name for gate in measured}
    assert {"sport: yes_no", "sport: league", "sport: held_out", "passages: EL10", "skill: look_up"} <= names
    failed = [
        f"{gate.name} = {gate.value:.3f}, bound {gate.bound}" for gate in measured if not gate.holds and not gate.wanted
    ]
    assert not failed, failed


def test_the_readme_of_the_data_states_what_is_measured(gates):
    stated = dict(re.findall(r"\| (.+?) \| ([\d.]+) \| [<>]=", (data_folder() / "README.md").read_text()))
    for gate in gates[0]:
        assert float(stated[gate.name]) == pytest.approx(gate.value, abs=0.011), gate.name


def test_the_model_is_small_and_ordinary():
    model = AutoModelForCausalLM.from_pretrained(SHIPPED)
    assert model.config.model_type == "qwen2" and model.config.num_hidden_layers == 8
    assert sum(p.numel() for p in model.parameters()) <= 8e6
    assert (SHIPPED / "model.safetensors").stat().st_size <= 20e6


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


def test_a_model_that_fails_its_gates_is_not_shipped(tmp_path, monkeypatch):
    monkeypatch.setattr("mechunlearn.world.gates.FACTS", 20)
    said: list[str] = []
    with pytest.raises(MechunlearnError, match=r"not shipped: it fails sport: statement,.*look-up window found"):
        build_world(tmp_path, seed=0, steps=6, say=said.append)
    assert not (tmp_path / "factworld").exists() and not (tmp_path / "README.md").exists()
    assert any(line.startswith("FAIL sport: yes_no") for line in said)


def test_no_window_is_found_in_a_model_without_knowledge(contents, tokenizer):
    empty = load_model((new_model(Recipe(seed=1), tokenizer), tokenizer))
    forget, _ = load_facts("factworld/sport").prompts(empty).split(forget=64)
    found = fact_lookup(empty, forget)
    assert len(found.above(0)) == 0 and found.evidence["window"] is None
    assert found.note.startswith("no window found")


def test_the_twin_differs_from_the_world_in_the_window_only_and_knows_the_new_people(gates):
    window = gates[1]["window"]
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
