"""Runs that start at some layer and position.

The model's own blocks, called again with its own masks and rotary embeddings.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Restart:
    """Blocks, ready to be called on some positions. Rows may be any multiple of the facts that were recorded.

    Attributes:
        blocks: The model's blocks.
        calls: What each block is called with, besides the residual stream.
        start: The first position.
        stop: The position after the last.
    """

    blocks: list[nn.Module]
    calls: list[Call]
    start: int
    stop: int

    def block(self, layer: int, resid: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """Return what leaves a block.

        Args:
            layer: The block.
            resid: What enters it.
        """
        args, kwargs = self.calls[layer]
        out = self.blocks[layer](resid, *args, **kwargs)
        left: Tensor = out[0] if isinstance(out, tuple) else out
        return left


class Prefix(DynamicLayer):
    """The keys and values of earlier positions in one layer, repeated for as many rows as ask.

    Nothing is added to them.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Hold keys and values `[fact head pos d_head]`.

        Args:
            keys: Those of earlier positions.
            values: Those of earlier positions.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.is_initialized = True
        self.dtype, self.device = keys.dtype, keys.device

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the held keys and values with the given ones behind them.

        Args:
            key_states: The keys of the positions that are run, `[row head pos d_head]`.
            value_states: Their values.
            args: Not used.
            kwargs: Not used.
        """
        if self.keys.shape[-2] == 0:
            return key_states, value_states
        repeats = (len(key_states) // len(self.keys), 1, 1, 1)
        return (
            torch.cat([self.keys.repeat(repeats), key_states], dim=-2),
            torch.cat([self.values.repeat(repeats), value_states], dim=-2),
        )


@contextmanager
def calls_of(blocks: Sequence[nn.Module], as_tuple: bool) -> Iterator[list[Call]]:
    """Within the block the modules compute nothing: each notes what it is called with, and passes the stream on.

    Args:
        blocks: The model's blocks.
        as_tuple: Whether they return the stream in a tuple.

    Yields:
        The calls so far, without the stream.
    """
    calls: list[Call] = []
    with ExitStack() as stack:
        for block in blocks:
            block.forward = partial(_note, calls, as_tuple)
            stack.callback(delattr, block, "forward")
            stack.enter_context(_without_hooks(block))
        yield calls


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Within the block the module is called as if it had no hooks."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    kept = {name: getattr(module, name) for name in names}
    for name in names:
        setattr(module, name, type(kept[name])())
    try:
        yield
    finally:
        for name, hooks in kept.items():
            setattr(module, name, hooks)


def _note(calls: list[Call], as_tuple: bool, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    calls.append((args, kwargs))
    return (hidden_states,) if as_tuple else hidden_states
