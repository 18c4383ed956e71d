"""What an optimiser may move: the selected rows of a model, or everything (`adapters` has low-rank factors beside them).

Each holds its numbers as float32 leaf tensors, whatever the dtype of the model, and gives gradients for these alone:
the matrices that hold selected rows never get a gradient of their own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel, frozen
from mechunlearn.training.precision import Half, times


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
                stack.enter_context(computing(module, partial(_selected_forward, module, parts)))
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
def computing(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a module compute otherwise within the block; its hooks stay.

    Args:
        module: The module.
        forward: What it computes instead.
    """
    given: Any = module
    given.forward = forward
    try:
        yield
    finally:
        del given.forward


def linear_of(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return weight [out in] and bias of a linear map.

    Args:
        module: A linear module, or a Conv1D of transformers, which stores its weight as [in out].
    """
    given: Any = module
    return given.weight.T if isinstance(module, Conv1D) else given.weight, given.bias


def _selected_forward(module: nn.Module, parts: Mapping[str, tuple[Slice, Tensor]], x: Tensor) -> Tensor:
    transposed = isinstance(module, Conv1D)
    part, leaf = parts["weight"]
    leaf_of_bias = parts["bias"][1] if "bias" in parts else None
    outputs = (part.dim == 0) != transposed
    weight, bias = linear_of(module)
    selected_linear: Callable[..., Tensor] = _Selected.apply
    return selected_linear(x, weight, bias, leaf, leaf_of_bias, part.index, outputs, transposed)


class _Selected(torch.autograd.Function):
    """A linear map whose weights get a gradient for selected input or output features only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        leaf, leaf_of_bias, index, outputs, transposed = rest
        ctx.outputs, ctx.transposed, ctx.index, ctx.dtype = outputs, transposed, index, leaf.dtype
        ctx.has_bias, ctx.half = leaf_of_bias is not None, Half.current
        ctx.save_for_backward(x if outputs or index is None else x[..., index], weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        before = times(ctx.half, gradient, weight) if ctx.needs_input_grad[0] else None
        chosen = gradient[..., ctx.index] if ctx.outputs and ctx.index is not None else gradient
        of_leaf = times(ctx.half, chosen.flatten(0, -2).T, x.flatten(0, -2))
        if ctx.transposed:
            of_leaf = of_leaf.T
        of_bias = chosen.flatten(0, -2).sum(0).to(ctx.dtype) if ctx.has_bias else None
        return before, None, None, of_leaf.to(ctx.dtype), of_bias, None, None, None
