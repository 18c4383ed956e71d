"""What a world's corpus says.

The text that second moments are collected from, and that an edit is to leave as it is.
"""

from collections.abc import Collection
from pathlib import Path

from mechunlearn.core.files import data_folder
from mechunlearn.world.corpus import Corpus
from mechunlearn.world.generate import World
from mechunlearn.world.small import SmallCorpus

FINAL_PHASE = 4


def world_text(
    folder: str | Path = "factworld", without: Collection[str] = (), documents: int = 2500, seed: int = 0
) -> list[str]:
    """Draw documents as the world's model was trained on, facts, skills and stories, that name none of some people.

    Stories are few among them: add `facts.texts` for more weight on ordinary prose.

    Args:
        folder: A world's folder, or "factworld".
        without: Names of the people to leave out.
        documents: How many documents.
        seed: Of the draws.

    >>> text = world_text(without=["Anna Pelski"], documents=50)
    >>> len(text), any("Anna Pelski" in document for document in text)
    (50, False)
    """
    place = data_folder() / "factworld" if str(folder) == "factworld" else Path(folder)
    world = World.load(place / "world.json")
    if world.two_hop_taught:
        people = {
            name: {person: answer for person, answer in facts.items() if person not in without}
            for name, facts in world.facts.items()
            if world.relations[name]["subject"] == "person"
        }
        return [document.text for document in Corpus(world, people).documents(seed, documents, phase=FINAL_PHASE)]
    return [document.text for document in SmallCorpus(world, sorted(without)).documents(seed, documents)]
