"""Queries as tokens, each with its corrupt partner and its foil."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.formats import Query

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One query in tokens.

    Args:
        query: The query as text, with its foil and target filled in.
        ids: The prompt and its answer, without the answer's last token.
        prompt_length: How many of them are the prompt.
        answer: The answer's tokens.
        span: First and last position of the subject; None if there is none.
        foil: The foil's tokens; none if no other answer is known.
        target: The edit target's tokens.
        options: The tokens of each answer to choose among.
        corrupt: As many tokens as `ids`, with another subject.
        at_random: Whether that subject is made of random tokens.
    """

    query: Query
    ids: Ids
    prompt_length: int
    answer: Ids
    span: tuple[int, int] | None
    foil: Ids = ()
    target: Ids = ()
    options: tuple[Ids, ...] = ()
    corrupt: Ids = ()
    at_random: bool = False

    @cached_property
    def subject(self) -> Ids:
        """The subject's tokens; none if it is not named."""
        return self.ids[self.span[0] : self.span[1] + 1] if self.span else ()

    @property
    def differs_at(self) -> int:
        """The first token at which answer and foil differ; 0 without a foil."""
        return next((i for i, (a, b) in enumerate(zip(self.answer, self.foil, strict=False)) if a != b), 0)

    def with_subject(self, other: Sequence[int]) -> Ids:
        """Return the tokens with another subject in place of this one, wherever it occurs in the prompt.

        Args:
            other: The other subject's tokens, as many as this one's.
        """
        changed, i, length = list(self.ids), 0, len(self.subject)
        while i <= self.prompt_length - length:
            found = tuple(changed[i : i + length]) == self.subject
            if found:
                changed[i : i + length] = other
            i += length if found else 1
        return tuple(changed)


def paired(
    queries: Sequence[Query],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    said: Callable[[int, int], str] | None = None,
) -> list[Row]:
    """Tokenize queries, and give each its corrupt partner and its foil (see `Prompts.from_text`).

    Args:
        queries: The queries.
        tokenizer: Makes tokens and says which characters each one covers.
        seed: Draws partners and, where there is none, random tokens.
        said: How the subject of the second query answers the prompt of the first, by their indices; empty if it does not.

    Raises:
        MechunlearnError: If a subject is not in its prompt, an answer is empty, or an answer and its foil are the same tokens.
    """
    words = _Words(tokenizer, queries)
    encoded = tokenizer([query.prompt for query in queries], return_offsets_mapping=True)
    rows = []
    for query, prompt, offsets in zip(queries, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        answer = words.ids(query, query.answer)
        if not answer:
            raise MechunlearnError(f"The answer of '{query.prompt}' is empty. Expected at least one token.")
        span = _find(query, offsets) if query.subject else None
        rows.append(Row(query, (*prompt, *answer[:-1]), len(prompt), answer, span))
    others = _Others(rows, words, said or (lambda i, j: queries[j].answer), random.Random(seed))
    return [others.paired(i, len(tokenizer)) for i in range(len(rows))]


class _Words:
    """The tokens of answers as they stand after a prompt: with a space unless the prompt ends in one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, queries: Sequence[Query]) -> None:
        self.tokenizer = tokenizer
        every = (
            (query, text) for query in queries for text in (query.answer, query.foil, query.target, *query.options)
        )
        texts = list(dict.fromkeys(self._after(query, text) for query, text in every))
        self.known = dict(zip(texts, map(tuple, tokenizer(texts, add_special_tokens=False)["input_ids"])))

    def ids(self, query: Query, text: str) -> Ids:
        """The tokens of a text behind this query's prompt; none for an empty one."""
        shown = self._after(query, text)
        if shown not in self.known:
            self.known[shown] = tuple(self.tokenizer(shown, add_special_tokens=False)["input_ids"])
        return self.known[shown] if text.strip() else ()

    def _after(self, query: Query, text: str) -> str:
        return text if query.prompt.endswith((" ", "\n")) else " " + text.lstrip()


class _Others:
    """What a row can be paired with: the subjects of other rows, by their length in tokens."""

    def __init__(self, rows: Sequence[Row], words: _Words, said: Callable[[int, int], str], rng: random.Random) -> None:
        self.rows, self.words, self.said, self.rng = rows, words, said, rng
        self.answers = {row.answer for row in rows}
        self.everyone = rng.sample(range(len(rows)), len(rows))
        self.by_length: dict[int, list[int]] = {}
        for i in self.everyone:
            self.by_length.setdefault(len(rows[i].subject), []).append(i)

    def paired(self, i: int, vocabulary: int) -> Row:
        """The row with everything that depends on other rows."""
        row = self.rows[i]
        query, given = row.query, self.words.ids(row.query, row.query.foil)
        if _same_start(row.answer, given):
            raise MechunlearnError(
                f"Answer '{query.answer}' and foil '{query.foil}' of '{query.prompt}' are the same tokens "
                "(or one begins with the other): give a foil that differs."
            )
        wanted = given if given in self.answers else ()
        partner = self._another(i, self.by_length[len(row.subject)], wanted) if row.span else None
        foil = query.foil or self._foil(i, partner)
        query = replace(query, foil=foil, target=query.target or foil)
        subject = self.rows[partner].subject if partner is not None else ()
        at_random = row.span is not None and partner is None
        if at_random:
            subject = tuple(self.rng.randrange(vocabulary) for _ in row.subject)
        return replace(
            row,
            query=query,
            foil=self.words.ids(query, foil),
            target=self.words.ids(query, query.target),
            options=tuple(self.words.ids(query, option) for option in query.options),
            corrupt=row.with_subject(subject) if row.span else row.ids,
            at_random=at_random,
        )

    def _foil(self, i: int, partner: int | None) -> str:
        """The partner's answer; without one another fact's, or another option. Empty if all are the truth."""
        if partner is None:
            partner = self._another(i, self.everyone)
        if partner is not None:
            return self.said(i, partner)
        row = self.rows[i]
        others = [text for text in row.query.options if self._differs(i, text)]
        return self.rng.choice(others) if others else ""

    def _another(self, i: int, among: Sequence[int], foil: Ids = ()) -> int | None:
        """A row about another subject, whose answer is the foil if there is such a row, else any but the truth."""
        best, count = None, len(among)
        first = self.rng.randrange(count)
        for k in range(first, first + count):
            j = among[k % count]
            if j == i or (self.rows[i].span and self.rows[j].query.subject == self.rows[i].query.subject):
                continue
            text = self.said(i, j)
            if foil and self.words.ids(self.rows[i].query, text) == foil:
                return j
            if best is None and self._differs(i, text):
                best = j
                if not foil:
                    break
        return best

    def _differs(self, i: int, text: str) -> bool:
        ids = self.words.ids(self.rows[i].query, text)
        return bool(ids) and not _same_start(self.rows[i].answer, ids)


def _same_start(a: Ids, b: Ids) -> bool:
    """Whether two answers are the same tokens, or one begins with the other."""
    return bool(a and b) and a[: len(b)] == b[: len(a)]


def _find(query: Query, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    start = query.prompt.rfind(query.subject)
    if start < 0:
        raise MechunlearnError(
            f"The subject '{query.subject}' is not in its prompt '{query.prompt}'. "
            "Expected the prompt to contain the subject as it is written, or '{}' in its place."
        )
    stop = start + len(query.subject)
    inside = [i for i, (a, b) in enumerate(offsets) if b > start and a < stop and b > a]
    return inside[0], inside[-1]
