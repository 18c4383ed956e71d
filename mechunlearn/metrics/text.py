"""The loss of ordinary text, and how varied a written text is."""

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mechunlearn.core.steady import steady
from mechunlearn.model.hooked import HookedModel

WORD = re.compile(r"\w+|[^\w\s]")
"""A word, or a mark of punctuation."""


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


def ngram_entropy(text: str) -> float:
    """Measure how varied a text is: the weighted mean of the entropies of its bigrams and trigrams, in bits.

    H = (H_2 + 2 H_3) / 3, with H_n = - sum_g f(g) log2 f(g) over the n-grams g of words and marks of punctuation, and
    f(g) the share of g among them. This is the generation entropy (GE, also called fluency) of ROME (Meng et al., 2022,
    arXiv 2202.05262). The paper names no weights; the authors' code takes the mean of 2/3 H_2 and 4/3 H_3. Text that
    repeats itself has a low value. The code splits words with NLTK, which takes a few of them apart ("don't"), so values
    differ slightly.

    Compare texts of one length: k n-grams have at most log2(k) bits. Not for languages written without spaces, where a
    whole clause counts as a word. High is not good: random words have the largest value, and `text_loss` tells them
    from sentences.

    Args:
        text: The text.

    Returns:
        Bits; 0 for a text of one n-gram over and over, and for one of fewer than three words.

    >>> round(ngram_entropy("the cat saw the cat run"), 3)  # bigrams 2 1 1 1: 1.922 bits; trigrams 1 1 1 1: 2 bits
    1.974
    >>> ngram_entropy("no no no no no no")
    0.0
    """
    words = WORD.findall(text)
    return (_entropy(words, 2) + 2 * _entropy(words, 3)) / 3


def _entropy(words: Sequence[str], size: int) -> float:
    """The entropy of the n-grams of this size, in bits."""
    counts = Counter(zip(*(words[i:] for i in range(size))))
    total = counts.total()
    return sum(count / total * math.log2(total / count) for count in counts.values())
