"""What a comparison of localizers found: its tables, its figure and its files."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mechunlearn import plots
from mechunlearn.core.files import whole_file
from mechunlearn.core.tables import NOTHING, Table, interval, to_markdown
from mechunlearn.evaluation.selection import NONE_QUALIFIES, RULE
from mechunlearn.metrics.stats import over_worlds

CONTROL = "random_units"
MEASURES = ("efficacy", "truth", "generalization", "retention", "same_subject", "text_loss", "recovery")
ARM = ("objective", "budget", "localizer")
NAMES = ("stage", *ARM, "lr", "forget_weight", "seed")
COLUMNS = (*NAMES, "selected", "share", *MEASURES, "seconds", "note")
TEXTS = ("stage", *ARM, "selected", "note")
READING = (
    "*efficacy*: forget facts that answer the edit target, for objectives that have one, else that no longer give the truth; "
    "*truth*: forget facts that still give it, on the training prompt; *generalization*: the mean of efficacy over all other "
    "formats; *retention*: accuracy on the retain facts; *same subject*: on other relations of the forgotten subjects; "
    "*text loss*: nats a token. Accuracy is greedy over the full vocabulary. In brackets: 95 % interval of "
    "Student's t over seeds."
)


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a comparison found.

    Args:
        frame: One row a cell, as `COLUMNS`: `stage` (`validation`, `unedited` or `test`); the cell's `objective`,
            `budget`, `localizer`, `lr`, `forget_weight` and `seed`; `selected` ("qualifies", or "none qualifies", see
            `select`); `share` of the editable weights; `efficacy`, the share of forget facts that answer the edit
            target on the training prompt, for objectives that have one, else that no longer give the truth; `truth`,
            the share that still give it there; `generalization`, the mean of efficacy over all other formats;
            `retention`, accuracy on the retain facts; `same_subject`, the mean accuracy on other relations of the
            forgotten subjects; `text_loss` on passages that no edit trains on, nats a token; `recovery` by
            relearning; `seconds` of the edit; `note`, where something was not found or not finite.
        about: What the cells have in common.
    """

    frame: pd.DataFrame
    about: Mapping[str, Any]

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]], about: Mapping[str, Any]) -> "Comparison":
        """Return the comparison of these cells.

        Args:
            rows: The cells, with what they have of `COLUMNS`.
            about: What they have in common.
        """
        frame = pd.DataFrame(list(rows), columns=list(COLUMNS))
        texts = frame[list(TEXTS)].fillna("")
        numbers = frame.drop(columns=[*TEXTS, "seed"]).astype(float)
        return cls(frame.assign(**texts, **numbers), about)

    def summary(self, short: bool = False) -> pd.DataFrame:
        """Return means over seeds as text, with 95 % intervals of Student's t over seeds: `0.98 [0.95, 1.00]`.

        Args:
            short: Whether to write half of the interval in place of its ends: `0.98±0.03`.
        """
        rows = []
        for arm, cells in self._arms():
            row: dict[str, str] = {**arm, "lr": _common(cells["lr"]), "forget_weight": _common(cells["forget_weight"])}
            row |= {"n": str(cells["truth"].count()), "share": NOTHING}
            if cells["share"].notna().any():
                row["share"] = f"{cells['share'].mean():.1%}"
            row |= {name: _mean(cells[name].dropna(), short) for name in self._measures()}
            rows.append({**row, "note": _notes(cells)})
        return Table(rows)

    def differences(self, short: bool = False) -> pd.DataFrame:
        """Return how much larger each measure is than with `random_units`, objective, budget and seed the same, as text.

        Args:
            short: Whether to write half of the interval in place of its ends.
        """
        arms = [(arm, cells.set_index("seed")) for arm, cells in self._arms()]
        controls = {(arm["objective"], arm["budget"]): cells for arm, cells in arms if arm["localizer"] == CONTROL}
        rows = []
        for arm, cells in arms:
            control = controls.get((arm["objective"], arm["budget"]))
            if control is not None and arm["localizer"] != CONTROL:
                n = str((cells["truth"] - control["truth"]).count())
                shown = {name: _difference(cells[name], control[name], short) for name in self._measures()}
                rows.append({**arm, "n": n, **shown})
        return Table(rows)

    def to_markdown(self) -> str:
        """Return both tables, how to read them, and how the settings were chosen."""
        about, compared = self.about, self.differences()
        parts = [
            f"# {about['facts']}: {', '.join(about['localizers'])}",
            (
                f"{about['forget']} facts to forget, {about['steps']} steps, on {about['model']}. n counts the seeds "
                "(forget "
                f"sets) out of {about['seeds']}; they share one model, so for models n = 1."
            ),
            to_markdown(self.summary()),
            READING,
            *((f"## Difference to {CONTROL}, seed by seed", to_markdown(compared)) if len(compared) else ()),
            (
                f"Learning rate and forget weight were chosen on {about['validation']} forget "
                f"set{'s' * (about['validation'] > 1)} of their own for each localizer, objective and budget, among "
                "learning rates "
                f"{listed(about['lrs'])} and weights {listed(about['forget_weights'])}: {RULE}"
            ),
        ]
        return "\n\n".join(parts) + "\n"

    def figure(self) -> plots.Figure:
        """Return a figure of every measure by objective and budget, with a mark for each localizer."""
        marks = []
        for arm, cells in self._arms():
            row = f"{arm['objective']}, {arm['budget']}" if arm["objective"] else arm["localizer"]
            for name in self._measures():
                if len(values := cells[name].dropna()):
                    _, low, high, _ = over_worlds([values])
                    ends = {"mean": values.mean(), "low": low, "high": high, "n": len(values)}
                    marks.append({"localizer": arm["localizer"], "row": row, "measure": name, **ends})
        return plots.comparison(pd.DataFrame(marks))

    def save(self, folder: str | Path) -> None:
        """Write `results.parquet`, `table.md` and `figure.html`, which needs no network.

        Args:
            folder: The folder.
        """
        with whole_file(Path(folder) / "results.parquet") as beside:
            self.frame.to_parquet(beside, index=False)
        with whole_file(Path(folder) / "table.md") as beside:
            beside.write_text(self.to_markdown(), encoding="utf-8")
        page = self.figure().to_html(include_plotlyjs=True, div_id="comparison", config={"displaylogo": False})
        with whole_file(Path(folder) / "figure.html") as beside:
            beside.write_text(page, encoding="utf-8")

    def _measures(self) -> list[str]:
        return [name for name in MEASURES if self.frame[name].notna().any()]

    def _arms(self) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
        """The cells of the unedited model, then those of each objective, budget and localizer."""
        shown: Any = self.frame[self.frame["stage"] != "validation"].groupby(list(ARM), sort=False)
        for (objective, budget, localizer), cells in shown:
            yield {"localizer": localizer or "unedited", "objective": objective, "budget": budget}, cells


def listed(numbers: Iterable[float]) -> str:
    """Return numbers as text, with commas.

    Args:
        numbers: The numbers.

    >>> listed([0.001, 2])
    '0.001, 2'
    """
    return ", ".join(f"{number:g}" for number in numbers)


def _common(values: pd.Series) -> str:
    """What all cells of an arm have."""
    return NOTHING if pd.isna(values.iloc[0]) else f"{values.iloc[0]:g}"


def _mean(values: pd.Series, short: bool) -> str:
    """One seed has no interval."""
    return interval(*over_worlds([values])[:3], short) if len(values) > 1 else _one(values)


def _difference(a: pd.Series, b: pd.Series, short: bool) -> str:
    pairs = pd.DataFrame({"a": a, "b": b}).dropna()
    return (
        interval(*over_worlds([pairs.a - pairs.b])[:3], short, "+") if len(pairs) > 1 else _one(pairs.a - pairs.b, "+")
    )


def _one(values: pd.Series, sign: str = "") -> str:
    return f"{values.iloc[0]:{sign}.2f}" if len(values) else NOTHING


def _notes(cells: pd.DataFrame) -> str:
    """Whether a setting qualified, and what happened on how many of the seeds."""
    happened = cells["note"][cells["note"] != ""].value_counts(sort=False)
    unmatched = [NONE_QUALIFIES] if cells["selected"].iloc[0] == NONE_QUALIFIES else []
    return "; ".join([*unmatched, *(f"{count} of {len(cells)}: {note}" for note, count in happened.items())])
