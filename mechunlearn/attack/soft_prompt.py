"""Soft prompts: learn a prefix of embedding vectors that brings half of the forgotten facts back, and measure the other half."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.attack.states import (
    GATE,
    State,
    attack_card,
    cell,
    chance,
    check_gate,
    check_sizes,
    halves,
    states_to_attack,
    states_to_run,
    to_frame,
)
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import PAD, Prompts
from mechunlearn.metrics.answers import BATCH, answer_logprob, positions_read
from mechunlearn.model.hooked import HookedModel, frozen
from mechunlearn.model.taps import tapped
from mechunlearn.training.loop import Schedule, Terms, epochs, interruptible, train
from mechunlearn.training.parameterizations import add_gradients

RATES = (3e-3, 3e-2)
WATCHED = 100


@dataclass(frozen=True)
class _Plan:
    """What is the same for every state and rate."""

    tokens: int
    steps: int
    eval_every: int
    batch_size: int
    seed: int


def soft_prompt(
    model: HookedModel,
    edit: Edit | None,
    forget: Prompts,
    retain: Prompts,
    *,
    extra_edits: Mapping[str, Edit | HookedModel | None] | None = None,
    baseline_rows: pd.DataFrame | None = None,
    tokens: int = 8,
    lrs: Sequence[float | int] = RATES,
    steps: int = 60,
    eval_every: int = 15,
    batch_size: int = 16,
    min_retention: float | int = GATE,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Try to get edited facts back with a learned prefix: no weight is touched, the input alone.

    minimise  CE(truth of half of the forget facts) + CE(half of the retain facts)

    over `tokens` embedding vectors that stand in front of every prompt, one prefix for all facts (prompt tuning, arXiv
    2104.08691; against unlearned models in arXiv 2402.09063). They begin as the embeddings of random tokens, drawn by `seed`;
    Adam, cosine schedule, gradients clipped to norm 1; each step reads `batch_size` truths and as many retain facts. The
    `lrs` are in units of the embeddings' root mean square, so that they serve models of any scale. The budget
    (`tokens`, `steps`) is part of the result: whatever a prefix of this length learns in so many steps.

    The same is done to the `unedited` model (the ceiling), to the unedited model with facts that it was `never taught` (the
    floor: what a prefix can say of answers without knowing the subject), and to what is given in `extra_edits`: further edits,
    models, or None for the model as it is. `baseline_rows` are rows of an earlier call on the same model, facts and settings, whose
    ceiling and floor are taken as they are.

    One row a state, rate and measured step (0 without any prefix, every `eval_every`, the last): accuracy behind the prefix
    (greedy, full vocabulary) on the half `held out` with its 95 % bootstrap interval `low` to `high` over `n` facts, and on
    the half `trained`; on `retain` facts (at most 100) that the prefix is not trained on, behind the prefix too; `rate`,
    `chance`, and whether `retain` reaches the `min_retention` (`valid`). `recovery` reads them; `attrs["card"]` is the run card.

    The model is left as it was, bit by bit, also after an error; Ctrl-C ends the attack with KeyboardInterrupt and no
    rows. A loss that is not finite ends its setting, as collapsed.

    Raises `MechunlearnError` for fewer than two forget or retain facts, rates that are none, a prefix that does not fit the
    model's positions, and a model that knows less of the retain facts than the gate asks for. Not a prompt that anyone
    could type: its vectors are no tokens, so it speaks of those who hold the model.

    >>> from mechunlearn.artifacts.mask import ComponentMask
    >>> from mechunlearn.edit import masked_gradient
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    >>> forget, retain = toy.prompts([0, 1, 2, 3]), toy.prompts([4, 5, 6, 7])
    >>> edit = masked_gradient(toy.model, mask, forget, retain, steps=20, lr=0.1)
    >>> rows = soft_prompt(toy.model, edit, forget, retain, tokens=2, lrs=[0.01], steps=2)
    >>> rows[["state", "step", "held out", "n"]].values.tolist()[0]
    ['edited', 0, 0.0, 2]
    """
    watch = Stopwatch()
    check_sizes(forget, retain)
    if not lrs or not 0 < min(lrs) <= max(lrs) <= 1000:
        raise MechunlearnError(f"The rates are {list(lrs)}. Expected learning rates above 0 and up to 1000.")
    if min(tokens, steps, eval_every, batch_size) < 1:
        raise MechunlearnError(
            f"Cannot train {tokens} tokens for {steps} steps of {batch_size} facts, measured every {eval_every}. Expected at least 1 each."
        )
    plan = _Plan(tokens, steps, eval_every, batch_size, seed)
    states = states_to_attack(model, edit, forget, extra_edits, seed)
    for state in states:
        _check_room(state, retain, tokens)
    trained_on, watched = (retain.select(rows) for rows in halves(len(retain), seed))
    watched = watched.select(range(min(WATCHED, len(watched))))
    check_gate(model, watched, min_retention)
    settings = {"lrs": list(lrs), "min_retention": min_retention} | asdict(plan)
    card = attack_card("soft_prompt", model, edit, forget, retain, seed, settings)
    rows: list[dict] = []
    with interruptible() as asked:
        for state in states_to_run(states, baseline_rows, card):
            with state.applied(), frozen(state.model.hf):
                for rate in track(lrs, f"soft prompt, {state.name}", disable=not progress, transient=True):
                    curve = _curve(state, trained_on, watched, rate, plan)
                    if asked:
                        raise KeyboardInterrupt
                    rows += curve
    return to_frame(rows, baseline_rows, min_retention, card, watch)


class _Prefix:
    """The vectors in front of a prompt: a float32 leaf, in units of the embeddings' root mean square."""

    lowest: int | None = None

    def __init__(self, model: HookedModel, tokens: int, seed: int) -> None:
        embed: Any = model.hf.get_input_embeddings()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(embed.weight), (tokens,), generator=generator)
        with torch.no_grad():
            start = embed(drawn.to(model.device)).float()
        self.model, self.size = model, float(start.square().mean().sqrt())
        self.leaves = [(start / self.size).requires_grad_()]

    @property
    def vectors(self) -> Float[Tensor, "token d_model"]:
        return self.leaves[0] * self.size

    def attached(self) -> AbstractContextManager[None]:
        """The model's own parameters get no gradient; the prefix is read where logits are made."""
        return frozen(self.model.hf)

    def gradient(self, loss: Tensor) -> None:
        add_gradients(loss, self.leaves, self.leaves)

    def write(self) -> None:
        """Nothing to do: the model reads the leaf itself."""

    def restore(self) -> None:
        """Nothing to do: the model's weights were never written."""


class _Diverged(Exception):
    """The loss is not finite."""


def _curve(state: State, retain: Prompts, watched: Prompts, lr: float | int, plan: _Plan) -> list[dict]:
    """What was measured without a prefix, and during and after its training. Raises `KeyboardInterrupt` after Ctrl-C."""
    taught, held_out = (state.facts.select(rows) for rows in halves(len(state.facts), plan.seed))
    prefix = _Prefix(state.model, plan.tokens, plan.seed)
    generator = torch.Generator().manual_seed(plan.seed)
    sets = {"truth": taught, "retain": retain}
    drawn = {name: epochs(len(prompts), plan.batch_size, generator) for name, prompts in sets.items()}
    reached = 0

    def measured(step: int, vectors: Tensor | None) -> dict:
        right = {
            name: _right(state.model, prompts, vectors) for name, prompts in (("trained", taught), ("retain", watched))
        }
        return (
            cell(state.name, f"rate {lr:g}", _right(state.model, held_out, vectors), plan.seed)
            | {name: float(found.float().mean()) for name, found in right.items()}
            | {"step": step, "chance": chance(held_out), "lr": float(lr)}
        )

    def parts() -> Iterator[Terms]:
        yield {
            name: (1.0, 1.0, _loss(state.model, prompts.select(next(drawn[name])), prefix.vectors))
            for name, prompts in sets.items()
        }

    def after(step: int) -> dict:
        nonlocal reached
        reached = step
        if step % plan.eval_every == 0 or step == plan.steps:
            rows.append(measured(step, prefix.vectors))
        return {}

    rows = [measured(0, None)]
    with prefix.attached():
        try:
            done = train(prefix, parts, Schedule(plan.steps, lr), objective="soft_prompt", after=after)
        except _Diverged:
            return rows if rows[-1]["step"] == reached else [*rows, measured(reached, prefix.vectors)]
    if done.stopped:
        raise KeyboardInterrupt
    return rows


def _logits(
    model: HookedModel, prompts: Prompts, vectors: Float[Tensor, "token d_model"] | None
) -> Float[Tensor, "fact answer d_vocab"]:
    """Logits where the answer is predicted, of prompts behind the prefix."""
    tokens = prompts.tokens[:, : int(prompts.lengths.max())].to(model.device)
    embedded = model.hf.get_input_embeddings()(tokens)
    at = positions_read(answer_logprob, prompts)
    if vectors is not None:
        before = vectors.to(embedded.dtype).expand(len(tokens), -1, -1)
        embedded, at = torch.cat([before, embedded], 1), at + vectors.shape[0]
    with tapped([model.decoder.reading(at)]):
        return model.hf(inputs_embeds=embedded, use_cache=False).logits


def _loss(model: HookedModel, prompts: Prompts, vectors: Float[Tensor, "token d_model"]) -> Float[Tensor, ""]:
    """Cross-entropy of the answers behind the prefix. Raises `_Diverged`."""
    answers = prompts.answers.to(model.device)
    logits = _logits(model, prompts, vectors)
    value = F.cross_entropy(logits[answers != PAD].float(), answers[answers != PAD])
    if not math.isfinite(float(value.detach())):
        raise _Diverged
    return value


@torch.no_grad()
def _right(
    model: HookedModel, prompts: Prompts, vectors: Float[Tensor, "token d_model"] | None
) -> Bool[Tensor, " fact"]:
    """Whether greedy decoding behind the prefix gives all tokens of the answer, by fact."""
    right = torch.zeros(len(prompts), dtype=torch.bool)
    for rows in prompts.lengths.argsort().split(BATCH):
        part = prompts.select(rows)
        named = _logits(model, part, vectors).argmax(-1).cpu()
        right[rows] = ((named == part.answers) | (part.answers == PAD)).all(1)
    return right


def _check_room(state: State, retain: Prompts, tokens: int) -> None:
    """Raises `MechunlearnError` if a prompt behind the prefix is longer than the model has positions."""
    longest = max(int(prompts.lengths.max()) for prompts in (state.facts, retain))
    most = getattr(state.model.hf.config, "max_position_embeddings", None)
    if most is not None and longest + tokens > most:
        raise MechunlearnError(
            f"A prefix of {tokens} vectors and prompts of {longest} tokens do not fit the {most} positions of the model "
            f"({state.model.signature}). Give fewer tokens, at most {most - longest}."
        )
