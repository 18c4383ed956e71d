"""Probing: whether the truth can still be read from the residual stream of an edited model, by linear probes and lenses."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.attack.states import GATE, WATCHED, Attack, Row, Rows, State, cell, chance, mean, untouched
from mechunlearn.core.arguments import validated
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import PAD, Prompts
from mechunlearn.metrics.answers import BATCH, answered
from mechunlearn.metrics.probes import fitted, residuals, streams, subject_ends
from mechunlearn.model.hooked import HookedModel

LEAST = 10
RIDGE, ROUNDING = 1.0, 1e-9  # the second where all facts have one stream, as before the first block


@validated
@steady()
def probing(
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
    """Read the truth from the residual stream of the edited model, after each number of blocks, without training the model.

    Two groups of readers, each fitted to the state itself on four fifths of the retain facts and applied to the
    forgotten facts, which it has never seen:

    - `probe`: multinomial logistic regression of the answer, as a class, on the layer-normed stream at the subject's
      last token (Mechanistic Unlearning, arXiv 2410.12949). An answer that no retain fact has is never given, and is
      wrong.
    - `lens`, at the position that predicts the first token at which truth and edit target differ: the *logit lens*
      unembeds the stream h_k after k blocks as if it were the last; the *tuned lens* unembeds h_k + W h_k + b, with W
      and b the ridge regression of h_L - h_k on h_k over the same retain facts (ridge: the mean eigenvalue; arXiv
      2303.08112 trains them by gradient instead). A lens is right if that token of the truth is the largest of the
      full vocabulary.

    A probe needs facts: on the shipped world (8 answers, width 128) none reaches a gate of .9 with 77 to train on, and
    all from the third block on do with 240. Give more retain facts, or a lower gate, if all probes are listed as
    collapsed. That the truth can be read does not mean that the model reads it; see `unlearning_depth`.

    Args:
        model: The unedited model.
        edit: The edit to attack, or None for ceiling and floor alone.
        forget: The facts that the edit removed.
        retain: The facts that were to stay; some for each answer.
        extra_edits: Further edits, models, or None for the model as it is, to attack alike, by name.
        baseline_rows: Rows of an earlier call whose ceiling and floor are taken as they are.
        min_retention: The share of retain facts that must be right for a row to be `valid`.
        seed: Draws the retain facts that readers are fitted to, and shuffles their labels.
        progress: Whether to show a bar; None shows one where somebody can see it.

    Returns:
        One row a state (see `states_to_attack`) and setting (`probe, after 3 blocks`). `held_out` is the accuracy on
        the truth with its 95 % interval `low` to `high` over `n` facts; `edit_target` how often the edit's
        answer is read; `shuffled` the accuracy of a probe trained on shuffled labels (probes only); `retain_here`
        that on the fifth of the retain facts (at most 100) that nothing was fitted to; `own` what the model itself
        knows of them; `retain`, which the gate is asked of, the smaller of these two, because neither a reader that
        cannot read retained subjects nor a wrecked model says anything. `group`, `blocks`, `below` (so deep
        that the edit has changed nothing yet), `chance` and `valid` stand beside them, and the run card in
        `attrs["card"]`. `recovery` takes the best of depths.

    Raises:
        MechunlearnError: For fewer than 10 retain facts or such that all have one answer, an empty forget set, facts
            without a subject, or a model that knows less of the retain facts than the gate asks for.

    >>> from mechunlearn.artifacts.mask import ComponentMask
    >>> from mechunlearn.edit import masked_gradient
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> forget, retain = toy.prompts([0, 1, 2, 3]), toy.prompts(list(range(4, 24)))
    >>> mask = ComponentMask.of([toy.neuron(i) for i in range(4)], toy.model.signature)
    >>> edit = masked_gradient(toy.model, mask, forget, retain, steps=50, lr=0.1)
    >>> rows = probing(toy.model, edit, forget, retain)
    >>> rows[rows.setting == "probe, after 1 blocks"].set_index("state")["held_out"].to_dict()
    {'edited': 0.0, 'unedited': 1.0}
    """
    _check(forget, retain)
    order = torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed))
    taught, tested = order[len(order) // 5 :], order[: len(order) // 5][:WATCHED]
    watched = retain.select(tested)
    attack = Attack(
        "probing", model, edit, forget, retain, watched, extra_edits, baseline_rows, min_retention, seed, progress
    )

    def tried(state: State) -> Rows:
        with state.applied() as target:
            readings = [
                *_probes(target, state.facts, retain, taught, tested, seed),
                *_lenses(target, state.facts, retain, taught, tested),
            ]
            about: Row = {"chance": chance(state.facts), "own": mean(answered(target, watched))}
        for read in readings:
            read |= {"retain": min(read["retain_here"], about["own"]), "below": read["blocks"] <= untouched(state.edit)}
        yield [cell(state.name, seed=seed, **read, **about) for read in readings]

    return attack.run(tried, {"ridge": RIDGE})


def _check(forget: Prompts, retain: Prompts) -> None:
    if len(retain) < LEAST:
        raise MechunlearnError(
            f"The retain set has {len(retain)} facts: probes are trained on four fifths of it and tested on the rest. "
            "Expected "
            f"at least {LEAST}, and some for each answer; see Prompts.split."
        )
    if len(forget) == 0:
        raise MechunlearnError("The forget set is empty. Expected at least one fact.")
    for name, prompts in (("forget", forget), ("retain", retain)):
        subject_ends(prompts, name)


def _probes(
    model: HookedModel, facts: Prompts, retain: Prompts, taught: Tensor, tested: Tensor, seed: int
) -> Iterator[Row]:
    """Answers as classes, read at the subject's last token."""
    classes: dict[tuple[int, ...], int] = {}
    labels, truth, targets = (
        np.array([classes.setdefault(tuple(i for i in row if i != PAD), len(classes)) for row in answers.tolist()])
        for answers in (retain.answers, facts.answers, facts.targets)
    )
    known = labels[taught]
    if len(set(known)) < 2:
        raise MechunlearnError(
            f"All {len(known)} retain facts that a probe is trained on have one answer, so there is nothing to tell "
            "apart. Give "
            "retain facts with different answers."
        )
    shuffled = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed + 1)).numpy()]
    seen = _finite(residuals(model, retain, retain.spans[:, 1])).numpy()
    asked = _finite(residuals(model, facts, facts.spans[:, 1])).numpy()
    for blocks, (x, new) in enumerate(zip(seen, asked, strict=True)):
        probe = fitted(x[taught], known)
        said, unsaid = probe.predict(new), fitted(x[taught], shuffled).predict(new)
        yield {
            "setting": f"probe, after {blocks} blocks",
            "right": torch.from_numpy(said == truth),
            "group": "probe",
            "blocks": blocks,
            "edit_target": float(np.mean(said == targets)),
            "shuffled": float(np.mean(unsaid == truth)),
            "retain_here": float(np.mean(probe.predict(x[tested]) == labels[tested])),
        }


def _lenses(model: HookedModel, facts: Prompts, retain: Prompts, taught: Tensor, tested: Tensor) -> Iterator[Row]:
    """Tokens, read where the first token is predicted that tells the truth from the edit target."""
    (positions, known, _), (places, truth, targets) = _told_apart(retain), _told_apart(facts)
    seen, asked = _finite(streams(model, retain, positions)), _finite(streams(model, facts, places))
    held_out = known[tested]
    for blocks, (x, new) in enumerate(zip(seen, asked, strict=True)):
        lens = _Lens.fitted(x[taught], seen[-1][taught])
        for name, final in (("logit lens", torch.clone), ("tuned lens", lens.final)):
            said = _said(model, final(new))
            yield {
                "setting": f"{name}, after {blocks} blocks",
                "right": said == truth,
                "group": "lens",
                "blocks": blocks,
                "edit_target": mean(said == targets),
                "shuffled": math.nan,
                "retain_here": mean(_said(model, final(x[tested])) == held_out),
            }


@dataclass(frozen=True)
class _Lens:
    """An affine guess of the final stream, by ridge regression in its dual form.

    No matrix has a side of d_model squared.
    """

    x: Float[Tensor, "fact d_model"]
    mean: Float[Tensor, " d_model"]
    added: Float[Tensor, " d_model"]
    dual: Float[Tensor, "fact d_model"]

    @classmethod
    def fitted(cls, x: Float[Tensor, "fact d_model"], final: Float[Tensor, "fact d_model"]) -> "_Lens":
        change = (final - x).double()
        mean, added = x.double().mean(0), change.mean(0)
        centred = x.double() - mean
        products = centred @ centred.mT
        strength = (RIDGE * products.diagonal().sum() + ROUNDING * x.double().square().sum()) / x.shape[1] + ROUNDING
        shifted = products + strength * torch.eye(len(products), dtype=torch.float64)
        return cls(centred, mean, added, torch.linalg.solve(shifted, change - added))

    def final(self, h: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What would leave the last block."""
        return (h + self.added + (h - self.mean) @ self.x.mT @ self.dual).float()


def _told_apart(facts: Prompts) -> tuple[Int[Tensor, " fact"], Int[Tensor, " fact"], Int[Tensor, " fact"]]:
    """Where the first token is predicted that tells the truth from the edit target, and what it is in both (-1: none)."""
    width = max(facts.answers.shape[1], facts.targets.shape[1])
    truth, targets = (F.pad(rows, (0, width - rows.shape[1]), value=PAD) for rows in (facts.answers, facts.targets))
    at = torch.minimum((truth != targets).int().argmax(1), (truth != PAD).sum(1) - 1)[:, None]
    truth, targets = truth.gather(1, at)[:, 0], targets.gather(1, at)[:, 0]
    return facts.start + at[:, 0], truth, targets.where(targets != truth, PAD)


@torch.no_grad()
def _said(model: HookedModel, resid: Float[Tensor, "fact d_model"]) -> Int[Tensor, " fact"]:
    """The largest token of the full vocabulary."""
    weight = next(model.hf.parameters())
    return torch.cat([model.decoder.unembed(part.to(weight)).argmax(-1).cpu() for part in resid.split(BATCH)])


def _finite(resid: Float[Tensor, "layer fact d_model"]) -> Float[Tensor, "layer fact d_model"]:
    """In float32, with zeros where a wrecked model has no numbers."""
    return resid.float().nan_to_num(0.0, 0.0, 0.0)
