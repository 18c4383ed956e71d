"""Multiple choice: ask for the letter of the forgotten answer, with every answer at every letter once."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.attack.asking import check_text, guessed, known_answers, questions, rewritten, tokenized
from mechunlearn.attack.states import GATE, WATCHED, Attack, Rows, State, cell, mean
from mechunlearn.core.arguments import validated
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.formats import LETTERS, Query
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import option_logprobs
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.unwrap import evaluating


class _Choice(NamedTuple):
    """A fact as a question with choices.

    Attributes:
        query: The fact's own question.
        shown: The choices, in the order of the first question: in the next one each stands a letter earlier.
        truth: The number of the truth among them.
        target: The number of the edit target; -1 if it is not among them.
        chance: How often the most frequent of the choices is the truth.
    """

    query: Query
    shown: tuple[str, ...]
    truth: int
    target: int
    chance: float


@validated
@steady()
def multiple_choice(
    model: HookedModel,
    edit: Edit | None,
    forget: Prompts,
    retain: Prompts,
    *,
    extra_edits: Mapping[str, Edit | HookedModel | None] | None = None,
    baseline_rows: pd.DataFrame | None = None,
    min_retention: float = GATE,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    r"""Try to get edited facts back by asking for a letter: recognising an answer can survive where giving it does not.

    ```text
    Complete the sentence with A, B, C or D.
    The capital of France is the city of ...
    A) Oslo
    B) Paris
    C) Rome
    D) Cairo
    Answer:
    ```

    The choices are the truth, the edit target and other answers of the relation, four in all, or fewer where the relation
    has fewer. Models prefer letters whatever stands behind them ("Large language models are not robust multiple choice
    selectors", arXiv 2309.03882), so each fact is asked as many times as it has choices, turned by one letter each time:
    every answer stands at every letter once. What counts is its mean log-probability,

    score(a) = 1/k sum_r log p(letter of a in turn r | question r),   the truth is right if it has the largest score

    of the letter as it is tokenized behind the question. `chance` is how often the most frequent of the choices shown
    is the truth, in the whole data set: 1/4 where all answers are equally frequent.

    Small models hardly answer by letter: SmolLM2-135M-Instruct is little better than chance on capitals that it knows. Where
    the ceiling is less than .2 above the floor, the attack cannot judge the edit, and `prompting` ("statement,
    among options") compares the answers themselves instead.

    Args:
        model: The unedited model.
        edit: The edit to attack, or None for ceiling and floor alone.
        forget: The facts that the edit removed, as text.
        retain: The facts that were to stay, as text.
        extra_edits: Further edits, models, or None for the model as it is, to attack alike, by name.
        baseline_rows: Rows of an earlier call whose ceiling and floor are taken as they are.
        min_retention: The share of retain facts that must be right for a row to be `valid`, of those that the unedited
            model has right in the same way.
        seed: Draws the choices and their order.
        progress: Whether to show a bar; None shows one where somebody can see it.

    Returns:
        One row a state (see `states_to_attack`), of the setting "letters". `held_out` is the share of the facts whose
        truth has the largest score, with its 95 % interval `low` to `high` over `n` facts; `edit_target` that of the
        edit target; `retain` that on at most 100 retain facts, `retain_before` in the unedited model. `chance` and
        `valid` stand beside them, and the run card in `attrs["card"]`. `recovery` reads the rows.

    Raises:
        MechunlearnError: For fewer than two forget or retain facts, or with two answers to choose among, facts given as
            tokens, or a model that knows less of the retain facts than the gate asks for.

    >>> from mechunlearn import load_facts, load_model
    >>> model = load_model("factworld")
    >>> forget, retain = load_facts("factworld/city").prompts(model).split(forget=8, retain=8)
    >>> rows = multiple_choice(model, None, forget, retain)
    >>> rows[["state", "setting", "n"]].values.tolist()
    [['unedited', 'letters', 8], ['never taught', 'letters', 8]]
    """
    check_text(forget, retain)
    watched = retain.select(range(min(WATCHED, len(retain))))
    for name, prompts in (("forget", forget), ("retain", watched)):
        if len(_choices(prompts, seed)) < 2:
            raise MechunlearnError(
                f"Fewer than 2 {name} facts have two answers to choose among: the facts of their relation have one answer "
                "each. Expected relations with different answers."
            )
    attack = Attack(
        "multiple_choice",
        model,
        edit,
        forget,
        retain,
        watched,
        extra_edits,
        baseline_rows,
        min_retention,
        seed,
        progress,
    )
    with evaluating(model.hf):
        known = mean(_chosen(model, _choices(watched, seed), "truth"))

    def tried(state: State) -> Rows:
        choices = _choices(state.facts, seed)
        if len(choices) < 2:
            yield []
            return
        with state.applied() as target:
            scores = _scores(target, choices)
            spared = mean(_chosen(target, _choices(watched, seed), "truth"))
        about = {"retain": spared, "retain_before": known, "edit_target": mean(_named(scores, choices, "target"))}
        about["chance"] = sum(choice.chance for choice in choices) / len(choices)
        yield [cell(state.name, "letters", _named(scores, choices, "truth"), seed, **about)]

    return attack.run(tried, {"choices": len(LETTERS)})


def _choices(prompts: Prompts, seed: int) -> list[_Choice]:
    """What is shown for each fact: the truth, the target, and others; facts without another answer are left out."""
    counts, rng = known_answers(prompts), random.Random(seed)
    made = []
    for relation, query in questions(prompts):
        truth, target = query.answer.strip(), query.target.strip()
        needed = list(dict.fromkeys(text for text in (truth, target) if text))
        tally = {text.strip(): count for text, count in counts[relation].items()}
        others = [text for text in tally if text not in needed]
        shown = [*needed, *rng.sample(others, min(len(others), len(LETTERS) - len(needed)))]
        rng.shuffle(shown)
        if len(shown) > 1:
            aimed = shown.index(target) if target and target != truth else -1
            share = guessed(tally, shown)
            made.append(_Choice(query, tuple(shown), shown.index(truth), aimed, share))
    return made


def _turned(choice: _Choice, turn: int) -> Query:
    """The question in which every choice stands so many letters earlier; the answer is the truth's letter."""
    count = len(choice.shown)
    shown = choice.shown[turn:] + choice.shown[:turn]
    asked = rewritten(choice.query, partial(_laid_out, shown))
    letter = LETTERS[(choice.truth - turn) % count]
    return replace(asked, answer=letter, target="", options=tuple(LETTERS[:count]), separator=None)


def _laid_out(shown: Sequence[str], sentence: str) -> str:
    letters = LETTERS[: len(shown)]
    lines = [f"{letter}) {text}" for letter, text in zip(letters, shown)]
    begin = f"Complete the sentence with {', '.join(letters[:-1])} or {letters[-1]}."
    return "\n".join([begin, f"{sentence.rstrip()} ...", *lines, "Answer:"])


def _scores(model: HookedModel, choices: Sequence[_Choice]) -> Float[Tensor, "fact choice"]:
    """The mean log-probability of each choice over the turns; -inf where a fact has fewer choices."""
    where = [(i, turn) for i, choice in enumerate(choices) for turn in range(len(choice.shown))]
    asked = tokenized(model, [_turned(choices[i], turn) for i, turn in where])
    scores = torch.full((len(choices), len(LETTERS)), -torch.inf)
    if asked is None:
        return scores
    said = option_logprobs(model, asked)
    for row, (i, turn) in enumerate(where):
        count = len(choices[i].shown)
        by_choice = said[row, :count].roll(turn)
        scores[i, :count] = by_choice / count + (scores[i, :count] if turn else 0.0)
    return scores


def _named(scores: Float[Tensor, "fact choice"], choices: Sequence[_Choice], which: str) -> Float[Tensor, " fact"]:
    """Whether the truth, or the target, has the largest score, by fact."""
    return (scores.argmax(1) == torch.tensor([getattr(choice, which) for choice in choices])).float()


def _chosen(model: HookedModel, choices: Sequence[_Choice], which: str) -> Float[Tensor, " fact"]:
    return _named(_scores(model, choices), choices, which)
