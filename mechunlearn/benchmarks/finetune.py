"""Finetuning on questions and answers: the full and the retain model that a benchmark compares."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechunlearn.benchmarks.asking import Asked, as_prompts
from mechunlearn.core import tensors
from mechunlearn.core.runcard import digest
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
KIND, MOMENTS = "checkpoint", ("step", "exp_avg", "exp_avg_sq")
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
    checkpoint: str | Path | None = None,
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
        checkpoint: A `.safetensors` file, three times the size of float32 weights, that is written after each epoch. The
            same call on the same model goes on from there. Remove it once the model is saved.

    Returns:
        The loss of each step.

    Raises:
        MechunlearnError: There is no row, a number is out of range, the loss is not finite, or the checkpoint is damaged
            or that of another call.

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

    kept = None
    if checkpoint is not None:
        texts = json.dumps([[row.question, row.answer] for row in rows])
        call = digest(model.fingerprint, texts, repr((lr, epochs, batch_size, seed)))
        kept = _Checkpoint(Path(checkpoint), call, each)
    begun = [*kept.taken] if kept is not None else []
    for _ in begun:
        next(drawn)

    def optimiser(leaves: list[Tensor], **settings: Any) -> torch.optim.Optimizer:
        made = torch.optim.AdamW(leaves, **settings)
        if kept is not None:
            kept.bring_back(leaves, made)
            trained.write()
        return made

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
        done = train(
            trained,
            parts,
            schedule,
            objective="finetuning",
            until=kept.note if kept is not None else lambda entry: False,
            optimiser=optimiser,
            begun=begun,
            progress=progress,
        )
    model.refresh_()
    return done


class _Checkpoint:
    """Weights and AdamW's moments after the last whole epoch, in a file.

    Args:
        file: The file.
        call: A hash of the model and of all that the training depends on.
        each: Steps of an epoch.
    """

    def __init__(self, file: Path, call: str, each: int) -> None:
        self.file, self.call, self.each = file, call, each
        self.taken: list[dict[str, Any]] = []
        self._held: dict[str, Tensor] = {}
        if not file.exists():
            return
        advice = f"Remove it to begin again, or give a new file than '{file}'."
        about, self._held = tensors.load(file, {KIND: lambda held, about: (about, held)}, advice)
        if about["call"] != call:
            raise MechunlearnError(f"'{file}' is the checkpoint of another model, other rows or settings. {advice}")
        self.taken = about["steps"]

    def bring_back(self, leaves: Sequence[Tensor], mover: torch.optim.Optimizer) -> None:
        """Put leaves and moments back to where the checkpoint has them, and save those of this optimiser from now on."""
        self._leaves, self._mover = leaves, mover
        with torch.no_grad():
            for i, leaf in enumerate(leaves if self._held else ()):
                leaf.copy_(self._held[f"{i}/leaf"])
                mover.state[leaf] = {name: self._held[f"{i}/{name}"].to(leaf.device) for name in MOMENTS}
        self._held = {}

    def note(self, entry: dict[str, Any]) -> bool:
        """Save after the last step of each epoch. It never ends the training."""
        self.taken.append(entry)
        if len(self.taken) % self.each == 0:
            held = {f"{i}/leaf": leaf for i, leaf in enumerate(self._leaves)}
            for i, leaf in enumerate(self._leaves):
                held |= {f"{i}/{name}": self._mover.state[leaf][name] for name in MOMENTS}
            tensors.save(self.file, KIND, held, {"call": self.call, "steps": self.taken})
        return False


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
