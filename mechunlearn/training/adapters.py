"""Low-rank adapters on the selected part of every selected matrix, as what an optimiser may move."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.hooked import HookedModel, frozen
from mechunlearn.training.parameterizations import (
    Change,
    Slice,
    add_gradients,
    computing,
    linear_of,
    lowest_layer,
    matrices,
    selected,
)


@dataclass(frozen=True)
class Factors:
    """A low-rank change of the selected part of one matrix: scale * (up @ down - up0 @ down0) of shape [out in].

    `up0` and `down0` are what the factors began as (None if that product was zero), so that the change begins at zero
    exactly whatever the initialisation.

    Attributes:
        part: The selected part.
        transposed: Whether the module stores its weight as [in out].
        down: The first factor.
        up: The second factor.
        down0: What the first factor began as.
        up0: What the second factor began as.
        scale: What the product is multiplied by.
    """

    part: Slice
    transposed: bool
    down: Float[Tensor, "rank _in"]
    up: Float[Tensor, "_out rank"]
    down0: Float[Tensor, "rank _in"] | None
    up0: Float[Tensor, "_out rank"] | None
    scale: float

    @property
    def outputs(self) -> bool:
        """Whether the selected part is one of output features."""
        return (self.part.dim == 0) != self.transposed

    @torch.no_grad()
    def whole(self) -> tuple[Tensor, Tensor]:
        """Return left and right factors of the change of the whole parameter: zero outside the selected part."""
        down, up, index = self.down, self.up, self.part.index
        if self.down0 is not None and self.up0 is not None:
            down, up = torch.cat([down, self.down0]), torch.cat([up, -self.up0], 1)
        up = self.scale * up
        shape = self.part.parameter.shape
        if index is not None and self.outputs:
            up = up.new_zeros(shape[int(self.transposed)], up.shape[1]).index_copy(0, index, up)
        elif index is not None:
            down = down.new_zeros(len(down), shape[int(not self.transposed)]).index_copy(1, index, down)
        left, right = (down.T, up.T) if self.transposed else (up, down)
        return left.cpu().contiguous(), right.cpu().contiguous()


Start = Callable[[str, Tensor, int], tuple[Tensor, Tensor]]


def lora_start(seed: int) -> Start:
    """Return where ordinary LoRA begins: A uniform within 1 / sqrt(in), as peft has it, and B zero (arXiv 2106.09685).

    Args:
        seed: Draws A.
    """
    generator = torch.Generator().manual_seed(seed)

    def start(name: str, weight: Float[Tensor, "out in"], rank: int) -> tuple[Tensor, Tensor]:
        del name
        bound = weight.shape[1] ** -0.5
        down = torch.rand(rank, weight.shape[1], generator=generator) * 2 * bound - bound
        return down.to(weight), torch.zeros(len(weight), rank).to(weight)

    return start


class LowRank:
    """Low-rank adapters on the selected part of every selected matrix; the model's own weights stay as they are.

    Biases are not adapted.

    Args:
        model: The model.
        mask: The units.
        rank: Rank of every adapter.
        scale: What the product of its factors is multiplied by.
        start: Gives the first (down [rank in], up [out rank]) of a parameter by name, its selected part [out in] and
            rank.
        fit: Give a matrix a smaller rank where the selected part of it has fewer rows or columns.

    Raises:
        MechunlearnError: If a rank is larger than a matrix, or the selected part of it, and is not to fit.
    """

    def __init__(
        self, model: HookedModel, mask: ComponentMask, rank: int, scale: float, start: Start, fit: bool = False
    ) -> None:
        self.model, self.mask = model, mask
        self.factors: list[Factors] = []
        parts = matrices(model, mask)
        self.lowest: int | None = lowest_layer(mask)
        for part in parts:
            rows, columns = part.shape
            if not (fit or 0 < rank <= min(rows, columns)):
                raise MechunlearnError(
                    f"A rank of {rank} does not fit '{part.name}': the selected part of it is {rows} x {columns}. "
                    f"Give a rank from 1 to {min(rows, columns)}, or select more units."
                )
        for part in parts:
            transposed = part.transposed(model)
            weight = (part.read().T if transposed else part.read()).float()
            down, up = start(part.name, weight, min(rank, *part.shape))
            down0, up0 = (down.clone(), up.clone()) if up.any() else (None, None)
            leaves = down.requires_grad_(), up.requires_grad_()
            self.factors.append(Factors(part, transposed, *leaves, down0, up0, float(scale)))
        self.leaves = [leaf for factors in self.factors for leaf in (factors.down, factors.up)]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Compute with the adapters within the block, and give them gradients."""
        with ExitStack() as stack:
            stack.enter_context(frozen(self.model.hf))
            for factors in self.factors:
                module = self.model.hf.get_submodule(factors.part.module)
                stack.enter_context(computing(module, partial(_adapted_forward, module, factors)))
            yield

    def gradient(self, loss: Tensor) -> None:
        """Add the loss's gradient to that of the factors.

        Args:
            loss: A scalar.
        """
        add_gradients(loss, self.leaves, self.leaves)

    def write(self) -> None:
        """Nothing to do: the model computes with the factors themselves."""

    def restore(self) -> None:
        """Nothing to do: the model's weights were never written."""

    def change(self) -> Change:
        """Return the units of the mask, no rows, and the factors of every adapted parameter."""
        return selected(self.mask), {}, {factors.part.name: factors.whole() for factors in self.factors}


def _through(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


def _adapted_forward(module: nn.Module, factors: Factors, x: Tensor) -> Tensor:
    index = factors.part.index
    weight, bias = linear_of(module)
    y = F.linear(x, weight, bias)
    seen = x if factors.outputs or index is None else x[..., index]
    change = _through(seen, factors.down, factors.up)
    if factors.down0 is not None and factors.up0 is not None:
        change = change - _through(seen, factors.down0, factors.up0)
    change = factors.scale * change
    return y + change if index is None or not factors.outputs else y.index_add(-1, index, change)
