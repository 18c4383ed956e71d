"""Random units: the control of every localizer."""

from collections.abc import Sequence

import torch

from mechunlearn.artifacts.localization import Localization
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.component import SCORED
from mechunlearn.model.hooked import HookedModel
from mechunlearn.patching.scores import localization, localizer


@localizer
def random_units(
    model: HookedModel,
    prompts: Prompts | None = None,
    *,
    kinds: Sequence[str] = SCORED,
    whole: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Localization:
    """Score units by uniform noise, so that `.top(weights=...)` is a random mask of the same weight as another.

    Args:
        model: The model.
        prompts: Not looked at; they are in the signature because every localizer has them.
        kinds: Kinds of sites to score.
        whole: Let all units of a site share one score: `kinds=("mlp.out",)` then takes random MLPs, the control of
            methods that choose whole layers. Ties are taken in component order, so a budget that is no multiple of a
            site cuts the last one: it then holds the first units of that site.
        seed: Seed of the noise.
        progress: Not used: it takes no time.

    Returns:
        Scores in [0, 1).

    >>> from mechunlearn.world.toy import planted_facts
    >>> found = random_units(planted_facts().model, seed=1)
    >>> len(found.top(units=3))
    3
    >>> mlps = random_units(planted_facts().model, kinds=("mlp.out",), whole=True, seed=1)
    >>> mlps.top(units=32)
    ComponentMask(32 units: L0.mlp.out 32/32; llama: 2 layers, 2 heads, 2 kv heads, d_mlp 32, d_model 48)
    """
    del prompts, progress
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for layer in range(model.signature.layers):
        for kind in kinds:
            units = model.signature.units(kind) or 0
            drawn = torch.rand(1 if whole else units, generator=generator)
            scores[f"L{layer}.{kind}"] = drawn.repeat(units) if whole else drawn
    return localization(model, scores)
