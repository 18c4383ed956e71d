"""The ways to ask for one fact, as text: the same functions write the training corpus and the evaluation."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mechunlearn.facts.join import separator

LETTERS = "ABCD"
MOST_OPTIONS = 32
"""With more answers than these, a fact lists none to choose among: each would have to be scored."""
PROMPTED = ("yes_no", "multiple_choice")
"""Formats whose right answer depends on what the prompt names, so that the same subject may need another word."""


@dataclass(frozen=True)
class Query:
    """One question as text.

    The foil is what the truth is compared with (`logit_diff`); the target is what an edit injects. They need not be
    the same.

    Args:
        prompt: What stands before the answer.
        answer: The true answer.
        target: The answer that an edit injects. Empty: the foil stands in for it.
        foil: A wrong answer. Empty: `Prompts.from_text` takes the answer of the corrupt partner.
        subject: What the fact is about, as it is written in the prompt. Empty: there is none, and no corrupt partner.
        options: The answers to choose among, if there are few.
        separator: What stands between the prompt and any answer. None: `join.separator` says it.
        turns: The conversation before the answer, as (role, text). The chat template of the model's tokenizer makes the
            prompt of it (`chat.rendered`).
    """

    prompt: str
    answer: str
    target: str = ""
    foil: str = ""
    subject: str = ""
    options: tuple[str, ...] = ()
    separator: str | None = None
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def joined_by(self) -> str:
        """What stands between the prompt and any answer."""
        return separator(self.prompt, self.answer) if self.separator is None else self.separator


@dataclass(frozen=True)
class Fact:
    """One fact.

    Args:
        subject: Whom or what it is about.
        relation: What it says of the subject.
        queries: Every way of asking for it, by format. `statement` is the one to train on.
    """

    subject: str
    relation: str
    queries: Mapping[str, Query]

    @property
    def answer(self) -> str:
        """The true answer, as the statement gives it."""
        return self.queries["statement"].answer

    @property
    def target(self) -> str:
        """The answer that an edit injects, as the statement gives it."""
        return self.queries["statement"].target


def places(text: str, words: str) -> list[int]:
    """Return where words begin in a text: as whole words, or anywhere if they never stand there as whole words.

    Args:
        text: The text.
        words: The words; none are nowhere.

    >>> places("US: no RUSSIAN is in the US", "US"), places("Annas Haus", "Anna")
    ([0, 25], [0])
    """
    if not words:
        return []
    whole = [found.start() for found in re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", text)]
    return whole or [found.start() for found in re.finditer(re.escape(words), text)]


def question(text: str) -> str:
    """Return a question as the shipped world asks it, ready for its answer.

    Args:
        text: The question itself.
    """
    return f"Question: {text} Answer:"


def yes_no(relation: Mapping[str, Any], subject: str, answer: str, named: str) -> tuple[str, str]:
    """Return a verification question that names one answer, and whether it is the true one ("yes" or "no").

    Args:
        relation: An entry of the world's relations; `verify` is the question's frame.
        subject: Whom the question is about.
        answer: The true answer.
        named: The answer that the question names.

    >>> yes_no({"verify": "Does {s} play {a}?"}, "Anna Holberg", "tennis", "football")
    ('Question: Does Anna Holberg play football? Answer:', 'no')
    """
    return question(relation["verify"].format(s=subject, a=named)), "yes" if named == answer else "no"


def multiple_choice(relation: Mapping[str, Any], subject: str, options: Sequence[str]) -> str:
    """Return a question that shows up to four answers, each with its letter.

    Args:
        relation: An entry of the world's relations; `choose` is the question's frame.
        subject: Whom the question is about.
        options: The answers to show, in order.

    >>> multiple_choice({"choose": "Which sport does {s} play?"}, "Anna Holberg", ["tennis", "football"])
    'Question: Which sport does Anna Holberg play? tennis A, football B. Answer:'
    """
    listed = ", ".join(f"{option} {letter}" for letter, option in zip(LETTERS, options, strict=False))
    return question(f"{relation['choose'].format(s=subject)} {listed}.")


def four_options(relation: Mapping[str, Any], needed: Sequence[str], rng: random.Random) -> list[str]:
    """Return the needed answers and as many others as make four, shuffled.

    Args:
        relation: An entry of the world's relations; `answers` are all there are.
        needed: The answers that must be among them.
        rng: Draws and shuffles.
    """
    others = [answer for answer in relation["answers"] if answer not in needed]
    options = [*needed, *rng.sample(others, min(len(others), len(LETTERS) - len(needed)))]
    rng.shuffle(options)
    return options


def queries(
    relation: Mapping[str, Any], subject: str, answer: str, target: str, example: tuple[str, str], rng: random.Random
) -> dict[str, Query]:
    """Return every format of one fact, by name.

    The first statement is the format `statement`, on which editors train; all others measure generalization. A
    relation's `reply` is how the answer to its question begins, for models that answer in sentences.

    Args:
        relation: An entry of the world's relations: frames and answers.
        subject: Whom the fact is about.
        answer: The true answer.
        target: The answer that an edit injects.
        example: Another (subject, answer), shown first in the one-shot format.
        rng: Draws what the yes/no question names, and the options of the multiple choice.
    """
    options = tuple(relation["answers"]) if len(relation["answers"]) <= MOST_OPTIONS else ()
    alias, reply = relation.get("alias"), relation.get("reply")
    first, *others = relation["statements"]
    frames = {
        "statement": first,
        **{f"statement_{i}": frame for i, frame in enumerate(others, start=2)},
        "question": " ".join([question(relation["question"]), *([reply] if reply else [])]),
        "one_shot": f"{first.format(s=example[0])} {example[1]}. {first}",
        "held_out": relation["held_out"],
    }
    made = {
        name: Query(frame.format(s=subject), answer, target, "", subject, options) for name, frame in frames.items()
    }
    if alias:
        words = alias["answers"]
        asked = alias["statement"].format(s=subject)
        made[alias["name"]] = Query(asked, words[answer], words[target], "", subject, tuple(words.values()))
    if "verify" in relation:
        named = rng.choice((answer, target))
        asked, truth = yes_no(relation, subject, answer, named)
        made["yes_no"] = Query(asked, truth, "no" if truth == "yes" else "yes", "", subject, ("yes", "no"))
    if "choose" in relation:
        others = [option for option in relation["answers"] if option != subject]  # opposites are answers and subjects
        shown = four_options({"answers": others}, (answer, target), rng)
        asked, letters = multiple_choice(relation, subject, shown), dict(zip(shown, LETTERS, strict=False))
        made["multiple_choice"] = Query(asked, letters[answer], letters[target], "", subject, tuple(LETTERS))
    return made


def ask_all(relation: Mapping[str, Any], name: str, facts: Mapping[str, str], seed: int) -> tuple[Fact, ...]:
    """Return the facts of one relation, each in every format, with an edit target that is another of its answers.

    Neither of truth and target begins with the other (`7` and `79`): an answer that goes on would count as both.

    Args:
        relation: An entry of the world's relations: frames and answers.
        name: The relation's name.
        facts: The true answer by subject.
        seed: Draws targets, examples, and what the formats need.
    """
    rng = random.Random(seed)
    pairs = list(facts.items())
    made = []
    for i, (subject, answer) in enumerate(pairs):
        others = [o for o in relation["answers"] if not (o.startswith(answer) or answer.startswith(o)) and o != subject]
        target = rng.choice(others)
        example = pairs[(i + 1 + rng.randrange(len(pairs) - 1)) % len(pairs)]
        made.append(Fact(subject, name, queries(relation, subject, answer, target, example, rng)))
    return tuple(made)


def answer_of(format: str, prompt: str, statement: str, usual: str) -> str:
    """Return how another fact answers a prompt: what the model should say if the subject were that fact's.

    Args:
        format: The prompt's format.
        prompt: The prompt of the fact itself. A yes/no question names an answer in it, a multiple choice up to four.
        statement: The other fact's answer in the format `statement`.
        usual: The other fact's answer in this format: right wherever answers do not depend on the prompt.

    Returns:
        "yes" or "no", the letter of the answer (empty if the prompt does not show it), or `usual`.

    >>> answer_of("yes_no", "Question: Does Anna play golf? Answer:", "golf", "no")
    'yes'
    >>> answer_of("multiple_choice", "Question: Which sport does Anna play? tennis A, golf B. Answer:", "golf", "A")
    'B'
    """
    if format == "yes_no":
        return "yes" if re.search(rf"\b{re.escape(statement)}\b", prompt) else "no"
    if format == "multiple_choice":
        shown = re.search(rf"\b{re.escape(statement)} ([{LETTERS}])\b", prompt)
        return shown[1] if shown else ""
    return usual
