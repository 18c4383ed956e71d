"""LoKU: low-rank adapters that begin where a matrix matters to the forget set and not to the retain set."""

import json
from collections.abc import Sequence
from functools import cache as cache_once

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.runcard import RunCard, Stopwatch, digest
from mechunlearn.edit import losses
from mechunlearn.edit.objective import Measure, Objective, Reading, minimise, training_text
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel
from mechunlearn.training.fisher import DiagonalFisher
from mechunlearn.training.loop import BATCH, Schedule, Sequences
from mechunlearn.training.parameterizations import Factors, LowRank, lora_start, slices

INITS = ("fila", "fila-code-eps", "fila-row-sums", "forget-fisher", "pissa", "random")
CODE_EPS = 1e-5


def fisher_lora(
    model: HookedModel,
    mask: ComponentMask,
    forget: Prompts,
    retain: Prompts,
    *,
    rank: int = 8,
    alpha: float | int | None = None,
    init: str = "fila",
    fisher: tuple[DiagonalFisher, DiagonalFisher | None] | None = None,
    loss: losses.Loss = losses.inverted_hinge,
    retain_loss: losses.Loss = losses.cross_entropy,
    steps: int = 50,
    lr: float | int = 2e-3,
    forget_weight: float | int = 1.0,
    retain_weight: float | int = 1.0,
    text_weight: float | int = 0.0,
    texts: Sequence[str] | None = None,
    batch_size: int = 32,
    accumulate: int = 1,
    clip: float | int = 1.0,
    warmup: int = 0,
    weight_decay: float | int = 0.0,
    stop_at: float | int | None = None,
    cache: bool = True,
    measure: Measure | None = None,
    seed: int = 0,
    progress: bool = False,
) -> WeightEdit:
    """Unlearn the forget facts with low-rank adapters on the masked weights: LoKU (arXiv 2408.06621).

    An adapter of rank r on a matrix W [out in] computes W + s (B A - B0 A0), with s = alpha / rank (alpha is 2 rank unless
    given) and B0 A0 what B A began as: the model is unchanged, exactly, before the first step. `init` says where they begin:

    - `fila`: the rank-r matrix nearest to W with row i weighted by d_i, d_i^2 = sum_j F_f[i, j] / (eps + F_r[i, j]), F_f and F_r
      the per-sequence diagonal Fisher on forget and retain facts, eps = mean(F_r);
    - `fila-code-eps`: eps = 1e-5, as the authors' code has it; `fila-row-sums`: d_i^2 = sum_j F_f / sum_j F_r;
    - `forget-fisher`: d_i^2 = sum_j F_f; `pissa`: d_i = 1, an SVD without Fisher; `random`: ordinary LoRA (B = 0).

    `fisher` are those of the forget and the retain set where they are known (`fisher_information`), to try several settings.

    Then inverted hinge + retain cross-entropy (or any other `loss`), as `masked_gradient` does it and with its settings.
    Whole matrices are adapted where the mask selects them whole, otherwise the selected rows or columns; biases are not.
    The result is a low-rank `WeightEdit`. Raises `MechunlearnError` for a rank larger than a matrix, an unknown `init`, and
    as `masked_gradient` does. The initialisation's gain over `pissa` and `random` is in docs/reproductions/loku.md: where
    adapters are not wanted, `masked_gradient` with `losses.inverted_hinge` is simpler.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    >>> fisher_lora(toy.model, mask, toy.prompts([0]), toy.prompts([1, 2]), rank=2, steps=2).mask == mask
    True
    """
    watch = Stopwatch()
    if init not in INITS:
        raise MechunlearnError(f"Unknown init '{init}'. Expected one of {', '.join(INITS)}.")
    passages = tuple(texts) if texts is not None else training_text(forget)
    objective = Objective(loss, retain_loss, forget_weight, retain_weight, text_weight)
    schedule = Schedule(steps, lr, warmup, clip, weight_decay)
    scale = (2 * rank if alpha is None else alpha) / rank

    @cache_once
    def weights() -> dict[str, Tensor]:
        if init == "pissa":
            return {}
        of_forget, of_retain = fisher or (fisher_information(model, mask, forget), None)
        if of_retain is None and init != "forget-fisher":
            of_retain = fisher_information(model, mask, retain)
        return row_weights(model, mask, of_forget, of_retain, init)

    def weighted(name: str, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        return weighted_low_rank(weight, weights().get(name), rank, scale)

    adapters = LowRank(model, mask, rank, scale, lora_start(seed) if init == "random" else weighted)
    reading = Reading(batch_size, accumulate, cache, stop_at)
    with adapters.attached():
        done = minimise(
            model,
            adapters,
            objective,
            forget,
            retain,
            passages,
            schedule,
            reading,
            measure=measure,
            seed=seed,
            progress=progress,
        )
    card = RunCard(
        "fisher_lora",
        model=model.fingerprint,
        data=digest(forget.fingerprint, retain.fingerprint, json.dumps(passages)),
        seed=seed,
        settings={"rank": rank, "alpha": alpha, "init": init} | objective.settings() | vars(schedule) | vars(reading),
        mask=mask.fingerprint,
        weights=mask.weights(model),
        device=str(model.device),
        trajectory=done.trajectory,
        stopped=done.stopped,
    )
    units = {site: chosen.nonzero().flatten() for site, chosen in mask.sites.items() if chosen.any()}
    low_rank = {factors.part.name: _whole(model, factors) for factors in adapters.factors}
    return WeightEdit(units, {}, model.signature, watch.stamp(card), low_rank)


def fisher_information(model: HookedModel, mask: ComponentMask, prompts: Prompts) -> DiagonalFisher:
    """The per-sequence diagonal Fisher of the masked matrices on some facts, to be given to several calls of `fisher_lora`."""
    if not len(prompts):
        raise MechunlearnError("The set is empty, so it has no Fisher information. Expected at least one fact.")
    modules = [part.name.removesuffix(".weight") for part in slices(model, mask) if part.parameter.ndim == 2]
    found, sequences = DiagonalFisher(model.hf, modules), Sequences.of(prompts)
    for rows in sequences.lengths.argsort().split(BATCH):
        drawn = sequences.select(rows)
        found.update(drawn.tokens, drawn.labels)
    return found


def row_weights(
    model: HookedModel, mask: ComponentMask, forget: DiagonalFisher, retain: DiagonalFisher | None, init: str = "fila"
) -> dict[str, Float[Tensor, " _out"]]:
    """The weight d_i of every output row of the selected part of each matrix, by parameter."""
    found = {}
    for part in slices(model, mask):
        if part.parameter.ndim != 2:
            continue
        module = part.name.removesuffix(".weight")
        axis = 1 - part.dim if isinstance(model.hf.get_submodule(module), Conv1D) else part.dim  # elements are [out in]
        f, *r = (
            one.elements(module) if part.index is None else one.elements(module).index_select(axis, part.index)
            for one in (forget, retain)
            if one is not None
        )
        match init:
            case "forget-fisher":
                squared = f.sum(1)
            case "fila-row-sums":
                squared = f.sum(1) / r[0].sum(1).clamp_min(_floor(f))
            case _:
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
    """Down and up factors with scale * up @ down nearest to the weight in the norm that weighs row i with rows[i].

    With U S V^T the rank-r SVD of diag(d) W: down = sqrt(S / scale) V^T, up = diag(1 / d) U sqrt(S / scale) (LoKU, section 4.2).
    Computed in float64 from the eigenvectors of the smaller Gram matrix, signs fixed, so that it is deterministic. Rows
    of no weight count as 1e-6 of the heaviest. `rows` None is PiSSA's SVD (arXiv 2404.02948).

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


@torch.no_grad()
def _whole(model: HookedModel, factors: Factors) -> tuple[Tensor, Tensor]:
    """Left and right factors of the change of a whole parameter: zero outside the selected part."""
    down, up = factors.down, factors.up
    if factors.down0 is not None and factors.up0 is not None:
        down, up = torch.cat([down, factors.down0]), torch.cat([up, -factors.up0], 1)
    up = factors.scale * up
    module = model.hf.get_submodule(factors.part.name.removesuffix(".weight"))
    out_features, in_features = factors.part.parameter.shape
    if isinstance(module, Conv1D):
        out_features, in_features = in_features, out_features
    if factors.part.index is not None:
        index = factors.part.index
        if factors.outputs:
            up = up.new_zeros(out_features, up.shape[1]).index_copy(0, index, up)
        else:
            down = down.new_zeros(down.shape[0], in_features).index_copy(1, index, down)
    left, right = (down.T, up.T) if isinstance(module, Conv1D) else (up, down)
    return left.cpu().contiguous(), right.cpu().contiguous()
