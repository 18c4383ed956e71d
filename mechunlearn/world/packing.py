"""Documents to training rows: several documents share a row, and none sees another."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechunlearn.world.corpus import PHASES, Corpus, Document

ROW = 132
ANSWER_WEIGHT = 5.0
CHUNK = 2000


@dataclass
class Batch:
    """Rows of packed documents. `document` numbers them within a row, -1 where there is none."""

    tokens: Int[Tensor, "row pos"]
    position: Int[Tensor, "row pos"]
    document: Int[Tensor, "row pos"]
    weight: Float[Tensor, "row pos"]
    people: list[tuple[int, int, str]]

    def masks(self, window: int | None) -> dict[str, Bool[Tensor, "row 1 pos pos"]]:
        """Attention masks by layer type: causal within a document; sliding layers see the last `window` positions."""
        same = self.document[:, :, None] == self.document[:, None, :]
        age = torch.arange(ROW)[:, None] - torch.arange(ROW)[None, :]
        full = (same & (age >= 0))[:, None]
        if window is None:
            return {"full_attention": full}
        return {"full_attention": full, "sliding_attention": full & (age < window)}


def batches(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, seed: int, rows: int, skip: int, phase: int
) -> Iterator[Batch]:
    """Batches of `rows` rows without end; the same seed gives the same batches, from any `skip` on."""
    chunk, passed = 0, 0
    left: list[list[tuple[Document, list[int], list[tuple[int, int]]]]] = []
    while True:
        left += _rows(corpus, tokenizer, (len(PHASES) * seed + phase) * 1_000_003 + chunk, phase)
        chunk += 1
        while len(left) >= rows:
            if passed >= skip:
                yield _batch(left[:rows], tokenizer)
            left, passed = left[rows:], passed + 1


def _rows(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, seed: int, phase: int) -> list[list[tuple[Any, ...]]]:
    documents = list(corpus.documents(seed, CHUNK, phase))
    encoded = tokenizer([d.text for d in documents], return_offsets_mapping=True)
    made = [
        (document, [*ids, tokenizer.eos_token_id], offsets)
        for document, ids, offsets in zip(documents, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        if len(ids) < ROW
    ]
    made.sort(key=lambda entry: -len(entry[1]))
    rows: list[list[tuple[Any, ...]]] = []
    free: list[int] = []
    first = 0
    for entry in made:
        size = len(entry[1])
        while first < len(free) and free[first] < 8:
            first += 1
        for i in range(first, len(free)):
            if free[i] >= size:
                rows[i].append(entry)
                free[i] -= size
                break
        else:
            rows.append([entry])
            free.append(ROW - size)
    random.Random(seed).shuffle(rows)
    return rows


def _batch(rows: list[list[tuple[Any, ...]]], tokenizer: PreTrainedTokenizerBase) -> Batch:
    tokens = torch.full((len(rows), ROW), tokenizer.pad_token_id)
    position = torch.zeros(len(rows), ROW, dtype=torch.long)
    document = torch.full((len(rows), ROW), -1)
    weight = torch.zeros(len(rows), ROW)
    people = []
    for row, entries in enumerate(rows):
        start = 0
        for number, (drawn, ids, offsets) in enumerate(entries):
            stop = start + len(ids)
            tokens[row, start:stop] = torch.tensor(ids)
            position[row, start:stop] = torch.arange(len(ids))
            document[row, start:stop] = number
            weight[row, start + 1 : stop] = drawn.plain  # the first token of a document is given
            ends = {end: i for i, (_, end) in enumerate(offsets)}
            for left, right in drawn.answers:
                if right - left < 100:
                    inside = [i for i, (a, b) in enumerate(offsets) if b > left and a < right and b > a]
                    weight[row, [start + i for i in inside]] = ANSWER_WEIGHT
            people += [(row, start + ends[end], name) for end, name in drawn.people]
            start = stop
    return Batch(tokens, position, document, weight, people)
