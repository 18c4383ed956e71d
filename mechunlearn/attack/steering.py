"""Steering: take one direction out of the residual stream, or add one, and see whether the facts come back."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.attack.states import GATE, WATCHED, Attack, Rows, State, cell, chance, check_sizes, halved, mean
from mechunlearn.core.arguments import validated
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import PAD, Prompts
from mechunlearn.metrics.answers import BATCH, answered
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.taps import Hook

ALPHAS = (0.1, 0.5, 2.0)


@validated
@steady()
def steering(
    model: HookedModel,
    edit: Edit | None,
    forget: Prompts,
    retain: Prompts,
    *,
    extra_edits: Mapping[str, Edit | HookedModel | None] | None = None,
    baseline_rows: pd.DataFrame | None = None,
    alphas: Sequence[float] = ALPHAS,
    min_retention: float = GATE,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Try to get edited facts back with a direction that half of them shows, on the other half; no weight is touched.

    Two kinds of setting, of which the best counts:

    - "ablation from Lk", for the first, the middle and the last block k: in each block l from k on, what leaves it loses
      its part along d_l at every position,

      h -> h - (h·d_l) d_l / |d_l|^2,   d_l = mean_forget h_l - mean_retain h_l

      with the means over half of either set, at the last token of the prompt, in the model that is attacked. If the edit
      marks what it hides in one direction, this removes the mark ("Refusal in language models is mediated by a single
      direction", arXiv 2406.11717; there one direction serves all blocks).
    - "truth - target at Lk, alpha", for the middle and the last block:

      h -> h + alpha m_k v / |v|,   v = mean (W_U[truth] - W_U[target])

      over half of the forget facts that have a target, with W_U the rows of the unembedding for the first token of each
      and m_k the median |h_k| at the last token of these prompts. It undoes a push that all facts share, such as towards
      one common target; where every fact has its own target, v says little.

    The means and v are of the taught half alone, what is measured is the other one. The cost is a forward pass over the
    facts for each of nine settings and state. `activation_perturbation` searches its vector by gradients, and needs an
    edit in front of it; this one is written down, and finds less. Do not use it where forget and retain facts are of
    different relations: d_l is then the difference of the relations, and ablating it breaks the question.

    Args:
        model: The unedited model.
        edit: The edit to attack, or None for ceiling and floor alone.
        forget: The facts that the edit removed.
        retain: The facts that were to stay.
        extra_edits: Further edits, models, or None for the model as it is, to attack alike, by name.
        baseline_rows: Rows of an earlier call whose ceiling and floor are taken as they are.
        alphas: Lengths of what is added, in units of the median |h|.
        min_retention: The share of retain facts that must be right for a row to be `valid`.
        seed: Draws the halves.
        progress: Whether to show a bar; None shows one where somebody can see it.

    Returns:
        One row a state (see `states_to_attack`) and setting. `held_out` is the accuracy (greedy, full vocabulary) on the
        half of the forget facts that no direction was made of, with its 95 % interval `low` to `high` over `n` facts;
        `retain` that on at most 100 facts of the other half of the retain facts. `chance` and `valid` stand beside them,
        and the run card in `attrs["card"]`. `recovery` reads the rows.

    Raises:
        MechunlearnError: For fewer than two forget or retain facts, alphas that are not above 0, or a model that knows
            less of the retain facts than the gate asks for.

    >>> from mechunlearn.artifacts.mask import ComponentMask
    >>> from mechunlearn.edit import masked_gradient
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    >>> forget, retain = toy.prompts([0, 1, 2, 3]), toy.prompts([4, 5, 6, 7])
    >>> edit = masked_gradient(toy.model, mask, forget, retain, steps=20, lr=0.1)
    >>> steering(toy.model, edit, forget, retain, alphas=[0.1])[["state", "setting", "n"]].values.tolist()[:3]
    [['edited', 'ablation from L0', 2], ['edited', 'ablation from L1', 2], ['edited', 'truth - target at L1, 0.1', 2]]
    """
    check_sizes(forget, retain)
    if not all(alpha > 0 for alpha in alphas):
        raise MechunlearnError(f"The alphas are {list(alphas)}. Expected numbers above 0, for example [0.1, 0.5].")
    kept, watched = halved(retain, seed, WATCHED)
    attack = Attack(
        "steering", model, edit, forget, retain, watched, extra_edits, baseline_rows, min_retention, seed, progress
    )
    layers = model.signature.layers
    total = len({0, layers // 2, layers - 1}) + len({layers // 2, layers - 1}) * len(alphas)

    def tried(state: State) -> Rows:
        taught, held_out = halved(state.facts, seed)
        with state.applied() as target:
            for setting, hooks in _settings(target, taught, kept, alphas):
                with target.decoder.hooks(hooks):
                    right, spared = answered(target, held_out), answered(target, watched)
                yield [cell(state.name, setting, right, seed, retain=mean(spared), chance=chance(held_out))]

    return attack.run(tried, {"alphas": list(alphas)}, total)


def _settings(
    model: HookedModel, taught: Prompts, kept: Prompts, alphas: Sequence[float]
) -> Iterator[tuple[str, dict[str, Hook]]]:
    """Every setting, and what it does where."""
    layers = model.signature.layers
    inside, outside = _last(model, taught), _last(model, kept)
    marks = [_unit(a.mean(0) - b.mean(0)) for a, b in zip(inside, outside)]
    for start in sorted({0, layers // 2, layers - 1}):
        yield (
            f"ablation from L{start}",
            {f"L{layer}.resid_post": partial(_without, marks[layer]) for layer in range(start, layers)},
        )
    push = _truth_minus_target(model, taught)
    if push is None:
        return
    for layer in sorted({layers // 2, layers - 1}):
        size = inside[layer].norm(dim=-1).median()
        for alpha in alphas:
            yield (
                f"truth - target at L{layer}, {alpha:g}",
                {f"L{layer}.resid_post": partial(_plus, alpha * size * push)},
            )


@torch.no_grad()
def _last(model: HookedModel, prompts: Prompts) -> list[Float[Tensor, "fact d_model"]]:
    """What leaves each block at the last token of the prompt."""
    names = [f"L{layer}.resid_post" for layer in range(model.signature.layers)]
    found: list[list[Tensor]] = [[] for _ in names]
    for rows in torch.arange(len(prompts)).split(BATCH):
        part = prompts.select(rows)
        _, resid = model.cache(part.tokens, names)
        for i, name in enumerate(names):
            found[i].append(resid[name][torch.arange(len(part)), part.start.to(model.device)].float())
    return [torch.cat(parts) for parts in found]


@torch.no_grad()
def _truth_minus_target(model: HookedModel, prompts: Prompts) -> Float[Tensor, " d_model"] | None:
    """The direction of the unembedding from the targets to the truths; None without targets."""
    has = prompts.targets[:, 0] != PAD
    if not has.any():
        return None
    unembedding: Any = model.decoder.unembedding
    rows: Tensor = unembedding.weight
    truth, target = (ids[has, 0].to(model.device) for ids in (prompts.answers, prompts.targets))
    return _unit((rows[truth] - rows[target]).float().mean(0))


def _unit(vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """The vector at length 1; one of length 0 stays so."""
    found: Tensor = vector / vector.norm().clamp(min=1e-12)
    return found


def _without(direction: Float[Tensor, " d_model"], resid: Float[Tensor, "fact pos d_model"]) -> Tensor:
    wide = resid.float()
    return (wide - (wide @ direction)[..., None] * direction).to(resid.dtype)


def _plus(vector: Float[Tensor, " d_model"], resid: Float[Tensor, "fact pos d_model"]) -> Tensor:
    return resid + vector.to(resid.dtype)
