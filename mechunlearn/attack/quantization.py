"""Quantization: round the weights of an edited model, and see whether that brings the facts back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from mechunlearn.artifacts.weight_edit import Edit
from mechunlearn.attack.states import (
    GATE,
    attack_card,
    cell,
    chance,
    check_gate,
    check_sizes,
    states_to_attack,
    states_to_run,
    to_frame,
)
from mechunlearn.core.runcard import Stopwatch
from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.metrics.answers import answered
from mechunlearn.model.hooked import HookedModel
from mechunlearn.training.loop import interruptible

Rounding = Callable[[Tensor], Tensor]
WATCHED = 100


def quantization(
    model: HookedModel,
    edit: Edit | None,
    forget: Prompts,
    retain: Prompts,
    *,
    extra_edits: Mapping[str, Edit | HookedModel | None] | None = None,
    baseline_rows: pd.DataFrame | None = None,
    bits: Sequence[int] = (8, 4),
    min_retention: float | int = GATE,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Try to get edited facts back by rounding: an edit smaller than the grid of the weights is rounded away.

    w -> s round(w / s),  s = max |w| of the output row / (2^(bits - 1) - 1)

    for every attention and MLP matrix of the edited model; embeddings, norms and biases are kept, and hooks of a
    `FeatureEdit` stay on. (Catastrophic failure of LLM unlearning via quantization, arXiv 2410.16454, has 4 and 8 bits, of
    GPTQ, AWQ and round-to-nearest; this is the last.) Where bitsandbytes is installed, the settings `nf4` and `fp4` are its
    4-bit formats in blocks of 64 weights; where it is not, they are left out.

    The same is done to the `unedited` model (the ceiling: what rounding leaves of facts that are there), to the unedited
    model with facts that it was `never taught` (the floor), and to what is given in `extra_edits`: further edits, models, or None
    for the model as it is. `baseline_rows` are rows of an earlier call on the same model, facts and settings, whose ceiling and
    floor are taken as they are.

    One row a state and setting (`int8`, `int4`, ...): accuracy (greedy, full vocabulary) on all forget facts as `held out`
    (nothing is trained) with its 95 % bootstrap interval `low` to `high` over `n` facts, and `before`, the same facts without
    rounding; on `retain` facts (at most 100), rounded too; `bits`, `chance`, and whether `retain` reaches the `min_retention`
    (`valid`). `recovery` reads them; `attrs["card"]` is the run card.

    The model is left as it was, bit by bit, also after an error. Memory: a copy of the rounded matrices. A model of few
    and narrow layers may not survive 4 bits at all: its setting has collapsed then, which says nothing of the edit.

    Raises `MechunlearnError` for an empty forget or retain set, bits outside 2 to 8, and a model that knows less of the
    retain facts than the gate asks for. Not for edits of a model that is already stored in 4 or 8 bits.

    >>> from mechunlearn.artifacts.mask import ComponentMask
    >>> from mechunlearn.edit import masked_gradient
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> mask = ComponentMask.of(["L0.mlp.out"], toy.model.signature)
    >>> forget, retain = toy.prompts([0, 1, 2, 3]), toy.prompts([4, 5, 6, 7])
    >>> edit = masked_gradient(toy.model, mask, forget, retain, steps=20, lr=0.1)
    >>> rows = quantization(toy.model, edit, forget, retain, bits=[8])
    >>> rows[rows.setting == "int8"][["state", "setting", "held out", "retain"]].values.tolist()
    [['edited', 'int8', 0.0, 1.0], ['unedited', 'int8', 1.0, 1.0]]
    """
    watch = Stopwatch()
    check_sizes(forget, retain, least=1)
    settings = _settings(bits)
    drawn = torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed))[:WATCHED]
    watched = retain.select(drawn)
    states = states_to_attack(model, edit, forget, extra_edits, seed)
    check_gate(model, watched, min_retention)
    card = attack_card(
        "quantization", model, edit, forget, retain, seed, {"settings": list(settings), "min_retention": min_retention}
    )
    rows: list[dict] = []
    with interruptible() as asked:
        for state in states_to_run(states, baseline_rows, card):
            with state.applied() as target:
                before = float(answered(target, state.facts).float().mean())
                tried = settings.items()
                for setting, (size, rounding) in track(
                    tried, f"quantization, {state.name}", disable=not progress, transient=True
                ):
                    with _rounded(target, rounding):
                        right, kept = answered(target, state.facts), answered(target, watched)
                    if asked:
                        raise KeyboardInterrupt
                    rows.append(
                        cell(state.name, setting, right, seed)
                        | {
                            "retain": float(kept.float().mean()),
                            "chance": chance(state.facts),
                            "bits": size,
                            "before": before,
                        }
                    )
    return to_frame(rows, baseline_rows, min_retention, card, watch)


def _settings(bits: Sequence[int]) -> dict[str, tuple[int, Rounding]]:
    """The bits of every setting, and what it makes of a matrix [out in]."""
    if not bits or not all(isinstance(size, int) and 2 <= size <= 8 for size in bits):
        raise MechunlearnError(f"The bits are {list(bits)}. Expected whole numbers from 2 to 8, for example [8, 4].")
    found: dict[str, tuple[int, Rounding]] = {f"int{size}": (size, partial(_nearest, bits=size)) for size in bits}
    if find_spec("bitsandbytes") is not None:
        found |= {kind: (4, partial(_by_bitsandbytes, kind=kind)) for kind in ("nf4", "fp4")}
    return found


def _nearest(weight: Float[Tensor, "out in"], bits: int) -> Float[Tensor, "out in"]:
    """Symmetric rounding to nearest, with the largest weight of each output row on the grid."""
    levels = 2 ** (bits - 1) - 1
    wide = weight.float()
    scale = wide.abs().amax(1, keepdim=True) / levels
    return torch.where(scale > 0, (wide / scale).round() * scale, 0.0)


def _by_bitsandbytes(weight: Float[Tensor, "out in"], kind: str) -> Float[Tensor, "out in"]:
    from bitsandbytes import functional  # an extra of the user's

    given: Any = functional
    packed, state = given.quantize_4bit(weight.contiguous(), blocksize=64, quant_type=kind)
    return given.dequantize_4bit(packed, state)


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
