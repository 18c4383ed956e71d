"""Facts as text: the data set, its formats, and what is related to it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from mechunlearn.core.display import card
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.formats import Query
from mechunlearn.facts.prompts import Asked, Prompts
from mechunlearn.model.hooked import HookedModel

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Fact:
    """One fact: its subject, the relation, and every way of asking for it. Format `statement` is the one to train on."""

    subject: str
    relation: str
    queries: Mapping[str, Query]

    @property
    def answer(self) -> str:
        return self.queries["statement"].answer

    @property
    def target(self) -> str:
        return self.queries["statement"].target


@dataclass(frozen=True, eq=False)
class FactDataset:
    """Facts of one relation (or file), with what belongs to them.

    `source` is the whole data set this one was selected from, `related` other relations of the same subjects,
    `skills` tasks that need no stored fact, `text` ordinary passages for text loss, `untaught` facts about subjects
    the model never saw (floors). `two_hop` has, by subject, a question that needs the fact and a second one about its answer.
    """

    name: str
    facts: tuple[Fact, ...]
    related: Mapping[str, "FactDataset"] = field(default_factory=dict)
    skills: Mapping[str, Sequence[Query]] = field(default_factory=dict)
    text: tuple[str, ...] = ()
    untaught: "FactDataset | None" = None
    source: "FactDataset | None" = None
    two_hop: Mapping[str, Query] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.facts)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.facts)

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats that every fact has, `statement` first."""
        shared = set.intersection(*(set(fact.queries) for fact in self.facts))
        return tuple(name for name in self.facts[0].queries if name in shared)

    @cached_property
    def subjects(self) -> frozenset[str]:
        return frozenset(fact.subject for fact in self.facts)

    def select(self, rows: Sequence[int]) -> "FactDataset":
        return replace(self, facts=tuple(self.facts[i] for i in rows), source=self.source or self)

    def about(self, subjects: frozenset[str] | set[str]) -> "FactDataset":
        """The facts whose subject is one of these."""
        return self.select([i for i, fact in enumerate(self.facts) if fact.subject in subjects])

    def prompts(self, model: HookedModel, format: str = "statement", seed: int = 0) -> Prompts:
        """Tokenized pairs in one format; a fact without this format is left out.

        The foil is the answer of the corrupt partner where it differs from the truth, else the edit target.
        Raises `MechunlearnError` if no fact has the format or the model has no tokenizer.
        """
        if model.tokenizer is None:
            raise MechunlearnError("This model has no tokenizer: use Prompts.from_tokens.")
        rows = [i for i, fact in enumerate(self.facts) if format in fact.queries]
        if not rows:
            raise MechunlearnError(f"No fact of '{self.name}' has the format '{format}'. Formats: {self.formats}.")
        asked = []
        for i in rows:
            query = self.facts[i].queries[format]
            subject = self.facts[i].subject
            asked.append(Asked(query.prompt, query.answer, query.target, query.target, subject, query.options))
        chosen = self if len(rows) == len(self) else self.select(rows)
        return Prompts.from_text(asked, model.tokenizer, seed, chosen, format)

    def to_frame(self) -> "pd.DataFrame":
        """One row a fact and format."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "subject": f.subject,
                    "relation": f.relation,
                    "format": name,
                    "prompt": q.prompt,
                    "answer": q.answer,
                    "target": q.target,
                }
                for f in self.facts
                for name, q in f.queries.items()
            ]
        )

    def __repr__(self) -> str:
        if not self.facts:
            return f"FactDataset({self.name}, 0 facts)"
        first = self.facts[0].queries["statement"]
        return f"FactDataset({self.name}, {len(self)} facts, formats {', '.join(self.formats)}; '{first.prompt}' -> '{first.answer}')"

    def _repr_html_(self) -> str:
        about = {
            "relations": ", ".join(dict.fromkeys(fact.relation for fact in self.facts)),
            "formats": ", ".join(self.formats) if self.facts else "",
            "selected from": f"{len(self.source)} facts" if self.source is not None else "",
            "related": ", ".join(self.related),
            "skills": ", ".join(self.skills),
            "passages": len(self.text) or "",
            "never taught": f"{len(self.untaught)} facts" if self.untaught is not None else "",
        }
        rows = [(f.subject, f.queries["statement"].prompt, f.answer, f.target) for f in self.facts[:3]]
        title = f"FactDataset: {self.name}, {len(self)} facts"
        return card(title, about, ("subject", "prompt", "answer", "edit target"), rows)
