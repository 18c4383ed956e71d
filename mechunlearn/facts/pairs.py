"""Queries as tokens, each with its corrupt partner and its foil."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.formats import Query, places
from mechunlearn.facts.join import Ids, Joiner, Offsets, common


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
    return others.paired(len(tokenizer))


class _Others:
    """What a row can be paired with: the subjects of other rows, by their length in tokens."""

    def __init__(
        self,
        queries: Sequence[Query],
        tokenizer: PreTrainedTokenizerBase,
        said: Callable[[int, int], str],
        rng: random.Random,
    ) -> None:
        self.said, self.rng, self.join = said, rng, Joiner(tokenizer)
        self.joins = [query.joined_by for query in queries]
        self.rows = []
        self.prompts = [query.prompt for query in queries]
        self.answers = [join + query.answer.lstrip() for join, query in zip(self.joins, queries)]
        self.joined = self.join(self.prompts, self.answers)
        for query, (ids, count, offsets) in zip(queries, self.joined):
            if not query.answer.strip() or count == len(ids):
                raise MechunlearnError(f"The answer of '{query.prompt}' is empty. Expected at least one token.")
            row = Row(query, ids[:-1], count, ids[count:], None)
            self.rows.append(_found(row, offsets[:count]) if query.subject else row)
        self.given = {query.answer.strip() for query in queries}
        self.everyone = rng.sample(range(len(queries)), len(queries))
        self.alike: dict[Fit | None, list[int]] = {}
        for i in self.everyone:
            self.alike.setdefault(self.rows[i].fits, []).append(i)

    def paired(self, vocabulary: int) -> list[Row]:
        """The rows with everything that depends on other rows."""
        rows = [self._with_partner(i, vocabulary) for i in range(len(self.rows))]
        texts = [list(dict.fromkeys((q.foil, q.target, *q.options))) for q in (row.query for row in rows)]
        wanted = [(i, text) for i, each in enumerate(texts) for text in each if text.strip()]
        following = [(i, self._text(i, text)) for i, text in wanted]
        others: list[dict[str, Ids]] = [{} for _ in rows]
        for (i, text), ids in zip(wanted, self.join.following(self.prompts, self.answers, self.joined, following)):
            others[i][text] = ids
        return [_with_others(row, each) for row, each in zip(rows, others)]

    def _with_partner(self, i: int, vocabulary: int) -> Row:
        """The row with its corrupt partner and its foil, as text."""
        row = self.rows[i]
        query, given = row.query, row.query.foil.strip()
        if given and not self._differs(i, given):
            raise MechunlearnError(
                f"Answer '{query.answer}' and foil '{query.foil}' of '{query.prompt}' are the same tokens "
                "(or one begins with the other): give a foil that differs."
            )
        among = self.alike[row.fits] if row.span else []
        partner = self._another(i, among, given if given in self.given else "", len(row.places) > 1) if among else None
        random_tokens = tuple(self.rng.randrange(vocabulary) for _ in row.subject) if partner is None else ()
        foil = query.foil or self._foil(i, partner)
        return replace(
            row,
            query=replace(query, foil=foil, target=query.target or foil),
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
        (found,) = self.join([text], [row.query.joined_by + row.query.answer.lstrip()])
        kept = (a == b for k, (a, b) in enumerate(zip(found.ids, row.ids)) if k not in row.within)
        return found.ids[:-1] if len(found.ids) == len(row.ids) + 1 and all(kept) else ()

    def _foil(self, i: int, partner: int | None) -> str:
        """The partner's answer; without one another fact's, or another option. Empty if all are the truth."""
        if partner is None:
            partner = self._another(i, self.everyone)
        if partner is not None:
            return self.said(i, partner)
        others = [text for text in self.rows[i].query.options if self._differs(i, text)]
        return self.rng.choice(others) if others else ""

    def _another(self, i: int, among: Sequence[int], foil: str = "", swap: bool = False) -> int | None:
        """A row about another subject, whose answer is the foil if there is such a row, else any but the truth.

        With `swap` its subject has to fit in all places of the prompt.
        """
        row, best, count = self.rows[i], None, len(among)
        first = self.rng.randrange(count)
        for k in range(first, first + count):
            j = among[k % count]
            if j == i or (row.span and self.rows[j].query.subject == row.query.subject):
                continue
            text = self.said(i, j)
            if foil and text.strip() == foil and not (swap and not self._swapped(row, j)):
                return j
            if best is None and self._differs(i, text) and not (swap and not self._swapped(row, j)):
                best = j
                if not foil:
                    break
        return best

    def _differs(self, i: int, text: str) -> bool:
        """Whether a text can be told from the answer: neither begins with the other, as tokens."""
        row, other = self.rows[i], text.strip()
        answer = row.query.answer.strip()
        if not other or not answer.startswith(other[: len(answer)]):
            return bool(other)
        whole, (found,) = (*row.ids, row.answer[-1]), self.join([row.query.prompt], [self._text(i, text)])
        return whole[: len(found.ids)] != found.ids[: len(whole)]

    def _text(self, i: int, text: str) -> str:
        """A text as it follows the prompt of a row."""
        return self.joins[i] + text.lstrip()


def _with_others(row: Row, others: Mapping[str, Ids]) -> Row:
    """The row with the tokens of its foil, target and options.

    Where one of them takes the end of the prompt into its own first token, the prompt ends before that for all.
    """
    query, whole = row.query, (*row.ids, row.answer[-1])
    start = common((whole, *others.values()), row.prompt_length)
    if not start:
        raise MechunlearnError(
            f"The tokenizer makes one token of the prompt '{query.prompt}' and the beginning of an answer, so no token "
            "predicts that. Expected a longer prompt, or a word or a mark at its end."
        )
    if row.span and row.span[1] >= start:
        raise MechunlearnError(
            f"The subject '{query.subject}' ends in one token with the beginning of an answer to '{query.prompt}'. "
            "Expected a word or a mark between the two."
        )
    tokens = {text: ids[start:] for text, ids in others.items()}
    return replace(
        row,
        prompt_length=start,
        answer=whole[start:],
        foil=tokens.get(query.foil, ()),
        target=tokens.get(query.target, ()),
        options=tuple(tokens[option] for option in query.options if option in tokens),
    )


def _found(row: Row, offsets: Offsets) -> Row:
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
    if not all(covers):
        raise MechunlearnError(
            f"The subject '{subject}' ends in one token with the beginning of the answer to '{prompt}'. Expected a word "
            "or a mark between the two."
        )
    start, stop = starts[-1], starts[-1] + len(subject)
    first, last = covers[-1][0], covers[-1][-1]
    before, after = prompt[offsets[first][0] : start], prompt[stop : offsets[last][1]]
    spaced = prompt[start - 1 : start].isspace() if start else False
    fits = Fit(last - first + 1, before, after, spaced, first > 0 and offsets[first - 1][1] == start > 0)
    within = frozenset(i for cover in covers for i in cover)
    return replace(row, span=(first, last), fits=fits, places=tuple(starts), within=within)
