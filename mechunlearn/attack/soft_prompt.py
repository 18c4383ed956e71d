"""Soft prompts: learn a prefix of embedding vectors that brings half of the forgotten facts back, and measure the other half."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.attack.curves import batch_losses, check_lrs, training_curve
from mechunlearn.attack.search import Budget, find_budgets, never_taught_rows
from mechunlearn.attack.states import (
    GATE,
    NEVER_TAUGHT,
    SEARCHED,
    WATCHED,
    Attack,
    Row,
    Rows,
    State,
    cell,
    chance,
    check_sizes,
    halved,
    mean,
)
from mechunlearn.core.arguments import validated
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import PAD, Prompts
from mechunlearn.metrics.answers import BATCH, answer_logprob, positions_read
from mechunlearn.model.hooked import HookedModel, frozen
from mechunlearn.model.taps import tapped
from mechunlearn.training.parameterizations import add_gradients

RATES, STEPS = (3e-3, 3e-2, 3e-1, 3.0), (20, 50)
PREFIX = "prefix"


@validated
@steady()
def soft_prompt(
    model: HookedModel,
    edit: Edit | None,
    forget: Prompts,
    retain: Prompts,
    *,
    extra_edits: Mapping[str, Edit | HookedModel | None] | None = None,
    baseline_rows: pd.DataFrame | None = None,
    tokens: int = 8,
    lrs: Sequence[float] | None = None,
    steps: int | None = None,
    eval_every: int = 5,
    batch_size: int = 16,
    min_retention: float = GATE,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Try to get edited facts back with a learned prefix: no weight is touched, only the input.

    minimise  CE(truth of half of the forget facts) + CE(half of the retain facts)

    over `tokens` embedding vectors in front of every prompt, one prefix for all facts (prompt tuning, arXiv 2104.08691;
    against unlearned models in arXiv 2402.09063). They begin as the embeddings of random tokens. The optimiser is
    AdamW with a cosine schedule and gradients clipped to norm 1. The budget (`tokens`, `steps`) is part of the
    result: it is what a prefix of this length learns in so many steps. Its learning rates are searched on the unedited
    model first, on facts that it does not know (see `find_budgets`): the gentlest and the strongest of three decades that
    teach them in 20 steps, or else in 50. The prefix is not a prompt that anyone could type, because its vectors are no
    tokens: the attack speaks of those who hold the model.

    A loss that is not finite ends its setting, as collapsed. The model is left as it was, bit by bit, also after an
    error and after Ctrl-C.

    Args:
        model: The unedited model.
        edit: The edit to attack, or None for ceiling and floor alone.
        forget: The facts that the edit removed.
        retain: The facts that were to stay.
        extra_edits: Further edits, models, or None for the model as it is, to attack alike, by name.
        baseline_rows: Rows of an earlier call whose ceiling and floor are taken as they are.
        tokens: The length of the prefix.
        lrs: Learning rates, in units of the embeddings' root mean square, so that they serve models of any scale; None
            searches them.
        steps: The number of optimiser steps; None searches it, or takes 20 with your own rates.
        eval_every: Measures after so many steps, and after the last.
        batch_size: How many truths, and as many retain facts, each step reads.
        min_retention: The share of retain facts that must be right for a row to be `valid`.
        seed: Draws the halves, the batches and the first prefix.
        progress: Whether to show a bar; None shows one where somebody can see it.

    Returns:
        One row a state (see `states_to_attack`), learning rate and measured step (0 is without any prefix).
        `held_out` is the accuracy behind the prefix (greedy, full vocabulary) on the half that is not trained on,
        with its 95 % interval `low` to `high` over `n` facts; `trained` that on the other half; `retain`
        that on at most 100 retain facts which the prefix is not trained on. `lr`, `steps`, `chance` and `valid` stand
        beside them, and the run card in `attrs["card"]`. `recovery` reads the rows. Those of state "search" show which
        rates were tried.

    Raises:
        MechunlearnError: For fewer than two forget or retain facts, learning rates out of range, a prefix that does
            not fit the model's positions, facts that leave nothing to search on, or a model that knows less of the
            retain facts than the gate asks for.

    >>> from mechunlearn.artifacts.mask import ComponentMask
    >>> from mechunlearn.edit import masked_gradient
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    >>> forget, retain = toy.prompts([0, 1, 2, 3]), toy.prompts([4, 5, 6, 7])
    >>> edit = masked_gradient(toy.model, mask, forget, retain, steps=20, lr=0.1)
    >>> rows = soft_prompt(toy.model, edit, forget, retain, tokens=2, lrs=[0.01], steps=2)
    >>> rows[["state", "step", "held_out", "n"]].values.tolist()[0]
    ['edited', 0, 0.0, 2]
    """
    check_sizes(forget, retain)
    if lrs is not None:
        check_lrs(lrs)
    kept, watched = halved(retain, seed, WATCHED)
    attack = Attack(
        "soft_prompt", model, edit, forget, retain, watched, extra_edits, baseline_rows, min_retention, seed, progress
    )
    for state in attack.states:
        _check_room(state, retain, tokens)

    def curves(state: State, budgets: Sequence[Budget]) -> Rows:
        taught, held_out = halved(state.facts, seed)
        sets = {"truth": taught, "retain": kept}

        def measured(prefix: _Prefix | None, step: int) -> Row:
            vectors = prefix.vectors if prefix is not None else None
            right, known, spared = (_right(state.model, part, vectors) for part in (held_out, taught, watched))
            more = {"trained": mean(known), "retain": mean(spared), "chance": chance(held_out)}
            return cell(state.name, "", right, seed, step=step, **more)

        def loss(prefix: _Prefix, prompts: Prompts, rows: Tensor) -> Tensor:
            return _loss(state.model, prompts.select(rows), prefix.vectors)

        with state.applied():
            start = measured(None, 0)
            for budget in budgets:
                lr = budget.lr
                prefix = _Prefix(state.model, tokens, seed)
                losses = batch_losses(sets, dict.fromkeys(sets, batch_size), partial(loss, prefix), seed)
                now, about = partial(measured, prefix), {"steps": budget.steps, "eval_every": eval_every}
                curve = training_curve(prefix, losses, start, now, setting=f"lr {lr:g}", lr=lr, **about)
                yield [row | {"method": PREFIX} for row in curve]

    def curve(state: State, budget: Budget) -> Sequence[Row]:
        [rows] = curves(state, [budget])
        return rows

    given = None if lrs is None else [Budget(PREFIX, lr, steps or STEPS[0]) for lr in lrs]
    budgets, tried = find_budgets(attack, curve, {PREFIX: RATES}, STEPS if steps is None else (steps,), given)
    settings = {"lrs": list(lrs) if lrs is not None else SEARCHED, "tokens": tokens, "steps": steps}
    settings |= {"eval_every": eval_every, "batch_size": batch_size}

    def work(state: State) -> Rows:
        known = tried and state.name == NEVER_TAUGHT
        yield from never_taught_rows(tried, budgets) if known else curves(state, budgets)

    return attack.run(work, settings, len(budgets), tried)


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
        self.leaves: list[Tensor] = [(start / self.size).requires_grad_()]

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
        logits: Tensor = model.hf(inputs_embeds=embedded, use_cache=False).logits
    return logits


def _loss(model: HookedModel, prompts: Prompts, vectors: Float[Tensor, "token d_model"]) -> Float[Tensor, ""]:
    """Cross-entropy of the answers behind the prefix."""
    answers = prompts.answers.to(model.device)
    logits = _logits(model, prompts, vectors)
    return F.cross_entropy(logits[answers != PAD].float(), answers[answers != PAD])


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
    most = getattr(state.model.hf.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and longest + tokens > most:
        raise MechunlearnError(
            f"A prefix of {tokens} vectors and prompts of {longest} tokens do not fit the {most} positions of the "
            "model "
            f"({state.model.signature}). Give fewer tokens, at most {most - longest}."
        )
