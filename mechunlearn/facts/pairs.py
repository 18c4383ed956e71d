"""Queries as tokens, each with its corrupt partner and its foil."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

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
        while other and i <= self.prompt_length - length:
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
        encoded = tokenizer([query.prompt for query in queries], return_offsets_mapping=True)
        self.rows = []
        for query, prompt, offsets in zip(queries, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            answer = self._ids(query, query.answer)
            if not answer:
                raise MechunlearnError(f"The answer of '{query.prompt}' is empty. Expected at least one token.")
            span = _find(query, offsets) if query.subject else None
            self.rows.append(Row(query, (*prompt, *answer[:-1]), len(prompt), answer, span))
        self.answers = {row.answer for row in self.rows}
        self.everyone = rng.sample(range(len(queries)), len(queries))
        self.by_length: dict[int, list[int]] = {}
        for i in self.everyone:
            self.by_length.setdefault(len(self.rows[i].subject), []).append(i)

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
        partner = self._another(i, self.by_length[len(row.subject)], wanted) if row.span else None
        random_tokens = tuple(self.rng.randrange(vocabulary) for _ in row.subject) if partner is None else ()
        foil = query.foil or self._foil(i, partner)
        query = replace(query, foil=foil, target=query.target or foil)
        return replace(
            row,
            query=query,
            foil=self._ids(query, foil),
            target=self._ids(query, query.target),
            options=tuple(self._ids(query, option) for option in query.options),
            corrupt=row.with_subject(random_tokens if partner is None else self.rows[partner].subject),
            at_random=bool(random_tokens),
        )

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
        shown = text if query.prompt.endswith((" ", "\n")) else " " + text.lstrip()
        return self.tokens(shown) if text.strip() else ()


def _find(query: Query, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    whole = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(query.subject)}(?!\w)", query.prompt)]
    start = whole[-1] if whole else query.prompt.rfind(query.subject)  # "Albania" is not looked for in "Albanian"
    if start < 0:
        raise MechunlearnError(
            f"The subject '{query.subject}' is not in its prompt '{query.prompt}'. "
            "Expected the prompt to contain the subject as it is written, or '{}' in its place."
        )
    stop = start + len(query.subject)
    inside = [i for i, (a, b) in enumerate(offsets) if b > start and a < stop and b > a]
    return inside[0], inside[-1]
