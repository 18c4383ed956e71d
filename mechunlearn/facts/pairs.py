"""Queries as tokens, each with its corrupt partner and its foil."""

import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.formats import PROMPTED, Fact, Query, answer_of, places
from mechunlearn.facts.join import Ids, Joiner, Offsets, common

STEPS = 64
"""So many rows are tried one by one before the search goes from answer to answer."""


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
    facts: Sequence[Fact] | None = None,
    format: str = "statement",
) -> list[Row]:
    """Tokenize queries, and give each its corrupt partner and its foil (see `Prompts.from_text`).

    Args:
        queries: The queries.
        tokenizer: Makes tokens and says which characters each one covers.
        seed: Draws partners and, where there is none, random tokens.
        facts: The facts that they ask for: partners are of one relation. None: the queries are of one relation.
        format: The format they are in: how an answer to one is an answer to another (`formats.answer_of`).

    Raises:
        MechunlearnError: If a subject is not in its prompt, an answer is empty, or an answer and its foil are the
            same tokens.
    """
    says = [
        Says(fact.relation, fact.answer, query.answer)
        for fact, query in zip(facts or [Fact("", "", {"statement": query}) for query in queries], queries)
    ]
    return _Others(queries, tokenizer, says, format, random.Random(seed)).paired(len(tokenizer))


class Says(NamedTuple):
    """What a row says where it stands in for another one.

    Attributes:
        relation: It answers prompts of this relation alone.
        statement: Its answer in the format `statement`.
        usual: Its answer in the format asked.
    """

    relation: str
    statement: str
    usual: str


class _Pool:
    """Rows that can stand in for each other, in a drawn order; the search within a relation meets no other rows."""

    def __init__(self, order: Sequence[int], says: Sequence[Says], subjects: Sequence[str]) -> None:
        self.order = order
        self.of: dict[str, list[int]] = defaultdict(list)  # of each relation, the places in the order
        self.saying: dict[tuple[str, str], list[int]] = defaultdict(list)  # of each relation and answer
        self.kinds: dict[str, dict[Says, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.subjects: dict[str, set[str]] = defaultdict(set)
        for place, j in enumerate(order):
            relation, usual = says[j].relation, says[j].usual.strip()
            self.of[relation].append(place)
            self.saying[relation, usual].append(place)
            self.kinds[relation][says[j]].append(place)
            self.subjects[relation].add(subjects[j])

    def rows(self, places: Sequence[int], first: int) -> Iterator[int]:
        """The rows at these places, from one place on and around."""
        begin = bisect_left(places, first)
        return (self.order[places[k]] for k in chain(range(begin, len(places)), range(begin)))


class _Others:
    """What a row can be paired with: the subjects of other rows, by their length in tokens."""

    def __init__(
        self,
        queries: Sequence[Query],
        tokenizer: PreTrainedTokenizerBase,
        says: Sequence[Says],
        format: str,
        rng: random.Random,
    ) -> None:
        self.says, self.format, self.rng, self.join = says, format, rng, Joiner(tokenizer)
        self.told_apart: dict[tuple[str, ...], bool] = {}
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
        everyone, alike = rng.sample(range(len(queries)), len(queries)), defaultdict[Fit | None, list[int]](list)
        for i in everyone:
            alike[self.rows[i].fits].append(i)
        subjects = [query.subject for query in queries]
        self.everyone = _Pool(everyone, says, subjects)
        self.alike = {fits: _Pool(order, says, subjects) for fits, order in alike.items()}

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
        sought, swap = given if given in self.given else "", len(row.places) > 1
        partner = self._another(i, self.alike[row.fits], sought, swap) if row.span else None
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

    def said(self, i: int, j: int) -> str:
        """How the subject of the second row answers the prompt of the first; empty if it does not."""
        says = self.says[j]
        return answer_of(self.format, self.rows[i].query.prompt, says.statement, says.usual)

    def _another(self, i: int, among: _Pool, foil: str = "", swap: bool = False) -> int | None:
        """A row about another subject, whose answer is the foil if there is such a row, else any but the truth.

        With `swap` its subject has to fit in all places of the prompt; of these so many are tried as `STEPS` says.
        """
        row, relation = self.rows[i], self.says[i].relation
        first = self.rng.randrange(len(among.order))
        if row.span and among.subjects[relation] == {row.query.subject}:
            return None
        if foil:
            prompted = self.format in PROMPTED
            places = among.of[relation] if prompted else among.saying.get((relation, foil), [])
            rows = (j for j in among.rows(places, first) if not prompted or self.said(i, j).strip() == foil)
            partner = next((j for j in islice(rows, STEPS if swap else None) if self._can_stand(i, j, swap)), None)
            if partner is not None:
                return partner
        return self._that_differs(i, among, first, swap)

    def _that_differs(self, i: int, among: _Pool, first: int, swap: bool) -> int | None:
        """The first row about another subject that does not say the truth.

        Rows that say the same are judged once: where most of them say the truth, the search stays short.
        """
        relation = self.says[i].relation
        kinds, judged = among.kinds[relation], dict[Says, bool]()

        def differs(says: Says, j: int) -> bool:
            if says not in judged:
                judged[says] = self._differs(i, self.said(i, j))
            return judged[says]

        for j in islice(among.rows(among.of[relation], first), STEPS):
            if differs(self.says[j], j) and self._can_stand(i, j, swap):
                return j
            if len(judged) == len(kinds) and not any(judged.values()):
                return None
        others = [] if swap else [at for says, at in kinds.items() if differs(says, among.order[at[0]])]
        nearest = sorted(others, key=lambda at: (at[bisect_left(at, first) % len(at)] - first) % len(among.order))
        rows = (j for at in nearest for j in among.rows(at, first) if self._can_stand(i, j, swap))
        return next(rows, None)

    def _can_stand(self, i: int, j: int, swap: bool) -> bool:
        """Whether the subject of the second row is another one, and fits where the first row's stands."""
        row, other = self.rows[i], self.rows[j]
        if j == i or (row.span and other.query.subject == row.query.subject):
            return False
        return not swap or bool(self._swapped(row, j))

    def _differs(self, i: int, text: str) -> bool:
        """Whether a text can be told from the answer: neither begins with the other, as tokens."""
        row, other = self.rows[i], text.strip()
        answer = row.query.answer.strip()
        if not other or not answer.startswith(other[: len(answer)]):
            return bool(other)
        if other == answer:
            return False
        key = (answer, other, self.joins[i], row.query.prompt[-8:])
        if key not in self.told_apart:
            whole, (found,) = (*row.ids, row.answer[-1]), self.join([row.query.prompt], [self._text(i, text)])
            self.told_apart[key] = whole[: len(found.ids)] != found.ids[: len(whole)]
        return self.told_apart[key]

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
