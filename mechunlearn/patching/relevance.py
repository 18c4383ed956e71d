"""RelP: a backward pass whose rules follow relevance propagation, for attribution that survives norms and saturation."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mechunlearn.model.decoder import Decoder
from mechunlearn.model.taps import tapped
from mechunlearn.patching.edges import Norm


@contextmanager
def relevance_rules(decoder: Decoder) -> Iterator[None]:
    """Let the backward pass, within the block, follow four rules (RelP, arXiv 2508.21258).

    The forward pass is the same.

    Norms: the scale is a constant. Nonlinearities: f(x) is x times the constant f(x)/x. Gated MLPs: half of the
        gradient
    to each factor. Attention: the pattern is a constant for everything before it.

    Args:
        decoder: The model.
    """
    layers = range(decoder.layout.signature.layers)
    gated = "mlp.gate" in decoder.layout.kinds
    modules = decoder.layout.modules
    names = {n for n in ("attention_norm", "mlp_norm", "attention_post", "mlp_post") if getattr(modules, n)}
    norms = {decoder.part(layer, name) for layer in layers for name in names} | {decoder.final_norm}
    taps = [
        tap
        for layer in layers
        for kind in ("attn.q", "attn.k")
        for tap in decoder.taps(f"L{layer}.{kind}", Tensor.detach)
    ]
    if gated:
        taps += [tap for layer in layers for tap in decoder.taps(f"L{layer}.mlp.out", _half)]
    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(_frozen_scale(Norm.of(decoder, norm))).remove)
        for layer in layers:
            for child in decoder.part(layer, "mlp").modules():
                if not list(child.children()) and not list(child.parameters()) and not isinstance(child, nn.Dropout):
                    stack.callback(child.register_forward_hook(_identity).remove)
        stack.enter_context(tapped(taps))
        yield


def _half(product: Tensor) -> Tensor:
    return 0.5 * product + (0.5 * product).detach()


def _identity(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    x: Tensor = args[0]
    slope = torch.where(x == 0, torch.zeros_like(out), out / torch.where(x == 0, torch.ones_like(x), x))
    return x * slope.detach()


def _frozen_scale(norm: Norm) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        x: Tensor = args[0]
        centred = x - x.mean(-1, keepdim=True) if norm.centred else x
        linear = centred * (norm.weight / norm.spread(x.detach()))
        return linear + (out - linear).detach()

    return hook
