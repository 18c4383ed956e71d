"""Gradient descent restricted to the units of a mask."""

from collections.abc import Sequence

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.edit import losses
from mechunlearn.edit.goal import Goal
from mechunlearn.edit.objective import Measure, Objective, descend_on
from mechunlearn.edit.remake import editor
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel
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
    text_loss: losses.Loss = losses.kl_retain,
    efficacy: float = 0.99,
    max_kl: float = 0.05,
    min_retention: float = 0.95,
    lr: float | None = None,
    steps: int | None = None,
    held_weight: float | None = None,
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

    minimise  forget_weight * loss(forget) + retain_weight * retain_loss(retain) + text_weight * text_loss(texts)

    Without `lr` and `steps` it searches: it takes the gentlest learning rate, relative to the size of the weights, that
    reaches `efficacy` in 50 steps or fewer; where that is not enough a larger one goes on from there. Each gradient G is
    turned away from the directions that the texts and the retain facts use:

    G (held_weight * C / c + 1)^-1,   C = E[x x^T] over the matrix's inputs x there, c = mean(diag C)

    so that of two changes that do as much to the facts it takes the one that does less to the rest (the input factor of
    K-FAC, arXiv 1503.05671; C is that of MEMIT, arXiv 2210.07229). Such a gradient moves by its own direction, with one
    second moment a matrix. A subject's other facts can change with the edited one: `evaluate` measures them.

    Given `lr` or `steps` it trains once, as published: AdamW, linear warm-up, cosine schedule and gradient clipping, as
    in Mechanistic Unlearning (arXiv 2410.12949).

    The card's `search` has what was tried. If the edit moves ordinary text by more than `max_kl`, or keeps fewer than
    `min_retention` of the retain facts, you get a warning. Ctrl-C ends training with the edit so far. The model is left
    as it was. Cost is that of the mask: gradient, optimiser state and float32 copy for the selected rows alone, no
    backward pass below the lowest masked layer; C takes the smaller of in x in and tokens x in for each matrix.
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
        text_loss: The same for ordinary text: `losses.kl_retain` holds what the unedited model says on it.
        efficacy: Least share of the forget facts to edit: they answer the target, where the loss has one, else they no
            longer give the truth (greedy).
        max_kl: Largest mean KL of the next token on the model's own text, in nats a token.
        min_retention: Least share of the known retain facts to keep.
        lr: Largest learning rate. Giving it, or `steps`, turns the search off.
        steps: Optimiser steps, at most; 50 where only `lr` is given. Given alone the rate is a gentle one, of which a
            warning says that it may change nothing.
        held_weight: Weight of C. A larger one holds the rest more, and changes the facts less for the same `lr`.
            0: plain AdamW. None: 400 where the learning rate is searched, else 0.
        forget_weight: Weight of the forget term.
        retain_weight: Weight of the retain term; at 0 the retain facts are not read.
        text_weight: Weight of the text term; at 0 no text is held.
        texts: Ordinary text to hold, by default a half of the forget data set's, or else samples of the model itself.
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
    weights = (forget_weight, retain_weight, text_weight)
    how = Objective(loss, retain_loss, text_loss, *weights, texts, batch_size, accumulate, stop_at, cache)
    rows = SelectedRows(model, mask)
    goal, schedule = Goal(efficacy, max_kl, min_retention), (warmup, clip, weight_decay)
    return descend_on(rows, forget, retain, how, goal, lr, steps, schedule, measure, seed, progress, held_weight)
