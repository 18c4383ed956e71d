"""Models whose truth is known.

One written by hand, in which every fact has its neuron, and one of a language of states.

The one of facts has two layers. Neuron `i` of MLP 0 fires on subject `i` alone and writes its answer's direction at the
subject; head 0 of layer 1 carries it to the last position, where the unembedding reads it. Everything else is zero.
The one of states is trained: its language is known, its weights are whatever came of it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel, load_model

SUBJECTS, ANSWERS = 24, 4
BOS, RELATION, STRANGER = 0, 1, 2
FIRST_SUBJECT = 3
FIRST_ANSWER = FIRST_SUBJECT + SUBJECTS
LOOKED_UP, CARRIED = SUBJECTS, SUBJECTS + ANSWERS
IS_SUBJECT, IS_RELATION, IS_BOS = 32, 33, 34
D_MODEL, D_HEAD, D_MLP = 48, 24, 32
WORDS, STATES, NEXT = 12, 8, 3
ROWS, LENGTH, RATE = 64, 20, 4e-3


@dataclass(frozen=True)
class PlantedFacts:
    """The model and its truth.

    Attributes:
        model: The model.
    """

    model: HookedModel

    def neuron(self, fact: int) -> Component:
        """Return the only neuron that knows a fact.

        Args:
            fact: The number of the fact, from 0.
        """
        return Component(0, "mlp.out", fact)

    def prompts(self, facts: list[int] | None = None) -> Prompts:
        """Make the prompts `[bos, subject, relation]`; the corrupt subject is one without a fact.

        Args:
            facts: Numbers of facts; None is all of them.
        """
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


@dataclass(frozen=True)
class FiniteStates:
    """A model of a language with hidden states, and its truth.

    The last two tokens a, b are in state `state_of[a, b]`, and any token that `allowed` gives this state comes next,
    each with the same chance.

    Attributes:
        model: The model.
        state_of: The state of each pair of tokens.
        allowed: Which tokens follow each state.
    """

    model: HookedModel
    state_of: Int[Tensor, "token token"]
    allowed: Bool[Tensor, "state token"]

    def sequences(
        self, count: int, length: int = LENGTH, seed: int = 0
    ) -> tuple[Int[Tensor, "text pos"], Int[Tensor, "text pos"]]:
        """Draw texts of the language.

        Args:
            count: How many texts.
            length: Tokens in each.
            seed: Of the draws.

        Returns:
            The tokens, and the state at each token; -1 at the first, which is in none.
        """
        return _walks(self.state_of, self.allowed, count, length, torch.Generator().manual_seed(seed))


def finite_states(seed: int = 0, steps: int = 200) -> FiniteStates:
    """Draw a language of 12 tokens and 8 states, each with 3 next tokens, and train two layers on it: some seconds.

    The truth of discovery: a feature or code either is of a state or is not, token by token (codebook features, arXiv
    2310.17230, section 3, have such a language).

    Args:
        seed: Of the language, the weights and the texts.
        steps: Training steps of 64 texts of 20 tokens, drawn anew each; after 200 the tokens that are not allowed have
            1 or 2 % of the probability.

    >>> language = finite_states(steps=1)
    >>> tokens, states = language.sequences(4)
    >>> bool(language.allowed[states[:, 1:-1], tokens[:, 2:]].all())
    True
    """
    generator = torch.Generator().manual_seed(seed)
    state_of = torch.randint(STATES, (WORDS, WORDS), generator=generator)
    allowed = torch.rand(STATES, WORDS, generator=generator).argsort(1) < NEXT
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = LlamaForCausalLM(config)
    optimiser = torch.optim.Adam(hf.parameters(), lr=RATE)
    warmed = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps + 1, pct_start=0.1)
    for _ in range(steps):
        tokens = _walks(state_of, allowed, ROWS, LENGTH, generator)[0]
        optimiser.zero_grad()
        with torch.enable_grad():
            logits = hf(input_ids=tokens).logits[:, 1:-1]
            functional.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten()).backward()
        optimiser.step()
        warmed.step()
    optimiser.zero_grad()
    return FiniteStates(load_model((hf.eval(), None)), state_of, allowed)


def _walks(
    state_of: Tensor, allowed: Tensor, count: int, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    tokens = [*torch.randint(len(state_of), (2, count), generator=generator)]
    states = [torch.full((count,), -1), state_of[tokens[0], tokens[1]]]
    while len(tokens) < length:
        tokens.append(torch.multinomial(allowed[states[-1]].float(), 1, generator=generator)[:, 0])
        states.append(state_of[tokens[-2], tokens[-1]])
    return torch.stack(tokens, 1)[:, :length], torch.stack(states, 1)[:, :length]
