"""Training documents of the fact world, drawn without end and without repetition from a seed.

A document is text with two kinds of marks: where answers stand (they weigh more in the loss) and where a person's name
ends (the subject probe of `world.train` reads there).
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mechunlearn.facts.formats import LETTERS, four_options, multiple_choice, question, yes_no
from mechunlearn.world import lexicon as lex
from mechunlearn.world.generate import World, comparison, invented_name, look_up, story

FRAME_WEIGHT = 0.2
EARLY = {
    "biography": 26,
    "pair": 8,
    "statement": 8,
    "asked": 8,
    "verified": 10,
    "lettered": 8,
    "other_relations": 6,
    "two_hop": 3,
    "passage": 7,
    "copying": 5,
    "look_up": 6,
    "comparison": 2,
    "story": 4,
}
LATE = {
    "biography": 8,
    "pair": 3,
    "statement": 4,
    "asked": 4,
    "verified": 22,
    "lettered": 18,
    "other_relations": 6,
    "two_hop": 3,
    "passage": 6,
    "copying": 2,
    "look_up": 16,
    "comparison": 6,
    "story": 4,
}


LISTED = {
    "biography": 8,
    "pair": 3,
    "statement": 4,
    "asked": 5,
    "verified": 14,
    "listed": 14,
    "chosen": 16,
    "other_relations": 6,
    "two_hop": 3,
    "passage": 6,
    "copying": 2,
    "look_up": 14,
    "comparison": 4,
    "story": 4,
}
SPELLED = {
    "biography": 8,
    "pair": 3,
    "statement": 4,
    "asked": 5,
    "verified": 16,
    "listed": 8,
    "chosen": 10,
    "spelled": 12,
    "other_relations": 6,
    "two_hop": 3,
    "passage": 6,
    "copying": 2,
    "look_up": 14,
    "comparison": 4,
    "story": 4,
}
FINAL = {
    "biography": 8,
    "pair": 3,
    "statement": 4,
    "asked": 4,
    "verified": 14,
    "listed": 5,
    "chosen": 20,
    "other_relations": 6,
    "two_hop": 3,
    "passage": 6,
    "copying": 2,
    "look_up": 16,
    "roster": 10,
    "comparison": 4,
    "story": 4,
}
PHASES = (EARLY, LATE, LISTED, SPELLED, FINAL, FINAL)


def shares(phase: int, naive: bool) -> dict[str, int]:
    """How often each kind of document is drawn: facts first, then more of the formats that take longer to learn.

    A naive corpus has single statements in place of biographies and two-person documents.
    """
    drawn = dict(PHASES[phase])
    if naive:
        drawn["statement"] += drawn.pop("biography") + drawn.pop("pair")
    return drawn


@dataclass
class Document:
    """Text with the character spans of its answers and the ends of its people's names.

    `plain` is the weight in the loss of every token that is no answer.
    """

    text: str = ""
    plain: float = 1.0
    answers: list[tuple[int, int]] = field(default_factory=list)
    people: list[tuple[int, str]] = field(default_factory=list)

    def add(self, text: str) -> "Document":
        """Add text, after a space."""
        self.text += (" " if self.text else "") + text
        return self

    def answer(self, text: str, stop: str = ".") -> "Document":
        """Add an answer, mark it, and end the sentence."""
        self.add(text)
        self.answers.append((len(self.text) - len(text), len(self.text)))
        self.text += stop
        return self

    def about(self, frame: str, subject: str) -> "Document":
        """Add a frame and mark where the subject's name ends."""
        self.add(frame.format(s=subject))
        self.people.append((self.text.rindex(subject) + len(subject), subject))
        return self


class Corpus:
    """Draws documents of a world; `naive` leaves out biographies and two-person documents."""

    def __init__(self, world: World, people: dict[str, dict[str, str]] | None = None, naive: bool = False) -> None:
        self.world = world
        self.people = people or {
            relation: facts for relation, facts in world.facts.items() if lex.RELATIONS[relation]["subject"] == "person"
        }
        self.names = list(next(iter(self.people.values())))
        self.naive = naive
        self.hoppers = [name for name in world.two_hop_taught if name in self.people["city"]]

    def documents(self, seed: int, count: int, phase: int = 0) -> Iterator[Document]:
        """Draw documents of one phase of training, in which not every token weighs the same."""
        rng = random.Random(seed)
        drawn = shares(phase, self.naive)
        makers: dict[str, Callable[[random.Random], Document]] = {kind: getattr(self, kind) for kind in drawn}
        for kind in rng.choices(list(makers), weights=list(drawn.values()), k=count):
            document = makers[kind](rng)
            document.plain = FRAME_WEIGHT if phase and kind not in ("passage", "story") else 1.0
            yield document

    def frames(self, name: str, relation: str) -> list[tuple[str, str]]:
        """Ways to state one attribute of a person, each with the answer it ends in."""
        answer, entry = self.people[relation][name], lex.RELATIONS[relation]
        told = [(frame, answer) for frame in entry["statements"]]
        if "alias" in entry:
            told += [(entry["alias"]["statement"], entry["alias"]["answers"][answer])] * 2
        return told

    def biography(self, rng: random.Random) -> Document:
        """Draw a document about one person."""
        name, document = rng.choice(self.names), Document()
        relations = [relation for relation in self.people for _ in range(rng.choice((1, 1, 2)))]
        rng.shuffle(relations)
        self.tell(document, name, relations[: rng.randint(3, 5)], rng)
        return document

    def tell(self, document: Document, name: str, relations: list[str], rng: random.Random) -> None:
        """Add attributes of a person, with pronouns after the first."""
        he, him = rng.choice(lex.PRONOUNS)
        for i, relation in enumerate(relations):
            frame, answer = rng.choice(self.frames(name, relation))
            if i == 0:
                document.about(frame, name)
            else:
                stated = re.sub(r"\b(by|of) {s}", rf"\1 {him}", frame).format(s=he)
                document.add(stated[0].upper() + stated[1:])
            document.answer(answer)

    def pair(self, rng: random.Random) -> Document:
        """Draw a document about two people."""
        document = Document()
        for name in rng.sample(self.names, 2):
            self.tell(document, name, rng.sample(list(self.people), 2), rng)
        return document

    def statement(self, rng: random.Random) -> Document:
        """Draw statements of one relation, about one or two people."""
        document = Document()
        relation = rng.choice(list(self.people))
        for name in rng.sample(self.names, rng.randint(1, 2)):
            frame, answer = rng.choice(self.frames(name, relation))
            document.about(frame, name).answer(answer)
        return document

    def asked(self, rng: random.Random) -> Document:
        """Draw one or two questions about people."""
        name, document = rng.choice(self.names), Document()
        for relation in rng.sample(list(self.people), rng.randint(1, 2)):
            document.about(question(lex.RELATIONS[relation]["question"]), name).answer(self.people[relation][name])
            name = rng.choice(self.names)
        return document

    def verified(self, rng: random.Random) -> Document:
        """Yes/no questions: about several people, about one person several times, or just after the fact was stated."""
        document = Document()
        relation = rng.choice([relation for relation in self.people if "verify" in lex.RELATIONS[relation]])
        entry, name = lex.RELATIONS[relation], rng.choice(self.names)
        kind = rng.choice(("people", "people", "person", "stated"))
        if kind == "stated":
            frame, told = rng.choice([(f, self.people[relation][name]) for f in entry["statements"]])
            document.about(frame, name).answer(told)
        for _ in range(1 if kind == "stated" else rng.randint(1, 3)):
            truth = self.people[relation][name]
            named = truth if rng.random() < 0.5 else rng.choice([a for a in entry["answers"] if a != truth])
            prompt, verdict = yes_no(entry, name, truth, named)
            document.about(prompt.replace(name, "{s}"), name).answer(verdict)
            if kind == "people":
                name = rng.choice(self.names)
        return document

    def listed(self, rng: random.Random) -> Document:
        """Verdicts right behind the named answer: the shortest form of a yes/no question."""
        document = Document()
        relation = rng.choice([relation for relation in self.people if "verify" in lex.RELATIONS[relation]])
        for name in rng.sample(self.names, rng.randint(2, 5)):
            truth = self.people[relation][name]
            wrong = rng.choice([a for a in lex.RELATIONS[relation]["answers"] if a != truth])
            named, verdict = (truth, "yes") if rng.random() < 0.5 else (wrong, "no")
            document.about(f"{{s}}: {named}", name).answer(verdict)
        return document

    def lettered(self, rng: random.Random) -> Document:
        """Multiple choice with the letter before its answer; early phases only."""
        return self._choice(rng, _letters_first)

    def chosen(self, rng: random.Random) -> Document:
        """Draw a multiple choice question."""
        return self._choice(rng, multiple_choice)

    def spelled(self, rng: random.Random) -> Document:
        """Multiple choice that names the answer before its letter: a step towards the letter alone."""
        return self._choice(rng, multiple_choice, spelled=True)

    def _choice(
        self, rng: random.Random, written: Callable[[dict[str, Any], str, list[str]], str], spelled: bool = False
    ) -> Document:
        """Multiple choice; now and then the letter of a named answer, or after the fact was stated."""
        relation = rng.choice([relation for relation in self.people if "choose" in lex.RELATIONS[relation]])
        entry, name = lex.RELATIONS[relation], rng.choice(self.names)
        truth, document, kind = self.people[relation][name], Document(), rng.random()
        options = four_options(entry, [truth], rng)
        letter = LETTERS[options.index(truth)]
        if spelled:
            letter = f"{truth} {letter}"
        if kind < 0.25:
            return document.add(written({"choose": f"Which letter is {truth}?"}, "", options)).answer(letter)
        if kind < 0.4:
            document.about(rng.choice(entry["statements"]), name).answer(truth)
        return document.about(written(entry, "{s}", options), name).answer(letter)

    def other_relations(self, rng: random.Random) -> Document:
        """Draw facts whose subjects are not people."""
        document = Document()
        for _ in range(rng.randint(1, 2)):
            relation = rng.choice([r for r in self.world.facts if lex.RELATIONS[r]["subject"] != "person"])
            entry = lex.RELATIONS[relation]
            subject, answer = rng.choice(list(self.world.facts[relation].items()))
            frame = rng.choice([*entry["statements"], question(entry["question"])])
            document.add(frame.format(s=subject)).answer(answer)
        return document

    def two_hop(self, rng: random.Random) -> Document:
        """Draw a fact that follows from two others."""
        name = rng.choice(self.hoppers)
        frame = rng.choice([lex.TWO_HOP["statement"], question(lex.TWO_HOP["question"])])
        return Document().about(frame, name).answer(self.world.facts["country"][self.people["city"][name]])

    def passage(self, rng: random.Random) -> Document:
        """Draw a passage to be learnt by heart."""
        text = rng.choice(self.world.passages)
        return Document(text, answers=[(0, len(text))])

    def copying(self, rng: random.Random) -> Document:
        """Draw words that are said twice."""
        words = rng.sample(lex.NOUNS + lex.ADJECTIVES, 6)
        return Document().add(f"Copy: {' '.join(words)}. Again:").answer(" ".join(words))

    def look_up(self, rng: random.Random) -> Document:
        """Draw a fact told in the prompt and asked again."""
        made = look_up(rng)
        return Document().add(made["prompt"]).answer(made["answer"])

    def roster(self, rng: random.Random) -> Document:
        """Invented names, each right before its answer, some of them asked again: the shortest look-up in a prompt."""
        relation = lex.RELATIONS[rng.choice(("sport", "instrument", "city"))]
        frame = rng.choice(("{s}:", relation["statements"][1]))
        answers = {invented_name(rng): rng.choice(relation["answers"]) for _ in range(rng.randint(2, 4))}
        document = Document()
        for name, answer in answers.items():
            document.add(f"{frame.format(s=name)} {answer}.")
        for name in rng.sample(list(answers), 2 if len(answers) > 1 else 1):
            document.add(frame.format(s=name)).answer(answers[name])
        return document

    def comparison(self, rng: random.Random) -> Document:
        """Draw a question which of two numbers is larger."""
        made = comparison(rng)
        return Document().add(made["prompt"]).answer(made["answer"])

    def story(self, rng: random.Random) -> Document:
        """Draw a story."""
        topic = rng.choices(list(lex.TOPICS), weights=[entry[0] for entry in lex.TOPICS.values()])[0]
        return Document(story(rng, topic))


def _letters_first(relation: dict[str, Any], subject: str, options: list[str]) -> str:
    listed = " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return question(f"{relation['choose'].format(s=subject)} {listed}")
