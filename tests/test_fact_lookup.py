"""Both rules of `fact_lookup`, on models whose truth is planted and on a real one."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mechunlearn import MechunlearnError, load_facts
from mechunlearn.facts.formats import Query
from mechunlearn.facts.prompts import Prompts
from mechunlearn.localize import fact_lookup
from mechunlearn.metrics.answers import answered
from mechunlearn.model.hooked import load_model
from mechunlearn.world import toy as planted
from tests.models import random_hf, token_prompts

LAYERS, ASK, ASKED, MOVED = 5, planted.STRANGER, 35, 36
"""Layers of the model below, and its words: the token that asks, its flag, and the flag where attention has moved it."""


def asked_facts(facts: int = 24) -> Prompts:
    """`[bos, ask, subject, relation]`; the corrupt subject has no fact."""
    chosen = torch.arange(facts)
    clean = torch.stack(
        [
            torch.full_like(chosen, planted.BOS),
            torch.full_like(chosen, ASK),
            planted.FIRST_SUBJECT + chosen,
            torch.full_like(chosen, planted.RELATION),
        ],
        1,
    )
    corrupt = clean.clone()
    corrupt[:, 2] = planted.FIRST_SUBJECT + planted.SUBJECTS - 1  # a subject that no neuron knows
    answer = planted.FIRST_ANSWER + chosen % 4
    foil = planted.FIRST_ANSWER + (chosen + 1) % 4
    return Prompts.from_tokens(clean, corrupt, answer, foil, torch.full((facts, 2), 2))


@pytest.fixture
def asked():
    """Two look-ups behind a token's identity.

    MLP 0 writes the answer for the token alone. Attention of layer 1 moves to the subject that there is a question, and
    MLPs 1 and 3 write the answer only then. Attention of layer 4 carries it to the end.
    """
    config = LlamaConfig(
        vocab_size=planted.FIRST_ANSWER + planted.ANSWERS,
        hidden_size=planted.D_MODEL,
        intermediate_size=planted.D_MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        tie_word_embeddings=False,
    )
    hf = LlamaForCausalLM(config)
    known, slow = planted.SUBJECTS - 1, planted.D_HEAD - 1
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            torch.nn.init.constant_(parameter, 1.0 if "norm" in name else 0.0)
        embed, layers = hf.model.embed_tokens.weight, hf.model.layers
        embed[planted.BOS, planted.IS_BOS] = embed[planted.RELATION, planted.IS_RELATION] = embed[ASK, ASKED] = 1.0
        for i in range(planted.SUBJECTS):
            embed[planted.FIRST_SUBJECT + i, i] = embed[planted.FIRST_SUBJECT + i, planted.IS_SUBJECT] = 1.0
        for layer, gate, size in ((0, planted.IS_SUBJECT, 0.06), (1, MOVED, 0.1), (3, MOVED, 0.1)):
            mlp = layers[layer].mlp
            for i in range(known):
                mlp.gate_proj.weight[i, i] = mlp.up_proj.weight[i, gate] = 1.0
                mlp.down_proj.weight[planted.LOOKED_UP + i % 4, i] = size
        ask, carry = layers[1].self_attn, layers[4].self_attn
        ask.q_proj.weight[slow, planted.IS_SUBJECT] = carry.q_proj.weight[slow, planted.IS_RELATION] = 30.0
        ask.k_proj.weight[slow, ASKED] = carry.k_proj.weight[slow, planted.IS_SUBJECT] = 1.0
        ask.v_proj.weight[0, ASKED], ask.o_proj.weight[MOVED, 0] = 1.0, 1.0
        for a in range(planted.ANSWERS):
            carry.v_proj.weight[a, planted.LOOKED_UP + a] = carry.o_proj.weight[planted.CARRIED + a, a] = 1.0
            hf.lm_head.weight[planted.FIRST_ANSWER + a, planted.CARRIED + a] = 4.0
    return load_model((hf.eval(), None))


class TestPaths:
    def test_every_layer_above_the_threshold_is_kept_and_token_identity_is_left_out(self, asked):
        prompts = asked_facts(23)
        assert asked.forward(prompts.tokens)[:, -1].argmax(-1).tolist() == prompts.answers[:, 0].tolist()
        found = fact_lookup(asked, prompts, rule="paths")
        shares, alike = found.evidence["mlps"], found.evidence["token_identity"]
        assert shares["m0"] > max(shares["m1"], shares["m3"]) and min(shares["m1"], shares["m3"]) > 0.02
        assert alike["m0"] > 0.99 and max(alike["m1"], alike["m3"]) < 0.5
        assert found.evidence["layers"] == [1, 3] and {unit.layer for unit in found.above(0)} == {1, 3}
        for layer in range(LAYERS):
            expected = shares[f"m{layer}"] if layer in (1, 3) else 0.0
            assert found.scores[f"L{layer}.mlp.out"].tolist() == pytest.approx([expected] * planted.D_MLP)
        best = 1 if shares["m1"] > shares["m3"] else 3
        assert found.evidence["window"] == [best, best]
        assert found.note.startswith(f"look-up window: MLP {best} (also above the threshold: {4 - best}); MLP 0")
        assert "writes the same for the token alone: token identity, left out" in found.note

    def test_a_look_up_that_needs_no_context_is_kept_where_it_is_all_there_is(self, toy):
        found = fact_lookup(toy.model, toy.prompts(), rule="paths")
        assert found.evidence["token_identity"]["m0"] == pytest.approx(1)
        assert found.evidence["layers"] == [0] and {unit.layer for unit in found.above(0)} == {0}
        assert found.note.endswith("a look-up that needs no context, or token identity")

    def test_the_control_is_the_output_for_the_same_token_behind_another_subject(self):
        model, prompts = load_model((random_hf("gpt2"), None)), token_prompts()
        alike = fact_lookup(model, prompts, rule="paths").evidence["token_identity"]
        rows = prompts.tokens.tolist()
        for layer in range(3):
            written = []
            for texts, at in ((rows, 3), ([[row[0], rows[i - 1][3], row[3]] for i, row in enumerate(rows)], 2)):
                each = [model.cache(torch.tensor([text]), [f"L{layer}.mlp_out"])[1] for text in texts]
                x = torch.stack([kept[f"L{layer}.mlp_out"][0, at] for kept in each])
                written.append(x - x.mean(0))
            a, b = written
            expected = ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()
            assert alike[f"m{layer}"] == pytest.approx(float(expected), abs=1e-5)

    @pytest.mark.training
    def test_the_shipped_world_keeps_what_else_is_above_the_threshold(self, world, sport):
        found = fact_lookup(world, sport[0], rule="paths")
        above = [layer for layer in range(8) if found.evidence["mlps"][f"m{layer}"] > 0.02]
        assert found.evidence["window"] == [1, 2] and found.evidence["layers"] == above and {1, 2} <= set(above)
        assert max(found.evidence["token_identity"].values()) < 0.5


class TestProbe:
    def test_facts_with_rare_answers_are_left_out_and_counted(self, toy):
        prompts = toy.prompts()
        answers = prompts.answers.clone()
        answers[:2, 0] = torch.tensor([4, 5])  # one fact each
        found = fact_lookup(toy.model, replace(prompts, answers=answers), seed=2)
        assert found.evidence["dropped"] == 2 and found.evidence["train"] + found.evidence["test"] == 22
        assert found.note == "look-up window: MLP 0; 2 of 24 facts have a rare answer and were left out"
        whole = fact_lookup(toy.model, prompts, seed=2)
        assert whole.evidence["dropped"] == 0 and whole.note == "look-up window: MLP 0"

    def test_facts_that_share_no_answers_are_refused(self, toy):
        prompts = toy.prompts()
        alone = replace(prompts, answers=torch.arange(24)[:, None] + 3)
        with pytest.raises(MechunlearnError, match=r"These 24 facts, 20 of them for training, have 24 different"):
            fact_lookup(toy.model, alone)

    def test_two_shared_answers_do_not_stand_for_a_data_set_without_any(self, toy):
        prompts = toy.prompts(list(range(24)) * 3)
        mostly_alone = torch.arange(72) + 100
        mostly_alone[:10], mostly_alone[10:20] = 1, 2
        with pytest.raises(MechunlearnError, match="half of the facts with such answers"):
            fact_lookup(toy.model, replace(prompts, answers=mostly_alone[:, None]))

    def test_an_answer_that_the_embedding_shows_has_no_rise_and_the_note_says_so(self):
        prompts = token_prompts(facts=64)
        tokens, answers = prompts.tokens.clone(), torch.arange(64) % 4 + 2
        tokens[:, 3] = 20 + answers
        prompts = Prompts.from_tokens(tokens, prompts.corrupt, answers, answers + 10, prompts.spans)
        found = fact_lookup(load_model((random_hf("llama"), None)), prompts)
        assert found.evidence["curve"][0] == 1 and found.evidence["window"] is None and len(found.above(0)) == 0
        assert found.note == (
            "no window found: the answer is readable from the embedding on (1.00), so there is no rise to locate"
        )
        unreadable = Prompts.from_tokens(prompts.corrupt, tokens, answers, answers + 10, prompts.spans)
        never = fact_lookup(load_model((random_hf("llama"), None)), unreadable)
        assert never.note.startswith("no window found: the answer is never readable at the subject (best probe")


KNOWN = {  # by SmolLM2, after "The capital city of ... is"
    "Nigeria": "Abuja",
    "Canada": "Ottawa",
    "Egypt": "Cairo",
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Spain": "Madrid",
    "Russia": "Moscow",
    "Peru": "Lima",
    "Kenya": "Nairobi",
    "Norway": "Oslo",
}


@pytest.mark.real
@pytest.mark.slow
def test_on_a_real_model_mlp_0_is_token_identity_and_what_stays_is_above_the_threshold(smollm2):
    prompts = Prompts.from_text(
        [Query(f"The capital city of {of} is", city, subject=of) for of, city in KNOWN.items()], smollm2.tokenizer
    )
    found = fact_lookup(smollm2, prompts, rule="paths")
    shares, alike = found.evidence["mlps"], found.evidence["token_identity"]
    assert shares["m0"] == max(shares.values()) > 0.3 and alike["m0"] > 0.95
    assert sorted(alike.values())[-2] < 0.9, "no other MLP writes the same for the token alone"
    layers = found.evidence["layers"]
    assert layers == [layer for layer in range(1, 30) if shares[f"m{layer}"] > 0.02] and {7, 8} <= set(layers)
    assert {unit.layer for unit in found.above(0)} == set(layers)
    assert "MLP 0 (0." in found.note and found.note.endswith(
        "writes the same for the token alone: token identity, left out"
    )


@pytest.mark.real
@pytest.mark.slow
def test_on_a_real_model_the_probe_rises_over_the_first_layers_and_unknown_facts_are_left_out(smollm2):
    cities = load_facts("cities/continent")
    cities = replace(cities, facts=cities.facts[::2])
    forget, _ = cities.prompts(smollm2).split(forget=8, seed=0)
    found = fact_lookup(smollm2, forget)
    curve, (first, last) = found.evidence["curve"], found.evidence["window"]
    assert curve[0] < 0.8 and curve[8] > 0.9 > found.evidence["majority"] + 0.3
    assert first <= 2 and 4 <= last <= 12 and {unit.layer for unit in found.above(0)} == set(range(first, last + 1))
    everyone = forget.facts.source.prompts(smollm2)
    theirs = [i for i, fact in enumerate(everyone.facts) if fact.subject not in forget.facts.subjects]
    unknown = int((~answered(smollm2, everyone.select(theirs))).sum())
    assert found.evidence["unknown"] == unknown > 10
    used = found.evidence["train"] + found.evidence["test"] + found.evidence["dropped"]
    assert used == len(everyone) - unknown and f"{unknown} more are not known to the model" in found.note
