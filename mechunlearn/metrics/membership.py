"""Scores that tell what a model was trained on from what it was not: the larger, the more likely it was."""

import zlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def min_k(logprobs: Float[Tensor, "row token"], share: float = 0.2) -> Float[Tensor, " row"]:
    """Return the mean log-probability of the least likely tokens of each text, in nats.

    The share of the tokens, rounded down and at least one, is that of Min-K% Prob (Shi et al., arXiv 2310.16789). Not
    for texts of a few tokens, where it is the least likely one alone.

    Args:
        logprobs: Log-probabilities of the tokens; NaN behind the last.
        share: How many of the tokens count.

    >>> min_k(torch.tensor([[-1.0, -5.0, -2.0, -3.0], [-1.0, -4.0, torch.nan, torch.nan]]), share=0.5).tolist()
    [-4.0, -4.0]
    """
    least = ((~logprobs.isnan()).sum(1) * share).floor().clamp(min=1)
    lowest = logprobs.nan_to_num(nan=torch.inf).sort(1).values
    counted = torch.arange(logprobs.shape[1]) < least[:, None]
    return lowest.masked_fill(~counted, 0).sum(1) / least


def zlib_score(logprobs: Float[Tensor, "row token"], texts: Sequence[str]) -> Float[Tensor, " row"]:
    """Return the mean log-probability of each text's tokens over its size in bytes, compressed by zlib (nats a byte).

    Carlini et al., arXiv 2012.07805: a text that is likely because it repeats itself is no member. Not for a comparison
    of texts of very different length: the size grows with the length, the mean does not.

    Args:
        logprobs: Log-probabilities of the tokens; NaN behind the last.
        texts: The texts.

    >>> zlib_score(torch.tensor([[-17.0, -17.0]]), ["and so on"]).tolist()
    [-1.0]
    """
    return logprobs.nanmean(1) / torch.tensor([len(zlib.compress(text.encode())) for text in texts])


def auc(members: Float[Tensor, " row"], others: Float[Tensor, " other"]) -> float:
    """Return the probability that a score of a member is above one of another text; of equal ones one half.

    It is the area under the ROC curve: .5 where the scores tell nothing, 1 where they tell everything. Below .5 they
    point the wrong way.

    Args:
        members: Scores of what the model was trained on.
        others: Scores of what it was not.

    >>> auc(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.625
    """
    above = (members[:, None] > others[None]).float() + 0.5 * (members[:, None] == others[None]).float()
    return float(above.mean())
