"""What patched runs will cost, said before they begin; work above a budget is refused."""

import math
import time
from dataclasses import dataclass

import torch
from rich import get_console

from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.prompts import Prompts
from mechunlearn.model.hooked import HookedModel
from mechunlearn.patching.corruption import subjects

BUDGET = 20.0
"""Minutes that a sweep may take unless its caller says otherwise."""
TOKENS = 8192
"""Tokens that run at once, all copies of the facts together."""
READ_OUT = 0.1  # of a forward pass: what reading the answer out takes at least
QUICK = 0.05  # seconds; a shorter pass is mostly the time it takes to start, so many copies are timed


@dataclass(frozen=True)
class Cost:
    """What patched runs will take. `str(cost)` says it: "3,240 patched runs, about 2 min, 1.1 GB beside the weights".

    Attributes:
        runs: How many patched runs there are, each of every fact.
        seconds: How long they take, estimated from one timed forward pass.
        memory: Bytes beside the weights.
    """

    runs: int
    seconds: float
    memory: int

    def __str__(self) -> str:
        took = f"{self.seconds:.0f} s" if self.seconds < 100 else f"{self.seconds / 60:,.0f} min"
        return f"{self.runs:,} patched runs, about {took}, {self.memory / 1e9:.1f} GB beside the weights"


def preview(model: HookedModel, prompts: Prompts, runs: int, share: float, batch_size: int = 32) -> Cost:
    """Estimate what patched runs will cost, from one timed forward pass of a batch.

    A run computes the layers behind its patch, from the subject's first token to where the answer is read.

    Args:
        model: The model.
        prompts: The facts.
        runs: How many patched runs there are.
        share: The mean share of the layers that a run computes.
        batch_size: Facts a batch.
    """
    begin, end = int(subjects(prompts).any(0).int().argmax()), int(prompts.read.max()) + 1
    share = max(share * (end - begin) / prompts.tokens.shape[1], READ_OUT)
    part = prompts.select(range(min(batch_size, len(prompts))))
    at = torch.zeros(len(part), 1, dtype=torch.long, device=model.device)
    model.decoder.record(part.tokens[:, :1], at)  # the first pass of a process takes longer
    copies = min(max(runs, 1), max(1, TOKENS // part.tokens.numel()))
    seconds, kept = _timed(model, part, 1)
    if seconds < QUICK and copies > 1:
        seconds = _timed(model, part, copies)[0] / copies
    working = min(TOKENS, runs * part.tokens.numel()) * next(model.hf.parameters()).element_size()
    working *= 4 * model.signature.d_model + 3 * model.signature.d_mlp
    return Cost(runs, seconds * share * runs * len(prompts) / len(part), 2 * kept + working)


def _timed(model: HookedModel, prompts: Prompts, copies: int) -> tuple[float, int]:
    """Seconds of one forward pass of so many copies, and the bytes that it keeps."""
    tokens = prompts.tokens.repeat(copies, 1)
    begun = time.perf_counter()
    run = model.decoder.record(tokens, torch.zeros(len(tokens), 1, dtype=torch.long, device=model.device))
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun, sum(t.nbytes for t in (*run.resid, *run.keys, *run.values))


def check_budget(
    model: HookedModel,
    prompts: Prompts,
    runs: int,
    share: float,
    batch_size: int,
    budget: float | None,
    progress: bool | None = False,
) -> None:
    """Say what patched runs will cost where `progress` is True, and refuse them above a budget.

    Args:
        model: The model.
        prompts: The facts.
        runs: How many patched runs there are.
        share: The mean share of the layers that a run computes.
        batch_size: Facts a batch.
        budget: Minutes that they may take; None for any time.
        progress: Whether to say what they cost.

    Raises:
        MechunlearnError: They would take longer; the message says how long, and what takes less.
    """
    if budget is not None and not budget > 0:
        raise MechunlearnError(f"A budget of {budget} minutes is out of range. Expected a number above 0.")
    if budget is None and not progress:
        return
    cost = preview(model, prompts, runs, share, batch_size)
    if budget is not None and cost.seconds > 60 * budget:
        raise MechunlearnError(
            f"This needs {cost}, and the budget is {budget:g} minutes. Give fewer than the {len(prompts)} facts; patch "
            "whole layers (kinds=['attn.o', 'mlp_out']) or neurons in blocks (neurons=64) where it patches neurons; "
            "estimate with attribution_patching or edge_attribution (seconds); or allow it with "
            f"budget={math.ceil(cost.seconds / 60 * 1.5)}."
        )
    if progress:
        get_console().print(str(cost))
