"""What closed-form editors share.

Facts as keys and values, sums over them by layer, and changes that are written and undone.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.runcard import RunCard
from mechunlearn.edit.closed_form.edit_prompts import EditPrompts, output_sites, sampled_prefixes, seen
from mechunlearn.edit.closed_form.target_values import (
    average_values,
    changes_what_is_said,
    described,
    least_shares,
    optimised_values,
    shared_values,
    target_labels,
)
from mechunlearn.edit.goal import Goal, Judge, Reached
from mechunlearn.edit.objective import training_texts
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import answered
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.samples import own_texts
from mechunlearn.training.covariance import Covariance
from mechunlearn.training.inputs import TopLayers
from mechunlearn.training.precision import products_named
from mechunlearn.training.solve import add_products, symmetric

Target = Literal["end-of-text", "targets", "shared", "mean"]
Position = Literal["subject last", "last"]
POST_NORM_DAMPING = 1e-2
LISTED = 3
GATHERED = 256
TOKENS_A_NEURON, OWN_TOKENS = 3, 48
BETWEEN = 2
MARGIN = 2.0  # a ridge falls short of its targets: twice what a fact needs
WEIGHTS = (20_000, 2_000, 200, 20, 2)
"""Weights of C to try, gentlest first: the papers use 15,000 to 100,000 for thousands of facts."""


@dataclass(frozen=True)
class How:
    """Settings that all closed-form editors share (see `memit`).

    Attributes:
        target: What the facts' prompts shall be followed by.
        position: The token that is edited.
        prefixes: How many prefixes each prompt is read behind.
        steps: Steps of Adam for a target value.
        lr: Adam's learning rate.
        overshoot: How many times as far the target values are moved. None: `MARGIN` times as far as each fact needs.
        batch_size: Prompts in memory.
    """

    target: str
    position: str
    prefixes: int
    steps: int
    lr: float
    overshoot: float | None
    batch_size: int


@dataclass(frozen=True, eq=False)
class Sums:
    """What one layer needs of any number of facts: K K^T and K R^T over the chosen neurons, in float64.

    Attributes:
        gram: K K^T.
        cross: K R^T.
    """

    gram: Float[Tensor, "unit unit"]
    cross: Float[Tensor, "unit d_model"]


@dataclass(frozen=True, eq=False)
class Washing:
    """One closed-form edit in the making.

    Attributes:
        model: The model; what is written into it is undone (`undone`).
        layers: The chosen neurons, by layer, lowest first.
        facts: The forget facts that the model knows.
        edit_prompts: Their prompts, bare and behind prefixes.
        target_values: What the last layer is to write at the edited token, one row a fact.
        covariance: Second moments of the neurons over text.
        others: The retain facts.
        retain: Prompts whose outputs are kept, if any.
        how: Settings.
        skipped: The facts that the model does not know, in words.
    """

    model: HookedModel
    layers: dict[int, Int[Tensor, " _unit"]]
    facts: Prompts
    edit_prompts: EditPrompts
    target_values: Float[Tensor, "fact d_model"]
    covariance: Covariance
    others: Prompts
    retain: EditPrompts | None
    how: How
    skipped: list[str] = field(default_factory=list)

    @property
    def last(self) -> int:
        """The highest layer."""
        return max(self.layers)

    def second_moment(self, layer: int) -> Float[Tensor, "unit unit"]:
        """Return E[k k^T] of a layer's chosen neurons over text.

        Args:
            layer: One of `layers`.
        """
        units = self.layers[layer]
        return self.covariance.matrix(site(layer))[units][:, units]

    def sums(self, layer: int) -> Sums:
        """Return K K^T and K R^T of all facts, with R = (z - h now) / (layers left).

        One pass, one batch of facts in memory.

        Where a norm follows the MLP (Gemma 2 and 3), R is taken back through it at the token's present scale.

        Args:
            layer: One of `layers`.
        """
        units = self.layers[layer]
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
                yield keys, residual / self.model.layout.residual_scale

        for keys, residual in _gathered(pairs()):
            add_products(upper, keys)
            cross.addmm_(keys.T, residual)
        return Sums(symmetric(upper), cross)

    def gram(self, layer: int, edit_prompts: EditPrompts) -> Float[Tensor, "unit unit"]:
        """Return K K^T of some prompts.

        Args:
            layer: One of `layers`.
            edit_prompts: The prompts.
        """
        units = self.layers[layer]
        upper = torch.zeros(len(units), len(units), dtype=torch.float64, device=self.model.device)
        batches = seen(self.model, edit_prompts, [site(layer)], self.how.batch_size)
        for (keys,) in _gathered((edit_prompts.mixed(found[site(layer)])[:, units],) for _, found in batches):
            add_products(upper, keys)
        return symmetric(upper)

    def kept(self, layer: int, weight: float) -> Float[Tensor, "unit unit"] | float:
        """Return weight * K_r K_r^T of the retain facts, which the change then leaves as they are.

        Args:
            layer: One of `layers`.
            weight: What it is multiplied by; at 0 nothing is computed.
        """
        if not weight or self.retain is None:
            return 0.0
        return float(weight) * self.gram(layer, self.retain)

    def rows(self, layer: int) -> Float[Tensor, "unit d_model"]:
        """Return the chosen neurons' rows as they are now.

        Args:
            layer: One of `layers`.
        """
        return self.model.rows(site(layer))[self.layers[layer]]

    def weight(self, layer: int) -> Float[Tensor, "unit d_model"]:
        """Return the chosen neurons' rows as they are now, in float64.

        Args:
            layer: One of `layers`.
        """
        return self.rows(layer).double()

    def add_(self, layer: int, change: Float[Tensor, "unit d_model"]) -> None:
        """Write weights plus a change into the model.

        Args:
            layer: One of `layers`.
            change: What is added to its chosen rows.
        """
        self.model.write_(site(layer), self.weight(layer) + change, self.layers[layer])

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Copy back, at the end of the block, whatever was written within it."""
        before = {layer: self.rows(layer) for layer in self.layers}
        try:
            yield
        finally:
            for layer, rows in before.items():
                self.model.write_(site(layer), rows, self.layers[layer])

    def solved(
        self, solution: Callable[[int], tuple[Tensor, dict[str, Any]]]
    ) -> tuple[dict[int, Tensor], list[dict[str, Any]]]:
        """Solve the layers one after another, lowest first, and write each change before the next is solved.

        Args:
            solution: The change of a layer, and what the card says of it.

        Returns:
            The changes by layer, and the trajectory of the card, with the norms of the changes and of the weights.
        """
        changes, trajectory = {}, []
        for layer in self.layers:
            size = float(self.weight(layer).norm())
            changes[layer], about = solution(layer)
            trajectory.append({"layer": layer, **about, "norm": float(changes[layer].norm()), "weight norm": size})
            self.add_(layer, changes[layer])
        return changes, trajectory

    def sought(self, goal: Goal, name: str, ladder: Iterable[float], made: Callable[[float], WeightEdit]) -> WeightEdit:
        """Return the edit with the gentlest setting that reaches a goal (see `Goal.search`).

        Args:
            goal: What is wanted.
            name: The setting's name, for the card.
            ladder: The settings to try, gentlest first.
            made: Makes the edit with a setting, and leaves the model as it was.
        """
        if not changes_what_is_said(self.model, self.last, self.edit_prompts, self.target_values).any():
            warnings.warn(
                f"The target values at layer {self.last}, token '{self.how.position}', change what is said for 0 of "
                f"{len(self.facts)} facts, so no {name} can: the gentlest one is taken. Expected a highest layer that "
                "later tokens still read from. Choose lower layers (`fact_lookup` names some), or position='last'.",
                stacklevel=4,
            )
            ladder = tuple(ladder)[:1]
        judge = Judge(TopLayers(self.model, min(self.layers)), self.facts, self.others, self.how.target == "targets")

        def attempt(setting: float) -> tuple[WeightEdit, dict[str, Any], Reached]:
            edit = made(setting)
            with edit.applied(self.model):
                return edit, {name: float(setting)}, judge.reached()

        edit, search = goal.search(ladder, attempt, BETWEEN)
        return replace(edit, card=replace(edit.card, search=search))

    def edit(self, trajectory: list[dict[str, Any]], stopped: str = "") -> WeightEdit:
        """Return the weights that the model has now, as an edit.

        Args:
            trajectory: What the card says of each layer.
            stopped: Why it ended early, if it did.
        """
        units = {site(layer): chosen.cpu() for layer, chosen in self.layers.items()}
        rows = {site(layer): self.rows(layer).cpu() for layer in self.layers}
        said: dict[str, Any] = {"trajectory": trajectory, "stopped": stopped, "skipped": self.skipped}
        card = RunCard("", products=products_named(self.model), **said)
        return WeightEdit(units, rows, self.model.signature, card)

    def _before_norm(self, layer: int, residual: Tensor, keys: Tensor) -> Tensor:
        """Return the change of the MLP's raw output that its norm turns into `residual`, while the scale stays."""
        norm: Any = self.model.decoder.part(layer, "mlp_post")
        gain = (self.model.layout.modules.offset + norm.weight.detach()).double()
        raw = keys.double() @ self.model.rows(site(layer)).double()
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        slope = gain / (raw.square().mean(1, keepdim=True) + eps).sqrt()
        damping = (POST_NORM_DAMPING * slope.abs().amax(1, keepdim=True)).square()
        moved: Tensor = residual * slope / (slope.square() + damping)
        return moved


def _gathered(batches: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows in batches of 256 or more.

    A product of few rows costs as much as the matrix it is added to.
    """
    waiting: list[tuple[Tensor, ...]] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(first) for first, *_ in waiting) >= GATHERED:
            yield tuple(map(torch.cat, zip(*waiting)))
            waiting = []
    if waiting:
        yield tuple(map(torch.cat, zip(*waiting)))


def site(layer: int) -> str:
    """Return the name of a layer's MLP output, whose weights a closed form solves for.

    Args:
        layer: The layer.
    """
    return str(Component(layer, "mlp.out"))


def washing(
    model: HookedModel,
    mask: ComponentMask,
    forget: Prompts,
    retain: Prompts,
    how: How,
    covariance: Covariance | None,
    texts: Sequence[str] | None,
    target_values: Float[Tensor, "fact d_model"] | None,
    keep: bool,
    seed: int,
    progress: bool,
) -> Washing:
    """Do everything that comes before the first solve: find known facts, their edit prompts, covariance, target values.

    Args:
        model: The model to edit.
        mask: The neurons; sites other than MLP outputs are left out.
        forget: Facts to wash out.
        retain: Other facts.
        how: Settings.
        covariance: Second moments, or `None` to collect them from the texts. Sites that it lacks are collected over
            its own texts.
        texts: What covariance and prefixes are from, by default a half of the forget data set's.
        target_values: One row a forget fact, or `None` to find them.
        keep: Whether the retain facts' keys are kept.
        seed: Seed of prefixes and of `target="shared"`.
        progress: Whether to show bars.

    Raises:
        MechunlearnError: For a mask without MLP output sites, no facts, no text, statistics of another model.
    """
    layers = output_sites(model, mask)
    sites = [site(layer) for layer in layers]
    labels = target_labels(model, forget, how.target)
    known, skipped = _known(model, forget)
    facts, labels = forget.select(known), labels[known]
    texts = training_texts(forget, texts) or (own_text(model) if covariance is None else ())
    if covariance is None and not texts:
        raise MechunlearnError(
            "There is no text to collect the covariance of the keys from. Give texts=[...] or covariance="
            "Covariance.of_text(model, sites, texts)."
        )
    if covariance is None:
        covariance = Covariance.of_text(model, sites, texts, progress=progress)
    covariance = covariance.at(model, sites)
    covariance.check(model, sites)
    edit_prompts = EditPrompts.of(
        model, facts, how.position, sampled_prefixes(model, texts, how.prefixes, seed), labels
    )
    retained = EditPrompts.of(model, retain, how.position) if len(retain) else None
    last = max(layers)
    if target_values is not None:
        if target_values.shape != (len(forget), model.signature.d_model):
            raise MechunlearnError(
                f"The target values have shape {tuple(target_values.shape)}. Expected one row a forget fact: "
                f"{(len(forget), model.signature.d_model)}, the residual stream leaving layer {last}."
            )
        target_values = target_values[known]
    else:
        target_values = _target_values(model, last, facts, edit_prompts, retained, how, seed, progress)
        if how.overshoot is None and how.target in ("end-of-text", "targets"):
            answers = None if how.target == "targets" else facts.answers
            shares = least_shares(model, last, edit_prompts, target_values, answers, how.batch_size)
            reach = (MARGIN * shares[:, None]).clamp_max(1)
            target_values = _moved(model, last, edit_prompts, target_values, reach, how.batch_size)
    if how.overshoot not in (None, 1):
        reach = torch.full((len(facts), 1), how.overshoot, device=model.device)
        target_values = _moved(model, last, edit_prompts, target_values, reach, how.batch_size)
    return Washing(
        model, layers, facts, edit_prompts, target_values, covariance, retain, retained if keep else None, how, skipped
    )


def own_text(model: HookedModel) -> tuple[str, ...]:
    """Return samples of the model with three tokens for each neuron of a layer; none without a tokenizer.

    Args:
        model: The model.
    """
    if model.tokenizer is None:
        return ()
    return own_texts(model, -(-TOKENS_A_NEURON * model.signature.d_mlp // OWN_TOKENS), OWN_TOKENS)


def _target_values(
    model: HookedModel,
    last: int,
    facts: Prompts,
    edit_prompts: EditPrompts,
    retain: EditPrompts | None,
    how: How,
    seed: int,
    progress: bool,
) -> Float[Tensor, "fact d_model"]:
    """Find the target values of the facts, as `how.target` says."""
    if last == model.signature.layers - 1 and bool((edit_prompts.at < edit_prompts.start).all()):
        warnings.warn(
            f"Layer {last} is the model's last: nothing above it reads the token '{how.position}', so no value there "
            "changes what is "
            "said. Choose lower layers, or position='last'.",
            stacklevel=5,
        )
    search: dict[str, Any] = {"steps": how.steps, "lr": how.lr, "batch_size": how.batch_size}
    if how.target not in ("mean", "shared"):
        kept = described(model, facts, how.position)
        return optimised_values(model, last, edit_prompts, kept, progress=progress, **search)
    if retain is None:
        raise MechunlearnError("The mean is taken over retain facts, and there are none. Give some.")
    if how.target == "mean":
        return average_values(model, last, edit_prompts, retain, how.batch_size)
    return shared_values(model, last, edit_prompts, retain, seed=seed, **search)


def _moved(
    model: HookedModel,
    last: int,
    edit_prompts: EditPrompts,
    target_values: Float[Tensor, "fact d_model"],
    reach: Float[Tensor, "fact 1"],
    batch_size: int,
) -> Float[Tensor, "fact d_model"]:
    """Return the target values so many times as far from the residual stream of the unedited model."""
    name, moved = f"L{last}.resid_post", target_values.clone()
    for facts, found in seen(model, edit_prompts.bare, [name], batch_size):
        home = found[name][:, 0].to(target_values)
        moved[facts] = home + reach[facts].to(home) * (target_values[facts] - home)
    return moved


def _known(model: HookedModel, forget: Prompts) -> tuple[Int[Tensor, " _known"], list[str]]:
    """Return the facts that the model gives, and the others in words."""
    if not len(forget):
        raise MechunlearnError("The forget set is empty. Expected at least one fact; see Prompts.split.")
    right = answered(model, forget)
    names = [forget.queries[i].prompt if forget.queries else f"fact {i}" for i in (~right).nonzero().flatten().tolist()]
    some = "; ".join(names[:LISTED]) + ("; ..." if len(names) > LISTED else "")
    if not right.any():
        raise MechunlearnError(
            f"The model answers none of the {len(forget)} forget facts ({some}): there is nothing to wash. Check the "
            "prompts against what the model says."
        )
    if names:
        warnings.warn(
            f"{len(names)} of {len(forget)} forget facts are not known to the model and are skipped: {some}",
            stacklevel=5,
        )
    return right.nonzero().flatten(), names


def remaining(washing: Washing, facts: Int[Tensor, " _fact"]) -> Int[Tensor, " _left"]:
    """Return those of the facts that the model still gives: one forward pass over their answers.

    Args:
        washing: The edit in the making.
        facts: Numbers of some of its facts.
    """
    return facts[answered(washing.model, washing.facts.select(facts))]
