"""The ways to ask for one fact, as text: the same functions write the training corpus and the evaluation."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LETTERS = "ABCD"


@dataclass(frozen=True)
class Query:
    """One way of asking: the prompt, its true answer, the answer after the edit, and the answers to choose among."""

    prompt: str
    answer: str
    target: str
    options: tuple[str, ...] = ()


def question(text: str) -> str:
    """A question as the shipped world asks it, ready for its answer."""
    return f"Question: {text} Answer:"


def yes_no(relation: Mapping, subject: str, answer: str, named: str) -> tuple[str, str]:
    """A verification question that names one answer, and whether it is the true one.

    >>> yes_no({"verify": "Does {s} play {a}?"}, "Anna Holberg", "tennis", "football")
    ('Question: Does Anna Holberg play football? Answer:', 'no')
    """
    return question(relation["verify"].format(s=subject, a=named)), "yes" if named == answer else "no"


def multiple_choice(relation: Mapping, subject: str, options: Sequence[str]) -> str:
    """
    >>> multiple_choice({"choose": "Which sport does {s} play?"}, "Anna Holberg", ["tennis", "football"])
    'Question: Which sport does Anna Holberg play? tennis A, football B. Answer:'
    """
    listed = ", ".join(f"{option} {letter}" for letter, option in zip(LETTERS, options, strict=False))
    return question(f"{relation['choose'].format(s=subject)} {listed}.")


def four_options(relation: Mapping, needed: Sequence[str], rng: random.Random) -> list[str]:
    """The needed answers and as many others as make four, shuffled."""
    others = [answer for answer in relation["answers"] if answer not in needed]
    options = [*needed, *rng.sample(others, min(len(others), len(LETTERS) - len(needed)))]
    rng.shuffle(options)
    return options


def queries(
    relation: Mapping, subject: str, answer: str, target: str, example: tuple[str, str], rng: random.Random
) -> dict[str, Query]:
    """Every format of one fact. `example` is another (subject, answer), shown first in the one-shot format.

    The first statement is the format `statement`, on which editors train; all others measure transfer.
    """
    options = tuple(relation["answers"])
    alias = relation.get("alias")
    first, *others = relation["statements"]
    asked = {
        "statement": first,
        **{f"statement_{i}": frame for i, frame in enumerate(others, start=2)},
        "question": question(relation["question"]),
        "one_shot": f"{first.format(s=example[0])} {example[1]}. {first}",
        "held_out": relation["held_out"],
    }
    made = {name: Query(frame.format(s=subject), answer, target, options) for name, frame in asked.items()}
    if alias:
        words = alias["answers"]
        made[alias["name"]] = Query(
            alias["statement"].format(s=subject), words[answer], words[target], tuple(words.values())
        )
    if "verify" in relation:
        named = rng.choice((answer, target))
        prompt, truth = yes_no(relation, subject, answer, named)
        made["yes_no"] = Query(prompt, truth, "no" if truth == "yes" else "yes", ("yes", "no"))
    if "choose" in relation:
        shown = four_options(relation, (answer, target), rng)
        made["multiple_choice"] = Query(
            multiple_choice(relation, subject, shown),
            LETTERS[shown.index(answer)],
            LETTERS[shown.index(target)],
            tuple(LETTERS),
        )
    return made
