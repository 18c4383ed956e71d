"""Portability: does what was done to a fact show where it is asked for the other way round, by another name, one step on?"""

from collections import Counter
from collections.abc import Mapping

from mechunlearn.evaluation.cells import LIMIT
from mechunlearn.facts.chat import CHAT
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.formats import PROMPTED, Fact, Query
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel

PORTABILITY = "portability"
REVERSE, ALIAS, HOP = "reverse", "alias", "one hop"
TOKENS = "the facts are tokens, and no data set comes with them"


def portability(model: HookedModel, forget: Prompts) -> tuple[list[tuple[str, Prompts]], dict[str, str]]:
    """Return the questions to which a change of the forgotten facts should carry over.

    The other way round, answer to subject, is asked of relations in which no two subjects share an answer: else the
    question would have several right answers. Both kinds come with the data (`FactDataset.reverse` and `two_hop`).

    Args:
        model: The model whose tokenizer is used.
        forget: The facts to forget.

    Returns:
        Cells for `evaluate`, as `cells.cells` returns them: "portability" with the prompts, whose format is "reverse"
        or "one hop". Then by format an example with the chance of guessing (the share of the most frequent answer of
        all such questions of the data), or why it cannot be asked.

    >>> from mechunlearn import load_facts, load_model
    >>> model = load_model("factworld")
    >>> found, about = portability(model, load_facts("factworld/city").prompts(model).select([0, 1]))
    >>> [(split, prompts.format) for split, prompts in found], about["reverse"]
    ([('portability', 'one hop')], 'the data have no question the other way round')
    """
    facts = forget.facts
    if facts is None or model.tokenizer is None:
        return [], dict.fromkeys((REVERSE, HOP), TOKENS)
    made, about = [], {}
    for kind, questions, none in (
        (REVERSE, facts.reverse, "no question the other way round"),
        (HOP, facts.two_hop, "no question that needs a second fact"),
    ):
        subjects = [fact.subject for fact in facts][:LIMIT]
        asked = [questions[subject] for subject in subjects if subject in questions]
        if not asked:
            about[kind] = f"the data have {none}" if not questions else f"the data have {none} on these subjects"
        elif kind == REVERSE and (shared := shared_answer(facts)):
            about[kind] = f"several subjects have the answer '{shared}', so a question from it has several answers"
        else:
            made.append((PORTABILITY, Prompts.from_text(asked, model.tokenizer, format=kind)))
            about[kind] = f"'{asked[0].prompt}' -> '{asked[0].answer}'; chance {_chance(questions):.2f}"
    return made, about


def shared_answer(facts: FactDataset) -> str:
    """Return an answer that several subjects of one relation share; empty if the relations are one to one.

    Args:
        facts: Some facts; their relations are searched in all of the data set that they come from.

    >>> from mechunlearn import load_facts
    >>> shared_answer(load_facts("countries/capital")), shared_answer(load_facts("countries/currency"))
    ('', 'dollar')
    """
    relations = {fact.relation for fact in facts}
    told = {(fact.relation, fact.answer, fact.subject): None for fact in facts.source or facts}
    counts = Counter((relation, answer) for relation, answer, _ in told if relation in relations)
    (_, answer), most = max(counts.items(), key=lambda item: item[1])
    return answer if most > 1 else ""


def aliases(facts: FactDataset) -> list[str]:
    """Return the formats in which every fact has another name: of its answer, or of its subject.

    Yes/no and multiple choice are no names, and a subject in another case is the same.

    Args:
        facts: The facts.

    >>> from mechunlearn import load_facts
    >>> facts = load_facts("factworld/sport")
    >>> aliases(facts), facts[0].answer, facts[0].queries["league"].answer
    (['league'], 'football', 'NFL')
    """
    asked = [format for format in facts.formats if format not in (*PROMPTED, CHAT)]
    return [format for format in asked if all(_renamed(fact, fact.queries[format]) for fact in facts)]


def _renamed(fact: Fact, query: Query) -> bool:
    subject = query.subject or fact.subject
    return query.answer != fact.answer or subject.casefold() != fact.subject.casefold()


def _chance(questions: Mapping[str, Query]) -> float:
    """The share of the most frequent answer."""
    counts = Counter(query.answer for query in questions.values())
    return max(counts.values()) / counts.total()
