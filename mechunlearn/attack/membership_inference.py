"""Membership inference: is the truth of a forgotten fact still likelier than that of a fact that was never taught?"""

import math
from collections.abc import Mapping
from dataclasses import replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.attack.states import (
    GATE,
    NEVER_TAUGHT,
    WATCHED,
    Attack,
    Rows,
    State,
    cell,
    check_sizes,
    mean,
)
from mechunlearn.core.arguments import validated
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import answered
from mechunlearn.metrics.continuations import answer_logprobs
from mechunlearn.metrics.membership import auc, min_k, zlib_score
from mechunlearn.model.hooked import HookedModel

FALSE_ALARMS = 0.05
LOWEST = 0.2
REFERENCES = 4
LEAST, MOST = 8, 400
SCORES = ("loss", "min-k", "zlib", "reference")


@validated
@steady()
def membership_inference(
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
    """Try to tell edited facts from facts that the model was never taught, by how likely their truth is.

    With l the mean log-probability of the truth's tokens behind its prompt, four scores, each larger for members:

    - "loss": l (Yeom et al., arXiv 1709.01604);
    - "min-k": the mean of the fifth of the tokens that are least likely, at least one (Shi et al., arXiv 2310.16789);
    - "zlib": l / bytes of the truth, compressed by zlib (Carlini et al., arXiv 2012.07805);
    - "reference": l - the mean l of the same truth behind the prompts of four never-taught subjects of the relation
      (difficulty calibration, Watson et al., arXiv 2111.08440).

    The papers score whole texts. Here only the truth is scored: subject and wording were seen in training whatever has
    become of the fact, and would give it away as a member after a perfect edit too. Neither is the unedited model the
    reference, though whoever has it would be the strongest attacker: beside it one sees what an edit has *changed*, and
    a model that never learnt the fact differs from it as well. For the same reason a truth that is less likely than that
    of strangers does not count.

    Never-taught facts of the same relations are drawn in two halves. The threshold is where .05 of the one half are
    called members, under the same state of the model: with m facts the k-th largest score, k = floor(.05 (m + 1)) and at
    least 1. `held_out` is the share of forget facts above it, the state "never taught" that of the other half; `chance`
    is what a never-taught fact has, k / (m + 1). Fewer than 19 facts in a half cannot give .05, and `chance` is
    larger.

    That a fact is a member says that something of it is left, not that anyone could read it: the attack asks for the
    truth by name. Do not use it where never-taught facts differ from the others in more than that (rarer answers,
    longer names): such differences count as membership.

    Args:
        model: The unedited model.
        edit: The edit to attack, or None for ceiling and floor alone.
        forget: The facts that the edit removed. Their data need never-taught facts (`forget.facts.untaught`).
        retain: The facts that were to stay.
        extra_edits: Further edits, models, or None for the model as it is, to attack alike, by name.
        baseline_rows: Rows of an earlier call whose ceiling and floor are taken as they are.
        min_retention: The share of retain facts that must be right for a row to be `valid`.
        seed: Draws the halves, the subjects of reference, and the retain facts that are measured.
        progress: Whether to show a bar; None shows one where somebody can see it.

    Returns:
        One row a state (see `states_to_attack`) and score. `held_out` is the share of the facts called members, with its
        95 % interval `low` to `high` over `n` facts; `auc` the probability that a fact's score is above that of a
        never-taught one (.5: no difference); `retain` the accuracy (greedy) on at most 100 retain facts. `chance` and
        `valid` stand beside them, and the run card in `attrs["card"]`. `recovery` reads the rows.

    Raises:
        MechunlearnError: For an empty forget or retain set, fewer than 8 never-taught facts of the same relations, or a
            model that knows less of the retain facts than the gate asks for.

    >>> from mechunlearn import load_facts, load_model
    >>> model = load_model("factworld")
    >>> forget, retain = load_facts("factworld/city").prompts(model).split(forget=8, retain=8)
    >>> rows = membership_inference(model, None, forget, retain)
    >>> rows[rows.state == "unedited"][["setting", "held_out"]].values.tolist()[:3]
    [['loss', 1.0], ['min-k', 1.0], ['zlib', 1.0]]
    """
    check_sizes(forget, retain, least=1)
    references, outside, measured = _strangers(model, forget, seed)
    watched = retain.select(torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed))[:WATCHED])
    given = model, edit, forget, retain, watched, extra_edits, baseline_rows, min_retention, seed, progress
    attack = Attack("membership_inference", *given)
    attack.states = [replace(s, facts=measured) if s.name == NEVER_TAUGHT else s for s in attack.states]
    called = max(1, math.floor(FALSE_ALARMS * (len(outside) + 1)))

    def tried(state: State) -> Rows:
        with state.applied() as target:
            spared = mean(answered(target, watched))
            inside, others = (_scores(target, facts, references) for facts in (state.facts, outside))
        about = {"retain": spared, "chance": called / (len(outside) + 1)}
        for name in SCORES:
            line = others[name].sort(descending=True)[0][called - 1]
            yield [cell(state.name, name, inside[name] > line, seed, **about, auc=auc(inside[name], others[name]))]

    return attack.run(tried, {"false_alarms": FALSE_ALARMS}, len(SCORES))


def _strangers(model: HookedModel, forget: Prompts, seed: int) -> tuple[Prompts, Prompts, Prompts]:
    """Never-taught facts of the same relations: those of reference, those of the threshold, and those measured."""
    untaught = forget.facts.untaught if forget.facts is not None else None
    wanted = {fact.relation for fact in forget.facts or ()}
    found = [] if untaught is None else [i for i, fact in enumerate(untaught) if fact.relation in wanted]
    drawn = [found[i] for i in torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()]
    of: dict[str, list[int]] = {relation: [] for relation in sorted(wanted)}
    for i in drawn:
        of[untaught.facts[i].relation].append(i)  # type: ignore[union-attr]
    few = [relation for relation, rows in of.items() if len(rows) < LEAST]
    if untaught is None or few or not of:
        raise MechunlearnError(
            f"The data have {min((len(rows) for rows in of.values()), default=0)} facts that the model was never taught"
            f"{f' of the relation {few[0]!r}' if few else ''}, and membership is judged by comparison with such facts. "
            f"Expected at least {LEAST} for every relation, in `untaught` of the data set: replace(facts, untaught=...)."
        )
    references = [i for rows in of.values() for i in rows[:REFERENCES]]
    left = [i for i in drawn if i not in set(references)][:MOST]
    halves = left[: len(left) // 2], left[len(left) // 2 :]
    parts = [untaught.select(rows).prompts(model, forget.format) for rows in (references, *halves)]
    return parts[0], parts[1], parts[2]


def _scores(model: HookedModel, prompts: Prompts, references: Prompts) -> dict[str, Float[Tensor, " fact"]]:
    """Every score of every fact: the larger, the more likely it was taught."""
    said = answer_logprobs(model, prompts)
    level = said.nanmean(1)
    packed = zlib_score(said, [query.answer.strip() for query in prompts.queries])
    usual = level - _elsewhere(model, prompts, references)
    return {"loss": level, "min-k": min_k(said, LOWEST), "zlib": packed, "reference": usual}


def _elsewhere(model: HookedModel, prompts: Prompts, references: Prompts) -> Float[Tensor, " fact"]:
    """The mean log-probability of each fact's truth behind the prompts of subjects that were never taught."""
    pairs = [(fact.relation, query.answer) for fact, query in zip(prompts.facts or (), prompts.queries)]
    behind = [(fact.relation, query) for fact, query in zip(references.facts or (), references.queries)]
    rows = [(pair, query) for pair in dict.fromkeys(pairs) for relation, query in behind if relation == pair[0]]
    asked = [replace(query, answer=answer, foil="", target="", subject="", options=()) for (_, answer), query in rows]
    assert model.tokenizer is not None  # it made prompts of the strangers
    level = answer_logprobs(model, Prompts.from_text(asked, model.tokenizer)).nanmean(1)
    found = {pair: [float(x) for x, (other, _) in zip(level, rows) if other == pair] for pair in dict.fromkeys(pairs)}
    return torch.tensor([sum(found[pair]) / len(found[pair]) for pair in pairs])
