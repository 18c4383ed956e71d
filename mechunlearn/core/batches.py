"""Work in batches that fit: half as many at a time when memory runs out."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from mechunlearn.core.progress import track
from mechunlearn.errors import MechunlearnError

OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "not enough memory")
Result = TypeVar("Result")


def in_batches(
    count: int, size: int, work: Callable[[Tensor], Result], title: str = "", progress: bool | None = False
) -> list[Result]:
    """Collect the results of `work` on the indices 0 ... count - 1, at most `size` at a time.

    Args:
        count: The number of indices.
        size: The largest batch; half of it when memory runs out.
        work: What is done with a batch of indices.
        title: What a bar calls it.
        progress: Whether there is a bar (see `progress.track`).

    Raises:
        MechunlearnError: Memory runs out with one at a time.

    >>> in_batches(5, 2, lambda rows: rows.tolist())
    [[0, 1], [2, 3], [4]]
    """
    pending, found = torch.arange(count), []
    with counter(count, title, progress) as done:
        while len(pending):
            with enough_memory(min(size, len(pending))) as smaller:
                found.append(work(pending[:size]))
                done(min(size, len(pending)))
                pending = pending[size:]
            size = min(size, smaller[0]) if smaller[1:] else size
    return found


@contextmanager
def counter(total: int, title: str, progress: bool | None = None) -> Iterator[Callable[[int], object]]:
    """Give, within the block, a function that counts so many more as done and moves a bar.

    Args:
        total: How many there are in all.
        title: What the bar calls the work.
        progress: Whether a bar is shown (see `progress.track`).
    """
    bar = iter(track(range(total), title, progress=progress))
    yield lambda count: deque(islice(bar, count), maxlen=0)
    deque(bar, maxlen=0)


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
