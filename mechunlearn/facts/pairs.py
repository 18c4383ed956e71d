"""Queries as tokens, each with its corrupt partner and its foil."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.formats import Query, places

Ids = tuple[int, ...]
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff01-\uff65]")
"""Letters and marks of scripts that part words by nothing: Thai, Lao, Burmese, Khmer, Chinese, Japanese."""


class Fit(NamedTuple):
    """What a subject needs of its place in a prompt to be the same tokens there.

    Attributes:
        tokens: How many tokens it has.
        before: What its first token holds before it.
        after: What its last token holds after it.
        spaced: Whether a space stands before it.
        apart: Whether that space is a token of its own, as before digits.
    """

    tokens: int
    before: str
    after: str
    spaced: bool
    apart: bool


@dataclass(frozen=True)
class Row:
    """One query in tokens.

    Args:
        query: The query as text, with its foil and target filled in.
        ids: The prompt and its answer, without the answer's last token.
        prompt_length: How many of them are the prompt.
        answer: The answer's tokens.
        span: First and last position of the subject's last occurrence; None if there is none.
        fits: What stands around the subject, and how many tokens it has: another subject that fits can stand there.
        places: Where the subject begins in the prompt, in characters.
        within: The positions of all its occurrences.
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
    fits: Fit | None = None
    places: tuple[int, ...] = ()
    within: frozenset[int] = frozenset()
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

    def with_subject(self, other: Ids) -> Ids:
        """Return the tokens with other tokens in place of the subject's, at every place where it has the same tokens.

        Args:
            other: The other tokens, as many as the subject's.
        """
        changed, size = list(self.ids), len(self.subject)
        for i in self.within if other else ():
            if tuple(self.ids[i : i + size]) == self.subject and self.within.issuperset(range(i, i + size)):
                changed[i : i + size] = other
        return tuple(changed)


def asked(prompt: str) -> str:
    """Return a prompt as it is tokenized: a space at its end belongs to the answer.

    Args:
        prompt: The prompt.
    """
    return prompt.rstrip(" ")


def continued(prompt: str, answer: str) -> str:
    r"""Return an answer as it follows a prompt: behind a space, unless a line ends there or neither script has spaces.

    Args:
        prompt: The prompt.
        answer: The answer.

    >>> continued("The capital of France is", "Paris"), continued("Answer:\n", "Paris"), continued("首都是", "巴黎")
    (' Paris', 'Paris', '巴黎')
    """
    answer = answer.lstrip()
    if prompt.endswith("\n") or (UNSPACED.match(prompt[-1:]) and UNSPACED.match(answer)):
        return answer
    return " " + answer


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
        said: How the subject of the second query answers the prompt of the first, by their indices; empty if it does
            not.

    Raises:
        MechunlearnError: If a subject is not in its prompt, an answer is empty, or an answer and its foil are the
            same tokens.
    """
    others = _Others(queries, tokenizer, said or (lambda i, j: queries[j].answer), random.Random(seed))
    return [others.paired(i, len(tokenizer)) for i in range(len(queries))]


class _Others:
    """What a row can be paired with: the subjects of other rows, by their length in tokens."""

    def __init__(
        self,
        queries: Sequence[Query],
        tokenizer: PreTrainedTokenizerBase,
        said: Callable[[int, int], str],
        rng: random.Random,
    ) -> None:
        self.said, self.rng = said, rng
        self.tokens = cache(lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
        self.prompt = cache(lambda text: tuple(tokenizer(asked(text))["input_ids"]))
        encoded = tokenizer([asked(query.prompt) for query in queries], return_offsets_mapping=True)
        self.rows = []
        for query, prompt, offsets in zip(queries, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            answer = self._ids(query, query.answer)
            if not answer:
                raise MechunlearnError(f"The answer of '{query.prompt}' is empty. Expected at least one token.")
            row = Row(query, (*prompt, *answer[:-1]), len(prompt), answer, None)
            self.rows.append(_found(row, offsets) if query.subject else row)
        self.answers = {row.answer for row in self.rows}
        self.everyone = rng.sample(range(len(queries)), len(queries))
        self.alike: dict[Fit | None, list[int]] = {}
        for i in self.everyone:
            self.alike.setdefault(self.rows[i].fits, []).append(i)

    def paired(self, i: int, vocabulary: int) -> Row:
        """The row with everything that depends on other rows."""
        row = self.rows[i]
        query, given = row.query, self._ids(row.query, row.query.foil)
        if given and not self._differs(i, query.foil):
            raise MechunlearnError(
                f"Answer '{query.answer}' and foil '{query.foil}' of '{query.prompt}' are the same tokens "
                "(or one begins with the other): give a foil that differs."
            )
        wanted = given if given in self.answers else ()
        among = self.alike[row.fits] if row.span else []
        if len(row.places) > 1:
            among = [j for j in among if self._swapped(row, j)]
        partner = self._another(i, among, wanted) if among else None
        random_tokens = tuple(self.rng.randrange(vocabulary) for _ in row.subject) if partner is None else ()
        foil = query.foil or self._foil(i, partner)
        query = replace(query, foil=foil, target=query.target or foil)
        return replace(
            row,
            query=query,
            foil=self._ids(query, foil),
            target=self._ids(query, query.target),
            options=tuple(self._ids(query, option) for option in query.options),
            corrupt=row.with_subject(random_tokens) if partner is None else self._swapped(row, partner),
            at_random=bool(random_tokens),
        )

    def _swapped(self, row: Row, j: int) -> Ids:
        """The row's tokens with another row's subject; none if that takes other tokens, or changes those around it.

        In one place the other subject's own tokens fit; for several the new prompt is tokenized.
        """
        other = self.rows[j]
        if len(row.places) == 1:
            return row.with_subject(other.subject)
        text, size = row.query.prompt, len(row.query.subject)
        for at in reversed(row.places):
            text = text[:at] + other.query.subject + text[at + size :]
        ids = self.prompt(text)
        kept = (a == b for k, (a, b) in enumerate(zip(ids, row.ids)) if k not in row.within)
        return (*ids, *row.ids[row.prompt_length :]) if len(ids) == row.prompt_length and all(kept) else ()

    def _foil(self, i: int, partner: int | None) -> str:
        """The partner's answer; without one another fact's, or another option. Empty if all are the truth."""
        if partner is None:
            partner = self._another(i, self.everyone)
        if partner is not None:
            return self.said(i, partner)
        others = [text for text in self.rows[i].query.options if self._differs(i, text)]
        return self.rng.choice(others) if others else ""

    def _another(self, i: int, among: Sequence[int], foil: Ids = ()) -> int | None:
        """A row about another subject, whose answer is the foil if there is such a row, else any but the truth."""
        row, best, count = self.rows[i], None, len(among)
        first = self.rng.randrange(count)
        for k in range(first, first + count):
            j = among[k % count]
            if j == i or (row.span and self.rows[j].query.subject == row.query.subject):
                continue
            text = self.said(i, j)
            if foil and self._ids(row.query, text) == foil:
                return j
            if best is None and self._differs(i, text):
                best = j
                if not foil:
                    break
        return best

    def _differs(self, i: int, text: str) -> bool:
        """Whether a text can be told from the answer: neither begins with the other."""
        answer, ids = self.rows[i].answer, self._ids(self.rows[i].query, text)
        return bool(ids) and answer[: len(ids)] != ids[: len(answer)]

    def _ids(self, query: Query, text: str) -> Ids:
        """The tokens of a text behind this query's prompt, with a space between unless the prompt ends in one."""
        return self.tokens(continued(query.prompt, text)) if text.strip() else ()


def _found(row: Row, offsets: Sequence[tuple[int, int]]) -> Row:
    """The row with its subject's place, by the characters that each token covers."""
    prompt, subject = row.query.prompt, row.query.subject
    starts = places(prompt, subject)
    if not starts:
        raise MechunlearnError(
            f"The subject '{subject}' is not in its prompt '{prompt}'. "
            "Expected the prompt to contain the subject as it is written, or '{}' in its place."
        )
    covers = [
        [i for i, (a, b) in enumerate(offsets) if b > start and a < start + len(subject) and b > a] for start in starts
    ]
    start, stop = starts[-1], starts[-1] + len(subject)
    first, last = covers[-1][0], covers[-1][-1]
    before, after = prompt[offsets[first][0] : start], prompt[stop : offsets[last][1]]
    spaced = prompt[start - 1 : start].isspace() if start else False
    fits = Fit(last - first + 1, before, after, spaced, first > 0 and offsets[first - 1][1] == start > 0)
    within = frozenset(i for cover in covers for i in cover)
    return replace(row, span=(first, last), fits=fits, places=tuple(starts), within=within)
