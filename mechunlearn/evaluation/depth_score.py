"""The Unlearning Depth Score (arXiv 2605.24614): how much of what a retain model lacks does the edited model lack too?"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.core.arguments import validated
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import PAD, Prompts
from mechunlearn.metrics.answers import BATCH, answer_logprob, per_fact, positions_read
from mechunlearn.metrics.stats import bootstrap_interval
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.unwrap import evaluating
from mechunlearn.patching.sweep import UnitPatch, sweep


@dataclass(frozen=True, eq=False)
class DepthScore:
    """The score of an edit, and what it is made of.

    Args:
        score: The mean over the facts that have a score: 0 is intact, 1 erased as deep as in the retain model.
        low: The lower end of its 95 % interval over facts (bootstrap).
        high: The upper end.
        by_fact: The score of each fact; NaN where no layer holds it.
        retain: What the retain model's stream costs, by layer (1 to all) and fact, in nats a token.
        edited: What the edited model's stream costs.
    """

    score: float
    low: float
    high: float
    by_fact: Float[Tensor, " fact"]
    retain: Float[Tensor, "layer fact"]
    edited: Float[Tensor, "layer fact"]

    @property
    def n(self) -> int:
        """How many facts have a score."""
        return int((~self.by_fact.isnan()).sum())


@validated
@steady()
def unlearning_depth_score(
    model: HookedModel, edit: Edit, gold: HookedModel, forget: Prompts, *, threshold: float = 0.05, seed: int = 0
) -> DepthScore:
    """Return the Unlearning Depth Score as its authors define it.

    For each layer l from 1 to the last, the residual stream that leaves it is put into the unedited model where the
    answer's tokens are predicted, first from the retain model (S1), then from the edited one (S2). With d the drop of
    the mean log-probability of the answer's tokens:

    score = sum over l of d1 clip(d2 / d1, 0, 1) / sum over l of d1, of the layers with d1 > `threshold`

    for each fact, then averaged over the facts that have such a layer (equations of arXiv 2605.24614, section 3). The
    attack `unlearning_depth` is a relative of it: it replaces all positions from the subject on, sums over tokens,
    counts the embeddings as a depth, and needs no retain model. Not for edits without a model that never saw the
    facts: another model than that makes the score meaningless.

    Args:
        model: The unedited model.
        edit: The edit.
        gold: The retain model: the same architecture, trained without the forgotten facts.
        forget: The facts that the edit removed.
        threshold: The smallest d1, in nats a token, of a layer that holds a fact.
        seed: Draws the bootstrap.

    Raises:
        MechunlearnError: If the retain model has another shape, there are no facts, or no layer holds any of them.

    >>> from mechunlearn.artifacts.mask import ComponentMask
    >>> from mechunlearn.edit import masked_gradient
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy, gold = planted_facts(), planted_facts().model
    >>> forget, retain = toy.prompts([0, 1, 2, 3]), toy.prompts([4, 5, 6, 7])
    >>> mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    >>> edit = masked_gradient(toy.model, mask, forget, retain, steps=20, lr=0.1)
    >>> edit.apply_(gold)
    >>> unlearning_depth_score(toy.model, edit, gold, forget).score
    1.0
    """
    if gold.signature != model.signature:
        raise MechunlearnError(
            f"The retain model is ({gold.signature}), the model ({model.signature}). Expected one architecture and "
            "size: streams are moved between them layer by layer."
        )
    if not len(forget):
        raise MechunlearnError("The forget set is empty. Expected at least one fact.")
    with evaluating(model.hf), evaluating(gold.hf):
        retain = _lost(model, forget, _streams(gold, forget))
        with edit.applied(model):
            streams = _streams(model, forget)
        edited = _lost(model, forget, streams)
    if not (retain > threshold).any():
        raise MechunlearnError(
            f"The retain model's streams cost {float(retain.max()):.2g} nats a token at most, and the threshold is "
            f"{threshold:g}: no layer holds a fact. Give a retain model that does not know these facts."
        )
    by_fact = depth_scores(retain, edited, threshold)
    scored = by_fact[~by_fact.isnan()]
    low, high = bootstrap_interval(scored.numpy(), seed)
    return DepthScore(float(scored.mean()), low, high, by_fact, retain, edited)


def depth_scores(
    retain: Float[Tensor, "layer fact"], edited: Float[Tensor, "layer fact"], threshold: float = 0.05
) -> Float[Tensor, " fact"]:
    """Return the score of each fact from what the streams of the retain and of the edited model cost.

    Args:
        retain: By layer and fact, in nats a token.
        edited: The same of the edited model.
        threshold: The smallest cost, in nats a token, of a layer that holds a fact.

    Returns:
        The scores; NaN where no layer holds the fact.

    >>> retain = torch.tensor([[0.5, 0.01], [0.04, 0.0], [1.0, 0.02]])
    >>> edited = torch.tensor([[0.25, 0.3], [1.0, 0.0], [2.0, 0.1]])
    >>> depth_scores(retain, edited).tolist()  # (.5 x .25 / .5 + 1 x 1) / (.5 + 1) = .8333; the second has no layer
    [0.8333333134651184, nan]
    """
    weight = torch.where(retain > threshold, retain, 0.0)
    erased = torch.where(weight > 0, (edited / retain).clamp(0, 1), 0.0)
    return torch.where(weight.sum(0) > 0, (weight * erased).sum(0) / weight.sum(0), torch.nan)


def _streams(model: HookedModel, facts: Prompts) -> list[list[Tensor]]:
    """What leaves every layer, by batch."""
    parts = (facts.select(rows) for rows in torch.arange(len(facts)).split(BATCH))
    return [list(model.decoder.record(part.tokens, part.start[:, None], keys=False).resid)[1:] for part in parts]


def _lost(model: HookedModel, facts: Prompts, streams: list[list[Tensor]]) -> Float[Tensor, "layer fact"]:
    """The drop of the mean log-probability of the answer's tokens with each of these streams in the model."""
    lost = []
    for rows, source in zip(torch.arange(len(facts)).split(BATCH), streams, strict=True):
        part = facts.select(rows)
        base = model.decoder.record(part.tokens, positions_read(answer_logprob, part).to(model.device))
        tokens = (part.answers != PAD).sum(1)
        places, first = torch.arange(part.tokens.shape[1]), part.start[:, None]
        answer = ((places >= first) & (places < first + tokens[:, None]))[None].to(model.device)
        patches = [
            UnitPatch(
                layer, "resid_post", torch.tensor([layer]), answer, torch.tensor([0]), stream[None].to(model.device)
            )
            for layer, stream in enumerate(source)
        ]
        as_it_is = per_fact(answer_logprob, base.logits, part)
        lost.append((as_it_is - sweep(model.decoder, base, patches, len(source), answer_logprob, part)) / tokens)
    return torch.cat(lost, 1)
