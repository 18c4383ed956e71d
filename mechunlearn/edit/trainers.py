"""Objectives and masks in the trainers of others: `transformers.Trainer`, TRL, a loop of your own.

A row holds parts by name: `forget`, and `retain` or `target` (the same prompt with the answer that an edit injects) where
the objective reads them. A part is what transformers takes: `input_ids`, `labels` (-100 where a token is not scored, not
shifted) and, in a batch, `attention_mask`. The trainers of open-unlearning get the same batches.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.edit import losses
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import PAD, Prompts
from mechunlearn.training.inputs import Sequences

IGNORED = -100
PARTS = {"target_": "target", "retain_": "retain", "": "forget"}
"""The part of a batch that a loss reads, by the prefix of its arguments."""


class UnlearningTrainer(Trainer):
    """A `transformers.Trainer` that minimises an objective of `edit.losses` and moves the units of a mask only.

    It trains on loss(forget) + retain_weight * retain_loss(retain), each over the rows of its batch; a loss that reads the
    retain logits itself gets no retain term. A loss that asks for the unedited model gets a copy of the model as it was
    handed over, in evaluation mode: twice the memory. While `train` runs the model is restricted to the mask
    (`ComponentMask.restrict_`), under any torch optimiser, so weight decay moves nothing else either. Not for FSDP
    and DeepSpeed, whose optimisers hold other tensors.

    To have the same in another subclass of Trainer, put this one first: `class Mine(UnlearningTrainer, trl.SFTTrainer)`.

    Args:
        model: A Hugging Face model; `model.hf` of a hooked one, which wants `refresh_()` afterwards.
        args: The training arguments.
        loss: Of the forget rows, a function of `edit.losses` or yours. Set it with `functools.partial`.
        mask: What may move. None: whatever has `requires_grad`, such as PEFT's adapters.
        retain_loss: Of the retain rows.
        retain_weight: Weight of the retain term.
        data_collator: Makes a batch of rows, by default `collate`.
        **settings: Further arguments of the Trainer: `train_dataset`, `optimizers`, `callbacks`, ...

    Raises:
        MechunlearnError: If a loss asks for something that cannot be given.

    >>> from tempfile import mkdtemp
    >>> from transformers import TrainingArguments
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of([str(toy.neuron(0))], toy.model.signature)
    >>> rows = paired(toy.prompts([0]), toy.prompts([1, 2]))
    >>> quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
    >>> settings = TrainingArguments(mkdtemp(), max_steps=2, logging_steps=1, learning_rate=0.1, **quiet)
    >>> trainer = UnlearningTrainer(toy.model.hf, settings, loss=losses.npo, mask=mask, train_dataset=rows)
    >>> trainer.log = lambda *_: None  # or a line a step
    >>> trainer.train().global_step
    2
    """

    _signature_columns: Any

    def __init__(
        self,
        model: nn.Module,
        args: Any = None,
        *,
        loss: losses.Loss,
        mask: ComponentMask | None = None,
        retain_loss: losses.Loss = losses.cross_entropy,
        retain_weight: float = 1.0,
        data_collator: Callable[..., Any] | None = None,
        **settings: Any,
    ) -> None:
        self.loss, self.retain_loss, self.retain_weight, self.mask = loss, retain_loss, retain_weight, mask
        asked = losses.needs(loss) | (losses.needs(retain_loss) if retain_weight else frozenset())
        self.reference = _copied(model) if any("reference" in name for name in asked) else None
        super().__init__(model=model, args=args, data_collator=data_collator or collate, **settings)
        if self.reference is not None and self.place_model_on_device:
            self.reference.to(self.args.device)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, restricted to the mask.

        Args:
            args: Arguments of `Trainer.train`.
            kwargs: The same by name.
        """
        trained: Any = self.model
        with nullcontext() if self.mask is None else self.mask.restrict_(trained):
            return super().train(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the objective on a batch.

        Args:
            model: The model, as the Trainer has wrapped it.
            inputs: The batch.
            return_outputs: Whether to return outputs too: none, for there is more than one pass.
            num_items_in_batch: Not read.
        """
        value = batch_loss(
            model,
            inputs,
            self.loss,
            reference=self.reference,
            retain_loss=self.retain_loss,
            retain_weight=self.retain_weight,
        )
        return (value, {}) if return_outputs else value

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None, None]:
        """Return the objective on a batch of the evaluation set.

        Args:
            model: The model.
            inputs: The batch.
            args: Not read.
            kwargs: Not read.
        """
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the parts of a row, which are no arguments of the model."""
        self._signature_columns = list(PARTS.values())


def batch_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    loss: losses.Loss,
    *,
    reference: nn.Module | None = None,
    retain_loss: losses.Loss = losses.cross_entropy,
    retain_weight: float = 1.0,
) -> Tensor:
    """Return loss(forget) + retain_weight * retain_loss(retain) of a batch, from a Hugging Face model: one pass a part.

    Args:
        model: The model that is trained.
        batch: Parts by name, as tensors.
        loss: Of the forget rows. One that reads the retain logits itself gets no retain term.
        reference: The unedited model, where a loss asks for it.
        retain_loss: Of the retain rows.
        retain_weight: Weight of the retain term. With 0 no retain rows are read.

    Raises:
        MechunlearnError: If the batch has no such part or no token to predict, or a loss asks for a model that is not given
            or a layer that cannot be read.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> batch = collate(paired(toy.prompts([0, 1]), toy.prompts([2])))
    >>> batch_loss(toy.model.hf, batch, losses.inverted_hinge).shape
    torch.Size([])
    """
    value = _called(loss, model, batch, PARTS, reference)
    if retain_weight and not any(name.startswith("retain_") for name in losses.needs(loss)):
        value = value + retain_weight * _called(retain_loss, model, batch, {"": "retain"}, reference)
    return value


def loss_function(loss: losses.Loss) -> Callable[..., Tensor]:
    """Return a loss as `compute_loss_func` of a `transformers.Trainer` or of TRL's `SFTTrainer`, for forget rows alone.

    Such a function sees the outputs and labels of one ordinary batch: neither retain rows nor the unedited model. For these
    use `UnlearningTrainer` or `batch_loss`. Batches that are accumulated weigh as their scored tokens.

    Args:
        loss: A loss of `logits`, `labels` and `fact`: `losses.simnpo`, `inverted_hinge`, `gradient_ascent`, ...

    Raises:
        MechunlearnError: If it asks for more.

    >>> from types import SimpleNamespace
    >>> outputs, labels = SimpleNamespace(logits=torch.zeros(1, 3, 4)), torch.tensor([[-100, 1, 2]])
    >>> round(loss_function(losses.cross_entropy)(outputs, labels).item(), 4)  # log 4
    1.3863
    """
    more = losses.needs(loss) - {"logits", "labels", "fact"}
    if more:
        raise MechunlearnError(
            f"The loss '{losses.described(loss)['name']}' asks for {', '.join(sorted(more))}, and compute_loss_func is given "
            "outputs and labels only. Use UnlearningTrainer, or batch_loss in your compute_loss."
        )

    def computed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        given = _scored(outputs.logits, labels)
        value = loss(**{name: given[name] for name in losses.needs(loss)})
        return value if num_items_in_batch is None else value * len(given["labels"]) / num_items_in_batch

    return computed


def paired(forget: Prompts, retain: Prompts) -> list[dict[str, dict[str, list[int]]]]:
    """Return rows for a Trainer: each a forget fact beside a retain fact, the answers scored.

    As many as there are facts in the larger set; the smaller one begins again. Where all forget facts have an edit target,
    each row has it too.

    Args:
        forget: Facts to change.
        retain: Facts to hold.

    Raises:
        MechunlearnError: If a set is empty.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> rows = paired(toy.prompts([0]), toy.prompts([1, 2]))
    >>> len(rows), sorted(rows[0])
    (2, ['forget', 'retain', 'target'])
    """
    for name, prompts in (("forget", forget), ("retain", retain)):
        if not len(prompts):
            raise MechunlearnError(f"The {name} set is empty. Expected at least one fact; see Prompts.split.")
    parts = {"forget": _rows(forget, "answers"), "retain": _rows(retain, "answers")}
    if (forget.targets != PAD).any(1).all():
        parts["target"] = _rows(forget, "targets")
    size = max(len(forget), len(retain))
    return [{part: rows[i % len(rows)] for part, rows in parts.items()} for i in range(size)]


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Int[Tensor, "row pos"]]]:
    """Return a batch of rows, each part padded on the right: a data collator for Trainers.

    Args:
        rows: The rows; of a part, `input_ids` and `labels` are read.

    >>> part = {"input_ids": [5, 6], "labels": [-100, 6]}
    >>> batch = collate([{"forget": part}, {"forget": {"input_ids": [7], "labels": [7]}}])
    >>> batch["forget"]["labels"].tolist(), batch["forget"]["attention_mask"].tolist()
    ([[-100, 6], [7, -100]], [[1, 1], [1, 0]])
    """

    def padded(part: str, name: str, value: int) -> Tensor:
        return pad_sequence([torch.as_tensor(row[part][name]) for row in rows], batch_first=True, padding_value=value)

    batch = {}
    for part in rows[0]:
        real = [torch.ones(len(row[part]["input_ids"]), dtype=torch.long) for row in rows]
        batch[part] = {
            "input_ids": padded(part, "input_ids", 0),
            "attention_mask": pad_sequence(real, batch_first=True),
            "labels": padded(part, "labels", IGNORED),
        }
    return batch


def _copied(model: nn.Module) -> nn.Module:
    """Return a copy that is not trained. A `forward` that somebody put on a module, as TRL does, still calls the original's."""
    copied = copy.deepcopy(model).eval()
    for module in copied.modules():
        if not hasattr(module, "_hf_hook"):  # accelerate's, which a copy keeps for itself
            module.__dict__.pop("forward", None)
    return copied


def _called(
    loss: losses.Loss,
    model: nn.Module,
    batch: Mapping[str, Any],
    parts: Mapping[str, str],
    reference: nn.Module | None,
) -> Tensor:
    """Return a loss of what it asks for, each argument read from the part that its prefix names."""
    described, left = losses.described(loss), set(losses.needs(loss))
    given: dict[str, Tensor] = {}
    for prefix, part in parts.items():
        names = {name.removeprefix(prefix) for name in left if name.startswith(prefix)}
        left -= {prefix + name for name in names}
        if names and part not in batch:
            raise MechunlearnError(
                f"The loss '{described['name']}' reads {part} rows, and the batch has parts {', '.join(batch)} only. Give "
                f"each row a '{part}' (see paired){', or retain_weight=0' if part == 'retain' else ''}."
            )
        if any("reference" in name for name in names) and reference is None:
            raise MechunlearnError(f"The loss '{described['name']}' reads the unedited model. Give it as `reference`.")
        if names:
            read = _read(model, batch[part], names, reference, described["settings"].get("layer"))
            given |= {prefix + name: read[name] for name in names}
    return loss(**given)


def _read(
    model: nn.Module, part: Mapping[str, Tensor], names: set[str], reference: nn.Module | None, layer: int | None
) -> dict[str, Tensor]:
    """Return what can be asked for of a part: all that one pass gives, and of the unedited model what is asked for."""
    given = {name: part[name] for name in ("input_ids", "attention_mask") if name in part}
    deep = {} if layer is None else {"output_hidden_states": True}
    outputs = model(**given, use_cache=False, **deep)
    found = _scored(outputs.logits, part["labels"])
    if layer is not None:
        found["hidden"] = _leaving(outputs, layer, given)
    if reference is not None and any("reference" in name for name in names):
        with torch.no_grad():
            before = reference(**given, use_cache=False, **deep)
        found["reference_logits"] = _scored(before.logits, part["labels"])["logits"]
        found["reference"] = -F.cross_entropy(found["reference_logits"].float(), found["labels"], reduction="none")
        if layer is not None:
            found["reference_hidden"] = _leaving(before, layer, given)
    return found


def _scored(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return logits, labels and number of the row where a token is to be predicted; rows without one are not counted."""
    following = labels[:, 1:]
    scored = following != IGNORED
    if not scored.any():
        raise MechunlearnError(
            "No token of the batch is to be predicted: all labels are -100. Give the answers labels."
        )
    fact = scored.nonzero()[:, 0].unique_consecutive(return_inverse=True)[1]
    return {"logits": logits[:, :-1][scored], "labels": following[scored], "fact": fact}


def _leaving(outputs: Any, layer: int, given: Mapping[str, Tensor]) -> Tensor:
    """Return the residual stream that leaves a layer, at every real token."""
    last = len(outputs.hidden_states) - 2
    if not 0 <= layer < last:
        raise MechunlearnError(
            f"Cannot read what leaves layer {layer}: transformers gives it for layers 0 to {last - 1}, and of the last "
            "only what its final norm has made of it."
        )
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    hidden: Tensor = outputs.hidden_states[layer + 1][real]
    return hidden


def _rows(prompts: Prompts, which: str) -> list[dict[str, list[int]]]:
    """Return prompts followed by their answers or targets, as transformers reads them."""
    found = Sequences.of(prompts, which)
    rows = []
    for ids, labels, length in zip(found.tokens.tolist(), found.labels.tolist(), found.lengths.tolist(), strict=True):
        following = labels[:length]
        scored = [IGNORED, *(IGNORED if label == PAD else label for label in following)]
        rows.append({"input_ids": [*ids[:length], following[-1]], "labels": scored})
    return rows
