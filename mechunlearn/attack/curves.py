"""What attacks that train share: learning rates, batches, and a curve that is measured on the way."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mechunlearn.attack.states import Row
from mechunlearn.errors import MechunlearnError
from mechunlearn.training.inputs import CachedInputs
from mechunlearn.training.loop import Schedule, Terms, epochs, train
from mechunlearn.training.parameterizations import Trainable

Loss = Callable[[], Tensor]
Set = TypeVar("Set", bound=Sized)


def check_lrs(lrs: Sequence[float]) -> None:
    """Raise `MechunlearnError` for learning rates out of range or missing.

    Args:
        lrs: The learning rates.
    """
    if not lrs or not all(0 < lr <= 1000 for lr in lrs):
        raise MechunlearnError(f"lrs is {list(lrs)}. Expected learning rates above 0 and up to 1000.")


class _Diverged(Exception):
    """A loss is not finite."""


def training_curve(
    trained: Trainable,
    losses: Mapping[str, Loss],
    start: Row,
    measured: Callable[[int], Row],
    *,
    setting: str,
    lr: float,
    steps: int,
    eval_every: int,
) -> list[Row]:
    """Train, measure on the way, and leave the model as it was. A loss that is not finite ends the curve.

    Args:
        trained: What is trained.
        losses: The terms of the objective by name: each call gives that of the next batch (see `batch_losses`).
        start: The row of step 0.
        measured: Measures the model as it is; it takes the step, and returns its row.
        setting: The name of the setting.
        lr: The learning rate.
        steps: The number of optimiser steps.
        eval_every: Measures after so many steps, and after the last.

    Returns:
        The rows: `start`, then one a measurement, with `setting`, `lr` and `steps`.

    Raises:
        KeyboardInterrupt: After Ctrl-C.
    """
    rows, reached = [start], 0

    def parts() -> Iterator[Terms]:
        terms = {name: loss() for name, loss in losses.items()}
        if not all(math.isfinite(float(value.detach())) for value in terms.values()):
            raise _Diverged
        yield {name: (1.0, 1.0, value) for name, value in terms.items()}

    def after(step: int) -> Row:
        nonlocal reached
        reached = step
        if step % eval_every == 0 or step == steps:
            rows.append(measured(step))
        return {}

    try:
        with trained.attached():
            try:
                if train(trained, parts, Schedule(steps, lr), objective=setting, after=after).stopped:
                    raise KeyboardInterrupt
            except _Diverged:
                if rows[-1]["step"] < reached:
                    rows.append(measured(reached))
    finally:
        trained.restore()
    return [row | {"setting": setting, "lr": float(lr), "steps": steps} for row in rows]


def batch_losses(
    sets: Mapping[str, Set], sizes: Mapping[str, int], loss: Callable[[Set, Tensor], Tensor], seed: int
) -> dict[str, Loss]:
    """Return for each set a function that gives the loss of its next batch.

    Args:
        sets: What is trained on, by name. A set without rows is left out.
        sizes: The number of rows a batch, by name.
        loss: The loss of rows of a set.
        seed: Draws the batches.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: epochs(len(some), sizes[name], generator) for name, some in sets.items() if len(some)}

    def next_loss(name: str) -> Tensor:
        return loss(sets[name], next(drawn[name]))

    return {name: partial(next_loss, name) for name in drawn}


def cross_entropy(stream: CachedInputs, rows: Tensor) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of labels, in nats a token.

    Args:
        stream: The sequences.
        rows: Which of them.
    """
    read = stream.read(rows, {"logits", "labels"})
    return F.cross_entropy(read["logits"].float(), read["labels"])
