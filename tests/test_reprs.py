"""What nouns show of themselves in a notebook and in a terminal."""

from dataclasses import replace

import pytest
import torch

from mechunlearn import Circuit, ComponentMask, FactDataset, Localization, load_facts
from mechunlearn.artifacts.edges import readers, writers
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.runcard import RunCard
from mechunlearn.facts.formats import Fact, Query
from mechunlearn.features.feature_edit import FeatureEdit, FeaturePart
from mechunlearn.model.layout import Signature
from tests.handmade import random_codebook
from tests.test_report_page import SCRIPT, report

TINY = Signature("llama", layers=4, heads=2, kv_heads=2, d_mlp=4, d_model=8)
CARD = RunCard(SCRIPT, seed=3)
SPREAD = ComponentMask.of(["L0.mlp.out[0]", "L1.mlp.out", "L3.mlp.out", "L2.attn.k[1]"], TINY)


def localization() -> Localization:
    scores = {"L0.mlp.out": torch.tensor([0.1, -0.9, 0.0, 0.2]), "L1.attn.o": torch.tensor([0.3, 0.0])}
    return Localization(scores, TINY, {"attn.o": 16, "mlp.out": 8}, 800, CARD, note=SCRIPT)


def circuit() -> Circuit:
    scores = torch.zeros(len(writers(TINY)), len(readers(TINY)))
    scores[0, -1], scores[-1, -1] = -2.0, 0.5
    return Circuit(scores, TINY, False, {"attn.o": 16, "mlp.out": 8}, 800, CARD, note=SCRIPT)


def weight_edit() -> WeightEdit:
    units = {"L0.mlp.out": torch.tensor([0, 2]), "L1.mlp.out": torch.tensor([1])}
    return WeightEdit(units, {site: torch.ones(len(rows), 8) for site, rows in units.items()}, TINY, CARD)


def feature_edit(toy) -> FeatureEdit:
    codebook = random_codebook(toy.model, "L0.resid_post")
    return FeatureEdit((FeaturePart(codebook, torch.tensor([1, 5]), "zero"),), toy.model.signature, CARD)


def facts(count: int = 5) -> FactDataset:
    made = [
        Fact(f"{SCRIPT} {i}", SCRIPT, {"statement": Query(f"{SCRIPT} {i} plays", SCRIPT, "polo")}) for i in range(count)
    ]
    return FactDataset(SCRIPT, tuple(made))


NOUNS = {
    "mask": lambda toy: SPREAD,
    "localization": lambda toy: localization(),
    "circuit": lambda toy: circuit(),
    "weight edit": lambda toy: weight_edit(),
    "feature edit": feature_edit,
    "facts": lambda toy: facts(),
    "report": lambda toy: report(),
}


@pytest.mark.parametrize("name", NOUNS)
def test_every_noun_shows_a_short_table_without_scripts_or_fixed_colours(name, toy):
    shown = NOUNS[name](toy)._repr_html_()
    assert "<table" in shown and "<script" not in shown and "<style" not in shown
    assert len(shown) < 16_000
    assert "color:#" not in shown.replace(" ", ""), "text and ground are the notebook's"
    if name != "mask":
        assert "&lt;script&gt;" in shown, "what was given is shown as text"


def test_a_mask_says_how_many_of_which_kind_in_which_layers():
    shown = SPREAD._repr_html_()
    assert "ComponentMask: 10 units" in shown
    for cell in ("attn.k", "kv heads", "1 of 2", "mlp.out", "neurons", "0-1, 3", "9 of 12"):
        assert f">{cell}</td>" in shown
    assert repr(SPREAD).startswith(
        "ComponentMask(10 units: mlp.out 9/12 in layers 0-1, 3; L2.attn.k 1/2; llama: 4 layers"
    )
    assert repr(SPREAD - SPREAD).startswith("ComponentMask(0 units: none; ")


def test_a_localization_shows_its_largest_units_and_what_they_weigh():
    shown = localization()._repr_html_()
    assert "2 heads at attn.o (layers 1)" in shown and "4 neurons at mlp.out (layers 0)" in shown
    first, second, *_ = shown.split("<tr")[2:]
    assert "L0.mlp.out[1]" in first and "-0.9" in first and "1.000%" in first
    assert "L1.attn.o[0]" in second and "2.000%" in second
    assert shown.count("<tr") == 1 + 5
    empty = replace(localization(), scores={}, total_weights=0)
    assert "largest: none" in repr(empty) and "<table" not in empty._repr_html_()


def test_a_circuit_shows_its_largest_edges():
    shown = circuit()._repr_html_()
    every = len(circuit())
    assert f"{every} of {every} edges" in shown
    assert "input → logits" in shown.split("<tr")[2] and "-2" in shown.split("<tr")[2]
    assert "m3 → logits" in shown.split("<tr")[3]
    assert "0 of" in (circuit() - circuit())._repr_html_()


def test_edits_show_what_they_move(toy):
    shown = weight_edit()._repr_html_()
    assert "3 units, 24 weights set anew" in shown and "seed 3" in shown and ">0-1</td>" in shown
    low_rank = replace(
        weight_edit(), rows={}, low_rank={"a.weight": (torch.ones(4, 2), torch.ones(2, 4))}
    )._repr_html_()
    assert "a.weight of rank 2" in low_rank
    features = feature_edit(toy)._repr_html_()
    assert "L0.resid_post" in features and "2 of 24" in features and "zero" in features and "take it off" in features


def test_facts_show_three_examples_and_what_belongs_to_them():
    sport = load_facts("factworld/sport")
    shown = sport._repr_html_()
    assert "factworld/sport, 800 facts" in shown and "held_out" in shown and "city, instrument" in shown
    assert shown.count("<tr") == 1 + 3
    for fact in sport.facts[:3]:
        assert fact.subject in shown and fact.answer in shown and fact.target in shown
    assert "800 facts" in sport.select([0])._repr_html_(), "what it was selected from"
    empty = sport.about(set())
    assert repr(empty) == "FactDataset(factworld/sport, 0 facts)" and "0 facts" in empty._repr_html_()


def test_prompts_show_the_first_one(world, sport, prompts):
    first = sport[0].queries[0]
    assert repr(sport[0]).endswith(f"; '{first.prompt}' -> '{first.answer}')") and "32 facts" in repr(sport[0])
    assert repr(prompts) == "Prompts(tokens, 4 facts, format statement, 7 positions)"
    assert ", 2 corrupted at random" in repr(replace(prompts, random_corruptions=2))


def test_a_report_leads_with_its_word():
    shown = report()._repr_html_()
    assert "Report: hidden" in shown and "quantization gets 0.90 right" in shown
    assert "forget, training prompt: target" in shown and "skills" not in shown
    assert "Report: not attacked" in report(None)._repr_html_() and "Attacks" not in report(None)._repr_html_()
