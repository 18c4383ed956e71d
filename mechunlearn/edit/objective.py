"""What gradient editors minimise: a forget term, a retain term and text, over the trained part of a model."""

import math
import warnings
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
from mechunlearn.edit.goal import OWN, OWN_TOKENS, Goal, Judge, Reached
from mechunlearn.edit.loss_inputs import LossInputs
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.samples import own_texts
from mechunlearn.training.adapters import LowRank
from mechunlearn.training.inputs import Sequences, TopLayers, text_sequences
from mechunlearn.training.loop import Schedule, Terms, TrainResult, epochs, train
from mechunlearn.training.parameterizations import SelectedRows
from mechunlearn.training.precision import products_named
from mechunlearn.training.preconditioning import MatrixAdam, turned_away

CHECK_EVERY = 5
LADDER, STEPS, PATIENCE = (5e-4, 2e-3, 8e-3, 3.2e-2), 50, 15
"""Learning rates to try, as shares of the root mean square of what is trained; the steps of each, at most; how many of
them an attempt has to show that it gets somewhere."""
LOW = 6
"""An attempt gets somewhere if its forget term is on the way to this part of what it was."""
HOLD, HELD_LADDER = 400.0, (3e-3, 1.2e-2, 4.8e-2)
"""Weight of the second moment of held text, and the learning rates of gradients that are turned away from it."""
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
    """forget_weight * loss(forget) + retain_weight * retain_loss(retain) + text_weight * text_loss(texts), and how it is read.

    A loss that takes the retain logits itself (`losses.gradient_difference`) gets no retain term beside it. The
    settings are those of `edit.masked_gradient`.

    Attributes:
        loss: Of the forget facts.
        retain_loss: Of the retain facts.
        text_loss: Of ordinary text.
        forget_weight: Weight of the forget term.
        retain_weight: Weight of the retain term.
        text_weight: Weight of the text term.
        texts: Ordinary text, by default the forget data set's, or else the model's own.
        batch_size: Forget facts a step.
        accumulate: Parts of a batch.
        stop_at: Share of the forget facts at which training ends.
        cache: Whether constants are kept.
    """

    loss: losses.Loss
    retain_loss: losses.Loss
    text_loss: losses.Loss
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


def held_texts(model: HookedModel, forget: Any, texts: Sequence[str] | None) -> tuple[str, ...]:
    """Return the texts that an editor holds: `training_texts`, or samples of the model itself where there are none.

    Args:
        model: The model. One without a tokenizer writes no text.
        forget: The forget set.
        texts: What was given.
    """
    found = training_texts(forget, texts)
    if found or texts is not None or model.tokenizer is None:
        return found
    return own_texts(model, OWN, OWN_TOKENS)[::2]


def descend_on(
    trained: SelectedRows | LowRank,
    forget: Prompts,
    retain: Prompts,
    objective: Objective,
    goal: Goal,
    lr: float | None,
    steps: int | None,
    schedule: tuple[int, float, float],
    measure: Measure | None,
    seed: int,
    progress: bool,
    held_weight: float | None = 0.0,
) -> WeightEdit:
    """Minimise an objective over rows or adapters of a model, and return what they have become.

    Each step reads `batch_size` forget facts, as many retain facts and a quarter as many texts, in `accumulate` parts
    of which each weighs as its share of the sequences. The model is left as it was.

    Args:
        trained: What moves.
        forget: Facts to change.
        retain: Facts to hold.
        objective: What is minimised.
        goal: What is wanted. `Goal.search` tries the learning rates of `LADDER`; an attempt ends as soon as the facts
            are edited, and early if it gets nowhere (`_hopeless`) and a larger rate is left; that one goes on from
            there.
        lr: Largest learning rate. Giving it, or the steps, turns the search off.
        steps: Optimiser steps.
        schedule: The rest of `Schedule`: warm-up, clipping, weight decay.
        measure: Called with the number of each step. What it returns goes on the card; a true `stop` in it ends
            training.
        seed: Seed of the order of the facts.
        progress: Whether to show a bar.
        held_weight: Of the inputs that held text gives the trained rows, which gradients are turned away from
            (`preconditioning.turned_away`). None: `HOLD` where the learning rate is searched, else 0.

    Returns:
        The edit, with the trajectory, the reason of its end and what was searched on its card.

    Raises:
        MechunlearnError: For an empty set, a loss that no trained weight can move, and a term that is not finite.
    """
    for name, prompts, weight in (("forget", forget, 1), ("retain", retain, objective.retain_weight)):
        if weight and not len(prompts):
            raise MechunlearnError(f"The {name} set is empty. Expected at least one fact; see Prompts.split.")
    model, batch, stop_at = trained.model, objective.batch_size, objective.stop_at
    answers, retained = partial(Sequences.of, forget), partial(Sequences.of, retain)
    targets = partial(Sequences.of, forget, "targets")
    texts = text_sequences(model, held_texts(model, forget, objective.texts) if objective.text_weight else ())
    searching = lr is None and steps is None
    weight = (HOLD if searching else 0.0) if held_weight is None else held_weight
    ladder: tuple[float, ...] = LADDER
    optimiser: type[torch.optim.Optimizer] = torch.optim.AdamW
    if weight and isinstance(trained, SelectedRows):
        held = [texts, *([retained()] if objective.retain_weight else [])]
        trained.turns = turned_away(trained, held, weight)
        ladder, optimiser = HELD_LADDER, MatrixAdam
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
            ordinary = LossInputs(objective.text_loss, upper, {"": ("text", lambda: texts)})
            terms["text"] = (objective.text_weight, ordinary)
        judge = Judge(upper, forget, retain, "target_" in removed.streams, whole=searching)
        name = losses.described(objective.loss)["name"]

        def trajectory(
            schedule: Schedule, enough: float | None, search: bool = False, last: bool = True
        ) -> TrainResult:
            shuffled, entries = torch.Generator(), []
            shuffled.manual_seed(seed)
            size = min(batch, len(forget)) if search else batch
            draws = {
                "forget": epochs(len(forget), size, shuffled),
                "retain": epochs(len(retain), min(batch, 2 * size), shuffled),
                "text": epochs(len(texts), max(1, size // 4), shuffled),
            }
            used = [name for name in draws if name in terms or f"{name}_" in removed.streams]
            ahead = search and objective.accumulate == 1 and size == len(forget) and judge.stream in removed.streams
            ahead = ahead and "logits" in removed.streams[judge.stream][2]
            upcoming: list[Tensor] = []  # of the forget facts, drawn before its step
            removed.drop()

            def efficacy() -> float:
                if not ahead:
                    return judge.efficacy()
                upcoming[:] = [next(draws["forget"])]
                return judge.share(removed.right(judge.stream, upcoming[0]))

            def parts() -> Iterator[Terms]:
                drawn = {name: upcoming.pop() if name == "forget" and upcoming else next(draws[name]) for name in used}
                for i in range(objective.accumulate):
                    chunks = {name: torch.tensor_split(rows, objective.accumulate)[i] for name, rows in drawn.items()}
                    found = {
                        name: (len(chunks[name]) / len(drawn[name]), weight, loss(chunks))
                        for name, (weight, loss) in terms.items()
                        if len(chunks[name])
                    }
                    if found:
                        yield found

            def after(step: int) -> dict[str, Any]:
                entry = dict((measure(step) if measure else None) or {})
                if enough is not None and (search or step % CHECK_EVERY == 0 or step == schedule.steps):
                    entry["efficacy"] = efficacy()
                    if search and entry["efficacy"] >= enough:
                        entry["retention"] = judge.retention()
                return entry

            def until(entry: dict[str, Any]) -> bool:
                entries.append(entry)
                reached = enough is not None and entry.get("efficacy", -1) >= enough
                reached &= not entry.get("retention", 1) < goal.min_retention
                return bool(entry.get("stop")) or reached or (not last and _hopeless(entries))

            return train(
                trained,
                parts,
                schedule,
                objective=name,
                after=after,
                until=until,
                optimiser=optimiser,
                progress=progress,
            )

        search: list[dict[str, Any]] = []
        if not searching:
            usual = ladder[1] * typical(trained) if lr is None else lr
            if lr is None:
                warnings.warn(
                    f"steps={steps} without lr turns the search off and trains once, at a gentle rate ({usual:.2g}) that "
                    "may change no fact. Give lr as well, or neither of them, and the rate is searched.",
                    stacklevel=4,
                )
            done = trajectory(Schedule(STEPS if steps is None else steps, usual, *schedule), stop_at)
        else:
            whole, rungs = TrainResult(), [share * typical(trained) for share in ladder]

            def attempt(lr: float) -> tuple[tuple[TrainResult, list[Tensor]], dict[str, Any], Reached]:
                part = trajectory(Schedule(STEPS, lr, *schedule), goal.efficacy, search=True, last=lr == rungs[-1])
                whole.trajectory += [
                    {**entry, "step": i} for i, entry in enumerate(part.trajectory, len(whole.trajectory) + 1)
                ]
                if part.stopped == "interrupted":
                    rungs.clear()  # this ends the search
                leaves = [leaf.detach().clone() for leaf in trained.leaves]
                made = TrainResult([*whole.trajectory], part.stopped), leaves
                return made, {"lr": lr, "steps": len(part.trajectory)}, judge.reached()

            (done, leaves), search = goal.search(rungs, attempt)
            with torch.no_grad():
                for leaf, value in zip(trained.leaves, leaves, strict=True):
                    leaf.copy_(value)
            trained.write()
        made_in = products_named(model)
        card = RunCard("", products=made_in, trajectory=done.trajectory, stopped=done.stopped, search=search)
        units, rows, low_rank = trained.change()
        return WeightEdit(units, rows, model.signature, card, low_rank)


def typical(trained: SelectedRows | LowRank) -> float:
    """Return the root mean square of the numbers that are trained; 1 if all are zero.

    Args:
        trained: What moves.
    """
    squares = sum(float(leaf.detach().pow(2).sum()) for leaf in trained.leaves)
    return math.sqrt(squares / sum(leaf.numel() for leaf in trained.leaves)) or 1.0


def _hopeless(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no fact is edited half-way, or the forget term would not be low at the end if it went on as it did of late.

    It is taken to fall by the same factor for the same sum of learning rates, the cosine's.
    """
    step = len(entries)
    if step < PATIENCE or step % CHECK_EVERY or entries[-1]["efficacy"] >= 0.5:
        return False
    if step >= STEPS / 2 and not entries[-1]["efficacy"]:
        return True
    first, then, now = (entries[i]["forget"] for i in (0, -1 - CHECK_EVERY, -1))
    spent_then, spent = (i / STEPS + math.sin(math.pi * i / STEPS) / math.pi for i in (step - CHECK_EVERY, step))
    if not 0 < now < then:
        return bool(first > 0)
    return bool(now * (now / then) ** ((1 - spent) / (spent - spent_then)) > first / LOW)
