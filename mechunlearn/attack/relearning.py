"""Relearning: train an edited model on half of the forgotten facts, and see whether the other half comes back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.attack.curves import batch_losses, check_lrs, cross_entropy, training_curve
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
    halves,
    mean,
)
from mechunlearn.core.arguments import validated
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import answered, measure
from mechunlearn.metrics.text import text_loss
from mechunlearn.model.hooked import HookedModel
from mechunlearn.training.adapters import LowRank, lora_start
from mechunlearn.training.inputs import CachedInputs, Sequences, TopLayers, text_sequences
from mechunlearn.training.parameterizations import Everything, Trainable, slices

On = Literal["facts", "other facts", "same template", "text"]
RATES: Mapping[str, Sequence[float]] = {"lora": (1e-4, 1e-3, 1e-2, 1e-1), "full": (1e-5, 1e-4, 1e-3, 1e-2)}
STEPS = (20, 50)
RANK, SCALE = 16, 2.0
PASSAGES = 32


@validated
@steady()
def relearning(
    model: HookedModel,
    edit: Edit | None,
    forget: Prompts,
    retain: Prompts,
    *,
    extra_edits: Mapping[str, Edit | HookedModel | None] | None = None,
    baseline_rows: pd.DataFrame | None = None,
    search_rows: pd.DataFrame | None = None,
    on: On = "facts",
    lrs: Mapping[str, Sequence[float]] | None = None,
    steps: int | None = None,
    eval_every: int = 5,
    rank: int | None = None,
    batch_size: int = 64,
    min_retention: float = GATE,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Try to get edited facts back: train on half of them, and measure the other half.

    minimise  CE(truth of half of the forget facts) + CE(half of the retain facts) + CE(text)

    on the edited model, for every method and learning rate: `lora` trains adapters on all linear maps of all layers
    (alpha 2 rank, B = 0), `full` every parameter. The optimiser is AdamW with a cosine schedule and gradients clipped
    to norm 1. (Mechanistic Unlearning, arXiv 2410.12949, has LoRA of rank 512 at 2e-4 and 20 steps for models of
    billions of weights.)

    An attack that cannot teach the model anything proves nothing, so its budget is searched on the unedited model
    first: the learning rates, over three decades, at which 20 steps (or, if they do not suffice, 50) teach half of as
    many facts that the model does not know (see `find_budgets`). The gentlest and the strongest of each method are used
    (the strongest alone where `on` is not "facts"). Give `lrs` and `steps` to use your own.

    Edits that are compared belong in one call, which runs ceiling and floor once. A loss that is not finite ends its
    setting, as collapsed. The model is left as it was, bit by bit, also after an error and after Ctrl-C. Memory:
    `full` holds four float32 copies of the model beside it. Not for edits that must only hold against a prompt: the
    attack speaks of those who can train the weights.

    Args:
        model: The unedited model.
        edit: The edit to attack, or None for ceiling and floor alone.
        forget: The facts that the edit removed.
        retain: The facts that were to stay.
        extra_edits: Further edits, models, or None for the model as it is, to attack alike, by name.
        baseline_rows: Rows of an earlier call whose ceiling and floor are taken as they are.
        search_rows: Rows of an earlier call on the same model and facts (with any `on`), whose budgets are used.
        on: What is trained on. "facts" is half of the forget facts; "same template" is facts of the same relation
            about all other subjects, but for the retain facts that the gate is measured on; "other facts" shares
            nothing with the held-out ones (other relations of retain subjects none of whose names a forgotten subject
            has, and text); "text" is text alone. But for the first all forget facts are held out: what comes back was
            never told to the model again.
        lrs: Learning rates by method; None searches them.
        steps: The number of optimiser steps; None searches it, or takes 20 with your own rates.
        eval_every: Measures after so many steps, and after the last.
        rank: The rank of the adapters; None takes 16, or less where a matrix is smaller.
        batch_size: How many truths, as many retain facts and a quarter as many passages each step reads.
        min_retention: The share of retain facts that must be right for a row to be `valid`.
        seed: Draws the halves, the batches and the adapters.
        progress: Whether to show a bar; None shows one where somebody can see it.

    Returns:
        One row a state (see `states_to_attack`), method, learning rate and measured step. `held_out` is the accuracy
        (greedy, full vocabulary) on the half that is not trained on, with its 95 % interval `low` to `high`
        over `n` facts; `trained` that on the other half; `retain` that on at most 100 retain facts which the attack
        does not train on; `option_probability` the mean probability of the truths held out among their options;
        `text_loss` that of passages which nothing trains on, in nats a token (both NaN where there are none).
        `method`, `lr`, `steps`, `chance` and `valid` stand beside them, and the run card in `attrs["card"]`. `recovery`
        reads the rows. Those of state "search" show what was tried, and how much of the unknown facts each budget
        taught (`trained`).

    Raises:
        MechunlearnError: For fewer than two forget or retain facts, no learning rates or unknown methods, a rank that
            does not fit, facts that leave nothing to search on or to train on, or a model that knows less of the retain
            facts than the gate asks for.

    >>> from mechunlearn.edit import masked_gradient
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    >>> forget, retain = toy.prompts([0, 1, 2, 3]), toy.prompts([4, 5, 6, 7])
    >>> edit = masked_gradient(toy.model, mask, forget, retain, steps=20, lr=0.1)
    >>> rows = relearning(toy.model, edit, forget, retain, lrs={"full": [1e-3]}, steps=2)
    >>> rows[["state", "step", "held_out", "n"]].values.tolist()[0]
    ['edited', 0, 0.0, 2]
    """
    check_sizes(forget, retain)
    if lrs is not None:
        if not lrs or not all(lrs.values()) or not lrs.keys() <= set(RATES):
            raise MechunlearnError(
                f"lrs is {dict(lrs)}. Expected learning rates for 'lora', 'full' or both, for example "
                f"{{'full': [1e-4, 1e-3]}}."
            )
        check_lrs([lr for chosen in lrs.values() for lr in chosen])
    watched = halved(retain, seed, WATCHED)[1]
    attack = Attack(
        "relearning", model, edit, forget, retain, watched, extra_edits, baseline_rows, min_retention, seed, progress
    )
    adapts = lrs is None or "lora" in lrs
    ranks = {id(each): _rank(each, rank) for each in (model, *(state.model for state in attack.states)) if adapts}
    texts = forget.facts.texts if forget.facts is not None else ()
    sizes = {"truth": batch_size, "retain": batch_size, "text": max(1, batch_size // 4)}

    def curves(state: State, budgets: Sequence[Budget], on: On) -> Rows:
        with state.applied() as target:
            sets = _Sets.of(target, state.facts, retain, watched, texts, on, seed)
            now, everything = partial(sets.measured, target, state.name, seed), ComponentMask.everything(target)
            start = now(0)
            for budget in budgets:
                adapted = partial(LowRank, target, everything, ranks.get(id(target), 0), SCALE, lora_start(seed))
                trained: Trainable = Everything(target) if budget.method == "full" else adapted()
                upper = TopLayers(target, trained.lowest)
                streams = {name: CachedInputs(upper, sequences) for name, sequences in sets.trained_on.items()}
                losses = batch_losses(streams, sizes, cross_entropy, seed)
                name, about = f"{budget.method} {budget.lr:g}", {"steps": budget.steps, "eval_every": eval_every}
                curve = training_curve(trained, losses, start, now, setting=name, lr=budget.lr, **about)
                yield [row | {"method": budget.method} for row in curve]

    def curve(state: State, budget: Budget) -> Sequence[Row]:
        [rows] = curves(state, [budget], "facts")
        return rows

    if on != "facts":
        _Sets.of(model, forget, retain, watched, texts, on, seed)  # what cannot be is said before the search
    given = None
    if lrs is not None:
        given = [Budget(method, lr, steps or STEPS[0]) for method, chosen in lrs.items() for lr in chosen]
    budgets, tried = find_budgets(attack, curve, RATES, STEPS if steps is None else (steps,), given, search_rows)
    if on != "facts" and lrs is None:
        budgets = list({budget.method: budget for budget in sorted(budgets)}.values())
    named = {name: list(chosen) for name, chosen in lrs.items()} if lrs is not None else SEARCHED
    settings = {"on": on, "lrs": named, "steps": steps, "rank": rank, "eval_every": eval_every}

    def work(state: State) -> Rows:
        known = tried and state.name == NEVER_TAUGHT and on == "facts"
        yield from never_taught_rows(tried, budgets) if known else curves(state, budgets, on)

    return attack.run(work, settings | {"batch_size": batch_size}, len(budgets), tried)


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


@dataclass(frozen=True)
class _Sets:
    """What one state of a model is trained and measured on."""

    facts: Prompts
    taught: Tensor
    held_out: Tensor
    watched: Prompts
    passages: tuple[str, ...]
    trained_on: Mapping[str, Sequences]

    @classmethod
    def of(
        cls,
        model: HookedModel,
        facts: Prompts,
        retain: Prompts,
        watched: Prompts,
        texts: Sequence[str],
        on: On,
        seed: int,
    ) -> "_Sets":
        taught, held_out = halves(len(facts), seed)
        sets = {}
        if on == "facts":
            sets = {"truth": Sequences.of(facts.select(taught)), "retain": Sequences.of(halved(retain, seed)[0])}
        else:
            taught, held_out = taught[:0], torch.arange(len(facts))
        if on == "other facts":
            sets["truth"] = Sequences.of(_unrelated(model, facts, retain))
        if on == "same template":
            sets["truth"] = Sequences.of(_same_template(model, facts, retain, watched, seed))
        else:
            sets["text"] = text_sequences(model, texts[::2])
        if not any(map(len, sets.values())):
            raise MechunlearnError("These facts come without text, so nothing can be relearned from text alone.")
        unseen = texts[1::2]
        passages = tuple(unseen[:: max(1, math.ceil(len(unseen) / PASSAGES))])
        return cls(facts, taught, held_out, watched, passages, sets)

    def measured(self, model: HookedModel, state: str, seed: int, step: int) -> Row:
        """What the model knows now."""
        found = measure(model, self.facts, targets=False)
        options = found.get("option_probability", torch.full((len(self.facts),), math.nan))
        right, known = found["accuracy"][self.held_out], found["accuracy"][self.taught]
        about = {"trained": mean(known), "retain": mean(answered(model, self.watched))}
        about["option_probability"] = mean(options[self.held_out])
        about["text_loss"] = mean(text_loss(model, self.passages)) if self.passages else math.nan
        return cell(state, "", right, seed, step=step, chance=chance(self.facts.select(self.held_out)), **about)


def _unrelated(model: HookedModel, facts: Prompts, retain: Prompts) -> Prompts:
    """Other relations of retain subjects who share no name with a subject that the attack tries to recall."""
    source, kept = facts.facts, retain.facts
    related = [] if kept is None else list(kept.related.values())
    if source is None or kept is None or not related:
        raise MechunlearnError(
            "on='other facts' needs facts of other relations, and these facts come without any. Use on='facts' or "
            "on='text'."
        )
    names = {word for subject in source.subjects for word in subject.split()}
    apart = {subject for subject in kept.subjects if not names & set(subject.split())}
    rows = [part.prompts(model) for each in related if len(part := each.about(apart))]
    if not rows:
        raise MechunlearnError(
            f"Every one of the {len(kept.subjects)} retain subjects shares a name with a forgotten one, so there are "
            "no facts "
            "that tell nothing of those. Forget fewer facts, or give more to retain."
        )
    assert model.tokenizer is not None
    return Prompts.from_text([query for part in rows for query in part.queries], model.tokenizer)


def _same_template(model: HookedModel, facts: Prompts, retain: Prompts, watched: Prompts, seed: int) -> Prompts:
    """Facts of the same relations and format about all other subjects, but for those that the gate is measured on."""
    if facts.facts is None or retain.facts is None or watched.facts is None:
        return halved(retain, seed)[0]
    relations, out = {fact.relation for fact in facts.facts}, facts.facts.subjects | watched.facts.subjects
    source = retain.facts.source or retain.facts
    rows = [
        i
        for i, fact in enumerate(source)
        if fact.relation in relations and fact.subject not in out and facts.format in fact.queries
    ]
    if not rows:
        raise MechunlearnError(
            "on='same template' needs facts of the same relation about other subjects, and there are none beside those "
            "that are measured. Give more facts to retain, or use on='facts' or on='text'."
        )
    return source.select(rows).prompts(model, facts.format)
