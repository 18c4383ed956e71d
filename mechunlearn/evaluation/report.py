"""What an evaluation found: a table, and one self-contained page a person can read without the manual."""

import json
from dataclasses import asdict, dataclass, field
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from mechunlearn import plots
from mechunlearn.artifacts.localization import Localization
from mechunlearn.artifacts.weight_edit import WeightEdit
from mechunlearn.core.display import by_kind, card, unit_name
from mechunlearn.core.files import whole_file
from mechunlearn.core.runcard import RunCard
from mechunlearn.core.tables import Table, intervals, label, numbers
from mechunlearn.evaluation.robustness import Attacked, status
from mechunlearn.features.feature_edit import FeatureEdit
from mechunlearn.metrics.stats import multiple_comparisons
from mechunlearn.model.component import Component

if TYPE_CHECKING:
    from collections.abc import Mapping

MEANING = {
    "before": "the unedited model",
    "after": "with the edit",
    "control": "the same editor and settings on a random mask of the same kinds and weight",
    "patching": "the same editor and settings on attribution patching's largest units, of the same weight",
}
STATUS = {
    "gone": "No attack that was tried is seen to bring the facts back:",
    "hidden": "The model no longer says the facts, but it still has them:",
    "still there": "The model still says the facts:",
    "collapsed": "The model has lost facts that were to stay, so nothing can be said of the others:",
    "inconclusive": "Whether the model still has the facts cannot be told:",
    "": "Nothing has tried to bring the facts back, so whether the model still has them is open.",
}
TILES = (
    ("Truth on the training prompt, of the forget facts", "forget", "accuracy"),
    ("Efficacy: edit target there", "forget", "target_accuracy"),
    ("Retention: retain facts right", "retain", "accuracy"),
)
TILE = "Most that an attack brings back"
FORMATS = {
    "accuracy": "Forget facts: the truth, by format",
    "target_accuracy": "Forget facts: the edit target, by format",
}
AnyEdit = WeightEdit | FeatureEdit


@dataclass(frozen=True, eq=False)
class Report:
    """What an evaluation found.

    Args:
        frame: One row a `split`, `format` and `metric` with `n`, and for each model its mean and 95 % interval, in
            columns such as `after`, `after_low` and `after_high`.
        columns: The models: `before`, `after`, `control` and any others set beside them.
        card: The run card of the edit.
        about: What was evaluated.
        attacked: What attacks found, if any were asked for.
    """

    frame: pd.DataFrame
    columns: list[str]
    card: RunCard
    about: dict[str, Any] = field(default_factory=dict)
    attacked: Attacked = field(default_factory=Attacked)

    def value(self, split: str, format: str, metric: str, column: str = "after") -> float:
        """Return one number of the frame.

        Args:
            split: Such as "forget".
            format: Such as "statement".
            metric: Such as "accuracy".
            column: Such as "after" or "control_low".
        """
        return float(self._rows(split, format, metric)[column].iloc[0])

    def summary(self, short: bool = False) -> pd.DataFrame:
        """Return the rows to read first, as text: `0.98 [0.95, 1.00]`.

        Args:
            short: Whether to write half of the interval in place of its ends: `0.98±0.03`.
        """
        frame = self.frame
        forget, statement, accuracy = frame.split == "forget", frame.format == "statement", frame.metric == "accuracy"
        target = forget & statement & (frame.metric == "target_accuracy")
        chosen = (target, forget & accuracy, ~forget & statement & accuracy, frame.split.isin(["skills", "text"]))
        rows = pd.concat([frame[rows] for rows in chosen], ignore_index=True)
        shown = Table({"what": [describe(*row) for row in zip(rows.split, rows.format, rows.metric)], "n": rows["n"]})
        for name in self.columns:
            shown[name] = intervals(rows, name, f"{name}_low", f"{name}_high", short)
        return shown

    def outcomes(self) -> pd.DataFrame:
        """Return one row an attack, as text: how much it recovered (0: the floor, 1: a model that was never edited)."""
        found = self.attacked.outcomes()
        shown = found[["attack", "outcome"]].assign(
            recovery=numbers(found["recovery"]),
            truth_came_back=intervals(found, "held_out", "low", "high"),
            never_taught=intervals(found, "never_taught", "never_low", "never_high"),
            **{name: numbers(found[name]) for name in ("chance", "floor", "ceiling")},
            n=numbers(found["n"], ".0f"),
            best_setting=found["setting"].fillna("–"),
            of=numbers(found["settings"], ".0f"),
            note=found["note"],
        )
        return Table(shown)

    def status(self) -> tuple[str, str]:
        """Return the status of the edit and the numbers behind it; empty without attacks.

        Returns:
            "gone", "hidden", "still there", "collapsed" or "inconclusive" (see `robustness.status`), and a reason.
        """
        found = self.attacked.outcomes()
        if found.empty or not len(self._rows("forget", "statement", "accuracy")):
            return "", ""
        chances = found["chance"].dropna()
        left = self.value("forget", "statement", "accuracy")
        kept, before = (self.value("retain", "statement", "accuracy", column) for column in ("after", "before"))
        return status(left, kept, before, float(chances.iloc[0]) if len(chances) else 0.0, found)

    def verdict(self) -> str:
        """Return what the numbers say, in sentences with the figures."""
        said, why = self.status()
        return (f"{said.capitalize()}: {why}. " if said else "") + self._sentences()

    def _rows(self, split: str, format: str, metric: str) -> pd.DataFrame:
        return self.frame[(self.frame[["split", "format", "metric"]] == [split, format, metric]).all(axis=1)]

    def _sentences(self) -> str:
        if not len(self._rows("forget", "statement", "target_accuracy")):
            return ""
        edited, left = (self.value("forget", "statement", metric) for metric in ("target_accuracy", "accuracy"))
        kept = self.value("retain", "statement", "accuracy")
        parts = [
            (
                f"On the training prompt {edited:.1%} of the forget facts now give the edit target and {left:.1%} "
                "still "
                "the "
                f"truth; {kept:.1%} of the retain facts are right."
            )
        ]
        same = self.frame[self.frame.split.str.startswith("same subject") & (self.frame.format == "statement")]
        parts += [
            f"Of the same subjects' {row['split'].split(': ')[1]} facts, which no loss held, {row['after']:.1%} are "
            f"right (before: {row['before']:.1%}; random mask: {row['control']:.1%})."
            for row in same[same.metric == "accuracy"].to_dict("records")
        ]
        return " ".join(parts)

    def figures(self, found: Localization | None = None, edit: AnyEdit | None = None) -> list[go.Figure]:
        """Return the figures of the page, in its order.

        Args:
            found: Adds the localization's probe curve and the share of the weights.
            edit: Adds the map of its mask.
        """
        return [figure for figures in self._by_section(found, edit).values() for figure in figures]

    def _by_section(self, found: Localization | None, edit: AnyEdit | None) -> dict[str, list[go.Figure]]:
        measured = set(self.frame.metric[self.frame.split == "forget"])
        return {
            "attacks": [plots.recoveries(self.attacked.outcomes())] if self.attacked.rows else [],
            "formats": [
                plots.before_after(self.frame, self.columns, metric, "forget", title)
                for metric, title in FORMATS.items()
                if metric in measured
            ],
            "side effects": [plots.side_effects(self.frame, self.columns)],
            "where": [
                *([plots.probe_curve(found)] if found is not None and "curve" in found.evidence else []),
                *([plots.mask_map(edit.mask, found)] if edit is not None else []),
            ],
            "attack by attack": [plots.attack_curves(name, rows) for name, rows in self.attacked.rows.items()],
        }

    def _tiles(self) -> list[dict[str, str]]:
        """The few numbers that the status rests on."""
        tiles = []
        for what, split, metric in TILES:
            for row in self._rows(split, "statement", metric).to_dict("records"):
                detail = f"95 % interval {row['after_low']:.0%} to {row['after_high']:.0%}, n = {row['n']:.0f}"
                if "control" in self.columns:
                    detail += f"; random mask: {row['control']:.0%}"
                tiles.append({"what": what, "value": f"{row['before']:.0%} → {row['after']:.0%}", "detail": detail})
        found = self.attacked.outcomes()
        measured = found.dropna(subset="recovery").sort_values("recovery", ascending=False)
        for most in measured[:1].to_dict("records"):
            detail = (
                f"recovery by {label(most['attack'])} (0: floor, 1: unedited; up to {most['up_to']:.2f} within its "
                f"interval); {len(measured)} of {len(found)} attacks measured it"
            )
            tiles.append({"what": TILE, "value": f"{most['recovery']:.2f}", "detail": detail})
        return tiles

    def _where(self, found: Localization | None, edit: AnyEdit | None) -> list[str]:
        """What was edited, kind by kind, and its weight."""
        by = f"by {label(self.card.method)}"
        weights = [f"{self.card.weights:,} weights, {by}"] if self.card.weights else []
        if edit is None:
            return weights or [f"what the mask selects, {by}"]
        sites = ((Component.parse(site), units) for site, units in edit.mask.sites.items())
        counts = by_kind((at.layer, at.kind, int(units.sum()), len(units)) for at, units in sites)
        if found is not None and {kind for kind, *_ in counts} <= found.unit_weights.keys():
            weights = [f"{found.share(edit.mask):.2%} of the editable weights, {by}"]
        return [
            f"{n} of {of} {unit_name(kind)}s of {kind} in layer{'' if layers.isdecimal() else 's'} {layers}"
            for kind, layers, n, of in counts
        ] + weights

    def to_html(self, path: str | Path, found: Localization | None = None, edit: AnyEdit | None = None) -> None:
        """Write one page that needs no network.

        The status and what it rests on, what was edited and where, figures, run card.

        It prints, and follows the reader's light or dark setting.

        Args:
            path: The file.
            found: Adds the localization's probe curve and the share of the weights.
            edit: Adds the map of its mask.
        """
        said, why = self.status()
        figures: dict[str, list[dict[str, Any]]] = {}
        drawn: list[dict[str, Any]] = []
        for section, made in self._by_section(found, edit).items():
            figures[section] = []
            for figure in made:
                about = {"id": f"figure-{len(drawn)}", "height": figure.layout.height - 30}
                figures[section].append(about | {"title": unescape(figure.layout.title.text)})
                figure.update_layout(title=None, height=about["height"], margin={"t": 40})
                drawn.append({"id": about["id"], **figure.to_plotly_json()})
        tables = {"summary": self.summary(), "outcomes": self.outcomes(), "everything": self.frame.round(3)}
        page = _PAGE.render(
            said=said or "not attacked",
            meaning=STATUS[said],
            why=f"{why}." if why else "",
            sentences=self._sentences(),
            tiles=self._tiles(),
            about=self.about,
            where=self._where(found, edit),
            note=found.note if found is not None else "",
            columns={name: MEANING.get(name, "another edit") for name in self.columns},
            **{name: _table(table) if len(table) else "" for name, table in tables.items()},
            compared=multiple_comparisons(len(self.attacked.rows)),
            figures=figures,
            card=json.dumps(asdict(self.card), indent=1),
            figure_css=Markup(plots.FIGURE_CSS),
            plotlyjs=Markup(get_plotlyjs()),
            drawn=_script(drawn),
            settings=_script(plots.SETTINGS),
        )
        with whole_file(path) as beside:
            beside.write_text(page, encoding="utf-8")

    def _repr_html_(self) -> str:
        said, why = self.status()
        summary, outcomes = self.summary(short=True), self.outcomes()
        first = summary[~summary["what"].astype(str).str.match(r"skills|forget, (?!training)")]
        sizes: Mapping[str, Any] = {"forget": "?", "retain": "?", "facts": "?"} | self.about
        about = {
            "because": why,
            "facts": "{forget} to forget, {retain} to retain, of {facts}".format(**sizes),
            "all": f"{len(summary)} rows in .summary(), {len(self.frame)} in .frame; .to_html('report.html') draws them",
        }
        shown = card(f"Report: {said or 'not attacked'}", about, list(first.columns), first.to_numpy().tolist())
        if not len(outcomes):
            return shown
        short = outcomes[["attack", "outcome", "recovery", "truth_came_back", "floor", "ceiling", "n", "note"]]
        return shown + card("Attacks", {}, [label(name) for name in short.columns], short.to_numpy().tolist())

    def __repr__(self) -> str:
        return f"Report({len(self.frame)} rows; {self.verdict()})"


def describe(split: str, format: str, metric: str) -> str:
    """Return a row of the frame in plain words.

    Args:
        split: The split.
        format: The format.
        metric: The metric.

    >>> describe("forget", "statement", "target_accuracy"), describe("text", "passages", "kl_to_before")
    ('forget, training prompt: target', 'text, KL to before, nats a token')
    """
    if split.startswith("same subject"):
        return split
    if split == "neighbours":
        return "specificity (neighbours)"
    if split == "text":
        return f"text{' ' if metric == 'loss' else ', '}{label(metric)}, nats a token"
    asked = "training prompt" if format == "statement" and split in ("forget", "retain") else label(format)
    return f"{split}, {asked}{': target' if metric == 'target_accuracy' else ''}"


def _table(frame: pd.DataFrame) -> Markup:
    return Markup(frame.rename(columns=label).to_html(index=False, border=0, classes="numbers"))


def _script(value: object) -> Markup:
    """JSON that may stand in a script."""
    return Markup(json.dumps(value, cls=PlotlyJSONEncoder).replace("<", "\\u003c"))


_PAGE = jinja2.Environment(autoescape=True).from_string(
    Path(__file__).with_name("report_page.html").read_text(encoding="utf-8")
)
