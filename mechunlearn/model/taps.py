"""Functions that see, and may change, what enters or leaves a module."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

Hook = Callable[[Tensor], Tensor | None]
Tap = tuple[nn.Module, str, Hook]


@contextmanager
def tapped(taps: Iterable[Tap]) -> Iterator[None]:
    """Within the block each function sees the first tensor that enters or leaves its module.

    Args:
        taps: Module, side and function. The side is `in` or `out`, or `first`: what enters before any other hook has
            changed it. What the function returns takes the tensor's place.
    """
    with ExitStack() as stack:
        for module, side, function in taps:
            if side != "out":
                first = side == "first"
                handle = module.register_forward_pre_hook(partial(_entering, function), prepend=first, with_kwargs=True)
            else:
                handle = module.register_forward_hook(partial(_leaving, function))
            stack.callback(handle.remove)
        yield


def _entering(function: Hook, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    del module
    changed = function(args[0] if args else kwargs["hidden_states"])
    if changed is None:
        return None
    return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})


def _leaving(function: Hook, module: nn.Module, args: object, out: Any) -> Any:
    del module, args
    changed = function(out[0] if isinstance(out, tuple) else out)
    if changed is None:
        return None
    return (changed, *out[1:]) if isinstance(out, tuple) else changed


def between(entered: list[Tensor], hook: Hook, attn_out: Tensor) -> Tensor | None:
    """Return what attention must write for the stream behind it to be what a hook returns.

    Args:
        entered: Holds the stream that entered the layer, which is taken out.
        hook: Sees the stream between attention and MLP.
        attn_out: What attention writes.
    """
    resid = entered.pop()
    changed = hook(resid + attn_out)
    return None if changed is None else changed - resid


def scaled(scale: float, hook: Hook, written: Tensor) -> Tensor | None:
    """Return what a module must give for its scaled output to be what a hook returns.

    Args:
        scale: What the output is multiplied by behind the module.
        hook: Sees the scaled output.
        written: What the module gives.
    """
    changed = hook(written * scale)
    return None if changed is None else changed / scale
