"""Text to tokens and back, with whatever tokenizer a model has."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mechunlearn.errors import MechunlearnError

Given = Int[Tensor, "fact pos"] | str | Sequence[str]
Begun = Given | Sequence[Sequence[int]]


def ids_of(text: str | Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    """Tokenize texts, each on its own, with the special tokens that the tokenizer adds.

    Args:
        text: One text or several.
        tokenizer: The model's.

    Raises:
        MechunlearnError: There is no tokenizer, no text, or a text without tokens.
    """
    if tokenizer is None:
        raise MechunlearnError("The model has no tokenizer. Give tokens, or load the model with one.")
    texts = [text] if isinstance(text, str) else list(text) if isinstance(text, Iterable) else []
    if not texts or not all(isinstance(each, str) for each in texts):
        raise MechunlearnError(f"Got {text!r:.80}. Expected a text, a list of texts, or a tensor of tokens [text pos].")
    found: list[list[int]] = tokenizer(texts)["input_ids"]
    if [] in found:
        raise MechunlearnError(f"The text {texts[found.index([])]!r} has no tokens. Give a text that has some.")
    return found


def padded(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Int[Tensor, "text pos"]:
    """Stack rows of different lengths.

    Args:
        rows: The tokens of each text.
        value: What fills the shorter rows.
        side: Where it is added, `right` or `left`.
    """
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value, padding_side=side)


def padding_token(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Return the id that pads: the tokenizer's own, else its end of text, else 0.

    Args:
        tokenizer: The model's, if it has one.
    """
    names = ("pad_token_id", "eos_token_id")
    return next((found for name in names if (found := getattr(tokenizer, name, None)) is not None), 0)


def decoded(tokens: Any, tokenizer: PreTrainedTokenizerBase | None, skip_special: bool = False) -> list[str]:
    """Turn rows of tokens into texts.

    Args:
        tokens: A tensor `[text pos]`, or lists.
        tokenizer: The model's.
        skip_special: Leave out tokens such as the beginning of a text.

    Raises:
        MechunlearnError: There is no tokenizer.
    """
    if tokenizer is None:
        raise MechunlearnError("The model has no tokenizer, so its tokens have no text. Load it with one.")
    texts: list[str] = tokenizer.batch_decode(
        tokens, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
    )
    return texts


def ids_to_continue(given: Begun, tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    """Return the tokens of each text without an end of text that the tokenizer adds: nothing would follow it.

    Args:
        given: Tokens (rows without padding, as a tensor or as lists), a text or several texts.
        tokenizer: The model's.
    """
    if isinstance(given, Tensor):
        return [list(row) for row in given.tolist()]
    if not isinstance(given, str) and given and not isinstance(given[0], str):
        return [[int(token) for token in row] for row in given]
    rows = ids_of(given, tokenizer)  # type: ignore[arg-type]
    assert tokenizer is not None
    mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    added = len(list(takewhile(bool, reversed(mask)))) if not all(mask) else 0
    return [row[: len(row) - added] for row in rows]


def continued(
    hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, given: Begun, settings: Mapping[str, Any]
) -> Any:
    """Continue texts or tokens, by the most likely token unless the settings say otherwise.

    Args:
        hf: The model.
        tokenizer: Its tokenizer.
        given: Tokens (rows without padding, as a tensor or as lists), a text or several texts; these are padded on the
            left. An end of text that the tokenizer adds is left out: nothing would follow it.
        settings: Keywords of `hf.generate`.

    Returns:
        What was given with its continuation: tokens, a text or several texts; or what `hf.generate` returns, if it is
        no tensor.
    """
    pad = padding_token(tokenizer)
    rows = ids_to_continue(given, tokenizer)
    ids = padded(rows, pad, "left").to(hf.device)
    mask = padded([[1] * len(row) for row in rows], 0, "left").to(hf.device)
    generate: Any = hf.generate
    made = generate(ids, attention_mask=mask, **{"do_sample": False, "pad_token_id": pad} | dict(settings))
    if isinstance(given, Tensor) or not isinstance(given[0], str) or not isinstance(made, Tensor):
        return made
    each = len(made) // len(rows)  # num_return_sequences
    real = [row[ids.shape[1] - len(rows[i // each]) :] for i, row in enumerate(made)]
    texts = decoded(real, tokenizer, skip_special=True)
    return texts[0] if isinstance(given, str) and len(texts) == 1 else texts
