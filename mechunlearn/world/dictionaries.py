"""`mechunlearn world dictionaries`.

The codebook and the SAE that ship with the world, and the texts they are trained on.
"""

import random
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from mechunlearn.core.files import whole_file
from mechunlearn.errors import MechunlearnError
from mechunlearn.features.dictionaries import SAE, SHIPPED, Codebook
from mechunlearn.features.firing import quality
from mechunlearn.features.training import train_codebook, train_sae
from mechunlearn.model.hooked import HookedModel, load_model
from mechunlearn.world import lexicon as lex
from mechunlearn.world.generate import story
from mechunlearn.world.text import world_text

SITE, SIZE, TEXTS = "L3.resid_post", 512, 1600
USED_CODES, USED_FEATURES = 2, 8
HELD_OUT = 1_000_000  # seeds from here on draw text that no dictionary is trained on
Say = Callable[[str], object]


def topic_words(topic: str) -> list[str]:
    """Return the things, actions and people of a topic.

    Args:
        topic: The topic, one of `lexicon.TOPICS`.

    >>> topic_words("war")[-3:]
    ['soldier', 'general', 'knight']
    """
    return " ".join(lex.TOPICS[topic][1:]).split()


def unrelated_words(topic: str) -> dict[str, list[str]]:
    """Return for each word of a topic the words of other topics that can stand in its place.

    Things for things, and so on.

    Words that the topic shares with another are not among them.

    Args:
        topic: The topic.

    >>> "cook" in unrelated_words("war")["knight"], "cook" in unrelated_words("war")["sword"]
    (True, False)
    """
    mine = set(topic_words(topic))
    pools: dict[str, list[str]] = {}
    kinds = {
        name: [words.split() for words in entry[1:] if isinstance(words, str)] for name, entry in lex.TOPICS.items()
    }
    for kind, words in enumerate(kinds[topic]):
        others = sorted({word for name, entry in kinds.items() if name != topic for word in entry[kind]} - mine)
        pools |= dict.fromkeys(words, others)
    return pools


def topic_stories(topic: str, count: int, seed: int, frames: Sequence[str] = lex.STORY_FRAMES) -> list[str]:
    """Draw stories of one topic.

    Args:
        topic: The topic.
        count: How many stories.
        seed: Of the draws.
        frames: The sentence frames to use.
    """
    rng = random.Random(f"{topic} {seed}")
    return [story(rng, topic, frames) for _ in range(count)]


def dictionary_texts(count: int, seed: int, without: Collection[str] = ()) -> list[str]:
    """Draw what dictionaries of the world are trained and measured on: half documents of its corpus, half stories.

    Each topic is as often among the stories as another.

    Args:
        count: How many texts.
        seed: Of the draws.
        without: Topics to leave out of the stories.
    """
    topics = [topic for topic in lex.TOPICS if topic not in without]
    rng = random.Random(seed)
    stories = [story(rng, rng.choice(topics)) for _ in range(count - count // 2)]
    return world_text(documents=count // 2, seed=seed) + stories


def shipped_codebook(model: HookedModel, seed: int = 0, progress: bool = False, **settings: Any) -> Codebook:
    """Train a codebook of the shipped world as it ships.

    Args:
        model: The shipped world's model.
        seed: Of the texts and the training.
        progress: Whether to show a bar.
        settings: Other arguments of `train_codebook`, and `site` for its hook point.
    """
    given = {"size": SIZE, "used": USED_CODES, "spliced_steps": 300, **settings}
    made = train_codebook(
        model, given.pop("site", SITE), dictionary_texts(TEXTS, seed), seed=seed, progress=progress, **given
    )
    made.quality = quality(model, made, dictionary_texts(200, HELD_OUT))
    return made


def shipped_sae(model: HookedModel, seed: int = 0, progress: bool = False, **settings: Any) -> SAE:
    """Train an SAE of the shipped world as it ships.

    Args:
        model: The shipped world's model.
        seed: Of the texts and the training.
        progress: Whether to show a bar.
        settings: Other arguments of `train_sae`, and `site` for its hook point.
    """
    given = {"size": SIZE, "used": USED_FEATURES, "steps": 4000, **settings}
    made = train_sae(
        model, given.pop("site", SITE), dictionary_texts(TEXTS, seed), seed=seed, progress=progress, **given
    )
    made.quality = quality(model, made, dictionary_texts(200, HELD_OUT))
    return made


def build_dictionaries(folder: Path, seed: int = 0, say: Say = print) -> None:
    """Train and write `factworld-codebook`, `factworld-sae` and a page of their quality into a folder: some minutes.

    Args:
        folder: The folder.
        seed: Of the texts and the training.
        say: What is called with a line for each dictionary.

    Raises:
        MechunlearnError: If one of them exists.
    """
    folder = Path(folder)
    for name in SHIPPED:
        if (folder / name).exists():
            raise MechunlearnError(
                f"'{folder / name}' exists already. Remove it to build it again, or give another folder."
            )
    model = load_model("factworld")
    lines = [
        "# Dictionaries of the fact world",
        "",
        (
            f"Written by `mechunlearn world dictionaries --seed {seed}`; do not edit. Trained on {TEXTS} texts, half "
            "of "
            "them stories of"
        ),
        (
            "every topic as often as another, half other documents of the corpus; measured on 200 that training did "
            "not "
            "see."
        ),
        "",
        "| | explained variance | loss, nats a token | loss increase when spliced | L0 | dead share |",
        "|---|---|---|---|---|---|",
    ]
    for name in SHIPPED:
        made = (shipped_codebook if name.endswith("codebook") else shipped_sae)(model, seed, progress=True)
        made.save(folder / name)
        told = [f"{made.quality[key]:g}" for key in ("explained variance", "loss", "loss increase", "L0", "dead share")]
        lines.append(f"| {name}: {made} | {' | '.join(told)} |")
        say(f"{made} -> {folder / name}: {', '.join(f'{key} {value:g}' for key, value in made.quality.items())}")
    with whole_file(folder / "factworld-dictionaries.md") as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
