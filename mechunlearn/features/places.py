"""Hook points of any model, with or without a layout: what they are called, how wide they are, how to stand there."""

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mechunlearn.core.runcard import digest
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.decoder import STREAMS, UNITS
from mechunlearn.model.hook_points import site_of
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.layout import Signature
from mechunlearn.model.taps import tapped

Model = HookedModel | nn.Module


def module_of(model: Model) -> Any:
    """Return the Hugging Face module of a hooked model, or the module that was given.

    Args:
        model: The model.
    """
    return model.hf if isinstance(model, HookedModel) else model


def place(model: Model, hook_name: str) -> str:
    """Return the hook point as a model calls it: a site, or a module's path where the model has no layout.

    Args:
        model: The model.
        hook_name: A site, a hook name of TransformerLens, or a module's path.

    Raises:
        MechunlearnError: With the nearest names, if there is no such hook point.
    """
    if isinstance(model, HookedModel):
        layers, site = range(model.signature.layers), site_of(hook_name)
        kinds = [kind for kind in (*UNITS, *STREAMS) if kind != "resid_mid" or not model.layout.parallel]
        names = [f"L{layer}.{kind}" for layer in layers for kind in kinds]
    else:
        site, names = hook_name, [name for name, _ in model.named_modules() if name]
    if site in names:
        return site
    near = difflib.get_close_matches(site, names, n=3, cutoff=0.4)
    raise MechunlearnError(
        f"No hook point '{hook_name}' in ({signature_of(model)}). Nearest: {', '.join(near) or 'none'}. "
        f"Expected one such as {names[-2] if len(names) > 1 else 'a module'}."
    )


def width(model: Model, hook_name: str) -> int | None:
    """Return how wide the activation at a hook point is; None where only a run would tell.

    Args:
        model: The model.
        hook_name: The hook point, as `place` returns it.
    """
    if not isinstance(model, HookedModel):
        return None
    kind = hook_name.split(".", 1)[1]
    heads = {"attn.q": "heads", "attn.o": "heads", "attn.k": "kv_heads", "attn.v": "kv_heads"}
    if kind in heads:
        return int(getattr(model.signature, heads[kind])) * model.layout.d_head
    return model.signature.d_mlp if kind == "mlp.out" else model.signature.d_model


@contextmanager
def installed(model: Model, hook_name: str, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Let a function see, and replace, the activations at a hook point for the length of a block.

    Args:
        model: The model.
        hook_name: The hook point.
        function: What is called with the activation `[... pos width]`, heads side by side. What it returns takes the
            activation's place, unless it is None.

    Raises:
        MechunlearnError: If there is no such hook point.
    """
    name = place(model, hook_name)
    if not isinstance(model, HookedModel):
        with tapped([(model.get_submodule(name), "out", function)]):
            yield
        return
    with model.hooks({name: partial(_by_head, function) if ".attn." in name else function}):
        yield


def _by_head(function: Callable[[Tensor], Tensor | None], z: Tensor) -> Tensor | None:
    changed = function(z.flatten(-2))
    return None if changed is None else changed.view_as(z)


def signature_of(model: Model) -> Signature:
    """Return a model's architecture, of a module without a layout read from its configuration.

    Args:
        model: The model.
    """
    if isinstance(model, HookedModel):
        return model.signature
    config: Any = model.config

    def number(*names: str) -> int:
        return next((int(n) for name in names if (n := getattr(config, name, None)) is not None), 0)

    heads = number("num_heads", "num_attention_heads", "n_head")
    kv_heads = number("num_key_value_heads") or heads
    layers = number("num_layers", "num_hidden_layers", "n_layer")
    d_mlp = number("d_ff", "intermediate_size", "n_inner")
    return Signature(config.model_type, layers, heads, kv_heads, d_mlp, number("d_model", "hidden_size", "n_embd"))


def fingerprint_of(model: Model) -> str:
    """Return what names a model in a run card: a hash of its weights.

    Args:
        model: The model.
    """
    return model.fingerprint if isinstance(model, HookedModel) else weights_name(model)


def weights_name(module: nn.Module) -> str:
    """Return eight digits of a hash of the weights.

    Args:
        module: The model or dictionary.
    """
    parts = (
        (n, t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        for n, t in module.state_dict().items()
    )
    return digest(*(part for pair in parts for part in pair))[:8]
