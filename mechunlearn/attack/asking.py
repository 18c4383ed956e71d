"""What attacks that ask in text share: the question in other words, and what guessing gives among the answers that are left."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from mechunlearn.attack.states import answer_counts
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.chat import rendered
from mechunlearn.facts.formats import Query
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel


def check_text(forget: Prompts, retain: Prompts) -> None:
    """Raise `MechunlearnError` if either set has too few facts, or is given as tokens.

    Args:
        forget: The facts that the edit removed.
        retain: The facts that were to stay.
    """
    if min(len(forget), len(retain)) < 2:
        raise MechunlearnError(
            f"There are {len(forget)} forget facts and {len(retain)} retain facts. Expected at least 2 of each."
        )
    for name, prompts in (("forget", forget), ("retain", retain)):
        if prompts.facts is None or not prompts.queries:
            raise MechunlearnError(
                f"The {name} facts are given as tokens, and this attack asks for them in words of its own. Expected "
                "prompts of facts in text, as load_facts(...).prompts(model) gives them."
            )


def tokenized(model: HookedModel, asked: Sequence[Query]) -> Prompts | None:
    """Return questions as prompts, or None if there are none.

    Args:
        model: The model whose tokenizer is used.
        asked: The questions.

    Raises:
        MechunlearnError: If the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise MechunlearnError("This model has no tokenizer, and these facts are text. Give it a tokenizer of its own.")
    return Prompts.from_text([rendered(query, model.tokenizer) for query in asked], model.tokenizer) if asked else None


def rewritten(query: Query, change: Callable[[str], str]) -> Query:
    """Return a question with another text: that of its prompt, or in a conversation that of the last user turn.

    Args:
        query: The question.
        change: Makes the new text of the old one.

    >>> rewritten(Query("The capital of France is", "Paris"), lambda text: f"Hint: it begins with P. {text}").prompt
    'Hint: it begins with P. The capital of France is'
    """
    last = max((i for i, (role, _) in enumerate(query.turns) if role == "user"), default=-1)
    turns = tuple((role, change(text) if i == last else text) for i, (role, text) in enumerate(query.turns))
    return replace(query, prompt=change(query.prompt), turns=turns)


def questions(prompts: Prompts) -> list[tuple[str, Query]]:
    """Return the relation and the question of each fact, as its data have it, with the edit target of its prompt.

    Args:
        prompts: Prompts of facts in text.
    """
    return [
        (fact.relation, replace(fact.queries[prompts.format], target=query.target, foil="", subject="", options=()))
        for fact, query in zip(prompts.facts or (), prompts.queries)
    ]


def known_answers(prompts: Prompts) -> dict[str, Counter[str]]:
    """Return how often each answer is the truth, relation by relation, in the whole data set the facts come from.

    Args:
        prompts: Prompts of facts in text.
    """
    if prompts.facts is None:
        return {}
    return answer_counts(prompts.facts, prompts.format) | answer_counts(prompts.facts.source or (), prompts.format)


def guessed(counts: Mapping[str, int], left: Iterable[str]) -> float:
    """Return how often the most frequent answer is the truth, once it is known to be one of these.

    max_a count(a) / sum_a count(a)   over the answers that are left

    Args:
        counts: How often each answer of the relation is the truth.
        left: The answers that are left, the truth among them.

    >>> guessed(Counter(golf=3, tennis=1, hockey=6), ["golf", "tennis"])
    0.75
    """
    shares = [counts.get(answer, 0) for answer in left]
    return max(shares) / sum(shares)
