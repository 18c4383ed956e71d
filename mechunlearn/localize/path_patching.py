"""Path patching: exact effects of one component on others, along the direct edge or along every path."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mechunlearn.artifacts.edges import writers
from mechunlearn.artifacts.localization import Localization
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import Metric, logit_diff
from mechunlearn.model.hooked import HookedModel
from mechunlearn.patching.cost import BUDGET
from mechunlearn.patching.paths import path_effects, readers_named
from mechunlearn.patching.scores import localization, localizer, note_of

if TYPE_CHECKING:
    import torch


@localizer
def path_patching(
    model: HookedModel,
    prompts: Prompts,
    *,
    receivers: Sequence[str] = ("logits",),
    through: str = "direct",
    metric: Metric = logit_diff,
    budget: float | None = BUDGET,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Localization:
    """Measure how each head and MLP acts on the metric through chosen receivers.

    The receivers see the corrupt output of one sender, are held there, and everything after them is recomputed; the
    score is the mean change of the metric (Wang et al. 2022, arXiv 2211.00593). Use it to ask how a component reaches
    another; for all pairs at once use `edge_attribution`.

    Args:
        model: The model.
        prompts: The facts.
        receivers: Names as in a circuit: `a9.h6` (all its inputs), `a9.h6<q>`, `m3`, `logits`. Under grouped-query
            attention keys and values are received by the group.
        through: `direct`, along the residual stream alone, or `total`, along every path from sender to receivers.
        metric: A function of `(logits, prompts)`, one number a fact.
        budget: Minutes that it may take, by an estimate from one timed forward pass; None for any time.
        seed: Recorded only: nothing is drawn.
        batch_size: Facts a batch.
        progress: Show a bar; None shows one on a terminal or in a notebook.

    Returns:
        The mean change by unit, in units of the metric; every neuron of an MLP gets its MLP's score.

    Raises:
        MechunlearnError: A receiver that the model does not have, unknown paths, or more work than the budget allows.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> found = path_patching(toy.model, toy.prompts([1]), receivers=["a1.h0<v>"])
    >>> bool(found.scores["L0.mlp.out"][0] < -1), float(found.scores["L1.mlp.out"][0])
    (True, 0.0)
    """
    into = readers_named(model, receivers)
    names = writers(model.signature)
    effect, clean, corrupt = path_effects(
        model, prompts, range(1, len(names)), into, metric, through, batch_size, budget=budget, progress=progress
    )
    scores: dict[str, torch.Tensor] = {}
    by_fact: dict[str, torch.Tensor] = {}
    by_layer = effect.mean(1).view(model.signature.layers, -1)
    facts = effect.T.reshape(len(prompts), model.signature.layers, -1)
    for layer, row in enumerate(by_layer):
        by_fact[f"L{layer}.attn.o"], by_fact[f"L{layer}.mlp.out"] = facts[:, layer, :-1], facts[:, layer, -1:]
        scores[f"L{layer}.attn.o"] = row[:-1]
        scores[f"L{layer}.mlp.out"] = row[-1].expand(model.signature.d_mlp)
    evidence = {"clean": float(clean.mean()), "corrupt": float(corrupt.mean())}
    return localization(model, scores, evidence, note_of(prompts), by_fact=by_fact)
