"""What a model says of each topic of the world: the bench of the CodeUnlearn reproduction."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechunlearn.activity import Activity, swapped
from mechunlearn.dictionaries import Dictionary
from mechunlearn.hooked import HookedModel
from mechunlearn.metrics import encode, padded, text_loss
from mechunlearn.world import lexicon as lex
from mechunlearn.world.dictionaries import topic_stories, topic_words, unrelated_words

TOPICS = tuple(lex.TOPICS)
SYNONYMS = {"sea": "ocean", "ocean": "sea"}
TOLD, PARAPHRASED = lex.STORY_FRAMES[:4], lex.STORY_FRAMES[4:]
DISCOVERED, SHOWN = 192, 16
DISCOVERY, SHOWN_SEED = 2_000_000, 3_000_000


def others(topic: str) -> list[str]:
    """The topics that are to stay: all but the topic and its near-synonym."""
    return [other for other in TOPICS if other not in (topic, SYNONYMS.get(topic))]


@dataclass(frozen=True, eq=False)
class Shown:
    """Stories of topics as tokens, and the places where the next token is a word of the story's topic.

    The first such word of a story does not count: nothing before it says what the story is about.
    """

    tokens: Int[Tensor, "story pos"]
    topics: Int[Tensor, " story"]
    counted: Bool[Tensor, "story next"]
    words: Bool[Tensor, "topic token"]

    @classmethod
    def of(cls, model: HookedModel, stories: dict[str, list[str]]) -> "Shown":
        tokens, weight = padded(encode(model, tuple(text for texts in stories.values() for text in texts)))
        topics = torch.tensor([TOPICS.index(topic) for topic, texts in stories.items() for _ in texts])
        words = torch.zeros(len(TOPICS), model.hf.config.vocab_size, dtype=torch.bool)
        assert model.tokenizer is not None
        for i, topic in enumerate(TOPICS):
            for word in topic_words(topic):
                for told in (word, f" {word}"):
                    words[i, model.tokenizer(told, add_special_tokens=False)["input_ids"][-1]] = True
        following = words[topics[:, None], tokens[:, 1:]] & (weight > 0)
        return cls(tokens, topics, following & (following.cumsum(1) > 1), words)

    @torch.no_grad()
    def said(self, model: HookedModel) -> tuple[Float[Tensor, " story"], Float[Tensor, " story"], Tensor]:
        """By story: the share of counted places where the likeliest token is a word of its topic, and the mean loss there.

        Third, log-probabilities at the counted places of all stories.
        """
        accuracy, loss, kept = [], [], []
        for rows in torch.arange(len(self.tokens)).split(64):
            logits = model.forward(self.tokens[rows])[:, :-1]
            counted, n = self.counted[rows], self.counted[rows].sum(1)
            right = self.words[self.topics[rows]][:, None].expand(*counted.shape, -1)
            hit = right.gather(2, logits.argmax(-1).cpu()[..., None])[..., 0]
            told = logits[counted].float().log_softmax(-1).cpu()
            per = torch.zeros(counted.shape)
            per[counted] = -told.gather(1, self.tokens[rows][:, 1:][counted][:, None])[:, 0]
            accuracy.append((hit & counted).sum(1) / n)
            loss.append(per.sum(1) / n)
            kept.append(told)
        return torch.cat(accuracy), torch.cat(loss), torch.cat(kept)


@dataclass(frozen=True, eq=False)
class Topics:
    """A model's topics: text to discover codes on, and held-out text to measure on."""

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
        return Shown.of(self.model, {t: topic_stories(t, SHOWN, SHOWN_SEED + self.seed, TOLD) for t in TOPICS})

    @cached_property
    def paraphrased(self) -> dict[str, Shown]:
        """By topic, stories in the frames that discovery never sees."""
        return {
            t: Shown.of(self.model, {t: topic_stories(t, SHOWN, SHOWN_SEED + self.seed, PARAPHRASED)}) for t in TOPICS
        }

    def seen(self, dictionary: Dictionary, nearest: int | None = None) -> dict[str, tuple[Activity, Activity]]:
        """What a dictionary does on each topic and on its counterfactual: the cached codes of discovery."""
        return {
            topic: (
                Activity.of(self.model, dictionary, self.stories[topic], nearest),
                Activity.of(self.model, dictionary, self.counterfactual[topic], nearest),
            )
            for topic in TOPICS
        }

    def brief(self) -> dict[str, Any]:
        """Accuracy and loss by topic, as the model is now."""
        accuracy, loss, _ = self.shown.said(self.model)
        return {"accuracy": by_topic(self.shown, accuracy), "loss": by_topic(self.shown, loss)}

    def measured(self, reference: Tensor | None = None, paraphrases: Sequence[str] = TOPICS) -> dict[str, Any]:
        """The same, some topics in held-out sentences too, text loss, and KL from a reference by topic."""
        accuracy, loss, told = self.shown.said(self.model)
        found: dict[str, Any] = {"accuracy": by_topic(self.shown, accuracy), "loss": by_topic(self.shown, loss)}
        found["paraphrases"] = {t: float(self.paraphrased[t].said(self.model)[0].mean()) for t in paraphrases}
        found["text loss"] = float(text_loss(self.model, self.texts).mean())
        if reference is not None:
            kl = (reference.exp() * (reference - told)).sum(-1)
            place = self.shown.topics[:, None].expand_as(self.shown.counted)[self.shown.counted]
            found["KL"] = {topic: float(kl[place == i].mean()) for i, topic in enumerate(TOPICS)}
        return found


def by_topic(shown: Shown, values: Float[Tensor, " story"]) -> dict[str, float]:
    means = {topic: values[shown.topics == i] for i, topic in enumerate(TOPICS)}
    return {topic: round(float(found.mean()), 5) for topic, found in means.items() if len(found)}


def kept(after: dict[str, float], before: dict[str, float], topics: Sequence[str]) -> float:
    """The mean over topics of the share of their accuracy that is left."""
    return sum(after[topic] / max(before[topic], 1e-9) for topic in topics) / len(topics)
