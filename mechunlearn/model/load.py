"""Models on disk and on the hub."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mechunlearn.core.files import data_folder
from mechunlearn.core.hub import is_hub_name, look_up
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.gguf import PACKAGED, converted, no_bar, packaged

SHIPPED = ("factworld", "factworld-twin", "factworld-naive")
KINDS = f"{', '.join((*SHIPPED, *PACKAGED))}, a folder written by save_pretrained (with its tokenizer), a .gguf file"


def checkpoint(
    source: str, dtype: torch.dtype | None, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a Hugging Face model and its tokenizer.

    Args:
        source: A shipped world, a real model that comes as a package, a folder, a GGUF file or a hub name.
        dtype: The type of the weights; the stored one if None.
        tokenizer: What is taken in place of the stored tokenizer.

    Raises:
        MechunlearnError: There is no such model, or it cannot be read.
    """
    folder = _folder(source)
    local = Path(folder).is_dir()
    try:
        if not local:
            look_up(folder, "model")
        with no_bar() if local else nullcontext():
            kind = type(AutoConfig.from_pretrained(folder))  # Mistral 3 is no causal language model to transformers
            auto: Any = (
                AutoModelForCausalLM if kind in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText
            )
            found: Any = auto.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
        hf, loaded = found
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, MechunlearnError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = "in this folder" if local else "as a folder, a shipped model or a hub name"
        raise MechunlearnError(
            f"Could not load a model from '{source}': {reason} Looked {where}. Expected one of {KINDS}, or a "
            "reachable hub name."
        ) from None
    if missing := sorted(loaded["missing_keys"]):
        raise MechunlearnError(
            f"The checkpoint '{source}' lacks {len(missing)} of the model's weights, such as {missing[0]}, which would "
            "be random numbers. Give a whole checkpoint."
        )
    return hf, tokenizer


def _folder(source: str) -> str:
    """The folder that holds a model's checkpoint; a hub name as it is."""
    if source in SHIPPED:
        return str(data_folder() / source)
    if source in PACKAGED:
        return str(packaged(source))
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(converted(path))
    if path.is_file():
        raise MechunlearnError(
            f"'{source}' is a file. Expected its folder, which save_pretrained wrote, or a .gguf file."
        )
    if path.is_dir():
        return str(_with_weights(path, source))
    if not is_hub_name(source):
        kind = "file" if source.endswith(".gguf") else "folder"
        raise MechunlearnError(f"There is no {kind} '{source}'. Expected one of {KINDS}, or a hub name.")
    return source


def _with_weights(folder: Path, source: str) -> Path:
    """A folder with a checkpoint: itself, or that of the one GGUF file in it."""
    if any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return folder
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return converted(files[0])
    if files:
        raise MechunlearnError(
            f"The folder '{source}' holds {len(files)} GGUF files. Give the path of one: {', '.join(map(str, files))}."
        )
    raise MechunlearnError(
        f"The folder '{source}' holds no weights. Expected model.safetensors beside config.json, as save_pretrained "
        "writes them, or a .gguf file."
    )
