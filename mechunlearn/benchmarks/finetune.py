"""Finetuning on questions and answers: the full and the retain model that a benchmark compares."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mechunlearn.benchmarks.asking import Asked, as_prompts
from mechunlearn.core.steady import steady
from mechunlearn.edit.losses import cross_entropy
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import PAD
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.unwrap import evaluating
from mechunlearn.training.inputs import CachedInputs, Sequences, TopLayers
from mechunlearn.training.loop import Schedule, Terms, TrainResult, train
from mechunlearn.training.loop import epochs as in_epochs
from mechunlearn.training.parameterizations import Everything

ANSWERS = "answers"
BATCH = 32
PARTS = 4
"""Into how many parts of like length a batch is cut, so that little of what is read is padding."""


@dataclass(frozen=True)
class _Ended:
    """A row whose answer ends the text, so that the model learns to stop."""

    question: str
    answer: str


@steady()
def finetune(
    model: HookedModel,
    rows: Sequence[Asked],
    *,
    lr: float = 1e-5,
    epochs: int = 5,
    batch_size: int = BATCH,
    seed: int = 0,
    progress: bool = False,
) -> TrainResult:
    """Finetune every weight of a model on answers, in place, as TOFU does (arXiv 2401.06121).

    minimise  mean of -log p(token) over the tokens of the answers, the end of text included

    AdamW with a weight decay of .01, a linear warm-up in the first epoch, then a cosine to zero, where TOFU's code goes down
    in a line. Questions are asked as `asking.queries` asks them. Ctrl-C ends it after the step in progress. Memory is
    that of the weights five times over, and of the activations of a batch. For models of billions of parameters use a
    trainer that shards: any one that writes an ordinary checkpoint will do.

    Args:
        model: The model, which is changed.
        rows: Questions with their answers, such as a split of `tofu.load`.
        lr: Largest learning rate.
        epochs: How often each row is seen.
        batch_size: Rows a step.
        seed: Of the order of the rows.
        progress: Whether to show a bar.

    Returns:
        The loss of each step.

    Raises:
        MechunlearnError: There is no row, a number is out of range, or the loss is not finite.

    >>> from mechunlearn import load_model
    >>> from mechunlearn.benchmarks.tofu import TofuRow
    >>> done = finetune(load_model("factworld"), [TofuRow("Where was Ann born?", "In Oslo.")] * 4, lr=1e-3)
    >>> done.trajectory[-1]["answers"] < done.trajectory[0]["answers"]
    True
    """
    check_finetuning(lr, epochs)
    if not rows or batch_size < 1:
        raise MechunlearnError(f"{len(rows)} rows, {batch_size} a step. Expected at least one of each.")
    end = getattr(model.tokenizer, "eos_token", None) or ""
    prompts = as_prompts(model, [_Ended(row.question, row.answer + end) for row in rows], "to learn")
    trained = Everything(model)
    stream = CachedInputs(TopLayers(model, trained.lowest), Sequences.of(prompts))
    counts = (stream.sequences.labels != PAD).sum(1)
    generator = torch.Generator()
    generator.manual_seed(seed)
    drawn, each = in_epochs(len(rows), batch_size, generator), -(-len(rows) // batch_size)

    def parts() -> Iterator[Terms]:
        rows = next(drawn)
        rows = rows[stream.sequences.lengths[rows].argsort()]
        tokens = int(counts[rows].sum())
        for part in torch.split(rows, -(-len(rows) // PARTS)):
            read = stream.read(part, {"logits", "labels"})
            share = int(counts[part].sum()) / tokens
            yield {ANSWERS: (share, 1.0, cross_entropy(read["logits"], read["labels"]))}

    schedule = Schedule(each * epochs, lr, warmup=each if epochs > 1 else 0, weight_decay=0.01)
    with evaluating(model.hf), trained.attached():
        done = train(trained, parts, schedule, objective="finetuning", progress=progress)
    model.refresh_()
    return done


def check_finetuning(lr: float, epochs: int) -> None:
    """Check the numbers of a finetuning before any work is done.

    Args:
        lr: Learning rate.
        epochs: How often each row is seen.

    Raises:
        MechunlearnError: One is out of range.

    >>> check_finetuning(1e-5, 0)
    Traceback (most recent call last):
    mechunlearn.errors.MechunlearnError: 0 epochs are out of range. Expected 1 to 1000.
    """
    if not 0 < lr <= 1000:
        raise MechunlearnError(f"A learning rate of {lr:g} is out of range. Expected above 0 and up to 1000, as 1e-5.")
    if not 1 <= epochs <= 1000:
        raise MechunlearnError(f"{epochs} epochs are out of range. Expected 1 to 1000.")
