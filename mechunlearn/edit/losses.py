"""Objectives on the logits of answer tokens: plain functions `(logits [token d_vocab], labels [token]) -> scalar`."""

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Float[Tensor, "token d_vocab"], labels: Int[Tensor, " token"]) -> Float[Tensor, ""]:
    """Mean negative log-likelihood: what keeps the retain set and the text."""
    return F.cross_entropy(logits.float(), labels)


def injection(logits: Float[Tensor, "token d_vocab"], labels: Int[Tensor, " token"]) -> Float[Tensor, ""]:
    """Cross-entropy on each fact's own wrong answer (the edit loss of arXiv 2410.12949).

    The wrong answers are drawn per fact, so that a change of the output bias cannot do the edit.
    """
    return F.cross_entropy(logits.float(), labels)


def log_one_minus_p(logits: Float[Tensor, "token d_vocab"], labels: Int[Tensor, " token"]) -> Float[Tensor, ""]:
    """Mean of -log(1 - p(truth)), zero where log p < -5 (the unlearning loss of arXiv 2410.12949).

    It stops pushing once the truth has become improbable, so it diverges less than gradient ascent.

    >>> import torch
    >>> round(log_one_minus_p(torch.tensor([[0.0, 0.0], [-9.0, 9.0]]), torch.tensor([0, 0])).item(), 4)
    0.3466
    """
    log_p = logits.float().log_softmax(-1)
    truth = log_p.gather(1, labels[:, None])[:, 0]
    others = log_p.scatter(1, labels[:, None], -float("inf")).logsumexp(-1)
    return (-others * (truth > -5)).mean()


def gradient_ascent(logits: Float[Tensor, "token d_vocab"], labels: Int[Tensor, " token"]) -> Float[Tensor, ""]:
    """Minus the cross-entropy on the truth. With a retain term this is gradient difference.

    Unbounded below: it destroys the model if nothing holds it. Use it as a baseline.
    """
    return -F.cross_entropy(logits.float(), labels)
