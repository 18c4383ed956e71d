"""How much of a text a model knows by heart: accuracy, extraction and, as a check on damage, repetition."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache

from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.metrics.text import encode, padded
from mechunlearn.model.hooked import HookedModel

PREFIXES = (16, 32, 64)


@steady()
@torch.no_grad()
def memorization_accuracy(model: HookedModel, texts: Sequence[str], batch_size: int = 64) -> Float[Tensor, " text"]:
    """Return the share of a text's tokens, from the second on, that the model ranks first given those before (0 to 1).

    MA(x) = sum_t 1{argmax p(. | x_<t) = x_t} / (T - 1) (Tirumala et al., arXiv 2205.10770). It forgives every mistake,
    since the true text is always given: `extraction_likelihood` tells what the model writes by itself.

    Args:
        model: The model.
        texts: The texts.
        batch_size: Texts at a time.

    Raises:
        MechunlearnError: If the model has no tokenizer, or a text fewer than two tokens.

    >>> from mechunlearn import load_model
    >>> model = load_model("factworld")
    >>> bool(memorization_accuracy(model, ["Copy: old lamp quiet stone."])[0] < 1)
    True
    """
    encoded = _encode(model, texts, 2)
    found = torch.zeros(len(encoded))
    for rows in torch.tensor([len(ids) for ids in encoded]).argsort().split(batch_size):
        tokens, weight = padded([encoded[i] for i in rows.tolist()])
        right = model.forward(tokens)[:, :-1].argmax(-1).cpu() == tokens[:, 1:]
        found[rows] = (right * weight).sum(1) / weight.sum(1)
    return found


def extraction_likelihood(
    model: HookedModel, texts: Sequence[str], n: int = 10, prefixes: Sequence[int] = PREFIXES
) -> Float[Tensor, " text"]:
    """Return the share of the n-grams that the model writes, given the start of a text, which stand in its rest (0 to 1).

    EL_n(x) = mean over prefix lengths t of |{c in n-grams(f(x_<=t)) : c in n-grams(x_>t)}| / (T - t - n + 1), where f
    continues greedily to the text's length T (Jang et al., arXiv 2210.01504). They average over every t from 1 to
    T - n; here t runs over `prefixes` (in tokens, a start token included), which costs one decoding. A continuation
    that ends early counts as if the rest of it were wrong.

    Args:
        model: The model.
        texts: The texts.
        n: Tokens of an n-gram.
        prefixes: How many tokens of a text are given; the mean over them is returned.

    Raises:
        MechunlearnError: If the model has no tokenizer, or a text is shorter than the longest prefix and an n-gram.

    >>> from mechunlearn import load_model
    >>> model = load_model("factworld")
    >>> bool(extraction_likelihood(model, ["Copy: old lamp quiet stone. Again: dusty."], n=2, prefixes=(3, 5))[0] < 1)
    True
    """
    encoded = _encode(model, texts, max(prefixes) + n)
    asked = [(ids, prefix) for ids in encoded for prefix in prefixes]
    made = _continue(model, [ids[:prefix] for ids, prefix in asked], [len(ids) - prefix for ids, prefix in asked])
    shares = []
    for (ids, prefix), written in zip(asked, made, strict=True):
        truth = set(_ngrams(ids[prefix:], n))
        shares.append(sum(gram in truth for gram in _ngrams(written, n)) / (len(ids) - prefix - n + 1))
    return torch.tensor(shares).view(len(encoded), len(prefixes)).mean(1)


def repetition(model: HookedModel, prompts: Sequence[str], tokens: int = 64, n: int = 4) -> Float[Tensor, " prompt"]:
    """Return the share of the n-grams in the greedy continuation of a prompt that stood in it before.

    1 - distinct / all.

    A sign of damage: a model that has been pushed too far says the same again and again. Compare it with the same model
    before, for greedy text of small models repeats itself anyway. A continuation shorter than n tokens gives 0.

    Args:
        model: The model.
        prompts: What the model continues.
        tokens: How far.
        n: Tokens of an n-gram.

    Raises:
        MechunlearnError: If the model has no tokenizer.

    >>> from mechunlearn import load_model
    >>> 0 <= float(repetition(load_model("factworld"), ["The cook"], tokens=8)[0]) <= 1
    True
    """
    encoded = _encode(model, prompts, 1)
    made = [_ngrams(written, n) for written in _continue(model, encoded, [tokens] * len(encoded))]
    return torch.tensor([1 - len(set(grams)) / len(grams) if grams else 0.0 for grams in made])


def _encode(model: HookedModel, texts: Sequence[str], least: int) -> list[list[int]]:
    if model.tokenizer is None:
        raise MechunlearnError("This model has no tokenizer, so it cannot read text. Load it with one.")
    if not texts:
        raise MechunlearnError("No text was given. Give at least one.")
    encoded = encode(model, tuple(texts))
    for text, ids in zip(texts, encoded, strict=True):
        if len(ids) < least:
            raise MechunlearnError(f"'{text[:40]}' has {len(ids)} tokens. Expected {least} or more: give longer texts.")
    return encoded


def _ngrams(ids: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


@torch.no_grad()
def _continue(model: HookedModel, given: list[list[int]], sizes: list[int]) -> list[list[int]]:
    """Greedy continuations of these sizes, each cut before its end-of-text token.

    All are decoded at once and in step, without padding: while a longer start still lasts, it is followed.
    """
    starts = torch.tensor([len(ids) for ids in given])
    total = int((starts + torch.tensor(sizes)).max())
    tokens = pad_sequence([torch.tensor(ids) for ids in given], batch_first=True)
    tokens = pad(tokens, (0, total - tokens.shape[1]))
    past, read = DynamicCache(), 0
    for position in range(int(starts.min()), total):
        new, held = tokens[:, read:position].to(model.device), {model.decoder.cache_argument: past}
        out = model.hf(input_ids=new, use_cache=True, logits_to_keep=1, **held)
        read = position
        tokens[:, position] = torch.where(position < starts, tokens[:, position], out.logits[:, -1].argmax(-1).cpu())
    end = model.tokenizer.eos_token_id if model.tokenizer is not None else None
    made = [row[start : start + size] for row, start, size in zip(tokens.tolist(), starts.tolist(), sizes, strict=True)]
    return [ids[: ids.index(end)] if end in ids else ids for ids in made]
