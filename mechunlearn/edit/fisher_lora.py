"""LoKU: low-rank adapters that begin where a matrix matters to the forget set and not to the retain set."""

from collections.abc import Sequence
from functools import cache as cache_once
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.edit import losses
from mechunlearn.edit.goal import Goal
from mechunlearn.edit.objective import Measure, Objective, descend_on
from mechunlearn.edit.remake import editor
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel
from mechunlearn.training.adapters import LowRank, lora_start
from mechunlearn.training.fisher import DiagonalFisher
from mechunlearn.training.inputs import BATCH, Sequences
from mechunlearn.training.parameterizations import matrices

Init = Literal["fila", "fila-code-eps", "fila-row-sums", "forget-fisher", "pissa", "random"]
INITS: tuple[str, ...] = get_args(Init)
CODE_EPS, RANK = 1e-5, 8


@editor
def fisher_lora(
    model: HookedModel,
    mask: ComponentMask,
    forget: Prompts,
    retain: Prompts,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    init: Init = "fila",
    fisher: tuple[DiagonalFisher, DiagonalFisher | None] | None = None,
    loss: losses.Loss = losses.inverted_hinge,
    retain_loss: losses.Loss = losses.cross_entropy,
    text_loss: losses.Loss = losses.kl_retain,
    efficacy: float = 0.99,
    max_kl: float = 0.05,
    min_retention: float = 0.95,
    lr: float | None = None,
    steps: int | None = None,
    forget_weight: float = 1.0,
    retain_weight: float = 1.0,
    text_weight: float = 1.0,
    texts: Sequence[str] | None = None,
    batch_size: int = 32,
    accumulate: int = 1,
    clip: float = 1.0,
    warmup: int = 0,
    weight_decay: float = 0.0,
    stop_at: float | None = None,
    cache: bool = True,
    measure: Measure | None = None,
    seed: int = 0,
    progress: bool = False,
) -> WeightEdit:
    """Unlearn the forget facts with low-rank adapters on the masked weights: LoKU (arXiv 2408.06621).

    An adapter of rank r on a matrix W [out in] computes W + s (B A - B0 A0), with s = alpha / rank and B0 A0 what B A
    began
    as: the model is unchanged, exactly, before the first step. `init` says where they begin:

    - `fila`: the rank-r matrix nearest to W with row i weighted by d_i, d_i^2 = sum_j F_f[i, j] / (eps + F_r[i, j]),
      F_f and F_r the per-sequence diagonal Fisher on forget and retain facts, eps = mean(F_r);
    - `fila-code-eps`: eps = 1e-5, as the authors' code has it; `fila-row-sums`: d_i^2 = sum_j F_f / sum_j F_r;
    - `forget-fisher`: d_i^2 = sum_j F_f; `pissa`: d_i = 1, an SVD without Fisher; `random`: ordinary LoRA (B = 0).

    Then inverted hinge + retain cross-entropy, trained as `masked_gradient` trains rows. Whole matrices are adapted
    where the mask selects them whole, otherwise the selected rows or columns; biases are not. The initialisation's
    gain over `pissa` and `random` is in docs/reproductions/loku.md: where adapters are not wanted, `masked_gradient`
    with `losses.inverted_hinge` is simpler.

    Without `lr` and `steps` it searches as `masked_gradient` does. Pushing truths down, with no other answer to put in
    their place, spreads to the relation: `evaluate`'s unseen facts say how far. Not for facts whose neighbours must
    stay, unless the retain set has many of them.

    Args:
        model: The model to edit.
        mask: The units that may move.
        forget: Facts to unlearn.
        retain: Facts to hold.
        rank: Rank of every adapter. None: 8, or less where the selected part of a matrix has fewer rows or columns.
        alpha: The change of the weights is scaled by alpha / rank, where no rank is given by alpha / 8; by 2 unless
            alpha is given.
        init: Where the adapters begin (above).
        fisher: The Fisher information of the forget and of the retain set where it is known (`fisher_information`),
            to try several settings. It is computed where it lacks a matrix of the mask.
        loss: Any function of `edit.losses`, or one of yours.
        retain_loss: The same for the retain facts.
        text_loss: The same for ordinary text: `losses.kl_retain` holds what the unedited model says on it.
        efficacy: Least share of the forget facts to edit: they answer the target, where the loss has one, else they no
            longer give the truth (greedy).
        max_kl: Largest mean KL of the next token on the model's own text, in nats a token.
        min_retention: Least share of the known retain facts to keep.
        lr: Largest learning rate. Giving it, or `steps`, turns the search off.
        steps: Optimiser steps, at most; 50 where only `lr` is given.
        forget_weight: Weight of the forget term.
        retain_weight: Weight of the retain term; at 0 the retain facts are not read.
        text_weight: Weight of the text term; at 0 no text is held.
        texts: Ordinary text to hold, by default a half of the forget data set's, or else samples of the model itself.
        batch_size: Forget facts a step, as many retain facts, and a quarter as many texts.
        accumulate: Parts that each batch is split into, to save memory.
        clip: Largest norm of the gradient.
        warmup: Steps in which the learning rate rises.
        weight_decay: AdamW's weight decay.
        stop_at: End once this share of the forget facts is edited (see `masked_gradient`).
        cache: Compute what enters the lowest masked layer once an example and keep it (tokens x d_model).
        measure: Called with the number of each step; what it returns goes on the card, and a true `stop` in it ends
            training.
        seed: Seed of the order of the facts, and of `init="random"`.
        progress: Whether to show a bar.

    Returns:
        A low-rank edit, which `save_adapter` writes for PEFT.

    Raises:
        MechunlearnError: For a rank larger than a matrix, an unknown `init`, and as `masked_gradient` does.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    >>> fisher_lora(toy.model, mask, toy.prompts([0]), toy.prompts([1, 2]), rank=2, steps=2).mask == mask
    True
    """
    scale = 2.0 if alpha is None else alpha / (rank or RANK)

    @cache_once
    def weights() -> dict[str, Tensor]:
        if init == "pissa":
            return {}
        needed = {part.module for part in matrices(model, mask)}
        known = [given if given and needed <= given.modules else None for given in fisher or (None, None)]
        of_forget = known[0] or fisher_information(model, mask, forget)
        of_retain = known[1] or (None if init == "forget-fisher" else fisher_information(model, mask, retain))
        return row_weights(model, mask, of_forget, of_retain, init)

    def weighted(name: str, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        return weighted_low_rank(weight, weights().get(name), rank, scale)

    terms = (forget_weight, retain_weight, text_weight)
    how = Objective(loss, retain_loss, text_loss, *terms, texts, batch_size, accumulate, stop_at, cache)
    start = lora_start(seed) if init == "random" else weighted
    adapters = LowRank(model, mask, rank or RANK, scale, start, fit=rank is None)
    goal, schedule = Goal(efficacy, max_kl, min_retention), (warmup, clip, weight_decay)
    return descend_on(adapters, forget, retain, how, goal, lr, steps, schedule, measure, seed, progress)


def fisher_information(model: HookedModel, mask: ComponentMask, prompts: Prompts) -> DiagonalFisher:
    """Return the per-sequence diagonal Fisher of the masked matrices on some facts, for several calls of `fisher_lora`.

    Args:
        model: The model.
        mask: What `fisher_lora` will adapt; biases are left out.
        prompts: The facts: one or more.
    """
    if not len(prompts):
        raise MechunlearnError("The set is empty, so it has no Fisher information. Expected at least one fact.")
    found, sequences = DiagonalFisher(model.hf, [part.module for part in matrices(model, mask)]), Sequences.of(prompts)
    for rows in torch.split(sequences.lengths.argsort(), BATCH):
        drawn = sequences.select(rows)
        found.update(drawn.tokens, drawn.labels)
    return found


def row_weights(
    model: HookedModel, mask: ComponentMask, forget: DiagonalFisher, retain: DiagonalFisher | None, init: str = "fila"
) -> dict[str, Float[Tensor, " _out"]]:
    """Return the weight d_i of every output row of the selected part of each matrix, by parameter.

    Args:
        model: The model.
        mask: What is adapted.
        forget: Fisher information of the forget facts.
        retain: Fisher information of the retain facts; `forget-fisher` needs none.
        init: One of `INITS` that weighs rows (see `fisher_lora`).
    """
    found = {}
    for part in matrices(model, mask):
        axis = 1 - part.dim if part.transposed(model) else part.dim  # elements are [out in]
        f, *r = (
            each.elements(part.module)
            if part.index is None
            else each.elements(part.module).index_select(axis, part.index)
            for each in (forget, retain)
            if each is not None
        )
        if init == "forget-fisher":
            squared = f.sum(1)
        elif init == "fila-row-sums":
            squared = f.sum(1) / r[0].sum(1).clamp_min(_floor(f))
        else:
            eps = CODE_EPS if init == "fila-code-eps" else max(float(r[0].mean()), _floor(f))
            squared = (f / (eps + r[0])).sum(1)
        found[part.name] = squared.sqrt()
    return found


def _floor(forget: Tensor) -> float:
    """What stands for a retain Fisher of zero."""
    return 1e-12 * float(forget.mean()) or 1.0


def weighted_low_rank(
    weight: Float[Tensor, "out in"], rows: Float[Tensor, " out"] | None, rank: int, scale: float
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """Return down and up factors with scale * up @ down nearest to the weight in the norm that weighs row i with rows[i].

    With U S V^T the rank-r SVD of diag(d) W: down = sqrt(S / scale) V^T, up = diag(1 / d) U sqrt(S / scale) (LoKU,
    section 4.2). Computed in float64 from the eigenvectors of the smaller Gram matrix, signs fixed, so that it is
    deterministic. Rows of no weight count as 1e-6 of the heaviest.

    Args:
        weight: W, [out in].
        rows: Weights d of its rows; `None` is PiSSA's SVD (arXiv 2404.02948).
        rank: r.
        scale: What the product of the factors is scaled by.

    >>> down, up = weighted_low_rank(torch.diag(torch.tensor([3.0, 2.0])), torch.tensor([1.0, 4.0]), 1, 2.0)
    >>> (2 * up @ down).round(decimals=4)
    tensor([[0., 0.],
            [0., 2.]])
    """
    d = torch.ones(len(weight), dtype=torch.float64) if rows is None else rows.double().cpu()
    d = d.clamp_min(1e-6 * float(d.max())) if d.any() else torch.ones_like(d)
    weighed = d[:, None] * weight.double().cpu()
    wide = weighed.shape[0] <= weighed.shape[1]
    gram = weighed @ weighed.T if wide else weighed.T @ weighed
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0)[None]).sign()
    others = weighed.T @ vectors if wide else weighed @ vectors  # singular value times the other side
    sizes = others.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    left, right = (vectors, others / sizes) if wide else (others / sizes, vectors)
    root = (sizes / scale).sqrt()
    return (root[:, None] * right.T).to(weight), (left * root / d[:, None]).to(weight)
