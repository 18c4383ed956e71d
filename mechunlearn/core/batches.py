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
    """Work on the indices 0 ... count - 1 in batches, half as large after each time that memory runs out.

    Args:
        count: The number of indices.
        size: The largest batch.
        work: Called with the indices of each batch, a tensor `[index]`.

    Returns:
        What `work` returned, one entry a batch.

    Raises:
        MechunlearnError: Memory runs out with one index at a time.

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
    """Catch it if memory runs out within the block.

    Args:
        size: The number of items that the block works on.

    Yields:
        A list of one entry, `size`. If memory ran out it has two after the block: half of `size`, and `size`.

    Raises:
        MechunlearnError: Memory ran out with one item.
    """
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
