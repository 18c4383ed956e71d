"""Random units: the control of every localizer."""

from collections.abc import Sequence

import torch

from mechunlearn.components import SCORED, Localization
from mechunlearn.hooked import HookedModel
from mechunlearn.prompts import Prompts
from mechunlearn.runcard import RunCard
from mechunlearn.scores import localization


def random_units(
    model: HookedModel, prompts: Prompts | None = None, *, kinds: Sequence[str] = SCORED, seed: int = 0
) -> Localization:
    """Scores that are uniform noise, so that `.top(weights=...)` is a random mask of the same weight as another.

    The prompts are not looked at; they are in the signature because every localizer has them.

    >>> from mechunlearn.toy import planted_facts
    >>> found = random_units(planted_facts().model, seed=1)
    >>> len(found.top(units=3))
    3
    """
    del prompts
    generator = torch.Generator().manual_seed(seed)
    scores = {
        f"L{layer}.{kind}": torch.rand(model.signature.units(kind) or 0, generator=generator)
        for layer in range(model.signature.layers)
        for kind in kinds
    }
    card = RunCard("random_units", model=model.fingerprint, seed=seed, settings={"kinds": list(kinds)})
    return localization(model, scores, card)
