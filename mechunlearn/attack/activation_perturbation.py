"""Activation perturbation: add one small vector behind an edit, with the edit on, and see whether facts come back."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import pandas as pd
import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from mechunlearn.artifacts.weight_edit import Edit, WeightEdit
from mechunlearn.attack.states import (
    EDITED,
    GATE,
    State,
    attack_card,
    cell,
    chance,
    check_gate,
    check_sizes,
    halves,
    states_to_attack,
    states_to_run,
    to_frame,
)
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.features.dictionaries import Codebook, check
from mechunlearn.features.feature_edit import FeatureEdit, FeaturePart
from mechunlearn.metrics.answers import BATCH, answered
from mechunlearn.model.component import Component
from mechunlearn.model.hook_points import layer_of
from mechunlearn.model.hooked import HookedModel, frozen
from mechunlearn.model.taps import Hook
from mechunlearn.training.loop import CachedInputs, Schedule, Sequences, Terms, TopLayers, epochs, interruptible, train
from mechunlearn.training.parameterizations import add_gradients

REMOVED = "edited, hook removed"
RATES = (1e-2, 1e-1)
WATCHED = 100
ALIKE = 1e-4
Site = tuple[str, FeaturePart | None]


@dataclass(frozen=True)
class _Plan:
    """What is the same for every state and rate."""

    size: float | int
    steps: int
    eval_every: int
    batch_size: int
    seed: int


def activation_perturbation(
    model: HookedModel,
    edit: Edit,
    forget: Prompts,
    retain: Prompts,
    *,
    extra_edits: Mapping[str, Edit | HookedModel | None] | None = None,
    baseline_rows: pd.DataFrame | None = None,
    size: float | int = 0.5,
    lrs: Sequence[float | int] = RATES,
    steps: int = 60,
    eval_every: int = 15,
    batch_size: int = 32,
    min_retention: float | int = GATE,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Try to get edited facts back with a vector that is added to the residual stream behind the edit, which stays on.

    minimise  CE(truth of half of the forget facts) + CE(half of the retain facts)   over v,  |v| <= size x median |h|

    h -> h + v at every position, with one v for all facts: it can undo what hides them, and cannot spell them out. h is
    what leaves the dictionary's hook point after the intervention (of a `FeatureEdit`; one v for each of its parts) or the
    last edited layer (of a `WeightEdit`); the median of |h| is over the tokens of the forget facts, as the first token's
    can be far above all others. Adam, cosine schedule, gradients clipped to norm 1, and v put back into the ball after
    every step; each step reads `batch_size` truths and as many retain facts. `lrs` are in units of median |h| / sqrt(d_model).

    After SAE interventions are unreliable (arXiv 2606.18322), the edited features are to stay where the intervention puts
    them. Where a dictionary has `W_enc`, v is orthogonal to its columns for the edited features, so their pre-activations do
    not move at all. Of a codebook without a linear map, v is orthogonal to the deleted codes; of one with a map W, to Wᵀc for
    each of them, which keeps c·Wh and, because of the ReLU and the norm in a cosine, their cosines only nearly. Other
    dictionaries put no constraint on v. What moves nevertheless is in `drift`: the mean change of the edited units' activity
    when h + v is encoded instead of h, relative to their mean activity in the unedited model on the forget facts (NaN if
    they have none there).

    The same is done, at the same places and with v free, to the `unedited` model (the ceiling), to the unedited model with
    facts that it was `never taught` (the floor), and to models and None in `extra_edits`; edits in `extra_edits` are attacked behind
    themselves. `baseline_rows` are rows of an earlier call on the same model, places, facts and settings, whose ceiling and floor
    are taken as they are. For a `FeatureEdit` the state `edited, hook removed` (setting `none`) says what anyone gets who
    takes the hook off: the unedited model, without any attack.

    One row a state, rate and measured step (0, every `eval_every`, the last): accuracy (greedy, full vocabulary) on the half
    `held out` with its 95 % bootstrap interval `low` to `high` over `n` facts, and on the half `trained`; on `retain` facts
    (at most 100) that v is not trained on; `norm`, the largest |v| / median |h|; `drift`; `chance`, and whether `retain`
    reaches the `min_retention` (`valid`). `recovery` reads them; `attrs["card"]` is the run card.

    The model is left as it was, bit by bit, also after an error; Ctrl-C ends the attack with KeyboardInterrupt and no
    rows. A loss that is not finite ends its setting, as collapsed.

    Raises `MechunlearnError` for fewer than two forget or retain facts, rates that are none, a dictionary that is not at a
    block's `resid_post`, edited units that leave no direction, and a model that knows less of the retain facts than the
    gate asks for. Not for edits of the last layer: behind them v only shifts all answers' logits.

    >>> from mechunlearn.artifacts.mask import ComponentMask
    >>> from mechunlearn.edit import masked_gradient
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    >>> forget, retain = toy.prompts([0, 1, 2, 3]), toy.prompts([4, 5, 6, 7])
    >>> edit = masked_gradient(toy.model, mask, forget, retain, steps=20, lr=0.1)
    >>> rows = activation_perturbation(toy.model, edit, forget, retain, lrs=[0.01], steps=2)
    >>> rows[["state", "step", "held out", "n"]].values.tolist()[0]
    ['edited', 0, 0.0, 2]
    """
    watch = Stopwatch()
    check_sizes(forget, retain)
    if not lrs or not 0 < min(lrs) <= max(lrs) <= 1000:
        raise MechunlearnError(f"The rates are {list(lrs)}. Expected learning rates above 0 and up to 1000.")
    if min(steps, eval_every, batch_size) < 1 or not 0 < size < math.inf:
        raise MechunlearnError(
            f"Cannot train a vector of size {size} for {steps} steps of {batch_size} facts, measured every {eval_every}. Expected at "
            "least 1 each, and a size above 0."
        )
    if REMOVED in (extra_edits or {}):
        raise MechunlearnError(
            f"What is given `extra_edits` cannot be named '{REMOVED}': the attack itself has that state."
        )
    plan = _Plan(size, steps, eval_every, batch_size, seed)
    places = _sites(model, edit)
    states = states_to_attack(model, edit, forget, extra_edits, seed)
    sites = {
        state.name: _sites(state.model, state.edit) if state.edit is not None else _free(places) for state in states
    }
    trained_on, watched = (retain.select(rows) for rows in halves(len(retain), seed))
    watched = watched.select(range(min(WATCHED, len(watched))))
    check_gate(model, watched, min_retention)
    settings = {"lrs": list(lrs), "sites": [site for site, _ in places], "min_retention": min_retention} | asdict(plan)
    card = attack_card("activation_perturbation", model, edit, forget, retain, seed, settings)
    rows: list[dict] = []
    with interruptible() as asked:
        for state in states_to_run(states, baseline_rows, card):
            usual = _activity(state, sites[state.name])
            with state.applied(), frozen(state.model.hf):
                attack = _Attack(state, sites[state.name], usual, trained_on, watched, plan)
                for rate in track(lrs, f"perturbation, {state.name}", disable=not progress, transient=True):
                    curve = attack.curve(rate)
                    if asked:
                        raise KeyboardInterrupt
                    rows += curve
            if state.name == EDITED and isinstance(edit, FeatureEdit):
                rows.append(_removed(state, watched, seed))
    return to_frame(rows, baseline_rows, min_retention, card, watch)


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
                f"{part.dictionary} is at '{part.dictionary.hook_name}': a vector is added to the residual stream only. Expected "
                "a dictionary at a block's resid_post, such as L3.resid_post."
            )
        check(part.dictionary, model)
    return [(part.dictionary.hook_name, part) for part in edit.parts]


def _free(sites: Sequence[Site]) -> list[Site]:
    return [(site, None) for site, _ in sites]


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
    _, sizes, basis = torch.linalg.svd(directions, full_matrices=False)
    return basis[sizes > ALIKE * sizes.max()].T


def _kept(part: FeaturePart, model: HookedModel) -> Float[Tensor, "d_model _rank"] | None:
    """The directions that a vector must not have. Raises `MechunlearnError` if none is left."""
    directions = _encoders(part)
    basis = None if directions is None else _spanned(directions).to(model.device)
    if basis is not None and basis.shape[1] >= model.signature.d_model:
        raise MechunlearnError(
            f"The {len(part.units)} edited units at '{part.dictionary.hook_name}' read all {basis.shape[1]} directions of the "
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
        size: float | int,
    ) -> None:
        self.model, self.scales, self.bases, self.size = model, scales, bases, size
        self.names = [site for site, _ in sites]
        self.width = model.signature.d_model
        self.lowest: int | None = min(map(layer_of, self.names))
        self.leaves = [torch.zeros(self.width, device=model.device, requires_grad=True) for _ in sites]

    def vector(self, i: int) -> Float[Tensor, " d_model"]:
        return self.leaves[i] * (self.scales[i] / self.width**0.5)

    def norms(self) -> list[float]:
        """Of each vector, in units of the residual stream there."""
        return [float(leaf.detach().norm()) / self.width**0.5 for leaf in self.leaves]

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
            leaf *= min(1.0, self.size * self.width**0.5 / max(float(leaf.norm()), 1e-12))

    def restore(self) -> None:
        """Nothing to do: the model's weights were never written."""


class _Diverged(Exception):
    """The loss is not finite."""


class _Attack:
    """One state of a model, within its edit, and what the vectors are trained and measured on."""

    def __init__(
        self,
        state: State,
        sites: Sequence[Site],
        usual: Sequence[float],
        retain: Prompts,
        watched: Prompts,
        plan: _Plan,
    ) -> None:
        self.state, self.sites, self.usual, self.plan = state, sites, usual, plan
        taught, held_out = (state.facts.select(rows) for rows in halves(len(state.facts), plan.seed))
        self.chance = chance(held_out)
        sets = {"truth": taught, "held out": held_out, "retain": retain, "watched": watched}
        upper = TopLayers(state.model, min(layer_of(site) for site, _ in sites))
        self.streams = {name: CachedInputs(upper, Sequences.of(prompts)) for name, prompts in sets.items()}
        self.resid = _leaving(state.model, state.facts, [site for site, _ in sites])
        self.scales = [float(h.float().norm(dim=-1).median()) for h in self.resid]
        self.bases = [None if part is None else _kept(part, state.model) for _, part in sites]

    def curve(self, lr: float | int) -> list[dict]:
        """What was measured before, during and after training. Raises `KeyboardInterrupt` after Ctrl-C."""
        plan, streams = self.plan, self.streams
        vectors = _Vectors(self.state.model, self.sites, self.scales, self.bases, plan.size)
        generator = torch.Generator().manual_seed(plan.seed)
        drawn = {name: epochs(len(streams[name]), plan.batch_size, generator) for name in ("truth", "retain")}
        reached = 0

        def measured(step: int) -> dict:
            right = {name: streams[name].right() for name in ("truth", "held out", "watched")}
            return (
                cell(self.state.name, f"rate {lr:g}", right["held out"], plan.seed)
                | {"step": step, "trained": float(right["truth"].float().mean())}
                | {"retain": float(right["watched"].float().mean()), "chance": self.chance}
                | {"lr": float(lr), "norm": max(vectors.norms()), "drift": self.drift(vectors)}
            )

        def parts() -> Iterator[Terms]:
            yield {name: (1.0, 1.0, _loss(streams[name], next(rows))) for name, rows in drawn.items()}

        def after(step: int) -> dict:
            nonlocal reached
            reached = step
            if step % plan.eval_every == 0 or step == plan.steps:
                rows.append(measured(step))
            return {}

        with vectors.attached():
            rows = [measured(0)]
            try:
                done = train(vectors, parts, Schedule(plan.steps, lr), objective="perturbation", after=after)
            except _Diverged:
                return rows if rows[-1]["step"] == reached else [*rows, measured(reached)]
        if done.stopped:
            raise KeyboardInterrupt
        return rows

    @torch.no_grad()
    def drift(self, vectors: _Vectors) -> float:
        """How far the edited units' activity moves under the vectors, by part relative to its usual one; the mean of parts."""
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


def _removed(state: State, watched: Prompts, seed: int) -> dict:
    """The model that is left when the hook of a feature edit is taken off."""
    held_out = state.facts.select(halves(len(state.facts), seed)[1])
    return cell(REMOVED, "none", answered(state.model, held_out), seed) | {
        "retain": float(answered(state.model, watched).float().mean()),
        "chance": chance(held_out),
    }


def _loss(stream: CachedInputs, rows: Tensor) -> Float[Tensor, ""]:
    """Cross-entropy of these rows. Raises `_Diverged`."""
    read = stream.read(rows, {"logits", "labels"})
    value = F.cross_entropy(read["logits"].float(), read["labels"])
    if not math.isfinite(float(value.detach())):
        raise _Diverged
    return value
