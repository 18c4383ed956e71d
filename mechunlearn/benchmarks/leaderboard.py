"""Methods side by side on TOFU: one table of every figure, and its files."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pandas as pd

from mechunlearn.benchmarks.open_unlearning import from_open_unlearning, summary, to_open_unlearning
from mechunlearn.benchmarks.published import READING as PUBLISHED_READING
from mechunlearn.benchmarks.published import SOURCE, published
from mechunlearn.benchmarks.scores import COLUMNS, Scores
from mechunlearn.core.files import whole_file
from mechunlearn.core.tables import NOTHING, Table, interval, to_markdown
from mechunlearn.metrics.stats import over_worlds

FULL, RETAIN = "full model", "retain model (gold)"
SHOWN = {
    "forget quality": ("", "forget_quality"),
    "model utility": ("all", "model_utility"),
    "forget probability": ("", "probability"),
    "forget ROUGE-L": ("", "rouge_l_recall"),
    "forget truth ratio": ("", "truth_ratio_closeness"),
    "exact memorization": ("", "exact_memorization"),
    "extraction strength": ("", "extraction_strength"),
    "retain probability": ("retain", "probability"),
    "retain ROUGE-L": ("retain", "rouge_l_recall"),
}
"""Columns of the short table: split (empty: the forget set) and metric."""
READING = (
    "*forget quality*: p-value of a Kolmogorov-Smirnov test with the retain model; at .05 or below the two differ. Over several "
    "seeds it is the median, with the smallest and the largest. *n*: seeds. In brackets: the 95 % interval over rows "
    "for one seed, of Student's t over seeds for several. All other splits: `results.csv`."
)
NO_GOLD = "No retain model was given, so there is no forget quality, and no row to compare with: give one (--retain)."
OTHERS = "Published elsewhere: other models and settings"
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em; color: #222 }} table {{ border-collapse: collapse }}
td, th {{ padding: .3em .8em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }}</style>
<h1>{title}</h1><p>{about}</p>{table}<p>{reading}</p>
<h2>{others}</h2><p>{note}</p>{published}<p>Source: {source}.</p><details><summary>All figures</summary>{figures}</details></html>
"""


class Row(NamedTuple):
    """What was found of a method with a seed.

    Attributes:
        method: The method's name.
        seed: The seed.
        scores: What `tofu.evaluate` returned; None if it failed.
        share: The share of the weights that the edit may change; NaN where that is not known.
        note: Why it failed, or who measured it.
    """

    method: str
    seed: int
    scores: Scores | None
    share: float = float("nan")
    note: str = ""


@dataclass(frozen=True, eq=False)
class Leaderboard:
    """What `compare_methods` found.

    Args:
        rows: The full model, the retain model if there is one, and each method and seed.
        about: What they have in common; `forget` is the forget set.

    >>> import torch
    >>> scores = Scores("tofu", {("forget01", "probability"): torch.tensor([0.5, 0.5])})
    >>> board = Leaderboard((Row("full model", 0, scores),), {"forget": "forget01"})
    >>> board.summary()[["method", "forget probability"]].to_dict("records")
    [{'method': 'full model', 'forget probability': '0.50 [0.50, 0.50]'}]
    """

    rows: tuple[Row, ...]
    about: Mapping[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """Return one row a figure.

        Returns:
            `method`, `seed`, the columns of `Scores.to_frame`, `share` of the weights that may change, and `note`. What
            failed is one row without a figure.
        """
        frames = []
        for row in self.rows:
            frame = pd.DataFrame([("tofu", "", "", *[np.nan] * 3, 0)], columns=COLUMNS)
            if row.scores is not None:
                frame = pd.DataFrame(row.scores.to_frame())
            frame.insert(0, "method", row.method)
            frame.insert(1, "seed", row.seed)
            frames.append(frame.assign(share=row.share, note=row.note))
        return Table(pd.concat(frames, ignore_index=True))

    def summary(self) -> pd.DataFrame:
        """Return one row a method as text: means over seeds with their intervals."""
        rows = []
        columns = {name: (split or self.about["forget"], metric) for name, (split, metric) in SHOWN.items()}
        for method, found in self._methods():
            measured = [row.scores for row in found if row.scores is not None]
            shares = [row.share for row in found if row.share == row.share]
            shown = {name: _shown(measured, at) for name, at in columns.items()}
            notes = "; ".join(dict.fromkeys(row.note for row in found if row.note))
            share = f"{np.mean(shares):.1%}" if shares else NOTHING
            rows.append({"method": method, "n": str(len(measured)), "share": share, **shown, "note": notes})
        frame = pd.DataFrame(rows)
        return Table(frame[[name for name in frame if name not in columns or (frame[name] != NOTHING).any()]])

    def beside(self, method: str, path: str | Path) -> "Leaderboard":
        """Return the table with a row more, from a result file of open-unlearning.

        Args:
            method: What the row is called.
            path: Their `TOFU_EVAL.json` or `TOFU_SUMMARY.json`, about the same forget set.

        Raises:
            MechunlearnError: The file cannot be read.
        """
        scores = from_open_unlearning(path, self.about["forget"])
        return replace(self, rows=(*self.rows, Row(method, 0, scores, note=scores.note)))

    def to_markdown(self) -> str:
        """Return the short table, how to read it, and what others have published of this forget set."""
        own = f"# {self._title()}\n\n{self._about()}\n\n{to_markdown(self.summary())}\n\n{READING}\n"
        others = to_markdown(published(self.about["forget"]))
        return f"{own}\n## {OTHERS}\n\n{PUBLISHED_READING}\n\n{others}\n\nSource: {SOURCE}.\n"

    def save(self, folder: str | Path) -> None:
        """Write the tables, and for each measured row open-unlearning's two files.

        `results.csv` and `.parquet` have every figure; `table.md`, `table.tex` and `results.html`, one page that needs no
        network, the short table. The page and `table.md` also have what others have published, under a heading of its
        own. Under `open-unlearning` each method and seed has a `TOFU_EVAL.json` and a
        `TOFU_SUMMARY.json`.

        Args:
            folder: The folder.
        """
        folder, frame, short = Path(folder), pd.DataFrame(self.to_frame()), pd.DataFrame(self.summary())
        page = PAGE.format(
            title=self._title(),
            about=self._about(),
            table=short.to_html(index=False, border=0),
            reading=READING.replace("*", "").replace("`", ""),
            others=OTHERS,
            note=PUBLISHED_READING,
            published=published(self.about["forget"]).to_html(index=False, border=0),
            source=SOURCE,
            figures=frame.to_html(index=False, border=0, na_rep=NOTHING),
        )
        texts = {"table.md": self.to_markdown(), "results.html": page, "results.csv": frame.to_csv(index=False)}
        texts["table.tex"] = short.to_latex(index=False, escape=True)
        for row in self.rows:
            if row.scores is not None:
                place = f"open-unlearning/{quote(row.method, safe='+')}/seed{row.seed}"
                evaluated = to_open_unlearning(row.scores, self.about["forget"])
                texts[f"{place}/TOFU_EVAL.json"] = json.dumps(evaluated, indent=4)
                texts[f"{place}/TOFU_SUMMARY.json"] = json.dumps(summary(evaluated), indent=4)
        for name, text in texts.items():
            with whole_file(folder / name) as beside:
                beside.write_text(text, encoding="utf-8")
        with whole_file(folder / "results.parquet") as beside:
            frame.to_parquet(beside, index=False)

    def __repr__(self) -> str:
        return repr(self.summary())

    def _title(self) -> str:
        return f"TOFU, {self.about['forget']}"

    def _about(self) -> str:
        gold = "" if any(row.method == RETAIN for row in self.rows) else f" {NO_GOLD}"
        return f"{self.about.get('asked', '')}{gold}".strip()

    def _methods(self) -> Iterator[tuple[str, list[Row]]]:
        for method in dict.fromkeys(row.method for row in self.rows):
            yield method, [row for row in self.rows if row.method == method]


def _shown(measured: list[Scores], at: tuple[str, str]) -> str:
    """A figure as text: of one seed with its interval over rows, of several with that over seeds."""
    found = [scores for scores in measured if at in scores.values or at in scores.figures]
    values = [scores[at] for scores in found]
    if not found:
        return NOTHING
    if at[1] == "forget_quality":
        ends = f" [{min(values):.2g}, {max(values):.2g}]" if len(values) > 1 else ""
        return f"{np.median(values):.2g}{ends}"
    if len(values) > 1:
        return interval(*over_worlds([values])[:3])
    if at in found[0].figures:
        return f"{values[0]:.2f}"
    frame = found[0].to_frame()
    row = frame[(frame["split"] == at[0]) & (frame["metric"] == at[1])].iloc[0]
    return interval(row["value"], row["low"], row["high"])
