"""A progress bar for work that takes a while: on a terminal or in a notebook, never in a pipe."""

from collections.abc import Iterable, Iterator, Sized
from threading import Timer
from typing import TypeVar

Item = TypeVar("Item")
DELAY = 1.0  # seconds; shorter work needs no bar


def track(items: Iterable[Item], title: str, total: int | None = None, progress: bool | None = None) -> Iterator[Item]:
    """Yield the items, and show how many are done.

    Args:
        items: What the work is done on, one at a time.
        title: The name of the work, to the left of the bar.
        total: The number of items, where they have no length.
        progress: True shows the bar at once, and in a pipe its last state; False shows none. None shows it after one
            second if standard output is a terminal or a notebook.

    >>> [2 * item for item in track([1, 2], "doubling")]
    [2, 4]
    """
    from rich import get_console  # with its columns, a tenth of a second to import
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, watched = get_console(), is_watched()
    if not (watched if progress is None else progress):
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    above = not console.is_jupyter  # on a terminal, what is printed goes above the bar
    bar = Progress(*columns, console=console, transient=watched, redirect_stdout=above, redirect_stderr=above)
    task = bar.add_task(title, total=len(items) if total is None and isinstance(items, Sized) else total)
    later = Timer(DELAY, bar.start)  # a thread, so that a first item that takes long has a bar too
    later.daemon = True
    try:
        bar.start() if progress else later.start()
        for item in items:
            yield item
            bar.advance(task)
    finally:
        later.cancel()
        if later.is_alive():
            later.join()
        if bar.live.is_started:
            bar.stop()


def is_watched() -> bool:
    """Return whether somebody can see a bar: standard output is a terminal or a notebook."""
    from rich import get_console

    console = get_console()
    return console.is_jupyter or console.file.isatty()  # not `is_terminal`: FORCE_COLOR makes that true in a pipe
