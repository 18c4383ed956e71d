"""Gradient descent restricted to the units of a mask."""

from collections.abc import Sequence

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.edit import losses
from mechunlearn.edit.objective import Measure, Objective, descend_on
from mechunlearn.edit.remake import editor
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel
from mechunlearn.training.loop import Schedule
from mechunlearn.training.parameterizations import SelectedRows


@editor
def masked_gradient(
    model: HookedModel,
    mask: ComponentMask,
    forget: Prompts,
    retain: Prompts,
    *,
    loss: losses.Loss = losses.injection,
    retain_loss: losses.Loss = losses.cross_entropy,
    steps: int = 50,
    lr: float = 2e-3,
    forget_weight: float = 1.0,
    retain_weight: float = 1.0,
    text_weight: float = 1.0,
    texts: Sequence[str] | None = None,
    batch_size: int = 64,
    accumulate: int = 1,
    clip: float = 1.0,
    warmup: int = 0,
    weight_decay: float = 0.0,
    stop_at: float | None = None,
    cache: bool = True,
    measure: Measure | None = None,
    seed: int = 0,
    progress: bool = False,
) -> WeightEdit:
    """Change the forget facts by training only the selected units, while the retain facts and text are held.

    minimise  forget_weight * loss(forget) + retain_weight * retain_loss(retain) + text_weight * CE(texts)

    with AdamW, linear warm-up, cosine schedule and gradient clipping, as in Mechanistic Unlearning (arXiv 2410.12949).
    Ctrl-C ends training with the edit so far. The model is left as it was. Cost is that of the mask: gradient,
    optimiser state and float32 copy for the selected rows alone, no backward pass below the lowest masked layer.
    bfloat16 weights are trained through float32 copies of the selected rows. For thousands of facts a closed form is
    the better tool.

    Args:
        model: The model to edit.
        mask: The units that may move.
        forget: Facts to change.
        retain: Facts to hold.
        loss: Any function of `edit.losses`, or one of yours; it gets what it names as its parameters (see `losses`).
            `losses.injection` trains towards each fact's own wrong answer (`forget.targets`).
        retain_loss: The same for the retain facts.
        steps: Optimiser steps, at most.
        lr: Largest learning rate.
        forget_weight: Weight of the forget term.
        retain_weight: Weight of the retain term; at 0 the retain facts are not read.
        text_weight: Weight of the cross-entropy of ordinary text; at 0 no text is read.
        texts: Ordinary text to hold, by default a half of the forget data set's.
        batch_size: Forget facts a step, as many retain facts, and a quarter as many texts.
        accumulate: Parts that each batch is split into, to save memory.
        clip: Largest norm of the gradient.
        warmup: Steps in which the learning rate rises.
        weight_decay: AdamW's weight decay.
        stop_at: End once this share of the forget facts is edited: answers the target, where the loss has one, else no
            longer gives the truth (greedy, measured every 5 steps).
        cache: Compute what enters the lowest masked layer once an example and keep it (tokens x d_model).
        measure: Called with the number of each step; what it returns goes on the card, and a true `stop` in it ends
            training.
        seed: Seed of the order of the facts.
        progress: Whether to show a bar.

    Returns:
        New rows of the selected units. The card's `trajectory` has the terms of every step.

    Raises:
        MechunlearnError: For an empty mask or set, a mask of another architecture or of features, numbers out of range,
            and a loss that is not finite.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    >>> edit = masked_gradient(toy.model, mask, toy.prompts([0]), toy.prompts([1, 2]), steps=2)
    >>> edit.mask == mask, edit.remake(seed=1).card.seed
    (True, 1)
    """
    how = (loss, retain_loss, forget_weight, retain_weight, text_weight, texts, batch_size, accumulate, stop_at, cache)
    schedule, rows = Schedule(steps, lr, warmup, clip, weight_decay), SelectedRows(model, mask)
    return descend_on(rows, forget, retain, Objective(*how), schedule, measure, seed, progress)
