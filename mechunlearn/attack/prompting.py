"""Ask otherwise: do the forgotten facts come back in another wording, with examples, with choices, or by a detour?"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import chain

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.attack.asking import tokenized
from mechunlearn.attack.states import GATE, WATCHED, Attack, Rows, State, cell, chance, mean
from mechunlearn.core.arguments import validated
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.chat import rendered
from mechunlearn.facts.dataset import FactDataset
from mechunlearn.facts.formats import Fact, Query
from mechunlearn.facts.prompts import PAD, Prompts
from mechunlearn.metrics.answers import answered, option_logprobs, with_answers
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.unwrap import evaluating

SHOTS = 4
TWO_HOP, AMONG = "two-hop", "statement, among options"
OPTIONS = range(2, 27)

Ask = Callable[[HookedModel, Prompts], Prompts | None]


@validated
@steady()
def prompting(
    model: HookedModel,
    edit: Edit | None,
    forget: Prompts,
    retain: Prompts,
    *,
    extra_edits: Mapping[str, Edit | HookedModel | None] | None = None,
    baseline_rows: pd.DataFrame | None = None,
    shots: int = SHOTS,
    min_retention: float = GATE,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Ask for the forgotten facts in every way that the data know: what hides from one prompt shows in another.

    Settings, each a `group` with a floor and a ceiling of its own: every format of the facts (the one that was
    trained on
    too: it shows what the edit left); "few-shot, k", k true statements about retained subjects in front of the
        statement
    (same relation, none about a forgotten subject); "two-hop", where the data have questions that need the fact and a
    second one about its answer; and, for facts with 2 to 26 options and no multiple choice, "statement, among
    options". A setting is asked of the facts that have it (`n`), and left out if fewer than two have. Facts given as
    tokens are asked in their one format.

    A right "two-hop" answer shows that the second answer is left (the country), not that the fact itself is (the
    city). It is not asked where the edit target would give the same one. The attack trains nothing, so it says little
    about those who can
    train: see `relearning`.

    Args:
        model: The unedited model.
        edit: The edit to attack, or None for ceiling and floor alone.
        forget: The facts that the edit removed.
        retain: The facts that were to stay.
        extra_edits: Further edits, models, or None for the model as it is, to attack alike, by name.
        baseline_rows: Rows of an earlier call whose ceiling and floor are taken as they are.
        shots: The number of examples in front of a statement; 0 asks without examples only.
        min_retention: The share of retain facts that must be right for a row to be `valid`.
        seed: Draws the examples.
        progress: Whether to show a bar; None shows one where somebody can see it.

    Returns:
        One row a state (see `states_to_attack`) and setting. `held_out` is the accuracy (greedy, full vocabulary, all
        tokens of the answer) with its 95 % interval `low` to `high` over `n` facts; in "statement, among
        options" the truth is right where it has the largest log-probability of all options, summed over tokens.
        `edit_target` is how often the answer is the edit's instead; `retain` the accuracy on at most 100 retain facts
        asked in the same way (in their own where they do not have it), `retain_before` that of the unedited model,
        beside which the gate is asked: a way that the model knows fewer facts in is none that breaks it; `chance` the
        share of the most frequent truth in that setting. `valid` stands beside them, and the run card in
        `attrs["card"]`. `recovery` reads the rows.

    Raises:
        MechunlearnError: For fewer than two forget or retain facts, a negative number of shots, or a model that knows
            less of the retain facts than the gate asks for.

    >>> from mechunlearn import ComponentMask
    >>> from mechunlearn.edit import masked_gradient
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    >>> forget, retain = toy.prompts([0, 1, 2, 3]), toy.prompts([4, 5, 6, 7])
    >>> edit = masked_gradient(toy.model, mask, forget, retain, steps=20, lr=0.1)
    >>> prompting(toy.model, edit, forget, retain)[["state", "setting", "held_out", "edit_target"]].values.tolist()
    [['edited', 'statement', 0.0, 1.0], ['unedited', 'statement', 1.0, 0.0]]
    """
    if min(len(forget), len(retain)) < 2:
        raise MechunlearnError(
            f"There are {len(forget)} forget facts and {len(retain)} retain facts. Expected at least 2 of each."
        )
    watched = replace(retain.select(range(min(WATCHED, len(retain)))), options=())
    attack = Attack(
        "prompting", model, edit, forget, retain, watched, extra_edits, baseline_rows, min_retention, seed, progress
    )
    ways: dict[str, Ask] = {setting: cache(ask) for setting, ask in _ways(forget, retain, shots, seed).items()}

    with evaluating(model.hf):
        known = {name: mean(_answered(model, ask(model, watched) or watched, name)[0]) for name, ask in ways.items()}

    def tried(state: State) -> Rows:
        with state.applied() as target:
            for setting, ask in ways.items():
                asked = ask(target, state.facts)
                if asked is None or len(asked) < 2:
                    yield []
                    continue
                right, hit = _answered(target, asked, setting)
                spared = _answered(target, ask(target, watched) or watched, setting)[0]
                about = {"group": setting, "edit_target": mean(hit), "retain": mean(spared)}
                about["retain_before"] = known[setting]
                about["chance"] = _chance(setting, asked, state.facts)
                yield [cell(state.name, setting, right, seed, **about)]

    return attack.run(tried, {"shots": shots}, len(ways))


def _ways(forget: Prompts, retain: Prompts, shots: int, seed: int) -> dict[str, Ask]:
    """Every setting and how it is asked; what is asked is None where no fact has it."""
    if forget.facts is None:
        return {forget.format: lambda model, prompts: prompts}
    formats = list(dict.fromkeys(name for fact in forget.facts for name in fact.queries))
    ways: dict[str, Ask] = {name: partial(_in_format, name) for name in formats}
    shown = [fact for fact in retain.facts or () if fact.subject not in forget.facts.subjects]
    if shots and shown:
        ways[f"few-shot, {shots}"] = partial(_few_shot, shown, shots, seed)
    if forget.facts.two_hop:
        ways[TWO_HOP] = _two_hop
    if "multiple_choice" not in formats:
        ways[AMONG] = _among
    return ways


def _in_format(format: str, model: HookedModel, prompts: Prompts) -> Prompts | None:
    facts = _having(prompts, lambda fact: format in fact.queries)
    return facts.prompts(model, format) if facts is not None else None


def _among(model: HookedModel, prompts: Prompts) -> Prompts | None:
    def listed(fact: Fact) -> bool:
        query = fact.queries["statement"]
        return len(query.options) in OPTIONS and query.answer in query.options

    facts = _having(prompts, listed)
    return facts.prompts(model) if facts is not None else None


def _having(prompts: Prompts, has: Callable[[Fact], bool]) -> FactDataset | None:
    """The facts that can be asked so."""
    facts = prompts.facts
    rows = [i for i, fact in enumerate(facts) if has(fact)] if facts is not None else []
    return facts.select(rows) if facts is not None and rows else None


def _few_shot(shown: Sequence[Fact], shots: int, seed: int, model: HookedModel, prompts: Prompts) -> Prompts | None:
    """Statements about other subjects of the same relation, then the fact's own."""
    rng = random.Random(seed)
    asked = []
    for fact in prompts.facts or ():
        fitting = [other for other in shown if other.relation == fact.relation and other.subject != fact.subject]
        if len(fitting) >= shots:
            drawn = [other.queries["statement"] for other in rng.sample(fitting, shots)]
            query = fact.queries["statement"]
            asked.append(_after(drawn, query, model))
    return tokenized(model, asked)


def _after(drawn: Sequence[Query], query: Query, model: HookedModel) -> Query:
    """A query behind others with their answers: as sentences, in a conversation as earlier turns."""
    if query.turns and model.tokenizer is not None:
        opening = [turn for turn in query.turns if turn[0] == "system"]
        turns = [(*(turn for turn in each.turns if turn[0] != "system"), ("assistant", each.answer)) for each in drawn]
        asked = [turn for turn in query.turns if turn[0] != "system"]
        return rendered(replace(query, turns=(*opening, *chain(*turns), *asked)), model.tokenizer)
    context = "".join(f"{each.prompt.rstrip()} {each.answer.strip()}. " for each in drawn)
    return replace(query, prompt=context + query.prompt)


def _two_hop(model: HookedModel, prompts: Prompts) -> Prompts | None:
    questions = prompts.facts.two_hop if prompts.facts is not None else {}
    subjects = [fact.subject for fact in prompts.facts or ()]
    return tokenized(model, [questions[subject] for subject in subjects if subject in questions])


def _chance(setting: str, asked: Prompts, facts: Prompts) -> float:
    """What naming the most frequent answer would give, of all facts that could be asked so; or one of the options."""
    if setting == AMONG:
        return max(chance(asked), sum(1 / len(options) for options in asked.options) / len(asked))
    if setting == TWO_HOP and facts.facts is not None:
        counts = Counter(query.answer for query in facts.facts.two_hop.values())
        return max(counts.values()) / counts.total()
    return chance(asked if asked.facts is not None else facts)


def _answered(
    model: HookedModel, prompts: Prompts, setting: str
) -> tuple[Float[Tensor, " fact"], Float[Tensor, " fact"]]:
    """Whether the answer is the truth, and whether it is the edit target, by fact."""
    if setting != AMONG or not prompts.options:
        aimed = with_answers(prompts, "targets")
        return answered(model, prompts).float(), answered(model, aimed).float()
    best = option_logprobs(model, prompts).argmax(1).tolist()
    chosen = [options[i] for options, i in zip(prompts.options, best)]
    said = [
        [tuple(token for token in row if token != PAD) == choice for row, choice in zip(rows.tolist(), chosen)]
        for rows in (prompts.answers, prompts.targets)
    ]
    return torch.tensor(said[0]).float(), torch.tensor(said[1]).float()
