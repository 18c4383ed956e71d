"""Settings from a goal: the gentlest one that changes the facts, and what it did to everything else."""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from mechunlearn.edit.losses import kl_retain
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.samples import own_texts
from mechunlearn.training.inputs import BATCH, CachedInputs, Sequences, TopLayers, text_sequences

OWN, OWN_TOKENS = 64, 32  # samples of the model: editors hold every other one, and are judged on the rest
Made = TypeVar("Made")


@dataclass(frozen=True)
class Reached:
    """What an edit reached, measured on its own facts and on ordinary text.

    Attributes:
        efficacy: Share of the forget facts that are edited.
        retention: Share of the retain facts that were right before and still are. NaN: none was.
        kl: Mean KL(before || after) of the next token on samples of the model that no editor trains on, in nats. NaN:
            the model has no tokenizer.
    """

    efficacy: float
    retention: float
    kl: float


class Judge:
    """Measures what an edit in the making has reached. Make it while the model is unedited.

    Args:
        upper: The model from its lowest edited layer up.
        forget: The facts that are edited.
        retain: The facts that are to stay.
        aimed: Whether a fact is edited when the model gives its target. Else it is when the truth is gone.
        whole: Whether `reached` will be asked for. Without it the retain facts and text are not read.

    Attributes:
        stream: The prefix of a loss's arguments that are read of the same sequences.
    """

    def __init__(self, upper: TopLayers, forget: Prompts, retain: Prompts, aimed: bool, whole: bool = True) -> None:
        self.aimed, self.stream = aimed, "target_" if aimed else ""
        self.edited = CachedInputs(upper, Sequences.of(forget, "targets" if aimed else "answers"))
        if not whole:
            return
        self.kept = CachedInputs(upper, Sequences.of(retain)) if len(retain) else None
        self.known = self.kept.right() if self.kept is not None else torch.zeros(0)
        own = text_sequences(
            upper.model, own_texts(upper.model, OWN, OWN_TOKENS)[1::2] if upper.model.tokenizer else ()
        )
        self.own = CachedInputs(upper, own, frozenset({"reference_logits"}), exact=True)

    def efficacy(self) -> float:
        """Return the share of the forget facts that are edited now."""
        return self.share(self.edited.right())

    def share(self, right: Bool[Tensor, " row"]) -> float:
        """Return the share of facts that are edited.

        Args:
            right: Whether the model gives each target, or each truth where the facts are erased.
        """
        given = float(right.float().mean())
        return given if self.aimed else 1 - given

    def retention(self) -> float:
        """Return the share of the retain facts that were right and are right now; NaN if none was."""
        if self.kept is None or not self.known.any():
            return math.nan
        return float(self.kept.right()[self.known].float().mean())

    def reached(self) -> Reached:
        """Return what the model as it is now has reached."""
        return Reached(self.efficacy(), self.retention(), self._moved())

    @torch.no_grad()
    def _moved(self) -> float:
        """Mean KL over the tokens of the model's own text."""
        total, tokens = 0.0, 0
        for rows in torch.split(self.own.sequences.lengths.argsort(), BATCH) if len(self.own) else ():
            read = self.own.read(rows, {"logits", "reference_logits"})
            total += float(kl_retain(**read)) * len(read["logits"])
            tokens += len(read["logits"])
        return total / tokens if tokens else math.nan


@dataclass(frozen=True)
class Goal:
    """What an edit is to reach. The smallest change that gets there is the one that is wanted.

    Attributes:
        efficacy: Least share of the forget facts that are edited.
        max_kl: Largest mean KL of the next token on ordinary text, in nats.
        min_retention: Least share of the known retain facts that stay right.
    """

    efficacy: float
    max_kl: float
    min_retention: float

    def missed(self, reached: Reached) -> dict[str, float]:
        """Return by how much an edit misses the goal, from 0 to 1, for each part that it misses.

        Args:
            reached: What the edit reached.

        >>> Goal(0.8, 0.05, 0.95).missed(Reached(efficacy=0.6, retention=1.0, kl=0.1))
        {'efficacy': 0.25, 'kl': 0.5}
        """
        short = {
            "efficacy": 1 - reached.efficacy / self.efficacy if self.efficacy else 0.0,
            "retention": 1 - reached.retention / self.min_retention if self.min_retention else 0.0,
            "kl": 1 - self.max_kl / reached.kl if reached.kl else 0.0,
        }
        return {name: round(value, 6) for name, value in short.items() if value > 0}

    def search(
        self,
        ladder: Iterable[float],
        attempt: Callable[[float], tuple[Made, dict[str, Any], Reached]],
        between: int = 0,
    ) -> tuple[Made, list[dict[str, Any]]]:
        """Try settings from the gentlest up, and return what the best of them made.

        The search ends when the goal is met, and when an attempt edits the facts and still misses another part of the
        goal: a stronger one would do more harm. If none meets the goal, the one nearest to it is taken, with a warning
        that names what failed.

        Args:
            ladder: The settings, gentlest first.
            attempt: Makes an edit with a setting. Returns it, what the card says of it, and what it reached.
            between: How many settings to try between the gentlest one that edits the facts and the one before it, where
                the former misses another part of the goal.

        Returns:
            What was made, and one entry for each attempt: what the card says of it, what it reached, and `chosen`.
        """
        tried: list[tuple[Made, dict[str, Any], Reached]] = []
        gentler, stronger = math.nan, math.nan
        for setting in ladder:
            tried.append(attempt(setting))
            if tried[-1][2].efficacy >= self.efficacy:
                stronger = setting
                break
            gentler = setting
        while between and math.isfinite(gentler * stronger) and all(self.missed(found) for *_, found in tried):
            tried.append(attempt(setting := math.sqrt(gentler * stronger)))
            gentler, stronger = (gentler, setting) if tried[-1][2].efficacy >= self.efficacy else (setting, stronger)
            between -= 1
        best = min(range(len(tried)), key=lambda i: max(self.missed(tried[i][2]).values(), default=0.0))
        made, _, found = tried[best]
        if missed := self.missed(found):
            said = {
                "efficacy": f"efficacy {found.efficacy:.2f} (wanted {self.efficacy:g} or more)",
                "retention": f"retention {found.retention:.2f} (wanted {self.min_retention:g} or more)",
                "kl": f"KL on ordinary text {found.kl:.3f} nats a token (wanted {self.max_kl:g} or less)",
            }
            warnings.warn(
                f"No setting met the goal. The edit nearest to it has {', '.join(said[name] for name in missed)}. Try "
                "another mask or fewer facts, or ask for less. The run card's `search` has all that was tried.",
                stacklevel=6,
            )
        rows = [(about, {k: None if math.isnan(v) else v for k, v in asdict(each).items()}) for _, about, each in tried]
        return made, [{**about, **each, "chosen": i == best} for i, (about, each) in enumerate(rows)]
