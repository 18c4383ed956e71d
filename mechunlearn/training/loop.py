"""The descent of every gradient method: batches, learning rates, steps, and how Ctrl-C ends it."""

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from mechunlearn.errors import MechunlearnError
from mechunlearn.training.parameterizations import Trainable


def epochs(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches of row indices without end, each epoch in a new order.

    Args:
        count: How many rows there are.
        batch_size: Rows in a batch, at most.
        generator: Draws the orders.
    """
    while True:
        yield from torch.split(torch.randperm(count, generator=generator), batch_size)


@dataclass(frozen=True)
class Schedule:
    """AdamW with a linear warm-up, then a cosine to zero; gradients are clipped to a norm.

    Attributes:
        steps: Optimiser steps.
        lr: Largest learning rate.
        warmup: Steps in which it rises.
        clip: Largest norm of the gradient.
        weight_decay: AdamW's.
    """

    steps: int
    lr: float
    warmup: int = 0
    clip: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.lr <= 1000:
            raise MechunlearnError(
                f"A learning rate of {self.lr:g} is out of range. Expected 0 to 1000, for example 2e-3."
            )
        if self.steps < 1 or not 0 <= self.warmup < self.steps:
            raise MechunlearnError(
                f"{self.steps} steps with {self.warmup} of warm-up. Expected at least one step, and fewer of warm-up."
            )

    def rates(self, optimiser: torch.optim.Optimizer) -> list[float]:
        """Return the learning rate of every step.

        Transformers' cosine, with a warm-up that leaves out its step at zero.

        Args:
            optimiser: The one that takes the steps.

        >>> Schedule(4, 1.0, warmup=2).rates(torch.optim.SGD([torch.zeros(1)]))
        [0.5, 1.0, 1.0, 0.5]
        """
        (share,) = get_cosine_schedule_with_warmup(optimiser, self.warmup, self.steps).lr_lambdas
        return [self.lr * share(step + (step < self.warmup)) for step in range(self.steps)]


Terms = Mapping[str, tuple[float, float, Tensor]]


@dataclass
class TrainResult:
    """What happened: one entry a step (the terms of the objective, and what `after` measured), and why it ended.

    Attributes:
        trajectory: One entry a step.
        stopped: `reached`, `interrupted`, or nothing.
    """

    trajectory: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""


@torch.enable_grad()
def train(
    trained: Trainable,
    parts: Callable[[], Iterator[Terms]],
    schedule: Schedule,
    *,
    objective: str,
    after: Callable[[int], dict[str, Any]] = lambda step: {},
    until: Callable[[dict[str, Any]], bool] = lambda entry: False,
    optimiser: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    begun: Sequence[dict[str, Any]] = (),
    progress: bool = False,
) -> TrainResult:
    """Minimise a weighted sum of terms; the model is left as trained.

    Ctrl-C ends it after the step in progress, with what was reached so far.

    Args:
        trained: What moves.
        parts: Yields the micro-batches of one step, `{term: (share of the batch, weight, value)}`.
        schedule: Steps and learning rates.
        objective: Its name, for messages.
        after: Measures more after a step; what it returns goes into the trajectory.
        until: Whether an entry of the trajectory ends training.
        optimiser: Makes the optimiser.
        begun: The entries of steps that an earlier call took; `optimiser` has to bring back where that one ended.
        progress: Whether to show a bar.

    Raises:
        MechunlearnError: If a term is not finite, naming step and objective; nothing of that step is then written.
    """
    mover = optimiser(trained.leaves, lr=schedule.lr, weight_decay=schedule.weight_decay)
    done, rates = TrainResult([*begun]), schedule.rates(mover)
    left = range(len(begun), schedule.steps)
    with interruptible() as asked:
        for step in track(left, "training", disable=not progress, transient=True):
            mover.zero_grad()
            entry: dict[str, Any] = {}
            for terms in parts():
                total = sum((share * weight * value for share, weight, value in terms.values()), torch.zeros(()))
                values = torch.stack([value.detach().float() for *_, value in terms.values()]).tolist()
                for (name, (share, *_)), value in zip(terms.items(), values, strict=True):
                    if not math.isfinite(value):
                        raise MechunlearnError(
                            f"The {name} term of {objective} is {value} at step {step + 1} of {schedule.steps}: the "
                            "model is "
                            f"left as it was. Lower the learning rate ({schedule.lr:g}), or use a bounded objective."
                        )
                    entry[name] = entry.get(name, 0.0) + share * value
                trained.gradient(total)
            for group in mover.param_groups:
                group["lr"] = rates[step]
            nn.utils.clip_grad_norm_(trained.leaves, schedule.clip)
            mover.step()
            trained.write()
            entry = {"step": step + 1, **{name: round(value, 6) for name, value in entry.items()}}
            entry |= after(step + 1)
            done.trajectory.append(entry)
            if until(entry):
                done.stopped = "reached"
                break
            if asked:
                done.stopped = "interrupted"
                break
    for leaf in trained.leaves:
        leaf.grad = None
    return done


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Note Ctrl-C in a list, within the block, instead of stopping; a second one interrupts at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: object) -> None:
        del frame
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
