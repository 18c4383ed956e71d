"""How much the loss on some sequences depends on each weight: the diagonal Fisher information, fed batch by batch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from mechunlearn.errors import MechunlearnError

CHUNK = 2**24  # entries of the weight gradients that are formed at a time


class DiagonalFisher:
    """How much the loss of each sequence depends on each weight of some linear layers: the empirical Fisher's diagonal.

    F[i, j] is the mean over sequences s of (d L_s / d W[i, j])^2, where L_s is the mean cross-entropy of the labelled
    tokens of s, in nats (LoKU, arXiv 2408.06621, the importance in FILA). Sequences are squared one by one: the square
    of a batch's mean gradient is another number. Labels drawn from the model instead of the text give the true Fisher.
    Biases, and a tied embedding's use as a table, are left out.

    Weight gradients are delta^T X of a layer's inputs X and output gradients delta, [pos in] and [pos out], so the
    model's parameters need no gradient and theirs is not touched. `update` costs one forward and one backward pass,
    holds X and delta of all layers for the batch, and does pos * in * out operations a layer and sequence. Sums are
    float64, whatever the model's dtype. In float16 small gradients become zero: use bfloat16 or float32.

    Args:
        hf: The module, which gives `.logits`.
        modules: Names of its linear layers (`nn.Linear` or transformers `Conv1D`), one or more.

    Attributes:
        count: Sequences seen so far.

    Raises:
        MechunlearnError: If a name is not that of a linear layer, or none is given.

    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> prompts = toy.prompts([0, 1])
    >>> labels = torch.full_like(prompts.tokens, -1)
    >>> labels[:, -1] = prompts.answers[:, 0]
    >>> fisher = DiagonalFisher(toy.model.hf, ["model.layers.0.mlp.down_proj"]).update(prompts.tokens, labels)
    >>> neurons = fisher.elements("model.layers.0.mlp.down_proj").sum(0)
    >>> neurons.topk(2).indices.sort().values.tolist(), fisher.count
    ([0, 1], 2)
    """

    def __init__(self, hf: nn.Module, modules: Sequence[str]) -> None:
        if not modules:
            raise MechunlearnError("No module was given. Expected a module or more, by name.")
        self.count, self._hf = 0, hf
        self._modules = {name: _linear(hf, name) for name in modules}
        self._sums = {
            name: torch.zeros(_shape(module), dtype=torch.float64, device=module.weight.device)
            for name, module in self._modules.items()
        }

    @property
    def modules(self) -> frozenset[str]:
        """The names of the layers."""
        return frozenset(self._modules)

    def update(self, tokens: Int[Tensor, "row pos"], labels: Int[Tensor, "row pos"]) -> "DiagonalFisher":
        """Add a batch. If this raises, memory running out included, it may have been added in part: start anew.

        Args:
            tokens: Padded on the right with any token.
            labels: `labels[r, t]` is the token that the logits at position t should give, -1 where there is none. A row
                without a label is not counted.

        Returns:
            The Fisher itself.

        Raises:
            MechunlearnError: If the module is in training mode (dropout is noise in the Fisher), if shapes differ, or
                if a layer does not see its inputs as `[row pos in]`, as the experts of a mixture do not.
        """
        if self._hf.training or tokens.shape != labels.shape:
            raise MechunlearnError(
                f"Got tokens {tuple(tokens.shape)}, labels {tuple(labels.shape)} and a module in "
                f"{'training' if self._hf.training else 'evaluation'} mode. Expected equal shapes and evaluation mode: "
                "call eval() on the module, and give one label a position."
            )
        device = next(self._hf.parameters()).device
        with torch.enable_grad(), _watched(self._modules) as calls:
            logits = self._hf(input_ids=tokens.to(device), use_cache=False).logits
        labels = labels.to(logits.device)
        rows, positions = (labels >= 0).nonzero(as_tuple=True)
        if not len(rows):
            return self
        for name, seen in calls.items():
            _check_calls(name, [x for x, _ in seen], tokens.shape)
        outs = [out for seen in calls.values() for _, out in seen]
        with torch.enable_grad():
            losses = cross_entropy(_wide(logits[rows, positions]), labels[rows, positions], reduction="none")
            total = (losses / (labels >= 0).sum(1)[rows]).sum()
        gradients = iter(torch.autograd.grad(total, outs, materialize_grads=True))
        for name, seen in calls.items():
            x = torch.cat([x for x, _ in seen], 1)
            _add(self._sums[name], x, torch.cat([next(gradients) for _ in seen], 1))
        self.count += len(set(rows.tolist()))
        return self

    def elements(self, name: str) -> Float[Tensor, "out in"]:
        """Return the Fisher of each weight of a layer, always [out in], also where the module stores [in out] (`Conv1D`).

        Args:
            name: The layer's.

        Raises:
            MechunlearnError: If it was not asked for, or before the first label.
        """
        if name not in self._sums or not self.count:
            raise MechunlearnError(
                f"No Fisher of '{name}' after {self.count} sequences. Expected one of {', '.join(self._sums)}, "
                "after an update with labels."
            )
        return self._sums[name] / self.count


def _wide(x: Tensor) -> Tensor:
    """Return the same numbers in float32, or in float64 where they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _add(total: Tensor, x: Float[Tensor, "row pos in"], delta: Float[Tensor, "row pos out"]) -> None:
    """Add the squares of the rows' weight gradients, a few rows at a time."""
    size = max(1, CHUNK // total.numel())
    for inputs, outputs in zip(torch.split(x, size), torch.split(delta, size), strict=True):
        total += (_wide(outputs).mT @ _wide(inputs)).to(total.dtype).square_().sum(0)


@contextmanager
def _watched(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Keep each call of a module, within the block, by name: its input, and its output as part of the graph."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(partial(_keep, calls[name]), prepend=True).remove)
        yield calls


def _keep(calls: list[tuple[Tensor, Tensor]], module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    del module
    out = out if out.requires_grad else out.detach().requires_grad_()
    calls.append((args[0].detach(), out))
    return out


def _linear(hf: nn.Module, name: str) -> Any:
    """Return the linear module of this name."""
    named = dict(hf.named_modules())
    if isinstance(named.get(name), nn.Linear | Conv1D):
        return named[name]
    linear = [other for other, module in named.items() if isinstance(module, nn.Linear | Conv1D)]
    given = f"'{name}' is a {type(named[name]).__name__}" if name in named else f"There is no module '{name}'"
    near = get_close_matches(name, linear, n=3, cutoff=0) or ["(this module has none)"]
    raise MechunlearnError(f"{given}. Expected the name of an nn.Linear or Conv1D, such as {', '.join(near)}.")


def _shape(module: Any) -> tuple[int, int]:
    """Return the numbers of outputs and inputs."""
    return (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)


def _check_calls(name: str, inputs: list[Tensor], shape: torch.Size) -> None:
    for x in inputs:
        if x.dim() != 3 or x.shape[:2] != shape:
            raise MechunlearnError(
                f"Module '{name}' saw inputs of shape {tuple(x.shape)}. Expected (row, pos, in) with {shape[0]} rows "
                "and "
                f"{shape[1]} positions, so that sequences can be told apart: leave this module out."
            )
    if not inputs:
        raise MechunlearnError(f"Module '{name}' was not called in the forward pass. Leave it out.")
