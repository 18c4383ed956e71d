"""What gradient editors minimise: a forget term, a retain term and text, over the trained part of a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.runcard import RunCard
from mechunlearn.edit import losses
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.component import Component
from mechunlearn.training.loop import (
    CachedInputs,
    Schedule,
    Sequences,
    Terms,
    TopLayers,
    epochs,
    text_sequences,
    train,
)
from mechunlearn.training.parameterizations import LowRank, SelectedRows

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
Measure = Callable[[int], dict[str, Any] | None]


@dataclass(frozen=True)
class Objective:
    """forget_weight * loss(forget) + retain_weight * retain_loss(retain) + text_weight * CE(texts), and how it is read.

    A loss that takes the retain logits itself (`losses.gradient_difference`) gets no retain term beside it. The
    settings are those of `edit.masked_gradient`.

    Attributes:
        loss: Of the forget facts.
        retain_loss: Of the retain facts.
        forget_weight: Weight of the forget term.
        retain_weight: Weight of the retain term.
        text_weight: Weight of the text term.
        texts: Ordinary text, by default the forget data set's.
        batch_size: Forget facts a step.
        accumulate: Parts of a batch.
        stop_at: Share of the forget facts at which training ends.
        cache: Whether constants are kept.
    """

    loss: losses.Loss
    retain_loss: losses.Loss
    forget_weight: float
    retain_weight: float
    text_weight: float
    texts: Sequence[str] | None
    batch_size: int
    accumulate: int
    stop_at: float | None
    cache: bool


def objective_named(name: str, mask: ComponentMask) -> dict[str, Any]:
    """Return the settings of a named objective; RMU reads the highest masked layer.

    Args:
        name: One of `OBJECTIVES`.
        mask: The mask that is edited.

    Raises:
        MechunlearnError: For an unknown name.
    """
    if name not in OBJECTIVES:
        raise MechunlearnError(f"Unknown objective '{name}'. Expected one of {', '.join(OBJECTIVES)}.")
    highest = max((Component.parse(site).layer for site, chosen in mask.sites.items() if chosen.any()), default=0)
    return {
        key: partial(value, layer=highest) if value in (losses.rmu, losses.rmu_retain) else value
        for key, value in OBJECTIVES[name].items()
    }


def training_texts(forget: Any, texts: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the texts given or, of `None`, the half of the forget data set's that editors may train on.

    The other half measures the loss of ordinary text.

    Args:
        forget: The forget set; plain texts and tokens come with none.
        texts: What was given.
    """
    if texts is not None:
        return tuple(texts)
    facts = forget.facts if isinstance(forget, Prompts) else None
    return facts.texts[::2] if facts is not None else ()


class LossInputs:
    """A loss, and the streams that it reads its arguments from.

    Args:
        loss: The loss.
        upper: The trained part of the model.
        sets: By prefix of argument names ('', 'target_', 'retain_'): which draw of rows it reads, and the sequences.
    """

    def __init__(
        self, loss: losses.Loss, upper: TopLayers, sets: Mapping[str, tuple[str, Callable[[], Sequences]]]
    ) -> None:
        self.loss = loss
        self.streams: dict[str, tuple[str, CachedInputs, frozenset[str]]] = {}
        layer = losses.described(loss)["settings"].get("layer")
        if layer is not None and upper.layer is not None and not upper.layer <= layer < upper.model.signature.layers:
            raise MechunlearnError(
                f"{losses.described(loss)['name']} reads layer {layer}, but the lowest masked layer is {upper.layer} "
                "of "
                f"{upper.model.signature.layers}: no selected weight could move what it reads. Give a layer from "
                f"{upper.layer} to {upper.model.signature.layers - 1}, or another mask."
            )
        left = losses.needs(loss)
        for prefix in sorted(sets, reverse=True):
            mine = frozenset(name for name in left if name.startswith(prefix))
            left -= mine
            if mine:
                draw, sequences = sets[prefix]
                wanted = frozenset(name.removeprefix(prefix) for name in mine)
                self.streams[prefix] = draw, CachedInputs(upper, sequences(), wanted, layer), wanted

    def __call__(self, drawn: Mapping[str, Tensor]) -> Tensor:
        """Return the loss on these rows of each draw."""
        return self.loss(
            **{
                prefix + name: tensor
                for prefix, (draw, stream, wanted) in self.streams.items()
                for name, tensor in stream.read(drawn[draw], wanted).items()
            }
        )


def descend_on(
    trained: SelectedRows | LowRank,
    forget: Prompts,
    retain: Prompts,
    objective: Objective,
    schedule: Schedule,
    measure: Measure | None,
    seed: int,
    progress: bool,
) -> WeightEdit:
    """Minimise an objective over rows or adapters of a model, and return what they have become.

    Each step reads `batch_size` forget facts, as many retain facts and a quarter as many texts, in `accumulate` parts
    of which each weighs as its share of the sequences. The model is left as it was.

    Args:
        trained: What moves.
        forget: Facts to change.
        retain: Facts to hold.
        objective: What is minimised.
        schedule: Steps and learning rates.
        measure: Called with the number of each step. What it returns goes on the card; a true `stop` in it ends
            training.
        seed: Seed of the order of the facts.
        progress: Whether to show a bar.

    Returns:
        The edit, with the trajectory and the reason of its end on its card.

    Raises:
        MechunlearnError: For an empty set, a loss that no trained weight can move, and a term that is not finite.
    """
    for name, prompts, weight in (("forget", forget, 1), ("retain", retain, objective.retain_weight)):
        if weight and not len(prompts):
            raise MechunlearnError(f"The {name} set is empty. Expected at least one fact; see Prompts.split.")
    model, batch, stop_at, shuffled = trained.model, objective.batch_size, objective.stop_at, torch.Generator()
    shuffled.manual_seed(seed)
    answers, retained = partial(Sequences.of, forget), partial(Sequences.of, retain)
    targets = partial(Sequences.of, forget, "targets")
    texts = text_sequences(model, training_texts(forget, objective.texts) if objective.text_weight else ())
    with ExitStack() as attached:
        attached.enter_context(trained.attached())
        attached.callback(trained.restore)
        upper = TopLayers(model, trained.lowest, objective.cache)
        sets = {"": ("forget", answers), "target_": ("forget", targets), "retain_": ("retain", retained)}
        removed = LossInputs(objective.loss, upper, sets)
        terms = {"forget": (objective.forget_weight, removed)}
        if objective.retain_weight and "retain_" not in removed.streams:
            kept = LossInputs(objective.retain_loss, upper, {"": ("retain", retained)})
            terms["retain"] = (objective.retain_weight, kept)
        if len(texts):
            ordinary = LossInputs(losses.cross_entropy, upper, {"": ("text", lambda: texts)})
            terms["text"] = (objective.text_weight, ordinary)
        draws = {
            "forget": epochs(len(forget), batch, shuffled),
            "retain": epochs(len(retain), batch, shuffled),
            "text": epochs(len(texts), max(1, batch // 4), shuffled),
        }
        used = [name for name in draws if name in terms or f"{name}_" in removed.streams]

        def parts() -> Iterator[Terms]:
            drawn = {name: next(draws[name]) for name in used}
            for i in range(objective.accumulate):
                chunks = {name: torch.tensor_split(rows, objective.accumulate)[i] for name, rows in drawn.items()}
                found = {
                    name: (len(chunks[name]) / len(drawn[name]), weight, loss(chunks))
                    for name, (weight, loss) in terms.items()
                    if len(chunks[name])
                }
                if found:
                    yield found

        aimed = "target_" in removed.streams
        judged = removed.streams["target_"][1] if aimed else CachedInputs(upper, answers())

        def after(step: int) -> dict[str, Any]:
            entry = dict((measure(step) if measure else None) or {})
            if stop_at is not None and (step % CHECK_EVERY == 0 or step == schedule.steps):
                right = float(judged.right().float().mean())
                entry["efficacy"] = right if aimed else 1 - right
            return entry

        def until(entry: dict[str, Any]) -> bool:
            return bool(entry.get("stop")) or (stop_at is not None and entry.get("efficacy", -1) >= stop_at)

        name = losses.described(objective.loss)["name"]
        done = train(trained, parts, schedule, objective=name, after=after, until=until, progress=progress)
        card = RunCard("", trajectory=done.trajectory, stopped=done.stopped)
        units, rows, low_rank = trained.change()
        return WeightEdit(units, rows, model.signature, card, low_rank)
