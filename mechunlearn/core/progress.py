"""A bar for work that takes a while: on a terminal or in a notebook, and silent in a pipe."""

from collections.abc import Iterable, Iterator, Sized
from time import monotonic
from typing import TypeVar

Item = TypeVar("Item")
SECONDS = 1.0  # what takes less needs no bar


def track(items: Iterable[Item], title: str, total: int | None = None, progress: bool | None = None) -> Iterator[Item]:
    """Yield the items, and show how many of them are done.

    Args:
        items: What is worked on.
        title: What the bar calls the work.
        total: The number of items, if they have no length.
        progress: True shows a bar, False none. None shows one on a terminal or in a notebook, after a second.

    >>> list(track([1, 2], "adding", progress=False))
    [1, 2]
    """
    from rich import get_console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = get_console()
    if not (progress if progress is not None else console.is_terminal or console.is_jupyter):
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar, begun = Progress(*columns, console=console), monotonic()
    task = bar.add_task(title, total=len(items) if total is None and isinstance(items, Sized) else total)
    try:
        for item in items:
            if progress or monotonic() - begun > SECONDS:
                bar.start()
            yield item
            bar.advance(task)
    finally:
        bar.stop()
