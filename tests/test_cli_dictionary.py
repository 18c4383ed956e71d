"""`mechunlearn dictionary` as a user meets it: results, and one clear line for every mistake."""

import pytest
import torch

from mechunlearn import MechunlearnError
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.edit import codebook_delete, dictionary_rows, feature_clamp
from mechunlearn.evaluation.controls import random_control
from mechunlearn.features.dictionaries import Codebook, load_dictionary
from mechunlearn.features.feature_edit import FeatureEdit, load_edit
from mechunlearn.localize import feature_discovery
from mechunlearn.world.dictionaries import topic_stories

WORDS = ["--words", "knight,soldier,general,sword,shield,army,flag,horse,siege,fought,charged,defended,marched"]
SWAP = ["--swap", "cook,baker,soup,bread,onion,baked,tasted"]
DELETE = ["dictionary", "delete", "factworld", "factworld-codebook"]


@pytest.fixture
def stories(tmp_path):
    for topic in ("war", "kitchen"):
        (tmp_path / f"{topic}.txt").write_text("\n\n".join(topic_stories(topic, 24, 0)) + "\n")
    (tmp_path / "empty.txt").write_text("\n")
    return tmp_path


def test_a_codebook_is_trained_and_its_quality_printed(call, stories):
    few = ["--size", 32, "--used", 2, "--steps", 20, "--spliced-steps", 2]
    code, out, err = call("dictionary", "train", "factworld", "L1.resid_post", "war.txt", "-o", "book", *few)
    assert code == 0, err
    assert "explained variance" in out and "Codebook(32 codes, 2 used, L1.resid_post, width 128)" in out
    made = load_dictionary(stories / "book")
    assert isinstance(made, Codebook) and made.quality["L0"] == 2


def test_a_topic_is_deleted_against_its_swapped_sentences_and_exported(call, stories, world):
    code, out, err = call(*DELETE, "war.txt", *WORDS, *SWAP, "-o", "war.safetensors", "--export", "out")
    assert code == 0, err
    assert "FeatureEdit(codebook_delete" in out and (stories / "out" / "modeling_mechunlearn.py").exists()
    edit = load_edit(stories / "war.safetensors")
    assert isinstance(edit, FeatureEdit)
    tokens = world.tokenizer(topic_stories("war", 1, 9)[0], return_tensors="pt").input_ids
    plain = world.forward(tokens)
    with edit.applied(world):
        assert not torch.equal(world.forward(tokens), plain)


def test_features_are_clamped_where_the_dictionary_is_an_sae(call, stories):
    sae = ["dictionary", "delete", "factworld", "factworld-sae"]
    code, out, err = call(*sae, "war.txt", "--against", "kitchen.txt", "-o", "war.safetensors", "--threshold", 3)
    assert code == 0, err
    assert "feature_clamp" in out


def test_a_page_shows_what_activates_codes(call, stories):
    asked = ["dictionary", "explore", "factworld", "factworld-codebook", "war.txt", "--units", "3,7"]
    code, _, err = call(*asked, "-o", "codes.html")
    assert code == 0, err
    assert "<mark" in (stories / "codes.html").read_text() or "<span" in (stories / "codes.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*DELETE, "war.txt", "-o", "e.safetensors"], "Give what to tell the topic from: --against TEXT"),
        ([*DELETE, "war.txt", "--against", "war.txt", "-o", "e.safetensors"], "no unit of Codebook"),
        ([*DELETE, "empty.txt", "--against", "war.txt", "-o", "e.safetensors"], "holds no text"),
        ([*DELETE, "war.txt", "--against", "kitchen.txt", "-o", "e.json"], "is not named *.safetensors"),
        ([*DELETE, "war.txt", "--words", "pilot", "--swap", "cook", "-o", "e.safetensors"], "is in the text"),
        ([*DELETE[:3], "nothing", "war.txt", "--against", "kitchen.txt", "-o", "e.safetensors"], "There is no dictionary in"),
        ([*DELETE[:2], "factworld-none", "factworld-codebook", "war.txt", "--against", "kitchen.txt", "-o", "e.safetensors"], "Could not load"),
        (["dictionary", "train", "factworld", "L3.resid_pots", "war.txt", "-o", "b"], "Nearest: L3.resid_post"),
        (["dictionary", "train", "factworld", "L3.resid_post", "war.txt", "-o", "b", "--size", 4, "--used", 8], "--used 8 is more than --size 4"),
        (["dictionary", "explore", "factworld", "factworld-codebook", "war.txt", "--units", "a", "-o", "c.html"], "is not a list of numbers"),
        (["dictionary", "explore", "factworld", "factworld-codebook", "war.txt", "--units", "512", "-o", "c.html"], "512"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_clear_line_and_nothing_is_written(call, stories, arguments, message):
    before = sorted(p.name for p in stories.iterdir())
    code, _, err = call(*arguments)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert sorted(p.name for p in stories.iterdir()) == before


def test_evaluate_sets_a_feature_edit_beside_units_that_are_active_as_often(world, sport):
    forget, retain = sport
    codebook, sae = load_dictionary("factworld-codebook"), load_dictionary("factworld-sae")
    topic, other = topic_stories("war", 24, 0), topic_stories("kitchen", 24, 0)
    for dictionary in (codebook, sae):
        mask = feature_discovery(world, topic, dictionary=dictionary, against=other).above(2)
        if dictionary is codebook:
            edit = codebook_delete(world, mask, dictionary=codebook)
        else:
            edit = feature_clamp(world, mask, topic, dictionary=sae)
        control = random_control(world, edit, forget, retain, seed=1)
        assert isinstance(control, FeatureEdit) and len(control.mask) == len(edit.mask)
        assert not len(control.mask & edit.mask) and control.parts[0].settings == edit.parts[0].settings
        assert (control.parts[0].values <= 0).all()
    rows = dictionary_rows(world, mask, topic, dictionary=sae)
    control = random_control(world, rows, forget, retain, seed=1)
    assert isinstance(rows, WeightEdit) and isinstance(control, WeightEdit)
    assert len(control.calls[0].mask) == len(mask) and not len(control.calls[0].mask & mask)


def test_files_of_both_kinds_load_and_others_do_not(world, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(MechunlearnError, match="weight edit or feature edit"):
        load_edit(tmp_path / "x.safetensors")
