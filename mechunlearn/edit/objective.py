"""What gradient editors minimise: a forget term, a retain term and text, over the trained part of a model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.edit import losses
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel
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
from mechunlearn.training.parameterizations import Trainable

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
Measure = Callable[[int], dict | None]


@dataclass(frozen=True)
class Objective:
    """forget_weight * loss(forget) + retain_weight * retain_loss(retain) + text_weight * CE(text).

    A loss that takes the retain logits itself (`losses.gradient_difference`) gets no retain term beside it.
    """

    loss: losses.Loss
    retain_loss: losses.Loss
    forget_weight: float | int = 1.0
    retain_weight: float | int = 1.0
    text_weight: float | int = 1.0

    def settings(self) -> dict:
        """What a run card says of it; `losses.named` makes functions of its losses again."""
        return {
            "loss": losses.described(self.loss),
            "retain_loss": losses.described(self.retain_loss),
            "forget_weight": self.forget_weight,
            "retain_weight": self.retain_weight,
            "text_weight": self.text_weight,
        }


@dataclass(frozen=True)
class Reading:
    """How an editor reads its sets: facts a step, in how many parts; whether constants are kept; when to stop."""

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


def training_text(forget: Prompts) -> tuple[str, ...]:
    """The half of the data set's passages that editors may train on; the other half measures text loss."""
    return forget.facts.texts[::2] if forget.facts is not None else ()


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


def minimise(
    model: HookedModel,
    trained: Trainable,
    objective: Objective,
    forget: Prompts,
    retain: Prompts,
    texts: Sequence[str],
    schedule: Schedule,
    reading: Reading,
    *,
    measure: Measure | None = None,
    seed: int = 0,
    progress: bool = False,
) -> TrainResult:
    """Train what is attached to a model; it is left as trained.

    Each step reads `batch_size` forget facts, as many retain facts and a quarter as many passages, in `accumulate` parts of
    which each weighs as its share of the sequences. Raises `MechunlearnError` for empty sets.
    """
    batch, accumulate, stop_at = reading.batch_size, reading.accumulate, reading.stop_at
    for name, prompts, weight in (("forget", forget, 1), ("retain", retain, objective.retain_weight)):
        if weight and not len(prompts):
            raise MechunlearnError(f"The {name} set is empty. Expected at least one fact; see Prompts.split.")
    upper = TopLayers(model, trained.lowest, reading.cache)
    removed = LossInputs(objective.loss, upper, {"": forget, "target_": forget, "retain_": retain})
    holds_retain = "retain_" in removed.streams
    kept = None
    if objective.retain_weight and not holds_retain:
        kept = LossInputs(objective.retain_loss, upper, {"": retain})
    passages = CachedInputs(upper, text_sequences(model, texts if objective.text_weight else ()))
    generator = torch.Generator().manual_seed(seed)
    forget_rows, retain_rows = epochs(len(forget), batch, generator), epochs(max(1, len(retain)), batch, generator)
    text_rows = epochs(max(1, len(passages)), max(1, batch // 4), generator)

    def parts() -> Iterator[Terms]:
        drawn = {"forget": next(forget_rows)}
        if kept is not None or holds_retain:
            drawn["retain"] = next(retain_rows)
        if len(passages):
            drawn["text"] = next(text_rows)
        for i in range(accumulate):
            chunks = {name: rows.tensor_split(accumulate)[i] for name, rows in drawn.items()}
            share = {name: len(chunk) / len(drawn[name]) for name, chunk in chunks.items()}
            terms: dict[str, tuple[float, float | int, Tensor]] = {}
            if share["forget"]:
                rows = {
                    "": chunks["forget"],
                    "target_": chunks["forget"],
                    "retain_": chunks.get("retain", drawn["forget"]),
                }
                terms["forget"] = (share["forget"], objective.forget_weight, removed(rows))
            if kept is not None and share["retain"]:
                terms["retain"] = (share["retain"], objective.retain_weight, kept({"": chunks["retain"]}))
            if share.get("text"):
                read = passages.read(chunks["text"], {"logits", "labels"})
                value = losses.cross_entropy(read["logits"], read["labels"])
                terms["text"] = (share["text"], objective.text_weight, value)
            if terms:
                yield terms

    aimed = "target_" in removed.streams
    judged = removed.streams["target_"] if aimed else CachedInputs(upper, Sequences.of(forget))

    def after(step: int) -> dict:
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
