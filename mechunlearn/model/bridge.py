"""The bridge of transformer_lens to the same parameters: the only file that imports that library."""

import copy
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mechunlearn.model.component import Component
from mechunlearn.model.decoder import Hook


def boot(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str):
    """Boot with a placeholder tokenizer: booting reads it again from its path, or else from the hub."""
    from transformer_lens.model_bridge import TransformerBridge  # seconds to import

    hf.config = copy.copy(hf.config)
    hf.config.architectures = [type(hf).__name__]
    with tempfile.TemporaryDirectory() as folder:
        bridge = TransformerBridge.boot_transformers(
            "local/" + (re.sub(r"[^\w.-]", "-", Path(name).name) or "model"),
            hf_model=hf,
            tokenizer=_placeholder_tokenizer(Path(folder)),
            device=str(next(hf.parameters()).device),
        )
    bridge.tokenizer = tokenizer
    return bridge


def freeze_additions(bridge: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Freeze the parameters that booting added, such as the bias of the unembedding."""
    truth = {id(p) for p in parameters.values()}
    for parameter in bridge.parameters():
        if id(parameter) not in truth:
            parameter.requires_grad_(False)


def _placeholder_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")),
        **dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "<unk>"),
    )
    made.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def bridged(user_hook: Hook, heads: int | None, activation: Tensor, hook: object) -> Tensor | None:
    """A hook of the user's as the bridge calls it, seeing heads apart."""
    del hook
    shape = activation.shape
    changed = user_hook(activation if heads is None else activation.view(*shape[:2], heads, -1))
    return None if changed is None else changed.reshape(shape)


def find_copies(bridge: Any, layers: int, parameters: Mapping[str, Tensor]) -> dict[Component, Any]:
    """Sites whose weights the bridge keeps apart from the Hugging Face storage."""
    storages = {p.untyped_storage().data_ptr() for p in parameters.values()}
    copies: dict[Component, Any] = {}
    for layer in range(layers):
        for kind in ("attn.q", "attn.k", "attn.v", "mlp.in", "mlp.gate"):
            part, name = kind.split(".")
            module = getattr(getattr(bridge.blocks[layer], part), name, None)
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.untyped_storage().data_ptr() not in storages:
                copies[Component(layer, kind)] = module
    return copies
