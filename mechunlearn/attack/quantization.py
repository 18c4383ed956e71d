"""Quantization: round the weights of an edited model, and see whether that brings the facts back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.attack.states import GATE, WATCHED, Attack, Rows, State, cell, chance, check_sizes, mean
from mechunlearn.core.arguments import validated
from mechunlearn.core.steady import steady
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import answered
from mechunlearn.model.hooked import HookedModel

GROUPS = (32, 128)
Rounding = Callable[[Tensor], Tensor]


@validated
@steady()
def quantization(
    model: HookedModel,
    edit: Edit | None,
    forget: Prompts,
    retain: Prompts,
    *,
    extra_edits: Mapping[str, Edit | HookedModel | None] | None = None,
    baseline_rows: pd.DataFrame | None = None,
    bits: Sequence[int] = (8, 4),
    min_retention: float = GATE,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Try to get edited facts back by rounding: an edit smaller than the grid of the weights is rounded away.

    w -> s round(w / s),  s = max |w| of the output row / (2^(bits - 1) - 1)

    for every attention and MLP matrix of the edited model; embeddings, norms and biases are kept, and hooks of a
    `FeatureEdit` stay on. (Catastrophic failure of LLM unlearning via quantization, arXiv 2410.16454, has 4 and 8
    bits, of GPTQ, AWQ and round-to-nearest; this is the last.) Where bitsandbytes is installed, the settings `nf4`
    and `fp4` are its 4-bit formats in blocks of 64 weights; where it is not, they are left out. "int4 in groups of 32" and
    "of 128" have a scale for so many neighbouring inputs of a row in the place of one for the whole row, as deployed 4-bit
    models do: their grid is finer, so they round away less of an edit and break the model less.

    A model of few and narrow layers may not survive 4 bits at all: its setting has collapsed then, which says nothing
    of the edit. The model is left as it was, bit by bit, also after an error and after Ctrl-C. Memory: a copy of the
    rounded matrices. Not for edits of a model that is already stored in 4 or 8 bits.

    Args:
        model: The unedited model.
        edit: The edit to attack, or None for ceiling and floor alone.
        forget: The facts that the edit removed.
        retain: The facts that were to stay.
        extra_edits: Further edits, models, or None for the model as it is, to attack alike, by name.
        baseline_rows: Rows of an earlier call whose ceiling and floor are taken as they are.
        bits: Bits of a weight, 2 to 8.
        min_retention: The share of retain facts that must be right for a row to be `valid`.
        seed: Draws the retain facts that are measured.
        progress: Whether to show a bar; None shows one where somebody can see it.

    Returns:
        One row a state (see `states_to_attack`) and setting (`int8`, `int4`, `int4 in groups of 32`, ...).
        `held_out` is the accuracy
        (greedy, full vocabulary) on all forget facts, as nothing is trained, with its 95 % interval `low`
        to `high` over `n` facts; `before` that without rounding; `retain` that on at most 100 retain facts, rounded
        too. `bits`, `chance` and `valid` stand beside them, and the run card in `attrs["card"]`. `recovery` reads the
        rows.

    Raises:
        MechunlearnError: For an empty forget or retain set, bits outside 2 to 8, or a model that knows less of the
            retain facts than the gate asks for.

    >>> from mechunlearn.artifacts.mask import ComponentMask
    >>> from mechunlearn.edit import masked_gradient
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    >>> forget, retain = toy.prompts([0, 1, 2, 3]), toy.prompts([4, 5, 6, 7])
    >>> edit = masked_gradient(toy.model, mask, forget, retain, steps=20, lr=0.1)
    >>> rows = quantization(toy.model, edit, forget, retain, bits=[8])
    >>> rows[rows.setting == "int8"][["state", "setting", "held_out", "retain"]].values.tolist()
    [['edited', 'int8', 0.0, 1.0], ['unedited', 'int8', 1.0, 1.0]]
    """
    check_sizes(forget, retain, least=1)
    settings = _settings(bits)
    watched = retain.select(torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed))[:WATCHED])
    attack = Attack(
        "quantization", model, edit, forget, retain, watched, extra_edits, baseline_rows, min_retention, seed, progress
    )

    def tried(state: State) -> Rows:
        with state.applied() as target:
            about = {"before": mean(answered(target, state.facts)), "chance": chance(state.facts)}
            for setting, (size, rounding) in settings.items():
                with _rounded(target, rounding):
                    right, spared = answered(target, state.facts), answered(target, watched)
                yield [cell(state.name, setting, right, seed, retain=mean(spared), bits=size, **about)]

    return attack.run(tried, {"settings": list(settings)}, len(settings))


def _settings(bits: Sequence[int]) -> dict[str, tuple[int, Rounding]]:
    """The bits of every setting, and what it makes of a matrix [out in]."""
    if not bits or not all(isinstance(size, int) and 2 <= size <= 8 for size in bits):
        raise MechunlearnError(f"The bits are {list(bits)}. Expected whole numbers from 2 to 8, for example [8, 4].")
    found: dict[str, tuple[int, Rounding]] = {f"int{size}": (size, partial(_nearest, bits=size)) for size in bits}
    if 4 in bits:
        found |= {f"int4 in groups of {size}": (4, partial(_in_groups, bits=4, size=size)) for size in GROUPS}
    if find_spec("bitsandbytes") is not None:
        found |= {kind: (4, partial(_by_bitsandbytes, kind=kind)) for kind in ("nf4", "fp4")}
    return found


def _nearest(weight: Float[Tensor, "out in"], bits: int) -> Float[Tensor, "out in"]:
    """Symmetric rounding to nearest, with the largest weight of each output row on the grid."""
    levels = 2 ** (bits - 1) - 1
    wide = weight.float()
    scale = wide.abs().amax(1, keepdim=True) / levels
    return torch.where(scale > 0, (wide / scale).round() * scale, 0.0)


def _in_groups(weight: Float[Tensor, "out in"], bits: int, size: int) -> Float[Tensor, "out in"]:
    """The same for each group of so many neighbouring inputs of a row; the last group may be shorter."""
    return torch.cat([_nearest(group, bits) for group in weight.split(size, dim=1)], 1)


def _by_bitsandbytes(weight: Float[Tensor, "out in"], kind: str) -> Float[Tensor, "out in"]:
    from bitsandbytes import functional  # an extra of the user's

    given: Any = functional
    found: Tensor = given.dequantize_4bit(*given.quantize_4bit(weight.contiguous(), blocksize=64, quant_type=kind))
    return found


def _matrices(model: HookedModel) -> list[tuple[Tensor, bool]]:
    """Every matrix of attention and MLPs, fused ones once, and whether it is stored as [in out]."""
    layout, parameters = model.layout, dict(model.hf.named_parameters())
    sites = [(layer, kind) for layer in range(layout.signature.layers) for kind in layout.kinds]
    names = dict.fromkeys(name for site in sites for name in layout.parameter_names(*site) if name in parameters)
    return [
        (parameters[name], isinstance(model.hf.get_submodule(name.rpartition(".")[0]), Conv1D))
        for name in names
        if parameters[name].ndim == 2
    ]


@contextmanager
def _rounded(model: HookedModel, rounding: Rounding) -> Iterator[None]:
    """Within the block the matrices are rounded; after it, every bit is as it was."""
    matrices = _matrices(model)
    before = [matrix.detach().clone() for matrix, _ in matrices]
    try:
        with torch.no_grad():
            for matrix, transposed in matrices:
                matrix.copy_(rounding(matrix.T).T if transposed else rounding(matrix))
        model.refresh_()
        yield
    finally:
        with torch.no_grad():
            for (matrix, _), kept in zip(matrices, before, strict=True):
                matrix.copy_(kept)
        model.refresh_()
