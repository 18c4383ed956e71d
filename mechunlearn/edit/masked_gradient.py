"""Gradient descent restricted to the units of a mask."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from rich.progress import track
from torch import Tensor

from mechunlearn.components import ComponentMask
from mechunlearn.edit import losses
from mechunlearn.edits import WeightEdit
from mechunlearn.errors import MechunlearnError
from mechunlearn.hooked import HookedModel
from mechunlearn.metrics import encode, padded, supervised, token_losses
from mechunlearn.prompts import Prompts
from mechunlearn.runcard import RunCard, Stopwatch, digest
from mechunlearn.training import SelectedRows, epochs


def masked_gradient(
    model: HookedModel,
    mask: ComponentMask,
    forget: Prompts,
    retain: Prompts,
    *,
    loss: losses.Loss = losses.injection,
    steps: int = 50,
    rate: float | int = 2e-3,
    forget_weight: float | int = 1.0,
    retain_weight: float | int = 1.0,
    text_weight: float | int = 1.0,
    text: Sequence[str] | None = None,
    batch: int = 64,
    clip: float | int = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> WeightEdit:
    """Change the forget facts by training only the selected units, while the retain facts and text are held.

    minimise  forget_weight * loss(forget) + retain_weight * CE(retain) + text_weight * CE(text)

    with AdamW (no weight decay), cosine schedule and gradient clipping, as in Mechanistic Unlearning
    (arXiv 2410.12949). `losses.injection` trains towards each fact's own wrong answer (`forget.targets`), every other
    loss sees the truth. `text` is by default a half of the forget data set's ordinary passages.
    The model is left as it was. Cost: a forward and backward pass over three batches a step. Raises `MechunlearnError`
    for an empty mask or a mask of another architecture. For thousands of facts a closed form is the better tool.

    >>> from mechunlearn.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    >>> masked_gradient(toy.model, mask, toy.prompts([0]), toy.prompts([1, 2]), steps=2).mask == mask
    True
    """
    if not len(mask):
        raise MechunlearnError("The mask selects no unit, so there is nothing to train. See the localization's note.")
    watch = Stopwatch()
    passages = tuple(text) if text is not None else training_text(forget)
    encoded = encode(model, passages) if text_weight else []
    generator = torch.Generator().manual_seed(seed)
    which = "targets" if loss is losses.injection else "answers"
    forget_rows, retain_rows = epochs(len(forget), batch, generator), epochs(len(retain), batch, generator)
    text_rows = epochs(len(encoded), max(1, batch // 4), generator)
    rows = SelectedRows(model, mask, rate)
    with only_trainable(model, rows.touched):
        try:
            for step in track(range(steps), "editing", disable=not progress, transient=True):
                total = forget_weight * _facts_loss(model, forget.select(next(forget_rows)), which, loss)
                if retain_weight:
                    kept = retain.select(next(retain_rows))
                    total = total + retain_weight * _facts_loss(model, kept, "answers", losses.cross_entropy)
                if encoded:
                    drawn = [encoded[i] for i in next(text_rows).tolist()]
                    total = total + text_weight * _text_loss(model, drawn)
                rows.gradient(total)
                rows.step(rate * 0.5 * (1 + math.cos(math.pi * step / steps)), clip)
            units, new = rows.rows()
        finally:
            rows.restore()
    settings = {
        "loss": loss.__name__,
        "steps": steps,
        "rate": rate,
        "forget_weight": forget_weight,
        "retain_weight": retain_weight,
        "text_weight": text_weight,
        "batch": batch,
        "clip": clip,
    }
    card = RunCard(
        "masked_gradient",
        model=model.fingerprint,
        data=digest(forget.fingerprint, retain.fingerprint, json.dumps(passages)),
        seed=seed,
        settings=settings,
        mask=mask.fingerprint,
        weights=mask.weights(model),
        device=str(model.device),
    )
    return WeightEdit(units, new, model.signature, watch.stamp(card))


def training_text(forget: Prompts) -> tuple[str, ...]:
    """The half of the data set's passages that editors may train on; the other half measures text loss."""
    return forget.facts.text[::2] if forget.facts is not None else ()


def _facts_loss(model: HookedModel, prompts: Prompts, which: str, loss: losses.Loss) -> Tensor:
    tokens, fact, position, labels = supervised(prompts, which)
    logits = model.hf(input_ids=tokens.to(model.device), use_cache=False).logits
    return loss(logits[fact, position], labels.to(model.device))


def _text_loss(model: HookedModel, encoded: list[list[int]]) -> Tensor:
    tokens, weight = padded(encoded)
    tokens, weight = tokens.to(model.device), weight.to(model.device)
    logits = model.hf(input_ids=tokens, use_cache=False).logits
    return (token_losses(logits, tokens) * weight).sum() / weight.sum()


@contextmanager
def only_trainable(model: HookedModel, names: Sequence[str]) -> Iterator[None]:
    """Only these parameters take part in the graph within the block."""
    flags = {name: p.requires_grad for name, p in model.hf.named_parameters()}
    for name, parameter in model.hf.named_parameters():
        parameter.requires_grad_(name in names)
    try:
        yield
    finally:
        for name, parameter in model.hf.named_parameters():
            parameter.requires_grad_(flags[name])
