"""Which and how much: component addresses, masks and scores. None of them knows a method or a parameter name."""

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechunlearn.core.files import whole_file
from mechunlearn.errors import MechunlearnError

if TYPE_CHECKING:
    pass


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole; a disk that is full raises `OSError`, as for any other file."""
    with whole_file(path) as beside:
        try:
            save_file({name: t.clone().contiguous() for name, t in tensors.items()}, beside, metadata=metadata)
        except SafetensorError as error:  # what it makes of an OSError
            raise OSError(str(error)) from None


def load_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file of ours; one clear error if it is not such a file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise MechunlearnError(f"'{path}' is not a whole .safetensors file ({error}).") from None
    if metadata.get("kind") != kind:
        raise MechunlearnError(f"'{path}' holds a {metadata.get('kind', 'foreign file')}, not a {kind}.")
    return tensors, metadata
