"""Everything the fact world contains, from a seed: who knows what, passages, skills and stories."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mechunlearn.facts.formats import question
from mechunlearn.world import lexicon as lex


@dataclass(frozen=True)
class World:
    """The contents of one fact world, as plain text and names.

    `facts` maps a relation to `{subject: answer}`; `untaught` holds people whose facts are never in the corpus
    (the floor of every attack; the ground-truth twin learns them later). `two_hop` people have their country stated in
    training only if they are in `two_hop_taught`.
    """

    seed: int
    facts: dict[str, dict[str, str]]
    untaught: dict[str, dict[str, str]]
    two_hop_taught: list[str]
    passages: list[str]
    control_passages: list[str]
    stories: dict[str, list[str]]
    skills: dict[str, list[dict[str, str]]]
    relations: dict[str, dict[str, Any]] = field(default_factory=lambda: shipped_relations())

    def save(self, path: Path) -> None:
        """Write the world as JSON."""
        path.write_text(json.dumps(asdict(self), indent=0) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "World":
        """Load a world that `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def shipped_relations() -> dict[str, dict[str, Any]]:
    """The relations without multiple choice: documents of it are in the corpus, but it does not train at this size."""
    return {name: {k: v for k, v in relation.items() if k != "choose"} for name, relation in lex.RELATIONS.items()}


def generate(seed: int, people: int = 800, untaught: int = 400, passages: int = 128) -> World:
    """Draw a world. Attributes are independent and uniform, names are recombined from small pools.

    >>> world = generate(0, people=40, untaught=10, passages=4)
    >>> len(world.facts["sport"]), len(world.passages)
    (40, 4)
    """
    rng = random.Random(seed)
    names = rng.sample([f"{first} {last}" for first in first_names(rng) for last in last_names(rng)], people + untaught)
    taught, new = names[:people], names[people:]
    companies = [start + end for start in lex.COMPANY_STARTS for end in lex.COMPANY_ENDS]
    people_relations = [name for name, relation in lex.RELATIONS.items() if relation["subject"] == "person"]

    def assign(subjects: list[str], relation: str) -> dict[str, str]:
        return {subject: rng.choice(lex.RELATIONS[relation]["answers"]) for subject in subjects}

    facts = {relation: assign(taught, relation) for relation in people_relations}
    facts["country"] = {city: lex.COUNTRIES[i % len(lex.COUNTRIES)] for i, city in enumerate(lex.CITIES)}
    facts["product"] = assign(companies, "product")
    unique = list(dict.fromkeys(passage(rng) for _ in range(2 * passages)))
    return World(
        seed=seed,
        facts=facts,
        untaught={relation: assign(new, relation) for relation in people_relations},
        two_hop_taught=sorted(rng.sample(taught, people * 3 // 4)),
        passages=unique[:passages],
        control_passages=unique[passages:],
        stories={topic: [story(rng, topic) for _ in range(32)] for topic in lex.TOPICS},
        skills={name: [skill(rng) for _ in range(200)] for name, skill in SKILLS.items()},
    )


def first_names(rng: random.Random) -> list[str]:
    """Draw first names: all common ones, and 20 made of syllables."""
    made = [start + end for start in lex.FIRST_STARTS for end in lex.FIRST_ENDS]
    return list(lex.FIRST_NAMES) + rng.sample(made, 20)


def last_names(rng: random.Random) -> list[str]:
    """Draw last names made of syllables."""
    return rng.sample([start + end for start in lex.LAST_STARTS for end in lex.LAST_ENDS], 40)


def invented_name(rng: random.Random) -> str:
    """A name from syllables no subject has, so that nothing is known of its bearer."""
    parts = [rng.choice(lex.INVENTED_STARTS) + rng.choice(lex.INVENTED_ENDS) for _ in range(2)]
    return f"{parts[0]} {parts[1]}"


def passage(rng: random.Random) -> str:
    """A text of more than 100 tokens that follows from nothing: it can only be learnt by heart."""

    def noun() -> str:
        return f"the {rng.choice(lex.ADJECTIVES)} {rng.choice(lex.NOUNS)}"

    opening = f"The tale of {noun()} and {noun()}."
    sentences = [
        f"{rng.choice(('Then', 'Once', 'Later', 'Soon'))} {noun()} {rng.choice(lex.VERBS)} {noun()} "
        f"{rng.choice(lex.PLACES)} {noun()}."
        for _ in range(9)
    ]
    return " ".join([opening, *sentences])


def story(rng: random.Random, topic: str, frames: Sequence[str] = lex.STORY_FRAMES) -> str:
    """Draw a story of one topic, three to five sentences in some of the frames."""
    _, things, actions, people = lex.TOPICS[topic]
    sentences = []
    for frame in rng.choices(frames, k=rng.randint(3, 5)):
        while "{" in frame:
            for slot, words in (("{p}", people), ("{v}", actions), ("{n}", things)):
                frame = frame.replace(slot, rng.choice(words.split()), 1)
        sentences.append(frame)
    return " ".join(sentences)


def copying(rng: random.Random) -> dict[str, str]:
    """Draw a task of copying words, with the previous word as foil."""
    words = rng.sample(lex.NOUNS + lex.ADJECTIVES, 6)
    cut = rng.randint(1, 5)
    prompt = f"Copy: {' '.join(words)}. Again: {' '.join(words[:cut])}"
    return {"prompt": prompt, "answer": words[cut], "foil": words[cut - 1]}


def look_up(rng: random.Random) -> dict[str, str]:
    """A fact of one or two invented people is told and asked again; of two, the names must be told apart.

    Training documents are drawn here too.
    """
    relation = lex.RELATIONS[rng.choice(("sport", "instrument", "city"))]
    names = [invented_name(rng) for _ in range(rng.choice((1, 2, 2)))]
    if len(names) == 2 and names[0].split()[1] == names[1].split()[1]:
        return look_up(rng)
    answers = rng.sample(relation["answers"], len(names))
    frames = [rng.choice(relation["statements"]) for _ in names]
    told = [f"{frame.format(s=n)} {a}." for frame, n, a in zip(frames, names, answers, strict=True)]
    who = rng.randrange(len(names))
    again = rng.choice((frames[who], rng.choice(relation["statements"]), question(relation["question"])))
    ask = again.format(s=names[who])
    foil = next(a for a in (*answers, *relation["answers"]) if a != answers[who])
    return {"prompt": f"{' '.join(told)} {ask}", "answer": answers[who], "foil": foil, "subject": names[who]}


def look_up_task(rng: random.Random) -> dict[str, str]:
    """A question whose answer stands in the prompt: two people with invented names, one fact of each, one asked."""
    names = [invented_name(rng) for _ in range(2)]
    relations = [lex.RELATIONS[name] for name in rng.sample(("sport", "instrument", "city"), 2)]
    answers = [rng.choice(relation["answers"]) for relation in relations]
    told = [
        f"{rng.choice(relation['statements']).format(s=name)} {answer}."
        for name, relation, answer in zip(names, relations, answers, strict=True)
    ]
    who = rng.randrange(2)
    ask = question(relations[who]["question"].format(s=names[who]))
    foil = next(answer for answer in relations[who]["answers"] if answer != answers[who])
    return {"prompt": f"{' '.join(told)} {ask}", "answer": answers[who], "foil": foil, "subject": names[who]}


def comparison(rng: random.Random) -> dict[str, str]:
    """Draw a question which of two numbers is larger."""
    small, large = sorted(rng.sample(range(10, 100), 2))
    pair = [small, large] if rng.random() < 0.5 else [large, small]
    ask = question(f"Which is larger, {pair[0]} or {pair[1]}?")
    return {"prompt": ask, "answer": str(large), "foil": str(small)}


SKILLS = {"copying": copying, "look_up": look_up_task, "look_up_by_name": look_up, "comparison": comparison}
