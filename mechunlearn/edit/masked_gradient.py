"""Gradient descent restricted to the units of a mask."""

import json
from collections.abc import Sequence

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.runcard import RunCard, Stopwatch, digest
from mechunlearn.edit import losses
from mechunlearn.edit.objective import Measure, Objective, Reading, minimise, training_text
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel
from mechunlearn.training.loop import Schedule
from mechunlearn.training.parameterizations import SelectedRows


def masked_gradient(
    model: HookedModel,
    mask: ComponentMask,
    forget: Prompts,
    retain: Prompts,
    *,
    loss: losses.Loss = losses.injection,
    retain_loss: losses.Loss = losses.cross_entropy,
    steps: int = 50,
    lr: float | int = 2e-3,
    forget_weight: float | int = 1.0,
    retain_weight: float | int = 1.0,
    text_weight: float | int = 1.0,
    texts: Sequence[str] | None = None,
    batch_size: int = 64,
    accumulate: int = 1,
    clip: float | int = 1.0,
    warmup: int = 0,
    weight_decay: float | int = 0.0,
    stop_at: float | int | None = None,
    cache: bool = True,
    measure: Measure | None = None,
    seed: int = 0,
    progress: bool = False,
) -> WeightEdit:
    """Change the forget facts by training only the selected units, while the retain facts and text are held.

    minimise  forget_weight * loss(forget) + retain_weight * retain_loss(retain) + text_weight * CE(text)

    with AdamW, linear warm-up, cosine schedule and gradient clipping, as in Mechanistic Unlearning (arXiv 2410.12949).
    `loss` is any function of `edit.losses`, or one of yours; what it names as its parameters it is given (see
    `losses`). `losses.injection` trains towards each fact's own wrong answer (`forget.targets`). `texts` is by default a
    half of the forget data set's ordinary passages. `accumulate` splits each batch into so many passes.

    With `stop_at`, training ends once that share of the forget facts is edited: answers the target, where the loss has
    one, else no longer gives the truth (greedy, measured every 5 steps). Ctrl-C ends it too, with the edit so far. The
    card's `trajectory` has the terms of every step, and what `measure(step)` gives of the model as trained so far; an entry
    `stop` that is true ends training.

    The model is left as it was. Cost is that of the mask: gradient, optimiser state and float32 copy for the selected
    rows alone, no backward pass below the lowest masked layer, and with `cache` what enters that layer is computed once an
    example and kept (tokens x d_model). bfloat16 weights are trained through float32 copies of the selected rows.

    Raises `MechunlearnError` for an empty mask or set, a mask of another architecture or of features, and a loss that is
    not finite. For thousands of facts a closed form is the better tool.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    >>> masked_gradient(toy.model, mask, toy.prompts([0]), toy.prompts([1, 2]), steps=2).mask == mask
    True
    """
    watch = Stopwatch()
    passages = tuple(texts) if texts is not None else training_text(forget)
    objective = Objective(loss, retain_loss, forget_weight, retain_weight, text_weight)
    schedule = Schedule(steps, lr, warmup, clip, weight_decay)
    rows = SelectedRows(model, mask)
    reading = Reading(batch_size, accumulate, cache, stop_at)
    with rows.attached():
        try:
            done = minimise(
                model,
                rows,
                objective,
                forget,
                retain,
                passages,
                schedule,
                reading,
                measure=measure,
                seed=seed,
                progress=progress,
            )
            units, new = rows.rows()
        finally:
            rows.restore()
    card = RunCard(
        "masked_gradient",
        model=model.fingerprint,
        data=digest(forget.fingerprint, retain.fingerprint, json.dumps(passages)),
        seed=seed,
        settings=objective.settings() | vars(schedule) | vars(reading),
        mask=mask.fingerprint,
        weights=mask.weights(model),
        device=str(model.device),
        trajectory=done.trajectory,
        stopped=done.stopped,
    )
    return WeightEdit(units, new, model.signature, watch.stamp(card))
