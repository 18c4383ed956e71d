"""Relearning: train an edited model on half of the forgotten facts, and see whether the other half comes back."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.attack.states import (
    GATE,
    attack_card,
    cell,
    chance,
    check_gate,
    check_sizes,
    halves,
    recovery,
    states_to_attack,
    states_to_run,
    to_frame,
)
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import measure
from mechunlearn.metrics.text import text_loss
from mechunlearn.model.hooked import HookedModel
from mechunlearn.training.loop import (
    CachedInputs,
    Schedule,
    Sequences,
    Terms,
    TopLayers,
    epochs,
    interruptible,
    text_sequences,
    train,
)
from mechunlearn.training.parameterizations import Everything, LowRank, Trainable, lora_start, slices

__all__ = ["recovery", "relearning"]

On = Literal["facts", "other facts", "text"]
RATES: Mapping[str, Sequence[float | int]] = {"lora": (1e-3, 5e-3), "full": (1e-4, 5e-4, 2e-3)}
RANK, SCALE = 16, 2.0
WATCHED, PASSAGES = 100, 32


@dataclass(frozen=True)
class _Plan:
    """What is the same for every state and setting."""

    steps: int
    eval_every: int
    rank: int | None
    batch_size: int
    seed: int
    on: On


def relearning(
    model: HookedModel,
    edit: Edit | None,
    forget: Prompts,
    retain: Prompts,
    *,
    extra_edits: Mapping[str, Edit | HookedModel | None] | None = None,
    baseline_rows: pd.DataFrame | None = None,
    on: On = "facts",
    lrs: Mapping[str, Sequence[float | int]] = RATES,
    steps: int = 20,
    eval_every: int = 5,
    rank: int | None = None,
    batch_size: int = 64,
    min_retention: float | int = GATE,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Try to get edited facts back: train on half of them, and measure the other half.

    minimise  CE(truth of half of the forget facts) + CE(half of the retain facts) + CE(text)

    on the edited model, for every method and rate of `lrs`: `lora` trains adapters of rank `rank` (16 unless given, less
    where a matrix is smaller; alpha 2 rank, B = 0) on all linear maps of all layers, `full` every parameter. AdamW,
    cosine schedule, gradients clipped to norm 1; each step reads `batch_size` truths, as many retain facts and a quarter as
    many passages. (Mechanistic Unlearning, arXiv 2410.12949, has LoRA of rank 512 at 2e-4 and 20 steps for models of
    billions of weights. The rates here are for the shipped world: give your model's own, over a factor of ten or more.)

    `on="other facts"` trains on facts that share nothing with the held-out ones instead: other relations of retain subjects none
    of whose names a forgotten subject has, and text; `on="text"` on text alone. All forget facts are then held out. What
    such training brings back was never told to the model again.

    The same is done to the `unedited` model (the ceiling), to the unedited model with facts that it was `never taught`
    (`forget.facts.untaught`, as many as forget facts: the floor), and to what is given in `extra_edits`: further edits, models, or
    None for the model as it is. Edits that are compared go in one call, which runs ceiling and floor once; `baseline_rows` are
    rows of an earlier call on the same model, facts and settings, whose ceiling and floor are taken as they are; without an edit (None) these two are run alone.

    One row a state, method, rate and measured step (0, every `eval_every`, the last): accuracy (greedy, full vocabulary) on the
    half `held out` with its 95 % bootstrap interval `low` to `high` over `n` facts, and on the half `trained`; on `retain` facts
    (at most 100) that the attack does not train on; mean `option probability` of the truth held out, and `text loss` in
    nats on passages that nothing trains on (NaN where there are none); `chance`, the share of the most frequent truth
    among those held out; and whether `retain` reaches the `min_retention` (`valid`). `recovery` reads them; `attrs["card"]` is the run card.

    The model is left as it was, bit by bit, also after an error; Ctrl-C ends the attack with KeyboardInterrupt and no
    rows, because half an attack would pass for robustness. A loss that is not finite ends its setting, as collapsed.
    Memory: `full` holds four float32 copies of the model beside it.

    Raises `MechunlearnError` for fewer than two forget or retain facts, no rates or unknown methods, a rank that does not
    fit, and a model that knows less of the retain facts than the gate asks for. Not for edits that are to hold against a
    prompt alone: it speaks of those who can train the weights.

    >>> from mechunlearn.edit import masked_gradient
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    >>> forget, retain = toy.prompts([0, 1, 2, 3]), toy.prompts([4, 5, 6, 7])
    >>> edit = masked_gradient(toy.model, mask, forget, retain, steps=20, lr=0.1)
    >>> rows = relearning(toy.model, edit, forget, retain, lrs={"full": [1e-3]}, steps=2)
    >>> rows[["state", "step", "held out", "n"]].values.tolist()[0]
    ['edited', 0, 0.0, 2]
    """
    watch = Stopwatch()
    _check(forget, retain, lrs, steps, eval_every)
    plan = _Plan(steps, eval_every, rank, batch_size, seed, on)
    states = states_to_attack(model, edit, forget, extra_edits, seed)
    if "lora" in lrs:
        for state in states:
            _rank(state.model, rank)
    check_gate(model, _watched(retain, seed), min_retention)
    settings = {"lrs": {name: list(chosen) for name, chosen in lrs.items()}, "min_retention": min_retention} | asdict(
        plan
    )
    card = attack_card("relearning", model, edit, forget, retain, seed, settings)
    text = forget.facts.texts if forget.facts is not None else ()
    tried = [(method, rate) for method, chosen in lrs.items() for rate in chosen]
    rows: list[dict] = []
    with interruptible() as asked:
        for state in states_to_run(states, baseline_rows, card):
            with state.applied() as target:
                attack = _Attack(state.name, target, state.facts, retain, text, plan)
                for method, rate in track(tried, f"relearning, {state.name}", disable=not progress, transient=True):
                    curve = attack.curve(method, rate)
                    if asked:
                        raise KeyboardInterrupt
                    rows += [
                        {**row, "setting": f"{method} {rate:g}", "method": method, "lr": float(rate)} for row in curve
                    ]
    return to_frame(rows, baseline_rows, min_retention, card, watch)


def _check(
    forget: Prompts,
    retain: Prompts,
    lrs: Mapping[str, Sequence[float | int]],
    steps: int,
    eval_every: int,
) -> None:
    check_sizes(forget, retain)
    chosen = [rate for given in lrs.values() for rate in given]
    if (
        not all(lrs.values())
        or not chosen
        or not lrs.keys() <= set(RATES)
        or not 0 < min(chosen) <= max(chosen) <= 1000
    ):
        raise MechunlearnError(
            f"The rates are {dict(lrs)}. Expected learning rates above 0 and up to 1000 for 'lora', 'full' or both, for "
            "example {'full': [1e-4, 1e-3]}."
        )
    if steps < 1 or eval_every < 1:
        raise MechunlearnError(f"Cannot measure every {eval_every} of {steps} steps. Expected at least 1 for both.")


def _rank(model: HookedModel, rank: int | None) -> int:
    """The rank of the adapters: as given, or as large as fits up to 16."""
    most = min(
        min(part.parameter.shape) for part in slices(model, ComponentMask.everything(model)) if part.parameter.ndim == 2
    )
    if rank is not None and not 0 < rank <= most:
        raise MechunlearnError(
            f"A rank of {rank} does not fit this model ({model.signature}): its smallest matrix has {most} rows or "
            f"columns. Give a rank from 1 to {most}."
        )
    return min(RANK, most) if rank is None else rank


def _watched(retain: Prompts, seed: int) -> Prompts:
    """The retain facts that the gate is measured on: none of them is trained on."""
    return replace(retain.select(halves(len(retain), seed)[1][:WATCHED]), options=())


class _Attack:
    """One state of a model, and the sets that it is trained and measured on."""

    def __init__(
        self, state: str, model: HookedModel, facts: Prompts, retain: Prompts, text: Sequence[str], plan: _Plan
    ) -> None:
        self.state, self.model, self.facts, self.plan = state, model, facts, plan
        self.taught, self.held_out = halves(len(facts), plan.seed)
        self.watched = _watched(retain, plan.seed)
        self.passages = tuple(text[1::2][:: max(1, math.ceil(len(text[1::2]) / PASSAGES))])
        self.sets: dict[str, Sequences] = {}
        if plan.on == "facts":
            self.sets = {
                "truth": Sequences.of(facts.select(self.taught)),
                "retain": Sequences.of(retain.select(halves(len(retain), plan.seed)[0])),
            }
        else:
            self.taught, self.held_out = self.taught[:0], torch.arange(len(facts))
        if plan.on == "other facts":
            self.sets["truth"] = Sequences.of(_unrelated(model, facts, retain))
        self.sets["text"] = text_sequences(model, text[::2])
        if not any(map(len, self.sets.values())):
            raise MechunlearnError("These facts come without text, so nothing can be relearned from text alone.")
        self.chance = chance(facts.select(self.held_out))
        self.before = self.measured(0)

    def measured(self, step: int) -> dict:
        """What the model knows now."""
        found = measure(self.model, self.facts)
        options = found.get("option probability", torch.full((len(self.facts),), math.nan))
        return cell(self.state, "", found["accuracy"][self.held_out], self.plan.seed) | {
            "step": step,
            "trained": float(found["accuracy"][self.taught].mean()),
            "retain": float(measure(self.model, self.watched)["accuracy"].mean()),
            "option probability": float(options[self.held_out].mean()),
            "text loss": float(text_loss(self.model, self.passages).mean()) if self.passages else math.nan,
            "chance": self.chance,
        }

    def curve(self, method: str, lr: float | int) -> list[dict]:
        """What was measured before, during and after training; the model is put back as it was.

        Raises `KeyboardInterrupt` if Ctrl-C ended it.
        """
        plan, rows, reached = self.plan, [self.before], 0
        trained: Trainable = Everything(self.model) if method == "full" else self._adapters()
        streams = self._streams(TopLayers(self.model, trained.lowest))

        def parts() -> Iterator[Terms]:
            yield {name: (1.0, 1.0, _loss(stream, next(drawn))) for name, (stream, drawn) in streams.items()}

        def after(step: int) -> dict:
            nonlocal reached
            reached = step
            if step % plan.eval_every == 0 or step == plan.steps:
                rows.append(self.measured(step))
            return {}

        try:
            with trained.attached():
                try:
                    done = train(trained, parts, Schedule(plan.steps, lr), objective="relearning", after=after)
                except _Diverged:
                    return rows if rows[-1]["step"] == reached else [*rows, self.measured(reached)]
        finally:
            trained.restore()
        if done.stopped:
            raise KeyboardInterrupt
        return rows

    def _streams(self, upper: TopLayers) -> dict[str, tuple[CachedInputs, Iterator[Tensor]]]:
        """The sets as the model reads them, and the rows of one step after another."""
        generator = torch.Generator().manual_seed(self.plan.seed)
        sizes = {
            "truth": self.plan.batch_size,
            "retain": self.plan.batch_size,
            "text": max(1, self.plan.batch_size // 4),
        }
        return {
            name: (CachedInputs(upper, sequences), epochs(len(sequences), sizes[name], generator))
            for name, sequences in self.sets.items()
            if len(sequences)
        }

    def _adapters(self) -> Trainable:
        """Ordinary LoRA on every linear map: A uniform as peft has it, B zero."""
        model, plan = self.model, self.plan
        rank = _rank(model, plan.rank)
        return LowRank(model, ComponentMask.everything(model), rank, SCALE, lora_start(plan.seed))


def _unrelated(model: HookedModel, facts: Prompts, retain: Prompts) -> Prompts:
    """Other relations of retain subjects who share no name with a subject that is to be recalled."""
    source, kept = facts.facts, retain.facts
    related = [] if kept is None else list(kept.related.values())
    if source is None or kept is None or not related:
        raise MechunlearnError(
            "on='other facts' needs facts of other relations, and these facts come without any. Use on='facts' or on='text'."
        )
    names = {word for subject in source.subjects for word in subject.split()}
    apart = {subject for subject in kept.subjects if not names & set(subject.split())}
    rows = [part.prompts(model) for each in related if len(part := each.about(apart))]
    if not rows:
        raise MechunlearnError(
            f"Every one of the {len(kept.subjects)} retain subjects shares a name with a forgotten one, so there are no facts "
            "that tell nothing of those. Forget fewer facts, or give more to retain."
        )
    assert model.tokenizer is not None
    return Prompts.from_text([query for part in rows for query in part.queries], model.tokenizer)


class _Diverged(Exception):
    """The loss is not finite."""


def _loss(stream: CachedInputs, rows: Int[Tensor, " row"]) -> Float[Tensor, ""]:
    """Cross-entropy of these rows. Raises `_Diverged`."""
    read = stream.read(rows, {"logits", "labels"})
    value = F.cross_entropy(read["logits"].float(), read["labels"])
    if not torch.isfinite(value):
        raise _Diverged
    return value
