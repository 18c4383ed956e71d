"""Probing: whether the truth can still be read from the residual stream of an edited model, by linear probes and lenses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.attack.states import (
    GATE,
    attack_card,
    cell,
    chance,
    check_gate,
    states_to_attack,
    states_to_run,
    to_frame,
)
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import PAD, Prompts
from mechunlearn.metrics.answers import BATCH, answered
from mechunlearn.metrics.probes import fitted, residuals, streams, subject_ends
from mechunlearn.model.hooked import HookedModel

__all__ = ["probing"]

LEAST, WATCHED = 10, 100
RIDGE, ROUNDING = 1.0, 1e-9  # the second where all facts have one stream, as before the first block


def probing(
    model: HookedModel,
    edit: Edit | None,
    forget: Prompts,
    retain: Prompts,
    *,
    extra_edits: Mapping[str, Edit | HookedModel | None] | None = None,
    baseline_rows: pd.DataFrame | None = None,
    min_retention: float | int = GATE,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Read the truth from the residual stream of the edited model, after each number of blocks, without training the model.

    Two groups of readers, each fitted to the state itself on four fifths of the retain facts (drawn by `seed`), each applied to
    the forgotten facts, which it has never seen:

    - `probe`: multinomial logistic regression of the answer, as a class, on the layer-normed stream at the subject's last token
      (Mechanistic Unlearning, arXiv 2410.12949). An answer that no retain fact has is never given, and is wrong.
    - `lens`, at the position that predicts the first token at which truth and edit target differ: the *logit lens* unembeds the
      stream h_k after k blocks as if it were the last; the *tuned lens* unembeds h_k + W h_k + b, with W and b the ridge
      regression of h_L - h_k on h_k over the same retain facts (strength: the mean eigenvalue; arXiv 2303.08112 trains them by
      gradient instead). A lens is right if that token of the truth is the largest of the full vocabulary.

    The same is done for all states that `relearning` has. One row a state and setting (`probe, after 3 blocks`): accuracy
    `held out` on the truth with its interval `low` to `high` over `n` facts; on the `edit label`; of a probe trained on `shuffled`
    labels, on the truth (probes only); `retain here` on the fifth of the retain facts (at most 100) that nothing was fitted to,
    and `own`, what the model itself knows of them. `retain`, which the gate is asked of, is the smaller of these two: neither what cannot read retained subjects nor a wrecked model says anything. Best of depths, in `recovery`.

    A probe needs facts: on the shipped world (8 answers, width 128) none reaches a gate of .9 with 77 to train on, and
    all from the third block on do with 240. Give more retain facts, or a lower gate, if all probes are listed as collapsed.

    Raises `MechunlearnError` for fewer than 10 retain facts, or such that all have one answer, facts without a subject, and a
    model that knows less of the retain facts than the gate asks for. Not for what a model could use: that the truth can be read
    does not mean that the model reads it; see `unlearning_depth`.

    >>> from mechunlearn.artifacts.mask import ComponentMask
    >>> from mechunlearn.edit import masked_gradient
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> forget, retain = toy.prompts([0, 1, 2, 3]), toy.prompts(list(range(4, 24)))
    >>> mask = ComponentMask.of([toy.neuron(i) for i in range(4)], toy.model.signature)
    >>> edit = masked_gradient(toy.model, mask, forget, retain, steps=50, lr=0.1)
    >>> rows = probing(toy.model, edit, forget, retain)
    >>> rows[rows.setting == "probe, after 1 blocks"].set_index("state")["held out"].to_dict()
    {'edited': 0.0, 'unedited': 1.0}
    """
    watch = Stopwatch()
    _check(forget, retain)
    states = states_to_attack(model, edit, forget, extra_edits, seed)
    order = torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed))
    taught, tested = order[len(order) // 5 :], order[: len(order) // 5][:WATCHED]
    check_gate(model, retain.select(tested), min_retention)
    card = attack_card("probing", model, edit, forget, retain, seed, {"min_retention": min_retention, "ridge": RIDGE})
    rows: list[dict] = []
    for state in track(states_to_run(states, baseline_rows, card), "probing", disable=not progress, transient=True):
        with state.applied() as target:
            readings = [
                *_probes(target, state.facts, retain, taught, tested, seed),
                *_lenses(target, state.facts, retain, taught, tested),
            ]
            own = float(answered(target, retain.select(tested)).float().mean())
        about = {"chance": chance(state.facts), "own": own}
        for found in readings:
            rows.append(
                cell(state.name, found.setting, found.truth, seed)
                | {"group": found.group, "blocks": found.blocks}
                | {"edit label": float(found.target.float().mean()), "shuffled": found.shuffled}
                | {"retain": min(found.retain, own), "retain here": found.retain, **about}
            )
    return to_frame(rows, baseline_rows, min_retention, card, watch)


@dataclass(frozen=True)
class _Reading:
    """What one reader says of facts after some blocks: the truth, or the edit target, by fact."""

    group: str
    name: str
    blocks: int
    truth: Bool[Tensor, " fact"]
    target: Bool[Tensor, " fact"]
    retain: float
    shuffled: float = math.nan

    @property
    def setting(self) -> str:
        return f"{self.name}, after {self.blocks} blocks"


def _check(forget: Prompts, retain: Prompts) -> None:
    if len(retain) < LEAST:
        raise MechunlearnError(
            f"The retain set has {len(retain)} facts: probes are trained on four fifths of it and tested on the rest. Expected "
            f"at least {LEAST}, and some for each answer; see Prompts.split."
        )
    if len(forget) == 0:
        raise MechunlearnError("The forget set is empty. Expected at least one fact.")
    for name, prompts in (("forget", forget), ("retain", retain)):
        subject_ends(prompts, name)


def _probes(
    model: HookedModel, facts: Prompts, retain: Prompts, taught: Tensor, tested: Tensor, seed: int
) -> list[_Reading]:
    """Answers as classes, read at the subject's last token."""
    classes: dict[tuple[int, ...], int] = {}
    labels, truth, targets = (
        np.array([classes.setdefault(tuple(i for i in row if i != PAD), len(classes)) for row in answers.tolist()])
        for answers in (retain.answers, facts.answers, facts.targets)
    )
    known = labels[taught]
    if len(set(known)) < 2:
        raise MechunlearnError(
            f"All {len(known)} retain facts that a probe is trained on have one answer, so there is nothing to tell apart. Give "
            "retain facts with different answers."
        )
    shuffled = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed + 1)).numpy()]
    seen = _finite(residuals(model, retain, retain.spans[:, 1])).numpy()
    asked = _finite(residuals(model, facts, facts.spans[:, 1])).numpy()
    found = []
    for blocks, (x, new) in enumerate(zip(seen, asked, strict=True)):
        probe = fitted(x[taught], known)
        said = probe.predict(new)
        found.append(
            _Reading(
                "probe",
                "probe",
                blocks,
                torch.from_numpy(said == truth),
                torch.from_numpy(said == targets),
                float(np.mean(probe.predict(x[tested]) == labels[tested])),
                float(np.mean(fitted(x[taught], shuffled).predict(new) == truth)),
            )
        )
    return found


def _lenses(model: HookedModel, facts: Prompts, retain: Prompts, taught: Tensor, tested: Tensor) -> list[_Reading]:
    """Tokens, read where the first token is predicted that tells the truth from the edit target."""
    (positions, known, _), (places, truth, targets) = _told_apart(retain), _told_apart(facts)
    seen, asked = _finite(streams(model, retain, positions)), _finite(streams(model, facts, places))
    held_out = known[tested]
    found = []
    for blocks, (x, new) in enumerate(zip(seen, asked, strict=True)):
        lens = _Lens.fitted(x[taught], seen[-1][taught])
        for name, kept, read in (
            ("logit lens", x[tested], new),
            ("tuned lens", lens.final(x[tested]), lens.final(new)),
        ):
            said = _said(model, read)
            right = float((_said(model, kept) == held_out).float().mean())
            found.append(_Reading("lens", name, blocks, said == truth, said == targets, right))
    return found


@dataclass(frozen=True)
class _Lens:
    """An affine guess of the final stream, by ridge regression in its dual form: no matrix has a side of d_model squared."""

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
