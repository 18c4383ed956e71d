"""What gradient editors minimise: a forget term, a retain term and text, over the trained part of a model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.runcard import RunCard
from mechunlearn.edit import losses
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.component import Component
from mechunlearn.training.loop import (
    CachedInputs,
    Schedule,
    Sequences,
    Terms,
    TopLayers,
    TrainResult,
    epochs,
    text_sequences,
    train,
)
from mechunlearn.training.parameterizations import LowRank, SelectedRows

CHECK_EVERY = 5
OBJECTIVES: dict[str, dict[str, Any]] = {
    "injection": {"loss": losses.injection},
    "log_one_minus_p": {"loss": losses.log_one_minus_p},
    "gradient_ascent": {"loss": losses.gradient_ascent, "retain_weight": 0, "text_weight": 0},
    # the same as losses.gradient_difference, but with a forget weight that weighs its forget half alone
    "gradient_difference": {"loss": losses.gradient_ascent, "retain_loss": losses.cross_entropy},
    "kl": {"loss": losses.gradient_ascent, "retain_loss": losses.kl_retain},
    "npo": {"loss": losses.npo},
    "simnpo": {"loss": losses.simnpo},
    "preference": {"loss": losses.preference},
    "inverted_hinge": {"loss": losses.inverted_hinge},
    "entropy": {"loss": losses.entropy},
    "rmu": {"loss": losses.rmu, "retain_loss": losses.rmu_retain},
}
"""Settings of an editor by the name that people use."""
Measure = Callable[[int], dict[str, Any] | None]


@dataclass(frozen=True)
class Objective:
    """forget_weight * loss(forget) + retain_weight * retain_loss(retain) + text_weight * CE(texts).

    A loss that takes the retain logits itself (`losses.gradient_difference`) gets no retain term beside it.
    """

    loss: losses.Loss
    retain_loss: losses.Loss
    forget_weight: float | int = 1.0
    retain_weight: float | int = 1.0
    text_weight: float | int = 1.0


@dataclass(frozen=True)
class Reading:
    """How an editor reads its sets: texts, facts a step and in how many parts, whether constants are kept, when to stop."""

    texts: Sequence[str] | None
    batch_size: int
    accumulate: int = 1
    cache: bool = True
    stop_at: float | int | None = None


def objective_named(name: str, mask: ComponentMask) -> dict[str, Any]:
    """The settings of a named objective for a mask; RMU reads the highest masked layer.

    Raises `MechunlearnError` for an unknown name.
    """
    if name not in OBJECTIVES:
        raise MechunlearnError(f"Unknown objective '{name}'. Expected one of {', '.join(OBJECTIVES)}.")
    highest = max((Component.parse(site).layer for site, chosen in mask.sites.items() if chosen.any()), default=0)
    return {
        key: partial(value, layer=highest) if value in (losses.rmu, losses.rmu_retain) else value
        for key, value in OBJECTIVES[name].items()
    }


def training_texts(forget: Any, texts: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the texts given or, of `None`, the half of the forget data set's passages that editors may train on.

    The other half measures the loss of ordinary text.
    """
    if texts is not None:
        return tuple(texts)
    facts = forget.facts if isinstance(forget, Prompts) else None
    return facts.text[::2] if facts is not None else ()


class LossInputs:
    """A loss, and the streams it reads its arguments from."""

    def __init__(self, loss: losses.Loss, upper: TopLayers, sets: dict[str, Prompts]) -> None:
        """`sets` maps a prefix of argument names ('', 'target_', 'retain_') to the prompts it speaks of."""
        self.loss, self.streams, self.wanted = loss, {}, {}
        layer = losses.described(loss)["settings"].get("layer")
        if layer is not None and upper.layer is not None and not upper.layer <= layer < upper.model.signature.layers:
            raise MechunlearnError(
                f"{losses.described(loss)['name']} reads layer {layer}, but the lowest masked layer is {upper.layer} of "
                f"{upper.model.signature.layers}: no selected weight could move what it reads. Give a layer from "
                f"{upper.layer} to {upper.model.signature.layers - 1}, or another mask."
            )
        left = losses.needs(loss)
        for prefix in sorted(sets, reverse=True):
            mine = frozenset(name for name in left if name.startswith(prefix))
            left -= mine
            if mine:
                self.wanted[prefix] = frozenset(name.removeprefix(prefix) for name in mine)
                which = "targets" if prefix == "target_" else "answers"
                sequences = Sequences.of(sets[prefix], which)
                self.streams[prefix] = CachedInputs(upper, sequences, self.wanted[prefix], layer)

    def __call__(self, rows: dict[str, Tensor]) -> Tensor:
        """The loss on these rows of each set."""
        return self.loss(
            **{
                prefix + name: tensor
                for prefix, stream in self.streams.items()
                for name, tensor in stream.read(rows[prefix], self.wanted[prefix]).items()
            }
        )


def descend_on(
    trained: SelectedRows | LowRank,
    forget: Prompts,
    retain: Prompts,
    objective: Objective,
    schedule: Schedule,
    reading: Reading,
    *,
    measure: Measure | None,
    seed: int,
    progress: bool,
) -> WeightEdit:
    """Minimise an objective over rows or adapters of a model, and return what they have become.

    Each step reads `batch_size` forget facts, as many retain facts and a quarter as many texts, in `accumulate` parts of
    which each weighs as its share of the sequences. The model is left as it was.

    Args:
        trained: What moves.
        forget: Facts to change.
        retain: Facts to hold.
        objective: What is minimised.
        schedule: Steps and learning rates.
        reading: Texts, batches, caches, and when to stop.
        measure: Called with the number of each step. What it returns goes on the card; a true `stop` in it ends training.
        seed: Seed of the order of the facts.
        progress: Whether to show a bar.

    Returns:
        The edit, with the trajectory and the reason of its end on its card.

    Raises:
        MechunlearnError: For an empty set, a loss that no trained weight can move, and a term that is not finite.
    """
    for name, prompts, weight in (("forget", forget, 1), ("retain", retain, objective.retain_weight)):
        if weight and not len(prompts):
            raise MechunlearnError(f"The {name} set is empty. Expected at least one fact; see Prompts.split.")
    with trained.attached():
        try:
            done = _trained(trained, forget, retain, objective, schedule, reading, measure, seed, progress)
            units, rows, low_rank = trained.change()
        finally:
            trained.restore()
    card = RunCard("", trajectory=done.trajectory, stopped=done.stopped)
    return WeightEdit(units, rows, trained.model.signature, card, low_rank)


def _trained(
    trained: SelectedRows | LowRank,
    forget: Prompts,
    retain: Prompts,
    objective: Objective,
    schedule: Schedule,
    reading: Reading,
    measure: Measure | None,
    seed: int,
    progress: bool,
) -> TrainResult:
    """Train what is attached to a model."""
    batch, stop_at, generator = reading.batch_size, reading.stop_at, torch.Generator().manual_seed(seed)
    upper = TopLayers(trained.model, trained.lowest, reading.cache)
    removed = LossInputs(objective.loss, upper, {"": forget, "target_": forget, "retain_": retain})
    draws = {"forget": epochs(len(forget), batch, generator)}
    terms: dict[str, tuple[float, Callable[[dict[str, Tensor]], Tensor]]] = {
        "forget": (
            objective.forget_weight,
            lambda rows: removed(
                {"": rows["forget"], "target_": rows["forget"], "retain_": rows.get("retain", rows["forget"])}
            ),
        )
    }
    if "retain_" in removed.streams:
        draws["retain"] = epochs(max(1, len(retain)), batch, generator)
    elif objective.retain_weight:
        kept = LossInputs(objective.retain_loss, upper, {"": retain})
        draws["retain"] = epochs(len(retain), batch, generator)
        terms["retain"] = (objective.retain_weight, lambda rows: kept({"": rows["retain"]}))
    texts = training_texts(forget, reading.texts) if objective.text_weight else ()
    ordinary = CachedInputs(upper, text_sequences(trained.model, texts))
    if len(ordinary):
        draws["text"] = epochs(len(ordinary), max(1, batch // 4), generator)
        terms["text"] = (
            objective.text_weight,
            lambda rows: losses.cross_entropy(**ordinary.read(rows["text"], {"logits", "labels"})),
        )

    def parts() -> Iterator[Terms]:
        drawn = {name: next(rows) for name, rows in draws.items()}
        for i in range(reading.accumulate):
            chunks = {name: rows.tensor_split(reading.accumulate)[i] for name, rows in drawn.items()}
            found = {
                name: (len(chunks[name]) / len(drawn[name]), weight, value(chunks))
                for name, (weight, value) in terms.items()
                if len(chunks[name])
            }
            if found:
                yield found

    aimed = "target_" in removed.streams
    judged = removed.streams["target_"] if aimed else CachedInputs(upper, Sequences.of(forget))

    def after(step: int) -> dict[str, Any]:
        entry = dict((measure(step) if measure else None) or {})
        if stop_at is not None and (step % CHECK_EVERY == 0 or step == schedule.steps):
            right = float(judged.right().float().mean())
            entry["efficacy"] = right if aimed else 1 - right
        return entry

    return train(
        trained,
        parts,
        schedule,
        objective=losses.described(objective.loss)["name"],
        after=after,
        until=lambda entry: bool(entry.get("stop")) or (stop_at is not None and entry.get("efficacy", -1) >= stop_at),
        progress=progress,
    )
