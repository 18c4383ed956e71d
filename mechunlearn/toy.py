"""A model written by hand, in which every fact's neuron is known: the planted truth of the tests.

Two layers. Neuron `i` of MLP 0 fires on subject `i` alone and writes its answer's direction at the subject; head 0 of
layer 1 carries it to the last position, where the unembedding reads it. Everything else is zero.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mechunlearn.components import Component
from mechunlearn.hooked import BridgedModel, load_model
from mechunlearn.prompts import Prompts

SUBJECTS, ANSWERS = 24, 4
BOS, RELATION, STRANGER = 0, 1, 2
FIRST_SUBJECT = 3
FIRST_ANSWER = FIRST_SUBJECT + SUBJECTS
LOOKED_UP, CARRIED = SUBJECTS, SUBJECTS + ANSWERS
IS_SUBJECT, IS_RELATION, IS_BOS = 32, 33, 34
D_MODEL, D_HEAD, D_MLP = 48, 24, 32


@dataclass(frozen=True)
class PlantedFacts:
    """The model and its truth. `prompts` are `[bos, subject, relation]`; the corrupt subject is one without a fact."""

    model: BridgedModel

    def neuron(self, fact: int) -> Component:
        """The only neuron that knows this fact."""
        return Component(0, "mlp.out", fact)

    def prompts(self, facts: list[int] | None = None) -> Prompts:
        chosen = torch.tensor(list(range(SUBJECTS)) if facts is None else facts)
        clean = torch.stack(
            [torch.full_like(chosen, BOS), FIRST_SUBJECT + chosen, torch.full_like(chosen, RELATION)], dim=1
        )
        corrupt = clean.clone()
        corrupt[:, 1] = STRANGER
        answer = FIRST_ANSWER + chosen % ANSWERS
        foil = FIRST_ANSWER + (chosen + 1) % ANSWERS
        return Prompts.from_tokens(clean, corrupt, answer, foil, torch.ones(len(chosen), 2, dtype=torch.long))


def planted_facts() -> PlantedFacts:
    """Build the model: 24 subjects, 4 answers, fact `i` has answer `i % 4`.

    >>> toy = planted_facts()
    >>> prompts = toy.prompts([0, 1])
    >>> toy.model.forward(prompts.tokens)[:, -1].argmax(-1).tolist() == prompts.answers[:, 0].tolist()
    True
    """
    config = LlamaConfig(
        vocab_size=FIRST_ANSWER + ANSWERS,
        hidden_size=D_MODEL,
        intermediate_size=D_MLP,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=BOS,
    )
    hf = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            nn.init.constant_(parameter, 1.0 if "norm" in name else 0.0)
        embed = hf.model.embed_tokens.weight
        embed[BOS, IS_BOS] = embed[RELATION, IS_RELATION] = embed[STRANGER, IS_SUBJECT] = 1.0
        for i in range(SUBJECTS):
            embed[FIRST_SUBJECT + i, i] = embed[FIRST_SUBJECT + i, IS_SUBJECT] = 1.0
        lookup = hf.model.layers[0].mlp
        for i in range(SUBJECTS):
            lookup.gate_proj.weight[i, i] = 1.0
            lookup.up_proj.weight[i, IS_SUBJECT] = 1.0
            lookup.down_proj.weight[LOOKED_UP + i % ANSWERS, i] = 0.1
        carry = hf.model.layers[1].self_attn
        slow = D_HEAD - 1  # the slowest rotary pair: position hardly turns it
        carry.q_proj.weight[slow, IS_RELATION] = 30.0
        carry.k_proj.weight[slow, IS_SUBJECT] = 1.0
        for a in range(ANSWERS):
            carry.v_proj.weight[a, LOOKED_UP + a] = 1.0
            carry.o_proj.weight[CARRIED + a, a] = 1.0
            hf.lm_head.weight[FIRST_ANSWER + a, CARRIED + a] = 4.0
    return PlantedFacts(load_model((hf.eval(), None)))
