"""The loss of ordinary text."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mechunlearn.core.steady import steady
from mechunlearn.model.hooked import HookedModel


@steady()
@torch.no_grad()
def text_loss(model: HookedModel, texts: Sequence[str], batch_size: int = 64) -> Float[Tensor, " text"]:
    """Return the mean next-token cross-entropy of each text, in nats.

    Args:
        model: The model. Without a tokenizer every loss is 0.
        texts: The texts, each of two or more tokens.
        batch_size: Texts at a time.
    """
    encoded = encode(model, texts)
    losses = torch.zeros(len(texts))
    for rows in torch.tensor([len(ids) for ids in encoded]).argsort().split(batch_size):
        tokens, weight = padded([encoded[i] for i in rows.tolist()])
        losses[rows] = (token_losses(model.forward(tokens), tokens) * weight).sum(1).cpu() / weight.sum(1)
    return losses


def encode(model: HookedModel, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text; none for a model without a tokenizer.

    Args:
        model: Its tokenizer is used.
        texts: The texts.
    """
    return [model.tokenizer(text)["input_ids"] for text in texts] if model.tokenizer is not None else []


def padded(encoded: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "text pos"], Float[Tensor, "text next"]]:
    """Return tokens padded on the right, and 1 where a next token is real.

    Args:
        encoded: Token ids of each text.
    """
    tokens = pad_sequence([torch.tensor(ids, dtype=torch.long) for ids in encoded], batch_first=True)
    lengths = torch.tensor([len(ids) for ids in encoded])
    return tokens, (torch.arange(1, tokens.shape[1]) < lengths[:, None]).float()


def token_losses(
    logits: Float[Tensor, "text pos d_vocab"], tokens: Int[Tensor, "text pos"]
) -> Float[Tensor, "text next"]:
    """Return the cross-entropy of every next token, in nats.

    Args:
        logits: A model's logits of these tokens.
        tokens: Token ids.
    """
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), tokens[:, 1:].to(logits.device), reduction="none"
    )
