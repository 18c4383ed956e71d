"""Numbers from logits: metrics are functions of `(logits, prompts)`, one value a fact."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.model.hooked import HookedModel


@torch.no_grad()
def text_loss(model: HookedModel, texts: tuple[str, ...], batch_size: int = 64) -> Float[Tensor, " text"]:
    """Mean next-token cross-entropy of each text, in nats."""
    encoded = encode(model, texts)
    losses = torch.zeros(len(texts))
    for rows in torch.tensor([len(ids) for ids in encoded]).argsort().split(batch_size):
        tokens, weight = padded([encoded[i] for i in rows.tolist()])
        losses[rows] = (token_losses(model.forward(tokens), tokens) * weight).sum(1).cpu() / weight.sum(1)
    return losses


def encode(model: HookedModel, texts: tuple[str, ...]) -> list[list[int]]:
    """Token ids of each text; none for a model without a tokenizer."""
    return [model.tokenizer(text)["input_ids"] for text in texts] if model.tokenizer is not None else []


def padded(encoded: list[list[int]]) -> tuple[Int[Tensor, "text pos"], Float[Tensor, "text next"]]:
    """Right-padded tokens, and 1 where a next token is real."""
    width = max(map(len, encoded))
    tokens = torch.zeros(len(encoded), width, dtype=torch.long)
    weight = torch.zeros(len(encoded), width - 1)
    for i, ids in enumerate(encoded):
        tokens[i, : len(ids)] = torch.tensor(ids)
        weight[i, : len(ids) - 1] = 1
    return tokens, weight


def token_losses(
    logits: Float[Tensor, "text pos d_vocab"], tokens: Int[Tensor, "text pos"]
) -> Float[Tensor, "text next"]:
    """Cross-entropy of every next token."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), tokens[:, 1:].to(logits.device), reduction="none"
    )
