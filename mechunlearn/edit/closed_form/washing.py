"""What closed-form editors share: facts as keys and values, sums over them by layer, and changes that are written and undone."""

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.runcard import RunCard, Stopwatch, digest
from mechunlearn.edit.closed_form.edit_prompts import EditPrompts, output_sites, sampled_prefixes, seen
from mechunlearn.edit.closed_form.target_values import (
    average_values,
    described,
    optimised_values,
    shared_values,
    target_labels,
)
from mechunlearn.edit.objective import training_text
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import answered
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel
from mechunlearn.training.covariance import Covariance
from mechunlearn.training.solve import add_products, symmetric

POST_NORM_DAMPING = 1e-2
LISTED = 3
GATHERED = 256


@dataclass(frozen=True)
class How:
    """Settings that all closed-form editors share (see `memit`)."""

    target: str
    position: str
    prefixes: int
    steps: int
    lr: float | int
    overshoot: float | int
    batch_size: int


@dataclass(frozen=True, eq=False)
class Sums:
    """What one layer needs of any number of facts: K K^T and K R^T over the chosen neurons, in float64."""

    gram: Float[Tensor, "unit unit"]
    cross: Float[Tensor, "unit d_model"]


@dataclass(frozen=True, eq=False)
class Washing:
    """One closed-form edit in the making. `layers` lists the chosen neurons by layer, `target_values` the target of each fact."""

    model: HookedModel
    layers: dict[int, Int[Tensor, " _unit"]]
    facts: Prompts
    edit_prompts: EditPrompts
    target_values: Float[Tensor, "fact d_model"]
    covariance: Covariance
    retain: EditPrompts | None
    how: How
    skipped: list[str] = field(default_factory=list)

    @property
    def last(self) -> int:
        return max(self.layers)

    def second_moment(self, layer: int) -> Float[Tensor, "unit unit"]:
        """E[k k^T] of the chosen neurons over text."""
        units = self.layers[layer].to(self.model.device)
        return self.covariance.matrix(site(layer))[units][:, units]

    def sums(self, layer: int) -> Sums:
        """K K^T and K R^T of all facts, with R = (z - h now) / (layers left): one pass, one batch of facts in memory.

        Where a norm follows the MLP (Gemma 2 and 3), R is taken back through it at the token's present scale.
        """
        units = self.layers[layer].to(self.model.device)
        left = sum(other >= layer for other in self.layers)
        cross = torch.zeros(len(units), self.model.signature.d_model, dtype=torch.float64, device=self.model.device)
        upper = cross.new_zeros(len(units), len(units))
        here, there = site(layer), f"L{self.last}.resid_post"

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for facts, found in seen(self.model, self.edit_prompts, [here, there], self.how.batch_size):
                keys = self.edit_prompts.mixed(found[here])[:, units]
                residual = (self.target_values[facts].to(keys) - found[there][:, 0].double()) / left
                if self.model.layout.modules.mlp_post:
                    residual = self._before_norm(layer, residual, found[here][:, 0])
                yield keys, residual

        for keys, residual in _gathered(pairs()):
            add_products(upper, keys)
            cross.addmm_(keys.T, residual)
        return Sums(symmetric(upper), cross)

    def gram(self, layer: int, edit_prompts: EditPrompts) -> Float[Tensor, "unit unit"]:
        """K K^T of some contexts."""
        units = self.layers[layer].to(self.model.device)
        upper = torch.zeros(len(units), len(units), dtype=torch.float64, device=self.model.device)
        batches = seen(self.model, edit_prompts, [site(layer)], self.how.batch_size)
        for (keys,) in _gathered((edit_prompts.mixed(found[site(layer)])[:, units],) for _, found in batches):
            add_products(upper, keys)
        return symmetric(upper)

    def kept(self, layer: int, weight: float | int) -> Float[Tensor, "unit unit"] | float:
        """weight * K_r K_r^T of the retain facts, which the change then leaves as they are."""
        if not weight or self.retain is None:
            return 0.0
        return float(weight) * self.gram(layer, self.retain)

    def weight(self, layer: int) -> Float[Tensor, "unit d_model"]:
        """The chosen neurons' rows now, in float64."""
        return self.model.rows(site(layer))[self.layers[layer].to(self.model.device)].double()

    def add_(self, layer: int, change: Float[Tensor, "unit d_model"]) -> None:
        """Write weights plus a change into the model."""
        self.model.write_(site(layer), self.weight(layer) + change, self.layers[layer])

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Whatever is written within the block is copied back at its end."""
        before = {
            layer: self.model.rows(site(layer))[units.to(self.model.device)] for layer, units in self.layers.items()
        }
        try:
            yield
        finally:
            for layer, rows in before.items():
                self.model.write_(site(layer), rows, self.layers[layer])

    def edit(
        self,
        method: str,
        mask: ComponentMask,
        retain: Prompts,
        settings: dict,
        trajectory: list[dict],
        watch: Stopwatch,
        seed: int,
        stopped: str = "",
    ) -> WeightEdit:
        """The weights that the model has now, as an edit."""
        card = RunCard(
            method,
            model=self.covariance.fingerprint,
            data=digest(self.facts.fingerprint, retain.fingerprint, json.dumps(self.covariance.count)),
            seed=seed,
            settings=vars(self.how) | settings,
            mask=mask.fingerprint,
            weights=sum(len(units) for units in self.layers.values()) * self.model.signature.d_model,
            device=str(self.model.device),
            trajectory=trajectory,
            stopped=stopped,
            skipped=self.skipped,
        )
        units = {site(layer): chosen for layer, chosen in self.layers.items()}
        rows = {name: self.model.rows(name)[chosen.to(self.model.device)].cpu() for name, chosen in units.items()}
        return WeightEdit(units, rows, self.model.signature, watch.stamp(card))

    def _before_norm(self, layer: int, residual: Tensor, keys: Tensor) -> Tensor:
        """The change of the MLP's raw output that its norm turns into `residual`, while the scale stays."""
        norm: Any = self.model.decoder.part(layer, "mlp_post")
        gain = (self.model.layout.modules.offset + norm.weight.detach()).double()
        raw = keys.double() @ self.model.rows(site(layer)).double()
        slope = gain / (raw.square().mean(1, keepdim=True) + getattr(norm, "eps", 1e-6)).sqrt()
        damping = (POST_NORM_DAMPING * slope.abs().amax(1, keepdim=True)).square()
        return residual * slope / (slope.square() + damping)


def _gathered(batches: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """The same rows in batches of 256 or more: a product of few rows costs as much as the matrix it is added to."""
    waiting: list[tuple[Tensor, ...]] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(first) for first, *_ in waiting) >= GATHERED:
            yield tuple(map(torch.cat, zip(*waiting)))
            waiting = []
    if waiting:
        yield tuple(map(torch.cat, zip(*waiting)))


def site(layer: int) -> str:
    """The name of a layer's MLP output, whose weights a closed form solves for."""
    return str(Component(layer, "mlp.out"))


def washing(
    model: HookedModel,
    mask: ComponentMask,
    forget: Prompts,
    retain: Prompts,
    how: How,
    *,
    covariance: Covariance | None,
    texts: Sequence[str] | None,
    target_values: Float[Tensor, "fact d_model"] | None,
    keep: bool,
    seed: int,
    progress: bool,
) -> Washing:
    """Everything that comes before the first solve: what is known, keys' contexts, the covariance, target values.

    Raises `MechunlearnError` for a mask without MLP output sites, no facts, no text, statistics of another model.
    """
    layers = output_sites(model, mask)
    sites = [site(layer) for layer in layers]
    if how.prefixes < 0 or how.steps < 1 or how.batch_size < 1 or how.overshoot <= 0:
        raise MechunlearnError(
            f"Got {how.prefixes} prefixes, {how.steps} steps, batches of {how.batch_size} and an overshoot of {how.overshoot:g}. Expected 0 or "
            "more prefixes, 1 or more of the next two, and an overshoot above 0."
        )
    labels = target_labels(model, forget, how.target)
    known, skipped = _known(model, forget)
    facts, labels = forget.select(known), labels[known]
    passages = tuple(texts) if texts is not None else training_text(forget)
    if covariance is None:
        if not passages:
            raise MechunlearnError(
                "There is no text to collect the covariance of the keys from. Give texts=[...] or covariance="
                "Covariance.of_text(model, sites, texts)."
            )
        covariance = Covariance.of_text(model, sites, passages, progress=progress)
    covariance.check(model, sites)
    prefixes = sampled_prefixes(model, passages, how.prefixes, seed)
    contexts = EditPrompts.of(model, facts, how.position, prefixes, labels)
    retained = EditPrompts.of(model, retain, how.position) if len(retain) else None
    last = max(layers)
    if target_values is None and last == model.signature.layers - 1 and bool((contexts.at < contexts.start).all()):
        warnings.warn(
            f"Layer {last} is the model's last: nothing above it reads the token '{how.position}', so no value there changes what is "
            "said. Choose lower layers, or position='last'.",
            stacklevel=3,
        )
    if target_values is not None:
        if target_values.shape != (len(forget), model.signature.d_model):
            raise MechunlearnError(
                f"The values have shape {tuple(target_values.shape)}. Expected one row a forget fact: "
                f"{(len(forget), model.signature.d_model)}, the residual stream leaving layer {last}."
            )
        target_values = target_values[known]
    elif how.target in ("mean", "shared"):
        if retained is None:
            raise MechunlearnError("The mean is taken over retain facts, and there are none. Give some.")
        target_values = (
            average_values(model, last, contexts, retained, how.batch_size)
            if how.target == "mean"
            else shared_values(
                model, last, contexts, retained, steps=how.steps, lr=how.lr, batch_size=how.batch_size, seed=seed
            )
        )
    else:
        target_values = optimised_values(
            model,
            last,
            contexts,
            described(model, facts, how.position),
            steps=how.steps,
            lr=how.lr,
            batch_size=how.batch_size,
            progress=progress,
        )
    if how.overshoot != 1:
        target_values = _reaching(model, last, contexts, target_values, how)
    return Washing(model, layers, facts, contexts, target_values, covariance, retained if keep else None, how, skipped)


def _reaching(
    model: HookedModel, last: int, edit_prompts: EditPrompts, target_values: Float[Tensor, "fact d_model"], how: How
) -> Float[Tensor, "fact d_model"]:
    """The values, `overshoot` times as far from the residual stream of the unedited model."""
    name, moved = f"L{last}.resid_post", target_values.clone()
    for facts, found in seen(model, edit_prompts.bare, [name], how.batch_size):
        home = found[name][:, 0].to(target_values)
        moved[facts] = home + how.overshoot * (target_values[facts] - home)
    return moved


def _known(model: HookedModel, forget: Prompts) -> tuple[Int[Tensor, " _known"], list[str]]:
    """The facts that the model gives, and the others in words."""
    if not len(forget):
        raise MechunlearnError("The forget set is empty. Expected at least one fact; see Prompts.split.")
    right = answered(model, forget)
    unknown = (~right).nonzero().flatten().tolist()
    names = [forget.queries[i].prompt if forget.queries else f"fact {i}" for i in unknown]
    some = "; ".join(names[:LISTED]) + ("; ..." if len(names) > LISTED else "")
    if not right.any():
        raise MechunlearnError(
            f"The model answers none of the {len(forget)} forget facts ({some}): there is nothing to wash. Check the "
            "prompts against what the model says."
        )
    if unknown:
        warnings.warn(
            f"{len(unknown)} of {len(forget)} forget facts are not known to the model and are skipped: {some}",
            stacklevel=4,
        )
    return right.nonzero().flatten(), names


def remaining(washing: Washing, facts: Int[Tensor, " _fact"]) -> Int[Tensor, " _left"]:
    """Of these facts, those that the model still gives: one forward pass over their answers."""
    return facts[answered(washing.model, washing.facts.select(facts))]
