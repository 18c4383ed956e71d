"""What a benchmark says of a model: figures with their intervals, and the value of every row behind them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mechunlearn.core.display import card as shown
from mechunlearn.core.runcard import RunCard, Stopwatch, digest
from mechunlearn.core.tables import Table, interval
from mechunlearn.metrics.stats import mean_interval
from mechunlearn.model.hooked import HookedModel

COLUMNS = ["benchmark", "split", "metric", "value", "low", "high", "n"]


@dataclass(frozen=True, eq=False)
class Scores:
    """The figures of one benchmark. `scores["forget10", "probability"]` is one of them.

    Args:
        benchmark: Its name.
        values: One number a row, by split and metric; a figure is their mean. NaN is a row that has none.
        figures: Figures that are no means of rows, each with the number of rows behind it.
        note: How the model was asked, and what else a reader has to know.
        card: How it was made.

    >>> scores = Scores("tofu", {("forget01", "probability"): torch.tensor([0.25, 0.75])})
    >>> scores["forget01", "probability"], scores.to_frame()[["split", "metric", "n"]].values.tolist()
    (0.5, [['forget01', 'probability', 2]])
    """

    benchmark: str
    values: Mapping[tuple[str, str], Float[Tensor, " _row"]]
    figures: Mapping[tuple[str, str], tuple[float, int]] = field(default_factory=dict)
    note: str = ""
    card: RunCard = field(default_factory=lambda: RunCard("benchmark"))

    def __getitem__(self, at: tuple[str, str]) -> float:
        """The figure of a split and a metric."""
        return self.figures[at][0] if at in self.figures else float(self.values[at].double().nanmean())

    def to_frame(self) -> pd.DataFrame:
        """Return one row a figure.

        Returns:
            Columns `benchmark`, `split`, `metric`, `value`, `low` and `high` (its 95 % interval over rows: exact where each
            row is 0 or 1, else by bootstrap; NaN for a figure that is no mean of rows), and `n`, the rows.
        """
        rows = []
        for (split, metric), each in self.values.items():
            data = each[~each.isnan()].double()
            low, high = mean_interval(data.numpy()) if len(data) else (nan, nan)
            rows.append((self.benchmark, split, metric, self[split, metric], low, high, len(data)))
        rows += [
            (self.benchmark, split, metric, value, nan, nan, n) for (split, metric), (value, n) in self.figures.items()
        ]
        return Table(rows, columns=COLUMNS)

    def __repr__(self) -> str:
        return f"{self.to_frame()!r}\n{self.note}"

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        ends = zip(frame["value"], frame["low"], frame["high"], strict=True)
        rows = zip(frame["split"], frame["metric"], [interval(*each) for each in ends], frame["n"], strict=True)
        return shown(
            self.benchmark, {"model": self.card.model, "note": self.note}, ("split", "metric", "value", "n"), rows
        )


def made_by(benchmark: str, model: HookedModel, data: object, watch: Stopwatch, **settings: Any) -> RunCard:
    """Return the run card of an evaluation.

    Args:
        benchmark: The benchmark.
        model: The model that was measured.
        data: The rows that it was measured on; their hash is kept.
        watch: Started when the evaluation began.
        settings: Its arguments.
    """
    made = RunCard(
        f"benchmarks.{benchmark}",
        model=model.fingerprint,
        data=digest(repr(data)),
        settings=settings,
        device=str(model.device),
    )
    return watch.stamp(made)


def per_group(values: Shaped[Tensor, " item"], sizes: Sequence[int]) -> Float[Tensor, " group"]:
    """Return the mean of each group of neighbours, such as the paraphrases of each fact; NaN for a group of none.

    Args:
        values: One number an item, group after group.
        sizes: How many items each group has.

    >>> per_group(torch.tensor([1.0, 0.0, 1.0]), [2, 0, 1]).tolist()
    [0.5, nan, 1.0]
    """
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(list(sizes)))
    return torch.zeros(len(sizes)).index_add_(0, group, values.float()) / torch.tensor(list(sizes))
