"""What a model answers: whether greedy decoding gives a whole answer, and how it goes on instead."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.core.steady import steady
from mechunlearn.facts.prompts import PAD, Prompts
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.text import decoded

BATCH = 128
WORTH = 64
"""Tokens that must be saved before a shared beginning is read once: a second call of the model costs as much."""


def answer_logits(
    model: HookedModel, part: Prompts, share: bool = False
) -> tuple[Float[Tensor, "fact read d_vocab"], Prompts]:
    """Return the logits of the answer's positions alone, and the same facts with their positions counted from there.

    Args:
        model: The model.
        part: The facts, as many as fit in one pass.
        share: Whether first tokens that all prompts have in common may be read once for all of them: a template's, a
            chat's. Not under hooks that count positions from the beginning of a text.
    """
    at = (part.start[:, None] + torch.arange(part.answers.shape[1])).clamp(max=part.tokens.shape[1] - 1)
    tokens = part.tokens[:, : int(at.max()) + 1]
    shared = shared_tokens(part) if share else 0
    if shared * (len(part) - 1) >= WORTH:
        logits = model.decoder.behind_shared(tokens, shared, at)
    else:
        logits = model.decoder.record(tokens, at, keys=False).logits
    return logits, replace(part, start=torch.zeros_like(part.start), read=part.read - part.start)


def shared_tokens(prompts: Prompts) -> int:
    """Return how many first tokens all prompts have in common, short of the token that predicts an answer.

    Args:
        prompts: The prompts.
    """
    same = (prompts.tokens == prompts.tokens[:1]).all(0)[: int(prompts.start.min())]
    return int(same.long().cumprod(0).sum())


@steady()
@torch.no_grad()
def answered(model: HookedModel, prompts: Prompts, batch_size: int = BATCH) -> Bool[Tensor, " fact"]:
    """Return, for each fact, whether greedy decoding gives all tokens of the answer: one forward pass a batch, nothing else.

    Args:
        model: The model.
        prompts: The facts.
        batch_size: Facts at a time.
    """
    right = torch.zeros(len(prompts), dtype=torch.bool)
    for rows in prompts.lengths.argsort().split(batch_size):
        part = prompts.select(rows)
        said = answer_logits(model, part)[0].argmax(-1).cpu()
        given = part.answers != PAD
        right[rows] = ((said == part.answers) | ~given).all(1) & given.any(1)
    return right


@steady()
@torch.no_grad()
def continuations(model: HookedModel, prompts: Prompts, tokens: int = 8, batch_size: int = BATCH) -> list[str]:
    """Return how greedy decoding goes on after each prompt: its first line, without spaces around it.

    Args:
        model: The model.
        prompts: The facts.
        tokens: How many tokens it may say.
        batch_size: Facts at a time.
    """
    said = [""] * len(prompts)
    for rows in prompts.lengths.argsort().split(batch_size):
        asked = [prompts.tokens[i, : int(prompts.start[i]) + 1].tolist() for i in rows.tolist()]
        made = model.generate(asked, max_new_tokens=tokens, return_dict_in_generate=True).sequences
        width = max(map(len, asked))
        for i, text in zip(rows.tolist(), decoded(made[:, width:], model.tokenizer, skip_special=True)):
            said[i] = text.strip().partition("\n")[0].rstrip()
    return said
