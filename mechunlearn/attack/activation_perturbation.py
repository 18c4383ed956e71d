"""Activation perturbation: add one small vector behind an edit, with the edit on, and see whether facts come back."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.artifacts.weight_edit import Edit, WeightEdit
from mechunlearn.attack.curves import batch_losses, check_lrs, cross_entropy, training_curve
from mechunlearn.attack.states import (
    EDITED,
    GATE,
    WATCHED,
    Attack,
    Row,
    Rows,
    State,
    cell,
    chance,
    check_edit,
    check_sizes,
    halved,
    mean,
)
from mechunlearn.core.arguments import validated
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.features.dictionaries import Codebook, check
from mechunlearn.features.feature_edit import FeatureEdit, FeaturePart
from mechunlearn.metrics.answers import BATCH, answered
from mechunlearn.model.component import Component
from mechunlearn.model.hook_points import layer_of
from mechunlearn.model.hooked import HookedModel, frozen
from mechunlearn.model.taps import Hook
from mechunlearn.training.inputs import CachedInputs, Sequences, TopLayers
from mechunlearn.training.parameterizations import add_gradients

REMOVED = "edited, hook removed"
RATES = (1e-2, 1e-1)
ALIKE = 1e-4
Site = tuple[str, FeaturePart | None]


@validated
@steady()
def activation_perturbation(
    model: HookedModel,
    edit: Edit,
    forget: Prompts,
    retain: Prompts,
    *,
    extra_edits: Mapping[str, Edit | HookedModel | None] | None = None,
    baseline_rows: pd.DataFrame | None = None,
    size: float = 0.5,
    lrs: Sequence[float] = RATES,
    steps: int = 60,
    eval_every: int = 15,
    batch_size: int = 32,
    min_retention: float = GATE,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Try to get edited facts back with a vector that is added to the residual stream behind the edit, which stays on.

    minimise  CE(truth of half of the forget facts) + CE(half of the retain facts)   over v,  |v| <= size x median |h|

    h -> h + v at every position, with one v for all facts: it can undo what hides them, and cannot spell them out. h is
    what leaves the dictionary's hook point after the intervention (of a `FeatureEdit`; one v for each of its parts)
    or the last edited layer (of a `WeightEdit`); the median of |h| is over the tokens of the forget facts, as the
    first token's can be far above all others. The optimiser is AdamW with a cosine schedule and gradients clipped to
    norm 1; v is put back into the ball after every step.

    After SAE interventions are unreliable (arXiv 2606.18322), the edited features must stay where the intervention puts
    them. Where a dictionary has `W_enc`, v is orthogonal to its columns for the edited features, so their
    pre-activations do not move at all. Of a codebook without a linear map, v is orthogonal to the deleted codes; of
    one with a map W, to Wᵀc for each of them, which keeps c·Wh and, because of the ReLU and the norm in a cosine,
    their cosines only nearly. Other dictionaries put no constraint on v. What moves nevertheless is in `drift`.

    The ceiling and the floor are attacked at the same places with v free; edits in `extra_edits` are attacked behind
    themselves. For a `FeatureEdit` the state `edited, hook removed` (setting `none`) shows what anyone gets who takes
    the hook off: the unedited model, without any attack. A loss that is not finite ends its setting, as collapsed.
    The model is left as it was, bit by bit, also after an error and after Ctrl-C. Not for edits of the last layer:
    behind them v only shifts all answers' logits.

    Args:
        model: The unedited model.
        edit: The edit to attack.
        forget: The facts that the edit removed.
        retain: The facts that were to stay.
        extra_edits: Further edits, models, or None for the model as it is, to attack alike, by name.
        baseline_rows: Rows of an earlier call with the same places whose ceiling and floor are taken as they are.
        size: The largest |v|, in units of the median |h|.
        lrs: Learning rates, in units of median |h| / sqrt(d_model).
        steps: The number of optimiser steps.
        eval_every: Measures after so many steps, and after the last.
        batch_size: How many truths, and as many retain facts, each step reads.
        min_retention: The share of retain facts that must be right for a row to be `valid`.
        seed: Draws the halves and the batches.
        progress: Whether to show a bar; None shows one where somebody can see it.

    Returns:
        One row a state (see `states_to_attack`), learning rate and measured step (0 is v = 0). `held_out` is the
        accuracy (greedy, full vocabulary) on the half that is not trained on, with its 95 % interval `low`
        to `high` over `n` facts; `trained` that on the other half; `retain` that on at most 100 retain facts which v
        is not trained on; `norm` the largest |v| / median |h|; `drift` the mean change of the edited units' activity
        when h + v is encoded instead of h, relative to their mean activity in the unedited model on the forget facts
        (NaN if they have none there). `lr`, `chance` and `valid` stand beside them, and the run card in
        `attrs["card"]`. `recovery` reads the rows.

    Raises:
        MechunlearnError: For fewer than two forget or retain facts, learning rates out of range, a dictionary that is
            not at a block's `resid_post`, edited units that leave no direction, or a model that knows less of the
            retain facts than the gate asks for.

    >>> from mechunlearn.artifacts.mask import ComponentMask
    >>> from mechunlearn.edit import masked_gradient
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    >>> forget, retain = toy.prompts([0, 1, 2, 3]), toy.prompts([4, 5, 6, 7])
    >>> edit = masked_gradient(toy.model, mask, forget, retain, steps=20, lr=0.1)
    >>> rows = activation_perturbation(toy.model, edit, forget, retain, lrs=[0.01], steps=2)
    >>> rows[["state", "step", "held_out", "n"]].values.tolist()[0]
    ['edited', 0, 0.0, 2]
    """
    check_edit(edit)
    check_sizes(forget, retain)
    check_lrs(lrs)
    if not 0 < size < math.inf:
        raise MechunlearnError(f"A vector of size {size} is out of range. Expected a size above 0.")
    if REMOVED in (extra_edits or {}):
        raise MechunlearnError(
            f"What is given `extra_edits` cannot be named '{REMOVED}': the attack itself has that state."
        )
    places = _sites(model, edit)
    kept, watched = halved(retain, seed, WATCHED)
    given = model, edit, forget, retain, watched, extra_edits, baseline_rows, min_retention, seed, progress
    attack = Attack("activation_perturbation", *given)
    free: list[Site] = [(site, None) for site, _ in places]
    sites = {s.name: free if s.edit is None else _sites(s.model, s.edit) for s in attack.states}

    def tried(state: State) -> Rows:
        usual = _activity(state, sites[state.name])
        with state.applied(), frozen(state.model.hf):
            here = _Here(state, sites[state.name], usual, kept, watched, size, seed)
            start = here.measured(here.vectors(), 0)
            for lr in lrs:
                vectors, streams = here.vectors(), {name: here.streams[name] for name in ("truth", "retain")}
                losses = batch_losses(streams, dict.fromkeys(streams, batch_size), cross_entropy, seed)
                now, about = partial(here.measured, vectors), {"steps": steps, "eval_every": eval_every}
                yield training_curve(vectors, losses, start, now, setting=f"lr {lr:g}", lr=lr, **about)
        if state.name == EDITED and isinstance(edit, FeatureEdit):
            yield [_removed(state, watched, seed)]

    settings = {"sites": [site for site, _ in places], "size": size, "lrs": list(lrs), "steps": steps}
    return attack.run(tried, settings | {"eval_every": eval_every, "batch_size": batch_size}, len(lrs))


def _sites(model: HookedModel, edit: Edit) -> list[Site]:
    """Where vectors are added, and the part of a feature edit that is in front of each."""
    if isinstance(edit, WeightEdit):
        last = max(Component.parse(site).layer for site in edit.units)
        return [(f"L{last}.resid_post", None)]
    if not isinstance(edit, FeatureEdit):
        raise MechunlearnError(
            f"An edit of type {type(edit).__name__} has no known place. Expected a WeightEdit or FeatureEdit."
        )
    for part in edit.parts:
        if not re.fullmatch(r"L\d+\.resid_post", part.dictionary.hook_name):
            raise MechunlearnError(
                f"{part.dictionary} is at '{part.dictionary.hook_name}': a vector is added to the residual stream "
                "only. Expected "
                "a dictionary at a block's resid_post, such as L3.resid_post."
            )
        check(part.dictionary, model)
    return [(part.dictionary.hook_name, part) for part in edit.parts]


def _encoders(part: FeaturePart) -> Float[Tensor, "unit d_model"] | None:
    """What the edited units read of the residual stream, where that is linear."""
    dictionary, units = part.dictionary, part.units
    if isinstance(dictionary, Codebook):
        codes = dictionary.codes.detach()[units].float()
        width = dictionary.codes.shape[1]  # of one group's part of what is looked up
        first = units.to(codes.device) // (dictionary.size // dictionary.groups) * width
        read = torch.zeros(len(units), width * dictionary.groups, device=codes.device)
        read.scatter_(1, first[:, None] + torch.arange(width, device=codes.device), codes)
        return read if dictionary.encoder is None else read @ dictionary.encoder.weight.detach().float()
    weights = getattr(getattr(dictionary, "sae", dictionary), "W_enc", None)
    return None if weights is None else weights.detach()[:, units].T.float()


def _spanned(directions: Float[Tensor, "unit d_model"]) -> Float[Tensor, "d_model rank"]:
    """An orthonormal basis of all that the directions span."""
    _, sizes, found = torch.linalg.svd(directions, full_matrices=False)
    basis: Tensor = found[sizes > ALIKE * sizes.max()]
    return basis.T


def _kept(part: FeaturePart, model: HookedModel) -> Float[Tensor, "d_model _rank"] | None:
    """The directions that a vector must not have. Raises `MechunlearnError` if none is left."""
    directions = _encoders(part)
    basis = None if directions is None else _spanned(directions).to(model.device)
    if basis is not None and basis.shape[1] >= model.signature.d_model:
        raise MechunlearnError(
            f"The {len(part.units)} edited units at '{part.dictionary.hook_name}' read all {basis.shape[1]} directions "
            "of the "
            "residual stream, so no vector leaves them where they are. Expected fewer units."
        )
    return basis


class _Vectors:
    """One vector a site: float32 leaves in units of `scales` / sqrt(d_model), inside the ball and orthogonal to `bases`."""

    def __init__(
        self,
        model: HookedModel,
        sites: Sequence[Site],
        scales: Sequence[float],
        bases: Sequence[Float[Tensor, "d_model _rank"] | None],
        size: float,
    ) -> None:
        self.model, self.scales, self.bases, self.size = model, scales, bases, size
        self.names = [site for site, _ in sites]
        self.width = model.signature.d_model
        self.lowest: int | None = min(map(layer_of, self.names))
        self.leaves = [torch.zeros(self.width, device=model.device, requires_grad=True) for _ in sites]

    def vector(self, i: int) -> Float[Tensor, " d_model"]:
        return self.leaves[i] * (self.scales[i] / math.sqrt(self.width))

    def norms(self) -> list[float]:
        """Of each vector, in units of the residual stream there."""
        return [float(leaf.detach().norm()) / math.sqrt(self.width) for leaf in self.leaves]

    def added(self, i: int) -> Hook:
        return lambda h: h + self.vector(i).to(h.dtype)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block the vectors are added, behind all hooks that are there already."""
        with self.model.decoder.hooks({name: self.added(i) for i, name in enumerate(self.names)}):
            yield

    def gradient(self, loss: Tensor) -> None:
        add_gradients(loss, self.leaves, self.leaves)

    @torch.no_grad()
    def write(self) -> None:
        """Back to where the vectors may be: orthogonal, and inside the ball."""
        for leaf, basis in zip(self.leaves, self.bases, strict=True):
            if basis is not None:
                leaf -= basis @ (basis.T @ leaf)
            leaf *= min(1.0, self.size * math.sqrt(self.width) / max(float(leaf.norm()), 1e-12))

    def restore(self) -> None:
        """Nothing to do: the model's weights were never written."""


class _Here:
    """One state of a model, within its edit, and what the vectors are trained and measured on."""

    def __init__(
        self,
        state: State,
        sites: Sequence[Site],
        usual: Sequence[float],
        retain: Prompts,
        watched: Prompts,
        size: float,
        seed: int,
    ) -> None:
        self.state, self.sites, self.usual, self.size, self.seed = state, sites, usual, size, seed
        taught, held_out = halved(state.facts, seed)
        self.chance = chance(held_out)
        sets = {"truth": taught, "retain": retain, "held_out": held_out, "watched": watched}
        upper = TopLayers(state.model, min(layer_of(site) for site, _ in sites))
        self.streams = {name: CachedInputs(upper, Sequences.of(prompts)) for name, prompts in sets.items()}
        self.resid = _leaving(state.model, state.facts, [site for site, _ in sites])
        self.scales = [float(h.float().norm(dim=-1).median()) for h in self.resid]
        self.bases = [None if part is None else _kept(part, state.model) for _, part in sites]

    def vectors(self) -> _Vectors:
        """Vectors of length zero at the sites."""
        return _Vectors(self.state.model, self.sites, self.scales, self.bases, self.size)

    def measured(self, vectors: _Vectors, step: int) -> Row:
        """What the model knows with the vectors as they are."""
        right, known, spared = (self.streams[name].right() for name in ("held_out", "truth", "watched"))
        more = {"trained": mean(known), "retain": mean(spared), "chance": self.chance}
        moved = {"norm": max(vectors.norms()), "drift": self.drift(vectors)}
        return cell(self.state.name, "", right, self.seed, step=step, **more, **moved)

    @torch.no_grad()
    def drift(self, vectors: _Vectors) -> float:
        """How far the edited units' activity moves under the vectors, by part relative to its usual one.

        The mean of parts.
        """
        found = []
        for i, (_, part) in enumerate(self.sites):
            if part is not None and self.usual[i] > 0:
                h = self.resid[i]
                moved = part.dictionary.encode(h + vectors.vector(i).to(h.dtype)) - part.dictionary.encode(h)
                found.append(float(moved[:, part.units].float().abs().mean()) / self.usual[i])
        return sum(found) / len(found) if found else math.nan


@torch.no_grad()
def _leaving(model: HookedModel, prompts: Prompts, sites: Sequence[str]) -> list[Float[Tensor, "_token d_model"]]:
    """The residual stream at sites, of all real tokens, behind all hooks."""
    found: list[list[Tensor]] = [[] for _ in sites]
    for rows in prompts.lengths.argsort().split(BATCH):
        part = prompts.select(rows)
        tokens = part.tokens[:, : int(part.lengths.max())]
        real = (torch.arange(tokens.shape[1]) < part.lengths[:, None]).to(model.device)
        _, kept = model.cache(tokens, list(dict.fromkeys(sites)))
        for i, site in enumerate(sites):
            found[i].append(kept[site][real])
    return [torch.cat(parts) for parts in found]


@torch.no_grad()
def _activity(state: State, sites: Sequence[Site]) -> list[float]:
    """The mean activity of the edited units of each part on the facts, in the model without the edit."""
    resid = _leaving(state.model, state.facts, [site for site, part in sites if part is not None])
    parts = [part for _, part in sites if part is not None]
    known = {id(part): float(part.dictionary.encode(h)[:, part.units].float().mean()) for part, h in zip(parts, resid)}
    return [0.0 if part is None else known[id(part)] for _, part in sites]


def _removed(state: State, watched: Prompts, seed: int) -> Row:
    """The model that is left when the hook of a feature edit is taken off."""
    held_out = halved(state.facts, seed)[1]
    right, spared = answered(state.model, held_out), answered(state.model, watched)
    return cell(REMOVED, "none", right, seed, retain=mean(spared), chance=chance(held_out))
