"""Work in batches that fit: half as many at a time when memory runs out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from mechunlearn.errors import MechunlearnError

OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "not enough memory")
Result = TypeVar("Result")


def in_batches(count: int, size: int, work: Callable[[Tensor], Result]) -> list[Result]:
    """The results of `work` on the indices 0 ... count - 1, at most `size` at a time.

    Raises `MechunlearnError` if memory runs out with one at a time.

    >>> in_batches(5, 2, lambda rows: rows.tolist())
    [[0, 1], [2, 3], [4]]
    """
    pending, found = torch.arange(count), []
    while len(pending):
        with enough_memory(min(size, len(pending))) as smaller:
            found.append(work(pending[:size]))
            pending = pending[size:]
        size = min(size, smaller[0]) if smaller[1:] else size
    return found


@contextmanager
def enough_memory(size: int) -> Iterator[list[int]]:
    """Gives the size to go on with, and a second entry if memory ran out within the block: then it is half of it."""
    smaller = [size]
    try:
        yield smaller
    except RuntimeError as error:
        if not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        if size == 1:
            raise MechunlearnError(
                "Out of memory with one at a time. Use shorter prompts, a lower dtype, or a device with more memory."
            ) from None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        smaller[:] = [size // 2, size]
