"""Facts as text: one relation or one file, with what belongs to it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, overload

from mechunlearn.core.display import card
from mechunlearn.core.tables import Table
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.answers import answered, continuations
from mechunlearn.facts.chat import CHAT, rendered, with_chat
from mechunlearn.facts.formats import Fact, Query
from mechunlearn.facts.odd import OddRow, line
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class FactDataset:
    """Facts of one relation (or file), with what belongs to them. `facts[3]` is a fact, `facts[2:5]` a data set.

    Args:
        name: What it is called.
        facts: The facts.
        related: Other relations of the same subjects, by name.
        skills: Tasks that need no stored fact, by name.
        texts: Ordinary texts, for text loss.
        untaught: Facts that the model was never taught or does not know: the floor of attacks, and what they must be
            able to teach.
        source: The whole data set that this one was selected from.
        two_hop: By subject, a question that needs the fact and a second one about its answer.
        reverse: By subject, the question the other way round: it names the answer and asks for the subject.
        odd: Rows of the file that were skipped or repaired (see `facts.odd`).
    """

    name: str
    facts: tuple[Fact, ...]
    related: Mapping[str, "FactDataset"] = field(default_factory=dict)
    skills: Mapping[str, Sequence[Query]] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    untaught: "FactDataset | None" = None
    source: "FactDataset | None" = None
    two_hop: Mapping[str, Query] = field(default_factory=dict)
    reverse: Mapping[str, Query] = field(default_factory=dict)
    odd: tuple[OddRow, ...] = ()

    def __len__(self) -> int:
        return len(self.facts)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.facts)

    @overload
    def __getitem__(self, rows: int) -> Fact: ...
    @overload
    def __getitem__(self, rows: slice) -> "FactDataset": ...
    def __getitem__(self, rows: int | slice) -> "Fact | FactDataset":
        return self.select(range(len(self))[rows]) if isinstance(rows, slice) else self.facts[rows]

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats that every fact has, `statement` first."""
        shared = set.intersection(*(set(fact.queries) for fact in self.facts))
        return tuple(name for name in self.facts[0].queries if name in shared)

    @cached_property
    def subjects(self) -> frozenset[str]:
        """Whom the facts are about."""
        return frozenset(fact.subject for fact in self.facts)

    def select(self, rows: Sequence[int]) -> "FactDataset":
        """Return the facts of these rows, in this order.

        Args:
            rows: Indices of facts.
        """
        return replace(self, facts=tuple(self.facts[i] for i in rows), source=self.source or self)

    def about(self, subjects: frozenset[str] | set[str]) -> "FactDataset":
        """Return the facts whose subject is one of these.

        Args:
            subjects: Names of subjects.
        """
        return self.select([i for i, fact in enumerate(self.facts) if fact.subject in subjects])

    def prompts(self, model: HookedModel, format: str = "statement", seed: int = 0) -> Prompts:
        """Tokenize the facts in one format, each with a corrupt partner of its relation (see `Prompts.from_text`).

        A fact without this format is left out. The foil of a yes/no question is the opposite word, that of a multiple
        choice the letter of another answer that it shows; the partner is a fact of which that is true.

        Args:
            model: Its tokenizer is used.
            format: One of `formats`, or `chat`: the question through the tokenizer's chat template (`chat.with_chat`).
            seed: Draws the partners.

        Raises:
            MechunlearnError: If no fact has the format, the model has no tokenizer, or, for `chat`, no chat template.
        """
        if model.tokenizer is None:
            raise MechunlearnError("This model has no tokenizer: use Prompts.from_tokens.")
        if format == CHAT and not any(CHAT in fact.queries for fact in self.facts):
            return replace(self, facts=with_chat(self.facts, model.tokenizer)).prompts(model, format, seed)
        rows = [i for i, fact in enumerate(self.facts) if format in fact.queries]
        if not rows:
            raise MechunlearnError(f"No fact of '{self.name}' has the format '{format}'. Formats: {self.formats}.")
        chosen = self if len(rows) == len(self) else self.select(rows)
        queries = [fact.queries[format] for fact in chosen]
        queries = [
            rendered(query if query.subject else replace(query, subject=fact.subject), model.tokenizer)
            for query, fact in zip(queries, chosen)
        ]
        return Prompts.from_text(queries, model.tokenizer, seed, chosen, format)

    def known(self, model: HookedModel) -> "FactDataset":
        """Keep the facts that a model gives: greedy decoding after the statement says the whole answer.

        Args:
            model: The model.

        >>> from mechunlearn import load_facts, load_model
        >>> len(load_facts("factworld/sport")[:20].known(load_model("factworld")))
        20
        """
        return self.select(answered(model, self.prompts(model)).nonzero().flatten().tolist())

    def unknown(self, model: HookedModel) -> "FactDataset":
        """Keep the facts that a model does not give: all that `known` leaves out. `said` shows what it says instead.

        Args:
            model: The model.

        >>> from mechunlearn import load_facts, load_model
        >>> len(load_facts("factworld/sport").untaught[:20].unknown(load_model("factworld"))) > 10
        True
        """
        return self.select((~answered(model, self.prompts(model))).nonzero().flatten().tolist())

    def said(self, model: HookedModel, tokens: int = 8) -> "pd.DataFrame":
        """Show how a model goes on after each statement, beside the answer, and whether it knows the fact.

        Args:
            model: The model.
            tokens: How many tokens it may say; of these the first line is shown.

        Returns:
            One row a fact: subject, prompt, answer, said, known.

        >>> from mechunlearn import load_facts, load_model
        >>> seen = load_facts("factworld/sport")[:3].said(load_model("factworld"), tokens=1)
        >>> list(seen.columns), (seen.said == seen.answer).all()
        (['subject', 'prompt', 'answer', 'said', 'known'], np.True_)
        """
        prompts = self.prompts(model)
        return Table(
            {
                "subject": [fact.subject for fact in self],
                "prompt": [query.prompt for query in prompts.queries],
                "answer": [query.answer for query in prompts.queries],
                "said": continuations(model, prompts, tokens),
                "known": answered(model, prompts).tolist(),
            }
        )

    @property
    def skipped(self) -> "pd.DataFrame":
        """The rows of the file that were left out: row, reason, text."""
        return self._odd(kept=False)

    @property
    def repaired(self) -> "pd.DataFrame":
        """The rows of the file that were changed by a rule of `facts.odd`: row, reason, text."""
        return self._odd(kept=True)

    def _odd(self, kept: bool) -> "pd.DataFrame":
        rows = [(odd.row, odd.reason, odd.text) for odd in self.odd if odd.kept == kept]
        return Table(rows, columns=["row", "reason", "text"])

    def to_frame(self) -> "pd.DataFrame":
        """Return one row a fact and format."""
        import pandas as pd

        rows = [
            (fact.subject, fact.relation, name, query.prompt, query.answer, query.target)
            for fact in self.facts
            for name, query in fact.queries.items()
        ]
        return pd.DataFrame(rows, columns=["subject", "relation", "format", "prompt", "answer", "target"])

    def __repr__(self) -> str:
        odd = f"; {line(self.odd)}" if self.odd and self.source is None else ""
        if not self.facts:
            return f"FactDataset({self.name}, 0 facts{odd})"
        first = self.facts[0].queries["statement"]
        formats = ", ".join(self.formats)
        return (
            f"FactDataset({self.name}, {len(self)} facts, formats {formats}{odd}; '{first.prompt}' -> '{first.answer}')"
        )

    def _repr_html_(self) -> str:
        relations = list(dict.fromkeys(fact.relation for fact in self.facts))
        more = f" and {len(relations) - 12} more" if len(relations) > 12 else ""
        about = {
            "relations": ", ".join(relations[:12]) + more,
            "formats": ", ".join(self.formats) if self.facts else "",
            "selected from": f"{len(self.source)} facts" if self.source is not None else "",
            "related": ", ".join(self.related),
            "skills": ", ".join(self.skills),
            "texts": len(self.texts) or "",
            "odd rows": line(self.odd) if self.source is None else "",
            "never taught": f"{len(self.untaught)} facts" if self.untaught is not None else "",
        }
        rows = [(f.subject, f.queries["statement"].prompt, f.answer, f.target) for f in self.facts[:3]]
        title = f"FactDataset: {self.name}, {len(self)} facts"
        return card(title, about, ("subject", "prompt", "answer", "edit target"), rows)
