"""Sampling: ask for the forgotten facts again and again at a temperature, and see whether one of the answers is the truth."""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.attack.states import GATE, WATCHED, Attack, Rows, State, cell, chance, check_sizes, mean
from mechunlearn.core.arguments import validated
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.answers import answer_logits
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import BATCH, answer_logprob, answered, with_answers
from mechunlearn.model.hooked import HookedModel

TRIES = (1, 10, 100)
EASY = 0.5


@validated
@steady()
def sampling(
    model: HookedModel,
    edit: Edit | None,
    forget: Prompts,
    retain: Prompts,
    *,
    extra_edits: Mapping[str, Edit | HookedModel | None] | None = None,
    baseline_rows: pd.DataFrame | None = None,
    tries: Sequence[int] = TRIES,
    temperature: float = 1.0,
    min_retention: float = GATE,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Try to get edited facts back by sampling many answers: an edit that lowers the truth need not make it rare.

    p = prod_i softmax(logits_i / T)[truth_i],   P(the truth is among n samples) = 1 - (1 - p)^n

    The logits are those behind the prompt and the truth's earlier tokens, so p is the exact probability that a sample
    at temperature T begins with the whole truth. No text is generated: for each fact one random number u, the same for
    every n and state, decides, and the truth is found where u < 1 - (1 - p)^n. (Unlearned knowledge comes out of
    samples that greedy decoding does not show: "A probabilistic perspective on unlearning and alignment for large
    language models", arXiv 2410.03523.)

    Whoever samples has to recognise the right answer when it appears: among 100 samples it is one of many. So the attack
    measures what leaks, and a large n speaks of attackers who can check an answer but do not know it.

    More tries also guess more. With n of them at most n different answers are named, so no guesser who knows the
    relation but not the fact is right more often than the n most frequent answers together are true: that is `chance`.
    Where these are half of all facts or more, n tries tell nothing and are left out (the smallest n is always tried). The
    model itself may well guess less: the never-taught facts say how much.

    The cost is two forward passes over the facts and one over the retain facts, whatever n is. Do not use it for
    relations with a handful of answers: there it has one try, which is weaker than `prompting`.

    Args:
        model: The unedited model.
        edit: The edit to attack, or None for ceiling and floor alone.
        forget: The facts that the edit removed.
        retain: The facts that were to stay.
        extra_edits: Further edits, models, or None for the model as it is, to attack alike, by name.
        baseline_rows: Rows of an earlier call whose ceiling and floor are taken as they are.
        tries: Numbers of samples n.
        temperature: The temperature T, above 0.
        min_retention: The share of retain facts that must be right for a row to be `valid`.
        seed: Draws the samples, and the retain facts that are measured.
        progress: Whether to show a bar; None shows one where somebody can see it.

    Returns:
        One row a state (see `states_to_attack`) and number of tries, each a `group` with a floor and a ceiling of its
        own. `held_out` is the share of the forget facts whose truth is among the samples, with its 95 % interval `low`
        to `high` over `n` facts; `probability` the mean of p; `edit_target` the mean probability that all samples are
        the edit target; `retain` the accuracy (greedy) on at most 100 retain facts; `tries` the number of samples.
        `chance` and `valid` stand beside them, and the run card in `attrs["card"]`. `recovery` reads the rows.

    Raises:
        MechunlearnError: For an empty forget or retain set, numbers of tries or a temperature out of range, or a model
            that knows less of the retain facts than the gate asks for.

    >>> from mechunlearn import ComponentMask
    >>> from mechunlearn.edit import masked_gradient
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    >>> forget, retain = toy.prompts([0, 1, 2, 3]), toy.prompts([4, 5, 6, 7])
    >>> edit = masked_gradient(toy.model, mask, forget, retain, steps=20, lr=0.1)
    >>> sampling(toy.model, edit, forget, retain, tries=[1])[["state", "setting", "held_out"]].values.tolist()
    [['edited', 'best of 1', 0.0], ['unedited', 'best of 1', 1.0]]
    """
    check_sizes(forget, retain, least=1)
    if not tries or not all(1 <= n < 2**31 for n in tries):
        raise MechunlearnError(f"The tries are {list(tries)}. Expected whole numbers, 1 or more, for example [1, 10].")
    if temperature <= 0:
        raise MechunlearnError(f"The temperature is {temperature}. Expected a number above 0, for example 1.0.")
    kept = [n for n in sorted(set(tries)) if n == min(tries) or chance(forget, n) < EASY]
    watched = retain.select(torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed))[:WATCHED])
    attack = Attack(
        "sampling", model, edit, forget, retain, watched, extra_edits, baseline_rows, min_retention, seed, progress
    )

    def tried(state: State) -> Rows:
        drawn = torch.rand(len(state.facts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with state.applied() as target:
            truth = _probability(target, state.facts, temperature)
            aim = _probability(target, with_answers(state.facts, "targets"), temperature)
            spared = mean(answered(target, watched))
        for n in kept:
            about = {"group": f"best of {n}", "tries": n, "probability": mean(truth), "edit_target": mean(aim**n)}
            about |= {"retain": spared, "chance": chance(state.facts, n)}
            yield [cell(state.name, f"best of {n}", drawn < _found(truth, n), seed, **about)]

    return attack.run(tried, {"tries": kept, "temperature": temperature}, len(kept))


@torch.no_grad()
def _probability(model: HookedModel, prompts: Prompts, temperature: float) -> Float[Tensor, " fact"]:
    """The probability that a sample begins with the whole answer, by fact."""
    found = torch.zeros(len(prompts), dtype=torch.float64)
    for rows in prompts.lengths.argsort().split(BATCH):
        logits, read = answer_logits(model, prompts.select(rows))
        found[rows] = answer_logprob(logits.float() / temperature, read).double().exp()
    return found


def _found(probability: Float[Tensor, " fact"], tries: int) -> Float[Tensor, " fact"]:
    """The probability that at least one of so many samples is the answer: exact also where p is tiny."""
    return -torch.expm1(tries * torch.log1p(-probability.clamp(max=1.0)))
