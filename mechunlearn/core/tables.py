"""Tables for readers: columns in plain words, numbers with their intervals as text, and whole when printed."""

from collections.abc import Iterable

import pandas as pd

LABELS = {"kl_to_before": "KL to before", "up_to": "up to (recovery)", "of": "of (settings)"}
NOTHING = "–"


def label(column: str) -> str:
    """Return a column's name in plain words, for tables and figures.

    Args:
        column: The name in a frame.

    >>> label("text_loss"), label("kl_to_before")
    ('text loss', 'KL to before')
    """
    return LABELS.get(column, column.replace("_", " "))


def interval(mean: float, low: float, high: float, short: bool = False, sign: str = "", digits: int = 2) -> str:
    """Return a number with its interval as text; a dash for NaN.

    Args:
        mean: The number.
        low: The lower end of the interval.
        high: The upper end.
        short: Whether half the width of the interval stands for its ends.
        sign: "+" shows the sign of numbers above zero too.
        digits: How many digits to show behind the point.

    >>> interval(0.5, 0.25, 0.75), interval(0.5, 0.25, 0.75, short=True)
    ('0.50 [0.25, 0.75]', '0.50±0.25')
    """
    if pd.isna(mean):
        return NOTHING
    spec = f"{sign}.{digits}f"
    around = f"±{(high - low) / 2:.{digits}f}" if short else f" [{low:{spec}}, {high:{spec}}]"
    return f"{mean:{spec}}{around}"


def intervals(frame: pd.DataFrame, mean: str, low: str, high: str, short: bool = False) -> list[str]:
    """Return a column with its intervals as text.

    Args:
        frame: The numbers.
        mean: The column.
        low: The column of the lower ends.
        high: The column of the upper ends.
        short: Whether half the width of the interval stands for its ends.
    """
    return [interval(*row, short=short) for row in zip(frame[mean], frame[low], frame[high])]


def numbers(values: Iterable[float], spec: str = ".2f") -> list[str]:
    """Return numbers as text; a dash for NaN.

    Args:
        values: The numbers.
        spec: Their format.

    >>> numbers([0.5, float("nan")])
    ['0.50', '–']
    """
    return [NOTHING if pd.isna(value) else f"{value:{spec}}" for value in values]


def to_markdown(frame: pd.DataFrame) -> str:
    """Return a table of text as Markdown, with columns in plain words.

    Args:
        frame: The table.
    """
    shown = frame.astype(str).replace(r"\|", "/", regex=True).rename(columns=label)
    return shown.to_markdown(index=False, disable_numparse=True)


class Table(pd.DataFrame):
    """A frame that prints whole, however narrow the terminal.

    >>> "..." in str(Table({f"column {i}": ["0.50 [0.25, 0.75]"] for i in range(12)}))
    False
    """

    @property
    def _constructor(self) -> type["Table"]:
        return Table

    def __repr__(self) -> str:
        return self.to_string()
