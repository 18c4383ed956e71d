"""What an optimiser may move: the selected rows of a model, low-rank factors beside them, or everything.

Each holds its numbers as float32 leaf tensors, whatever the dtype of the model, and gives gradients for these alone:
the matrices that hold selected rows never get a gradient of their own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel, frozen


@runtime_checkable
class Trainable(Protocol):
    """The numbers that a gradient method moves.

    Attributes:
        leaves: The numbers.
        lowest: The first layer they are in; `None` if below all layers.
    """

    leaves: list[Tensor]
    lowest: int | None

    def attached(self) -> Any:
        """Compute with the leaves within the block, and give them gradients."""
        ...

    def gradient(self, loss: Tensor) -> None:
        """Add the loss's gradient to that of the leaves.

        Args:
            loss: A scalar.
        """
        ...

    def write(self) -> None:
        """Bring the model up to date with the leaves."""
        ...

    def restore(self) -> None:
        """Put the model back as it was, bit by bit."""
        ...


@dataclass(frozen=True)
class Slice:
    """The selected part of one parameter.

    Attributes:
        name: The parameter's.
        parameter: The parameter.
        dim: Along which features are selected.
        index: Which are; `None` for all.
    """

    name: str
    parameter: Tensor
    dim: int
    index: Int[Tensor, " _feature"] | None

    @property
    def shape(self) -> list[int]:
        """The shape of the selected part."""
        sizes = list(self.parameter.shape)
        if self.index is not None:
            sizes[self.dim] = len(self.index)
        return sizes

    @property
    def module(self) -> str:
        """The name of the module that the parameter belongs to."""
        return self.name.rpartition(".")[0]

    def transposed(self, model: HookedModel) -> bool:
        """Return whether the module stores its weight as [in out].

        Args:
            model: The model.
        """
        return isinstance(model.hf.get_submodule(self.module), Conv1D)

    def read(self) -> Tensor:
        """Return a copy of the selected part."""
        chosen = self.parameter.detach()
        return chosen.clone() if self.index is None else chosen.index_select(self.dim, self.index)

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Write the selected part.

        Args:
            values: What it becomes.
        """
        new = values.to(self.parameter.dtype)
        if self.index is None:
            self.parameter.copy_(new)
        else:
            self.parameter.index_copy_(self.dim, self.index, new)


def slices(model: HookedModel, mask: ComponentMask) -> list[Slice]:
    """Return the selected part of every parameter. A unit's weights are whole rows or whole columns of their matrices.

    Args:
        model: The model.
        mask: The units.

    Raises:
        MechunlearnError: For an empty mask, a mask of another architecture, and one with feature sites.
    """
    mask.check(model.signature)
    features = [site for site in mask.sites if ":" in site]
    if features:
        raise MechunlearnError(
            f"The mask names features ({', '.join(features[:3])}): they live in activations, not in weights. A "
            "FeatureEdit "
            "takes them (feature_clamp, codebook_delete); a weight editor takes heads and neurons."
        )
    if not len(mask):
        raise MechunlearnError("The mask selects no unit, so there is nothing to train. See the localization's note.")
    parameters, found = dict(model.hf.named_parameters()), []
    for name, chosen in mask.parameter_masks(model).items():
        by_row = chosen.flatten(1).any(1) if chosen.ndim > 1 else chosen
        if chosen.all():
            found.append(Slice(name, parameters[name], 0, None))
        elif chosen[by_row].all():
            found.append(Slice(name, parameters[name], 0, by_row.nonzero().flatten()))
        else:
            found.append(Slice(name, parameters[name], 1, chosen.any(0).nonzero().flatten()))
    return found


def matrices(model: HookedModel, mask: ComponentMask) -> list[Slice]:
    """Return the selected part of every matrix: `slices` without the biases.

    Args:
        model: The model.
        mask: The units.
    """
    return [part for part in slices(model, mask) if part.parameter.ndim == 2]


def lowest_layer(mask: ComponentMask) -> int:
    """Return the first layer of which a mask selects something: below it nothing changes while an editor trains.

    Args:
        mask: The units, one or more.
    """
    return min(Component.parse(site).layer for site, chosen in mask.sites.items() if chosen.any())


def selected(mask: ComponentMask) -> dict[str, Int[Tensor, " _unit"]]:
    """Return the units that a mask selects, by site.

    Args:
        mask: The units.
    """
    return {site: chosen.nonzero().flatten() for site, chosen in mask.sites.items() if chosen.any()}


Change = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]
"""Units by site, their new rows by site, and low-rank factors by parameter, as `WeightEdit` takes them."""


class SelectedRows:
    """The selected rows of a model as float32 leaves: only these rows are ever written.

    What is not selected cannot move, whatever the optimiser does, and costs no gradient, optimiser state or copy: a
    linear map whose weights are partly selected computes the gradient of its selected features alone.

    Args:
        model: The model.
        mask: The units.

    Attributes:
        turns: What is done to each leaf's gradient; nothing by default.
    """

    def __init__(self, model: HookedModel, mask: ComponentMask) -> None:
        self.model, self.mask = model, mask
        self.slices = slices(model, mask)
        self.before = [part.read() for part in self.slices]
        self.leaves = [kept.float().clone().requires_grad_() for kept in self.before]
        self.lowest: int | None = lowest_layer(mask)
        self.turns: Sequence[Callable[[Tensor], Tensor] | None] = ()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Compute with the leaves within the block, and give them gradients."""
        modules: dict[str, dict[str, tuple[Slice, Tensor]]] = {}
        for part, leaf in zip(self.slices, self.leaves, strict=True):
            modules.setdefault(part.module, {})[part.name.rpartition(".")[2]] = (part, leaf)
        with ExitStack() as stack:
            stack.enter_context(frozen(self.model.hf))
            for name, parts in modules.items():
                module = self.model.hf.get_submodule(name)
                stack.enter_context(_computing(module, partial(_selected_forward, module, parts)))
            yield

    def gradient(self, loss: Tensor) -> None:
        """Add the loss's gradient to that of the leaves.

        Args:
            loss: A scalar.
        """
        add_gradients(loss, self.leaves, self.leaves, self.turns)

    def write(self) -> None:
        """Write the leaves into the model."""
        for part, leaf in zip(self.slices, self.leaves, strict=True):
            part.write(leaf.detach())

    def restore(self) -> None:
        """Put the model back as it was, bit by bit."""
        for part, kept in zip(self.slices, self.before, strict=True):
            part.write(kept)

    def change(self) -> Change:
        """Return units and their rows as they are in the model now, by site, and no factors."""
        units = selected(self.mask)
        return units, {site: self.model.rows(site)[at.to(self.model.device)].cpu() for site, at in units.items()}, {}


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
        self.lowest: int | None = lowest_layer(mask) if len(mask) else 0
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
                stack.enter_context(_computing(module, partial(_adapted_forward, module, factors)))
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


class Everything:
    """Every parameter of a model, embeddings and norms too: full fine-tuning.

    Args:
        model: The model.
    """

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self.lowest: int | None = None
        self.parameters = list(model.hf.parameters())
        self.before = [parameter.detach().clone() for parameter in self.parameters]
        self.leaves = [parameter.detach().float() for parameter in self.parameters]  # float32 weights are shared

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let every parameter have gradients within the block."""
        flags = [parameter.requires_grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter, flag in zip(self.parameters, flags, strict=True):
                parameter.requires_grad_(flag)

    def gradient(self, loss: Tensor) -> None:
        """Add the loss's gradient to that of the leaves.

        Args:
            loss: A scalar.
        """
        add_gradients(loss, self.parameters, self.leaves)

    @torch.no_grad()
    def write(self) -> None:
        """Write the leaves into the model."""
        for parameter, leaf in zip(self.parameters, self.leaves, strict=True):
            if parameter.data_ptr() != leaf.data_ptr():
                parameter.copy_(leaf)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the model back as it was, bit by bit."""
        for parameter, kept in zip(self.parameters, self.before, strict=True):
            parameter.copy_(kept)


def add_gradients(
    loss: Tensor,
    of: Sequence[Tensor],
    to: Sequence[Tensor],
    turns: Sequence[Callable[[Tensor], Tensor] | None] = (),
) -> None:
    """Add the loss's gradient with respect to some tensors to the `.grad` of others; parameters' own stay as they are.

    Args:
        loss: A scalar.
        of: What it is differentiated by.
        to: What the gradients are added to, one each.
        turns: What is done to each gradient before (`preconditioning.turned_away`).
    """
    gradients = torch.autograd.grad(loss, of, allow_unused=True)
    for leaf, gradient, turn in zip(to, gradients, turns or [None] * len(to), strict=True):
        new = torch.zeros_like(leaf) if gradient is None else gradient.to(leaf.dtype)
        new = turn(new) if turn else new
        leaf.grad = new if leaf.grad is None else leaf.grad + new


@contextmanager
def _computing(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a module compute otherwise within the block; its hooks stay."""
    given: Any = module
    given.forward = forward
    try:
        yield
    finally:
        del given.forward


def _linear(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return weight [out in] and bias of a linear map."""
    given: Any = module
    return given.weight.T if isinstance(module, Conv1D) else given.weight, given.bias


def _selected_forward(module: nn.Module, parts: Mapping[str, tuple[Slice, Tensor]], x: Tensor) -> Tensor:
    transposed = isinstance(module, Conv1D)
    part, leaf = parts["weight"]
    leaf_of_bias = parts["bias"][1] if "bias" in parts else None
    outputs = (part.dim == 0) != transposed
    weight, bias = _linear(module)
    selected_linear: Callable[..., Tensor] = _Selected.apply
    return selected_linear(x, weight, bias, leaf, leaf_of_bias, part.index, outputs, transposed)


class _Selected(torch.autograd.Function):
    """A linear map whose weights get a gradient for selected input or output features only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        leaf, leaf_of_bias, index, outputs, transposed = rest
        ctx.outputs, ctx.transposed, ctx.index, ctx.dtype = outputs, transposed, index, leaf.dtype
        ctx.has_bias = leaf_of_bias is not None
        ctx.save_for_backward(x if outputs or index is None else x[..., index], weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        before = gradient @ weight if ctx.needs_input_grad[0] else None
        chosen = gradient[..., ctx.index] if ctx.outputs and ctx.index is not None else gradient
        of_leaf = chosen.flatten(0, -2).T @ x.flatten(0, -2)
        if ctx.transposed:
            of_leaf = of_leaf.T
        of_bias = chosen.flatten(0, -2).sum(0).to(ctx.dtype) if ctx.has_bias else None
        return before, None, None, of_leaf.to(ctx.dtype), of_bias, None, None, None


def _through(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


def _adapted_forward(module: nn.Module, factors: Factors, x: Tensor) -> Tensor:
    index = factors.part.index
    weight, bias = _linear(module)
    y = F.linear(x, weight, bias)
    seen = x if factors.outputs or index is None else x[..., index]
    change = _through(seen, factors.down, factors.up)
    if factors.down0 is not None and factors.up0 is not None:
        change = change - _through(seen, factors.down0, factors.up0)
    change = factors.scale * change
    return y + change if index is None or not factors.outputs else y.index_add(-1, index, change)
