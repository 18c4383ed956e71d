"""Gradients turned away from the directions that held text uses, and an optimiser that keeps their direction."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechunlearn.model.component import Component
from mechunlearn.training.inputs import BATCH, Sequences, real
from mechunlearn.training.parameterizations import SelectedRows

BETAS, EPSILON = (0.9, 0.999), 1e-12
Turn = Callable[[Float[Tensor, "_out _in"]], Float[Tensor, "_out _in"]]


class Inputs:
    """What enters a linear map on held text: rows, or the sum of their products once that is smaller.

    Args:
        index: Which input features count; `None` for all.
    """

    def __init__(self, index: Tensor | None) -> None:
        self.index, self.tokens, self.squares = index, 0, 0.0
        self.rows: list[Tensor] = []
        self.firsts: list[Tensor] = []
        self.sums: Tensor | None = None
        self.device = torch.device("cpu")

    def add(self, x: Float[Tensor, "token _in"], first: Float[Tensor, "text _in"] | None = None) -> None:
        """Add what enters at some tokens.

        Args:
            x: One row a token.
            first: What enters at the first token of each text. It counts as large as the others are on average.
        """
        self.squares += float(x.float().pow(2).sum())
        self._keep(x.float())
        if first is not None:
            self.firsts.append(nn.functional.normalize(first.float(), dim=1))

    def _keep(self, x: Float[Tensor, "token _in"]) -> None:
        x = x if self.index is None else x.index_select(1, self.index)
        self.rows.append(x)
        self.device = x.device
        self.tokens += len(x)
        if self.tokens >= x.shape[1]:
            together = _wide(torch.cat(self.rows))
            self.sums = together.T @ together + (0.0 if self.sums is None else self.sums)
            self.rows = []

    def turn(self, weight: float) -> Turn:
        """Return the map G -> G (weight * C / c + 1)^-1, where C is the mean of x x^T and c its mean diagonal.

        Args:
            weight: Of C.
        """
        if self.firsts:
            first, self.firsts = torch.cat(self.firsts), []
            self._keep(first * math.sqrt(self.squares / max(1, self.tokens)))
        if self.sums is not None and self.rows:
            left = _wide(torch.cat(self.rows))
            self.sums, self.rows = self.sums + left.T @ left, []
        if self.sums is not None:
            share = weight / (float(self.sums.diagonal().mean()) or 1.0)
            inverse = _inverse(share * self.sums)
            inverse = inverse.to(self.device, torch.float32)
            return lambda gradient: gradient @ inverse
        x = _wide(torch.cat(self.rows))
        x *= math.sqrt(weight / (float(x.pow(2).sum()) / x.shape[1] or 1.0))
        right = (_inverse(x @ x.T) @ x).to(self.device, torch.float32)
        left = x.T.to(self.device, torch.float32)
        return lambda gradient: gradient - (gradient @ left) @ right


def _wide(x: Float[Tensor, "token _in"]) -> Float[Tensor, "token _in"]:
    """Return a float64 copy: a few inputs of real models are thousands of times larger than the others."""
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64, copy=True)  # MPS has no float64


def _inverse(products: Float[Tensor, "one other"]) -> Float[Tensor, "one other"]:
    """Return (products + 1)^-1."""
    return torch.cholesky_inverse(torch.linalg.cholesky(products + torch.eye(len(products)).to(products)))


class MatrixAdam(torch.optim.Optimizer):
    """AdamW with one second moment a tensor in place of one a number, so that a step keeps its gradient's direction.

    A step of ordinary Adam is about as large for every number, whatever its gradient: it would undo `turned_away`.

    Args:
        leaves: What is trained.
        lr: Learning rate.
        weight_decay: Decoupled, as AdamW's.
    """

    def __init__(self, leaves: Sequence[Tensor], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(leaves, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step.

        Args:
            closure: Not used.
        """
        for group in self.param_groups:
            for leaf in group["params"]:
                state = self.state[leaf]
                if not state:
                    state |= {"step": 0, "mean": torch.zeros_like(leaf), "square": torch.zeros_like(leaf.sum())}
                state["step"] += 1
                state["mean"].lerp_(leaf.grad, 1 - BETAS[0])
                state["square"].lerp_(leaf.grad.pow(2).mean(), 1 - BETAS[1])
                first, second = (1 - beta ** state["step"] for beta in BETAS)
                size = (state["square"] / second).sqrt().add_(EPSILON)
                leaf.mul_(1 - group["lr"] * group["weight_decay"])
                leaf.sub_(state["mean"] / size, alpha=group["lr"] / first)


@torch.no_grad()
def turned_away(rows: SelectedRows, held: Sequence[Sequences], weight: float) -> list[Turn | None]:
    """Return, for each leaf, the map that turns its gradient G into G (weight * C / c + 1)^-1; `None` for biases.

    C = E[x x^T] over the inputs x of the matrix on held text, c the mean of its diagonal. A step along it is the
    steepest descent where a change D costs weight * E|D x|^2 / c + |D|^2: of two changes that do as much to the facts
    it takes the one that does less to the text. C is the input factor of K-FAC (arXiv 1503.05671), and that of MEMIT
    (arXiv 2210.07229). The first token of a sequence has far larger activations in many models, and counts as if it had
    those of the others: a change of what it gives would change all text.

    Memory: for each matrix the smaller of in x in and tokens x in. Matrices that read the same tensor share it.

    Args:
        rows: What is trained.
        held: Sequences on which little is to move; one or more.
        weight: A larger one holds the text more.

    Returns:
        One map a leaf.
    """
    model, inputs, shared = rows.model, dict[str, Inputs](), dict[str, str]()
    for part in rows.slices:
        if part.parameter.ndim == 2:
            outputs = (part.dim == 0) != part.transposed(model)
            inputs[part.module] = Inputs(None if outputs else part.index)
    highest = max(Component.parse(site).layer for site in rows.mask.sites)
    counted = torch.zeros(0, dtype=torch.bool)
    last: list[Any] = [None, ""]

    def see(name: str, module: Any, args: tuple[Tensor, ...]) -> None:
        del module
        if args[0] is last[0] and inputs[name].index is None and inputs[last[1]].index is None:
            shared[name] = last[1]
            return
        last[:] = args[0], name
        inputs[name].add(args[0][counted.to(args[0].device)], args[0][:, 0])

    with ExitStack() as stack:
        for name in inputs:
            module = model.hf.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(partial(see, name)).remove)
        for sequences in held:
            for chosen in torch.split(sequences.lengths.argsort(), BATCH) if len(sequences) else ():
                read = sequences.select(chosen)
                counted = real(read)
                counted[:, 0] = False
                model.decoder.observe(read.tokens, {f"L{highest}.resid_post": lambda x: None})
    turns = {name: each.turn(weight) for name, each in inputs.items() if name not in shared and each.tokens}
    found: list[Turn | None] = []
    for part in rows.slices:
        turn = turns.get(shared.get(part.module, part.module)) if part.parameter.ndim == 2 else None
        found.append(_of_transposed(turn) if turn and part.transposed(model) else turn)
    return found


def _of_transposed(turn: Turn) -> Turn:
    return lambda gradient: turn(gradient.T).T
