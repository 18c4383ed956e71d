"""Models on disk and on the hub."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from mechunlearn.core.files import data_folder
from mechunlearn.errors import MechunlearnError

SHIPPED = ("factworld", "factworld-twin", "factworld-naive")


def checkpoint(source: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a Hugging Face model and its tokenizer.

    Args:
        source: A shipped world, a folder or a hub name.
        dtype: The type of the weights; the stored one if None.

    Raises:
        MechunlearnError: There is no such model, or it cannot be read.
    """
    folder = _folder(source)
    try:
        with _no_bar() if source in SHIPPED else nullcontext():
            hf: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
        return hf, AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        where = "in this folder" if Path(folder).is_dir() else "as a folder, a shipped model or a hub name"
        raise MechunlearnError(
            f"Could not load a model from '{source}': {reason} Looked {where}. Expected one of "
            f"{', '.join(SHIPPED)}, a folder written by save_pretrained (with its tokenizer), or a reachable hub name."
        ) from None


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without the progress bar of transformers: a shipped model is there at once."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _folder(source: str) -> str:
    if source in SHIPPED:
        return str(data_folder() / source)
    path = Path(source).expanduser()
    if path.is_dir():
        if not list(path.glob("*.safetensors")) and not list(path.glob("pytorch_model*.bin")):
            raise MechunlearnError(
                f"The folder '{source}' holds no weights. Expected model.safetensors beside config.json, "
                "as save_pretrained writes them."
            )
        return str(path)
    if path.suffix or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise MechunlearnError(
            f"There is no folder '{source}'. Expected a model folder, or one of {', '.join(SHIPPED)}."
        )
    return source
