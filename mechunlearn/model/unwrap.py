"""The ordinary Hugging Face module within what users have around it, and evaluation mode while a method runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mechunlearn.errors import MechunlearnError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(given: Any) -> PreTrainedModel:
    """Return the Hugging Face module within wrappers that share its weights; refuse what hooks or edits would miss.

    `torch.compile`, `DataParallel` and `DistributedDataParallel` are taken off. What is done to the module within is
    done to the wrapper too.

    Args:
        given: A model of the user's.

    Raises:
        MechunlearnError: It is no causal language model of transformers, has adapters, is quantized, offloaded, spread
            over devices, or compiled in place; with what to do.
    """
    hf = given
    while hasattr(hf, "_orig_mod") or isinstance(hf, PARALLEL):
        hf = hf._orig_mod if hasattr(hf, "_orig_mod") else hf.module
    modules = dict(hf.named_modules()) if isinstance(hf, nn.Module) else {}
    if any(hasattr(module, "base_layer") for module in modules.values()):
        raise MechunlearnError(
            f"The model ({type(hf).__name__}) has adapters. Methods see the model's own weights alone. Merge the "
            "adapters first: load_model(peft_model.merge_and_unload(), tokenizer=tokenizer), or load the model without them."
        )
    if not isinstance(hf, PreTrainedModel):
        raise MechunlearnError(
            f"Got a {type(hf).__name__}. Expected a causal language model of transformers, as AutoModelForCausalLM gives it."
        )
    if hf.get_output_embeddings() is None:
        raise MechunlearnError(
            f"The model ({type(hf).__name__}) has no unembedding, so it gives no logits of tokens. Load it with "
            "AutoModelForCausalLM."
        )
    for name, module in modules.items():
        what = f"'{name}'" if name else "The model"
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise MechunlearnError(
                f"{what} is compiled in place, and compiled code does not see hooks. Load the model before .compile(), "
                "or give torch.compile(model), which keeps the plain module within."
            )
        if callable(getattr(module, "weight", None)) and not isinstance(
            module, nn.ModuleDict
        ):  # torch.ao's: a method that unpacks it
            raise MechunlearnError(
                f"{what} is quantized ({type(module).__module__}.{type(module).__name__}). Load the model in float32, "
                "bfloat16 or float16."
            )
        if hasattr(module, "in_features") and not isinstance(getattr(module, "weight", None), nn.Parameter):
            if "parametrizations" in dict(module.named_children()):
                raise MechunlearnError(
                    f"{what} has a parametrized weight. Remove the parametrization first: "
                    "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')."
                )
            raise MechunlearnError(
                f"{what} is quantized or packed: a {type(module).__module__}.{type(module).__name__} without a weight. "
                "Load the model in float32, bfloat16 or float16."
            )
        if hasattr(module, "_hf_hook"):
            raise MechunlearnError(
                f"{what} was placed by accelerate (device_map). Load the model on one device: "
                "AutoModelForCausalLM.from_pretrained(name).to(device)."
            )
    _check_weights(hf)
    return hf


def _check_weights(hf: PreTrainedModel) -> None:
    weights = dict(hf.named_parameters())
    for name, weight in weights.items():
        if weight.device.type == "meta":
            raise MechunlearnError(f"The weight '{name}' has no data (device meta). Load the model with its weights.")
        if weight.dtype not in DTYPES:
            raise MechunlearnError(
                f"The weight '{name}' is quantized ({weight.dtype}). Load the model in float32, bfloat16 or float16."
            )
        if weight.is_inference():
            raise MechunlearnError(
                f"The weight '{name}' was made in inference mode, so nothing can be trained through it. Load the model "
                "outside torch.inference_mode()."
            )
    _check_shared(hf)
    devices = sorted({str(weight.device) for weight in weights.values()})
    if len(devices) > 1:
        raise MechunlearnError(
            f"The model is spread over {', '.join(devices)}. Move it to one: model.to('{devices[0]}')."
        )


def _check_shared(hf: PreTrainedModel) -> None:
    """Raise an error if a weight stands in two places, other than embedding and unembedding: an edit would move both."""
    ends = {id(part.weight) for part in (hf.get_input_embeddings(), hf.get_output_embeddings())}
    places: dict[int, str] = {}
    for name, weight in hf.named_parameters(remove_duplicate=False):
        first = places.setdefault(id(weight), name)
        if first != name and id(weight) not in ends:
            raise MechunlearnError(
                f"'{first}' and '{name}' are one weight, so an edit of one would move the other. Give each its own: "
                "module.weight = torch.nn.Parameter(module.weight.detach().clone())."
            )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within the block a module is in evaluation mode; afterwards each part is in the mode that it was in.

    Args:
        module: A model that its user may have put into training mode, as `Trainer` does.

    >>> part = nn.Dropout(0.5)
    >>> with evaluating(part):
    ...     print(part.training)
    False
    >>> part.training
    True
    """
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
