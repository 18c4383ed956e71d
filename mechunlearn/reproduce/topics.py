"""What a model says of each topic of its world, and what a dictionary does on it: what CodeUnlearn is measured by."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechunlearn.features.dictionaries import Dictionary
from mechunlearn.features.firing import FiringStatistics, swapped
from mechunlearn.metrics.text import encode, padded, text_loss
from mechunlearn.model.hooked import HookedModel
from mechunlearn.reproduce.engine import Found
from mechunlearn.world import lexicon as lex
from mechunlearn.world.dictionaries import topic_stories, topic_words, unrelated_words

TOPICS = tuple(lex.TOPICS)
SYNONYMS = {"sea": "ocean", "ocean": "sea"}
TOLD, PARAPHRASED = lex.STORY_FRAMES[:4], lex.STORY_FRAMES[4:]
DISCOVERED, SHOWN = 192, 12
DISCOVERY, SHOWN_SEED = 2_000_000, 3_000_000


def others(topic: str) -> list[str]:
    """Return the topics that are to stay: all but the topic and its near-synonym.

    Args:
        topic: Which one is deleted.
    """
    return [other for other in TOPICS if other not in (topic, SYNONYMS.get(topic))]


@dataclass(frozen=True, eq=False)
class Shown:
    """Stories of topics as tokens, and every token of their topics' words.

    The first such word of a story does not count: nothing before it shows what the story is about.

    Attributes:
        tokens: The stories.
        topics: For each story, the number of its topic.
        counted: Where a token of a word that counts is predicted.
        row: For each such place, the row of `allowed`: which topic, and which tokens of the word are there already.
        word: For each such place, the word it belongs to.
        allowed: The tokens that lead from there to some word of the topic.
        owner: For each word, its story.
    """

    tokens: Int[Tensor, "story pos"]
    topics: Int[Tensor, " story"]
    counted: Bool[Tensor, "story next"]
    row: Int[Tensor, "story next"]
    word: Int[Tensor, "story next"]
    allowed: Bool[Tensor, "prefix token"]
    owner: Int[Tensor, " word"]

    @classmethod
    def of(cls, model: HookedModel, stories: dict[str, list[str]]) -> "Shown":
        """Return stories as tokens.

        Args:
            model: Whose tokenizer is used.
            stories: Their texts by topic.
        """
        texts = [(topic, text) for topic, told in stories.items() for text in told]
        tokens, weight = padded(encode(model, tuple(text for _, text in texts)))
        counted = torch.zeros(weight.shape, dtype=torch.bool)
        row, word = torch.zeros(weight.shape, dtype=torch.long), torch.zeros(weight.shape, dtype=torch.long)
        rows: dict[tuple[str, tuple[int, ...]], int] = {}
        owner: list[int] = []
        tokenizer: Any = model.tokenizer
        for story, (topic, text) in enumerate(texts):
            spelled = _spelled(tokenizer, topic)
            offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
            found = re.finditer(rf"\b({'|'.join(spelled)})\b", text)
            for match in list(found)[1:]:
                pieces = spelled[match[0]]
                # counted from the end: the space before a word may be a token of its own, with no place in the text
                last = next(i for i, (start, end) in enumerate(offsets) if start < match.end() <= end)
                assert tuple(tokens[story, last - len(pieces) + 1 : last + 1].tolist()) == pieces
                for step, place in enumerate(range(last - len(pieces) + 1, last + 1)):
                    key = (topic, pieces[:step])
                    counted[story, place - 1] = True
                    row[story, place - 1] = rows.setdefault(key, len(rows))
                    word[story, place - 1] = len(owner)
                owner.append(story)
        allowed = torch.zeros(len(rows), model.hf.config.get_text_config().vocab_size, dtype=torch.bool)
        for (topic, prefix), number in rows.items():
            for pieces in _spelled(tokenizer, topic).values():
                if len(pieces) > len(prefix) and pieces[: len(prefix)] == prefix:
                    allowed[number, pieces[len(prefix)]] = True
        topics = torch.tensor([TOPICS.index(topic) for topic, _ in texts])
        return cls(tokens, topics, counted, row, word, allowed, torch.tensor(owner))

    @torch.no_grad()
    def said(self, model: HookedModel) -> tuple[Float[Tensor, " story"], Float[Tensor, " story"], Tensor]:
        """Return accuracy, loss and log-probabilities of a model.

        Args:
            model: What reads the stories.

        Returns:
            By story, the share of its words of which every token is answered by one that leads to a word of the topic
            (greedy, given the true tokens before). By story, the mean loss of a word in nats. The log-probabilities at
            the counted places of all stories.
        """
        wrong, losses = torch.zeros(len(self.owner)), torch.zeros(len(self.owner))
        kept = []
        for rows in torch.split(torch.arange(len(self.tokens)), 64):
            counted = self.counted[rows]
            told = model.forward(self.tokens[rows])[:, :-1][counted].float().log_softmax(-1).cpu()
            word, following = self.word[rows][counted], self.tokens[rows][:, 1:][counted]
            right = self.allowed[self.row[rows][counted], told.argmax(-1)]
            wrong.index_add_(0, word, (~right).float())
            losses.index_add_(0, word, -told.gather(1, following[:, None])[:, 0])
            kept.append(told)
        words = torch.zeros(len(self.tokens)).index_add_(0, self.owner, torch.ones(len(self.owner)))
        accuracy, loss = (
            torch.zeros(len(self.tokens)).index_add_(0, self.owner, of) / words for of in ((wrong == 0).float(), losses)
        )
        return accuracy, loss, torch.cat(kept)


def _spelled(tokenizer: Any, topic: str) -> dict[str, tuple[int, ...]]:
    """Return the tokens of each word of a topic, as they are within a sentence."""
    before = len(tokenizer("The", add_special_tokens=False)["input_ids"])
    return {
        word: tuple(tokenizer(f"The {word}", add_special_tokens=False)["input_ids"][before:])
        for word in topic_words(topic)
    }


@dataclass(frozen=True, eq=False)
class Topics:
    """A model's topics: text to discover codes on, and held-out text to measure on.

    Attributes:
        model: The model.
        texts: Other text, on which damage is measured.
        seed: Of the stories.
    """

    model: HookedModel
    texts: tuple[str, ...]
    seed: int = 0

    @cached_property
    def stories(self) -> dict[str, list[str]]:
        """Text to discover codes on, in some of the sentence frames."""
        return {topic: topic_stories(topic, DISCOVERED, DISCOVERY + self.seed, TOLD) for topic in TOPICS}

    @cached_property
    def counterfactual(self) -> dict[str, list[str]]:
        """The same sentences with the topic's words swapped for unrelated ones of the same kind."""
        return {
            topic: swapped(texts, topic_words(topic), unrelated_words(topic), self.seed)
            for topic, texts in self.stories.items()
        }

    @cached_property
    def shown(self) -> Shown:
        """Held-out stories in the same frames."""
        return Shown.of(self.model, {t: topic_stories(t, SHOWN, SHOWN_SEED + self.seed, TOLD) for t in TOPICS})

    @cached_property
    def paraphrased(self) -> dict[str, Shown]:
        """By topic, stories in the frames that discovery never sees."""
        return {
            t: Shown.of(self.model, {t: topic_stories(t, SHOWN, SHOWN_SEED + self.seed, PARAPHRASED)}) for t in TOPICS
        }

    def seen(
        self, dictionary: Dictionary, nearest: int | None = None
    ) -> dict[str, tuple[FiringStatistics, FiringStatistics]]:
        """Return what a dictionary does on each topic and on its counterfactual: the cached codes of discovery.

        Args:
            dictionary: A codebook or an SAE.
            nearest: How many nearest codes are counted, if not those that are used.
        """
        return {
            topic: (
                FiringStatistics.of(self.model, dictionary, self.stories[topic], nearest),
                FiringStatistics.of(self.model, dictionary, self.counterfactual[topic], nearest),
            )
            for topic in TOPICS
        }

    def brief(self) -> Found:
        """Return accuracy and loss by topic of the model as it is now."""
        accuracy, loss, _ = self.shown.said(self.model)
        return {"accuracy": by_topic(self.shown, accuracy), "loss": by_topic(self.shown, loss)}

    def measured(self, reference: Tensor | None = None, paraphrases: Sequence[str] = TOPICS) -> Found:
        """Return the same, accuracy in the other sentences, text loss, and the KL from a reference by topic.

        Args:
            reference: The third of what `said` returns of another model; without it there is no KL.
            paraphrases: The topics that are measured in the other sentences.
        """
        accuracy, loss, told = self.shown.said(self.model)
        found: Found = {"accuracy": by_topic(self.shown, accuracy), "loss": by_topic(self.shown, loss)}
        found["paraphrases"] = {t: float(self.paraphrased[t].said(self.model)[0].mean()) for t in paraphrases}
        found["text loss"] = float(text_loss(self.model, self.texts).mean())
        return found if reference is None else found | {"KL": self.divergence(reference, told)}

    def divergence(self, reference: Tensor, told: Tensor) -> dict[str, float]:
        """Return the mean KL by topic.

        Args:
            reference: The third of what `said` returns of one model.
            told: The same of the other.
        """
        kl = (reference.exp() * (reference - told)).sum(-1)
        place = self.shown.topics[:, None].expand_as(self.shown.counted)[self.shown.counted]
        return {topic: float(kl[place == i].mean()) for i, topic in enumerate(TOPICS)}


def by_topic(shown: Shown, values: Float[Tensor, " story"]) -> dict[str, float]:
    """Return the mean of each topic.

    Args:
        shown: The stories.
        values: One number a story.
    """
    means = {topic: values[shown.topics == i] for i, topic in enumerate(TOPICS)}
    return {topic: round(float(found.mean()), 5) for topic, found in means.items() if len(found)}


def kept(after: dict[str, float], before: dict[str, float], topics: Sequence[str]) -> float:
    """Return the mean over topics of the share of their accuracy that is left.

    Args:
        after: Accuracy by topic.
        before: The same, unedited.
        topics: Which ones.
    """
    return sum(after[topic] / max(before[topic], 1e-9) for topic in topics) / len(topics)
