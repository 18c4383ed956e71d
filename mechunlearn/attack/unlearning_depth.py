"""How deep an edit reaches: after which blocks the knowledge is still in the edited model's residual stream."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.attack.states import (
    GATE,
    NEVER_TAUGHT,
    WATCHED,
    Attack,
    Row,
    Rows,
    State,
    cell,
    chance,
    check_sizes,
    mean,
    untouched,
)
from mechunlearn.core.arguments import validated
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import PAD, Prompts
from mechunlearn.metrics.answers import BATCH, answer_logprob, at_answers, per_fact, positions_read
from mechunlearn.metrics.probes import subject_ends
from mechunlearn.metrics.stats import bootstrap_interval
from mechunlearn.model.decoder import Run
from mechunlearn.model.hooked import HookedModel
from mechunlearn.patching.sweep import UnitPatch, sweep

__all__ = ["depth", "unlearning_depth"]

Record = Callable[[Prompts], Run]
THRESHOLD = 0.05
SCORE = ("score", "score_low", "score_high", "scored")


@validated
@steady()
def unlearning_depth(
    model: HookedModel,
    edit: Edit | None,
    forget: Prompts,
    retain: Prompts,
    *,
    gold: HookedModel | None = None,
    extra_edits: Mapping[str, Edit | HookedModel | None] | None = None,
    baseline_rows: pd.DataFrame | None = None,
    threshold: float = THRESHOLD,
    min_retention: float = GATE,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Let the original model continue from the edited model's residual stream: is what it needs to answer still there?

    After each number of blocks, from 0 to all, the original model's stream at the subject's last token and everything
    behind it is replaced by the edited model's, and the original model's own later blocks go on from there (after the
    Unlearning Depth Score of arXiv 2605.24614, by activation patching). With d the drop in log-probability of the
    truth, in nats:

    d1 = what the stream of a model without the knowledge costs;  d2 = what the edited model's costs
    erased = clip(d2 / d1, 0, 1) where d1 > `threshold`;  score = sum(d1 erased) / sum(d1) over these depths

    for each fact, then averaged: 0 is intact, 1 erased. The model without the knowledge is `gold`, if there is one.
    Otherwise it is the original model whose MLPs all write, at the subject's last token, what they write there on
    average over the retain facts: it reads the name as ever and looks nothing up. (The stream of another subject will
    not do: it differs in who is meant from the embedding on, where no edit of a later layer can reach.)

    Depths before the lowest edited layer are intact by construction, and count as far as d1 says that they hold the
    knowledge. Memory: one run of a batch of 128 facts, a stream for each depth. Not for knowledge that is not looked
    up by MLPs at the subject, unless you have a `gold` model.

    Args:
        model: The unedited model.
        edit: The edit to attack, or None for ceiling and floor alone.
        forget: The facts that the edit removed.
        retain: The facts that were to stay.
        gold: A model trained without the forgotten facts.
        extra_edits: Further edits, models, or None for the model as it is, to attack alike, by name.
        baseline_rows: Rows of an earlier call whose ceiling and floor are taken as they are.
        threshold: The smallest d1, in nats, of a depth that holds a fact.
        min_retention: The share of retain facts that must be right for a row to be `valid`.
        seed: Draws the never-taught facts and the bootstrap.
        progress: Whether to show a bar; None shows one where somebody can see it.

    Returns:
        One row a state (see `states_to_attack`) and depth (setting `after k blocks`). `held_out` is the accuracy
        (greedy, full vocabulary, all answer tokens) with its 95 % interval `low` to `high` over `n` facts;
        `weight` the mean d1 over facts (0 below the threshold), the same for all states; `erased` the mean over the
        `holding` facts with d1 > `threshold`; `retain_here` the accuracy on at most 100 retain facts under the same
        replacement; `retain` that after all blocks, the edited model's own, so that one that is wrecked has collapsed
        at every depth; `score` with `score_low` to `score_high` over `scored` facts (see `depth`; never-taught facts
        have none). `blocks`, `below` (so deep that the edit has changed nothing yet), `chance` and `valid` stand beside
        them, and the run card in `attrs["card"]`. `recovery` takes the mean over depths by `weight`.

    Raises:
        MechunlearnError: For facts without a subject, a model of another shape, a model that knows less of the retain
            facts than the gate asks for, and if no depth holds the knowledge.

    >>> from mechunlearn.artifacts.mask import ComponentMask
    >>> from mechunlearn.edit import masked_gradient
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> forget, retain = toy.prompts([0, 1, 2, 3]), toy.prompts([4, 5, 6, 7])
    >>> mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    >>> edit = masked_gradient(toy.model, mask, forget, retain, steps=20, lr=0.1)
    >>> rows = unlearning_depth(toy.model, edit, forget, retain)
    >>> rows[["state", "setting", "held_out", "erased"]].values.tolist()[1]
    ['edited', 'after 1 blocks', 0.0, 1.0]
    """
    check_sizes(forget, retain, least=1)
    for name, prompts in (("forget", forget), ("retain", retain)):
        subject_ends(prompts, name)
    retain = retain.select(range(min(WATCHED, len(retain))))
    attack = Attack(
        "unlearning_depth",
        model,
        edit,
        forget,
        retain,
        retain,
        extra_edits,
        baseline_rows,
        min_retention,
        seed,
        progress,
    )
    golden = {} if gold is None else {"gold": gold}
    for name, other in {**{state.name: state.model for state in attack.states}, **golden}.items():
        if other.signature != model.signature:
            raise MechunlearnError(
                f"The model '{name}' is ({other.signature}), the original one ({model.signature}): streams are moved "
                "between "
                "them layer by layer. Give models of one architecture and size."
            )
    without = partial(_run, gold) if gold is not None else partial(_without_look_up, model, _mean_writes(model, retain))
    needed = _patched(model, forget, without)[0]
    weights = needed.mean(1)
    weights = torch.where(weights > threshold, weights, 0.0)
    if not weights.any():
        raise MechunlearnError(
            f"Without the knowledge the truth loses {float(needed.mean(1).max()):.2g} nats at most, and the threshold "
            "is "
            f"{threshold:g}: no depth holds it. Give facts that the model knows, or a `gold` model that does not know "
            "them."
        )

    def tried(state: State) -> Rows:
        (lost, there), (_, kept) = (_patched(model, each, partial(_of_state, state)) for each in (state.facts, retain))
        erased = torch.full_like(needed, math.nan)
        if state.name != NEVER_TAUGHT:  # it is known of the forget facts alone where the original model holds them
            erased = torch.where(needed > threshold, lost / needed, math.nan).clamp(0, 1)
        about = {"retain": mean(kept[-1]), "chance": chance(state.facts), **_score(needed, erased, seed)}
        rows = []
        for blocks, right in enumerate(there):
            here = erased[blocks][~erased[blocks].isnan()]
            depths = {"blocks": blocks, "weight": float(weights[blocks]), "erased": mean(here), "holding": len(here)}
            depths |= {"retain_here": mean(kept[blocks]), "below": blocks <= untouched(state.edit)}
            rows.append(cell(state.name, f"after {blocks} blocks", right, seed, **depths, **about))
        yield rows

    return attack.run(tried, {"gold": gold.fingerprint if gold is not None else None, "threshold": threshold})


def depth(rows: pd.DataFrame) -> pd.DataFrame:
    """Return how deep each state's edit reaches.

    0 where the knowledge is intact at every depth, 1 where it is erased at all.

    Args:
        rows: The rows of `unlearning_depth`.

    Returns:
        One row a state. `score` is the mean over facts of sum(d1 erased) / sum(d1), `score_low` to `score_high` its
        95 % bootstrap interval over the `scored` facts: those with a depth where d1 is above the threshold. `outcome`
        is "measured", or "collapsed" for a model that lost the retain facts too: it then has no score, as wrecked
        models erase everything. Facts that were never taught have none either.

    Raises:
        MechunlearnError: For rows of another attack.

    >>> row = {"state": "edited", "score": 0.8, "score_low": 0.7, "score_high": 0.9, "scored": 64, "valid": True}
    >>> depth(pd.DataFrame([row, row]))["score"].to_dict()
    {'edited': 0.8}
    """
    if missing := [name for name in ("state", "valid", *SCORE) if name not in rows]:
        raise MechunlearnError(f"The frame lacks {', '.join(missing)}. Expected the rows of `unlearning_depth`.")
    found = rows.groupby("state", sort=False)[["valid", *SCORE]].first()
    valid = found.pop("valid").astype(bool)
    found.insert(0, "outcome", valid.map({True: "measured", False: "collapsed"}))
    found.loc[~valid, ["score", "score_low", "score_high"]] = math.nan
    return found


def _patched(
    model: HookedModel, facts: Prompts, record: Record
) -> tuple[Float[Tensor, "depth fact"], Float[Tensor, "depth fact"]]:
    """What the original model makes of another's stream after 0, 1, ... all blocks.

    Nats that the truth loses, and whether it is given.
    """
    depths = torch.arange(model.signature.layers + 1)
    lost, right = [], []
    for rows in torch.arange(len(facts)).split(BATCH):
        part = facts.select(rows)
        source = record(part).resid
        base = model.decoder.record(part.tokens, positions_read(answer_logprob, part).to(model.device))
        behind, first = _behind(part)[None].to(model.device), torch.tensor([0])
        patches = [
            UnitPatch(k, "resid_pre", torch.tensor([k]), behind, first, source[k][None].to(model.device))
            for k in depths.tolist()
        ]
        as_it_is = per_fact(answer_logprob, base.logits, part)
        lost.append(as_it_is - sweep(model.decoder, base, patches, len(depths), answer_logprob, part))
        right.append(sweep(model.decoder, base, patches, len(depths), _given, part))
    return torch.cat(lost, 1), torch.cat(right, 1)


def _behind(facts: Prompts) -> Bool[Tensor, "fact pos"]:
    """The subject's last token and all that follows."""
    places = torch.arange(facts.tokens.shape[1])
    return (places >= facts.spans[:, 1:]) & (places < facts.lengths[:, None])


def _run(model: HookedModel, facts: Prompts) -> Run:
    return model.decoder.record(facts.tokens, facts.start[:, None], keys=False)


def _of_state(state: State, facts: Prompts) -> Run:
    with state.applied() as target:
        return _run(target, facts)


def _mean_writes(model: HookedModel, retain: Prompts) -> dict[str, Float[Tensor, " d_model"]]:
    """What each MLP writes at the subject's last token, on average over these facts."""
    mlps = [f"L{layer}.mlp_out" for layer in range(model.signature.layers)]
    run = model.decoder.record(retain.tokens, retain.start[:, None], mlps, keys=False)
    rows = torch.arange(len(retain))
    return {site: written[rows, retain.spans[:, 1]].mean(0) for site, written in run.kept.items()}


def _without_look_up(model: HookedModel, means: Mapping[str, Tensor], facts: Prompts) -> Run:
    """A run in which every MLP writes the mean at the subject's last token."""

    def replaced(mean: Tensor, written: Tensor) -> Tensor:
        changed = written.clone()
        changed[torch.arange(len(facts)), facts.spans[:, 1]] = mean
        return changed

    hooks = {site: partial(replaced, mean) for site, mean in means.items()}
    return model.decoder.record(facts.tokens, facts.start[:, None], hooks=hooks, keys=False)


@at_answers
def _given(logits: Float[Tensor, "fact pos d_vocab"], prompts: Prompts) -> Float[Tensor, " fact"]:
    """1 where greedy decoding gives all tokens of the answer."""
    valid = prompts.answers != PAD
    rows, steps = valid.nonzero(as_tuple=True)
    wrong = logits[rows, prompts.start[rows] + steps].argmax(-1).cpu() != prompts.answers[valid]
    return (torch.zeros(len(prompts)).index_add_(0, rows, wrong.float()) == 0).float()


def _score(needed: Float[Tensor, "depth fact"], erased: Float[Tensor, "depth fact"], seed: int) -> Row:
    """Mean over facts of the weighted mean of `erased` (NaN where a depth does not hold the fact), with its interval."""
    weight = torch.where(erased.isnan(), 0.0, needed)
    some = weight.sum(0) > 0
    if not some.any():
        return dict(zip(SCORE, (math.nan, math.nan, math.nan, 0), strict=True))
    by_fact = ((weight * erased.nan_to_num()).sum(0) / weight.sum(0))[some].numpy()
    return dict(zip(SCORE, (float(by_fact.mean()), *bootstrap_interval(by_fact, seed), len(by_fact)), strict=True))
