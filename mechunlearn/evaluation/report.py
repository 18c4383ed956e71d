"""What an evaluation found: a table, and one self-contained page a person can read without the manual."""

import json
from dataclasses import asdict, dataclass, field
from html import unescape
from pathlib import Path

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
from mechunlearn.evaluation.robustness import Attacked, word
from mechunlearn.features.feature_edit import FeatureEdit
from mechunlearn.metrics.stats import multiple_comparisons
from mechunlearn.model.component import Component

MEANING = {
    "before": "the model as it came",
    "after": "with the edit",
    "control": "the same editor and settings on a random mask of the same kinds and weight",
    "patching": "the same editor and settings on attribution patching's largest units, of the same weight",
}
WORDS = {
    "gone": "No attack that was tried is seen to bring the facts back:",
    "hidden": "The model no longer says the facts, but it still has them:",
    "still there": "The model still says the facts:",
    "collapsed": "The model has lost facts that were to stay, so nothing can be said of the others:",
    "not known": "Whether the model still has the facts cannot be told:",
    "": "Nothing has tried to bring the facts back, so whether the model still has them is open.",
}
AnyEdit = WeightEdit | FeatureEdit


@dataclass(frozen=True, eq=False)
class Report:
    """Split x format x metric, one column a model with its 95 % interval (`<name> low`, `<name> high`).

    `columns` lists the models: `before`, `after`, `control` and any others set beside them. `attacked` is what attacks found, if
    any were asked for.
    """

    frame: pd.DataFrame
    columns: list[str]
    card: RunCard
    about: dict = field(default_factory=dict)
    attacked: Attacked = field(default_factory=Attacked)

    def value(self, split: str, format: str, metric: str, column: str = "after") -> float:
        """One number of the table."""
        rows = self.frame[(self.frame.split == split) & (self.frame.format == format) & (self.frame.metric == metric)]
        return float(rows[column].iloc[0])

    def summary(self, short: bool = False) -> pd.DataFrame:
        """The rows to read first, as text: `0.98 [0.95, 1.00]`, or short, `0.98±0.03` (half the interval)."""
        frame = self.frame
        wanted = pd.concat(
            [
                frame[(frame.split == "forget") & (frame.format == "statement") & (frame.metric == "target accuracy")],
                frame[(frame.split == "forget") & (frame.metric == "accuracy")],
                frame[(frame.split != "forget") & (frame.format == "statement") & (frame.metric == "accuracy")],
                frame[(frame.split == "skills") | (frame.split == "text")],
            ]
        )
        rows = []
        for row in wanted.to_dict("records"):
            shown = {"what": describe(row["split"], row["format"], row["metric"]), "n": row["n"]}
            for name in self.columns:
                low, high = row[f"{name} low"], row[f"{name} high"]
                interval = f"±{(high - low) / 2:.2f}" if short else f" [{low:.2f}, {high:.2f}]"
                shown[name] = f"{row[name]:.2f}{interval}"
            rows.append(shown)
        return pd.DataFrame(rows)

    def outcomes(self) -> pd.DataFrame:
        """One row an attack, as text: how much it recovered (0: the floor, 1: a model that was never edited), and from what."""
        rows = []
        for row in self.attacked.outcomes().to_dict("records"):
            failed = row["outcome"] == "failed"
            shown = {"attack": row["attack"], "outcome": row["outcome"]}
            shown["recovery"] = "–" if pd.isna(row["recovery"]) else f"{row['recovery']:.2f}"
            shown["truth came back"] = "–" if failed else _interval(row["held out"], row["low"], row["high"])
            shown["never taught"] = (
                "–" if failed else _interval(row["never taught"], row["never low"], row["never high"])
            )
            shown |= {
                name: "–" if pd.isna(row[name]) else f"{row[name]:.2f}" for name in ("chance", "floor", "ceiling")
            }
            shown["n"] = "–" if pd.isna(row["n"]) else f"{row['n']:.0f}"
            shown["best setting"] = row["setting"] if isinstance(row["setting"], str) else "–"
            shown["of"] = "–" if pd.isna(row["settings"]) else f"{row['settings']:.0f}"
            rows.append(shown | {"note": row["note"]})
        return pd.DataFrame(rows)

    def word(self) -> tuple[str, str]:
        """ "gone", "hidden", "still there", "collapsed" or "not known", and the numbers behind it; empty without attacks.

        See `robustness.word` for what each means.
        """
        found = self.attacked.outcomes()
        if found.empty or "statement" not in set(self.frame[self.frame.split == "forget"].format):
            return "", ""
        measured = found[found["chance"].notna()]
        guess = float(measured["chance"].iloc[0]) if len(measured) else 0.0
        left = self.value("forget", "statement", "accuracy")
        kept, before = (self.value("retain", "statement", "accuracy", column) for column in ("after", "before"))
        return word(left, kept, before, guess, found)

    def verdict(self) -> str:
        """What the numbers say, in sentences with the figures."""
        said, why = self.word()
        return (f"{said.capitalize()}: {why}. " if said else "") + self._sentences()

    def _has(self, split: str, format: str, metric: str) -> bool:
        rows = self.frame[["split", "format", "metric"]]
        return bool((rows == [split, format, metric]).all(axis=1).any())

    def _sentences(self) -> str:
        if not self._has("forget", "statement", "target accuracy"):
            return ""
        edited = self.value("forget", "statement", "target accuracy")
        left = self.value("forget", "statement", "accuracy")
        kept = self.value("retain", "statement", "accuracy")
        parts = [
            f"On the training prompt {edited:.1%} of the forget facts now give the edit target and {left:.1%} still the "
            f"truth; {kept:.1%} of the retain facts are right."
        ]
        same = self.frame[self.frame.split.str.startswith("same subject") & (self.frame.format == "statement")]
        for row in same[same.metric == "accuracy"].to_dict("records"):
            parts.append(
                f"Of the same subjects' {row['split'].split(': ')[1]} facts, which no loss held, {row['after']:.1%} are "
                f"right (before: {row['before']:.1%}; random mask: {row['control']:.1%})."
            )
        return " ".join(parts)

    def figures(self, found: Localization | None = None, edit: AnyEdit | None = None) -> list[go.Figure]:
        """The figures of the page, in its order."""
        return [figure for figures in self._by_section(found, edit).values() for figure in figures]

    def _by_section(self, found: Localization | None, edit: AnyEdit | None) -> dict[str, list[go.Figure]]:
        asked = {
            "accuracy": "Forget facts: the truth, by format",
            "target accuracy": "Forget facts: the edit target, by format",
        }
        made: dict[str, list[go.Figure]] = {
            "attacks": [plots.recoveries(self.attacked.outcomes())] if self.attacked.rows else [],
            "formats": [
                plots.before_after(self.frame, self.columns, metric, "forget", title)
                for metric, title in asked.items()
                if ((self.frame.split == "forget") & (self.frame.metric == metric)).any()
            ],
            "side effects": [plots.side_effects(self.frame, self.columns)],
            "where": [],
            "attack by attack": [plots.attack_curves(name, rows) for name, rows in self.attacked.rows.items()],
        }
        if found is not None and "curve" in found.evidence:
            made["where"].append(plots.probe_curve(found))
        if edit is not None:
            made["where"].append(plots.mask_map(edit.mask, found))
        return made

    def _tiles(self) -> list[dict[str, str]]:
        """The few numbers that the word rests on."""
        wanted = (
            ("Truth on the training prompt, of the forget facts", "forget", "accuracy"),
            ("Edit target there", "forget", "target accuracy"),
            ("Retain facts right", "retain", "accuracy"),
        )
        tiles = []
        for what, split, metric in wanted:
            if not self._has(split, "statement", metric):
                continue
            before, after, low, high = (
                self.value(split, "statement", metric, column)
                for column in ("before", "after", "after low", "after high")
            )
            beside = f"95 % interval {low:.0%} to {high:.0%}, n = {self.value(split, 'statement', metric, 'n'):.0f}"
            if "control" in self.columns:
                beside += f"; random mask: {self.value(split, 'statement', metric, 'control'):.0%}"
            tiles.append({"what": what, "value": f"{before:.0%} → {after:.0%}", "beside": beside})
        found = self.attacked.outcomes()
        measured = found[found["recovery"].notna()].sort_values("recovery", ascending=False).to_dict("records")
        if measured:
            most = measured[0]
            beside = (
                f"recovery by {most['attack'].replace('_', ' ')} (0: floor, 1: unedited; up to {most['up to']:.2f} within its "
                f"interval); {len(measured)} of {len(found)} attacks measured it"
            )
            tiles.append(
                {"what": "Most that an attack brings back", "value": f"{most['recovery']:.2f}", "beside": beside}
            )
        return tiles

    def _where(self, found: Localization | None, edit: AnyEdit | None) -> list[str]:
        if edit is None:
            weights = f"{self.card.weights:,} weights" if self.card.weights else "what the mask selects"
            return [f"{weights}, by {self.card.method}".replace("_", " ")]
        mask = edit.mask
        sites = (Component.parse(site) for site in mask.sites)
        counts = by_kind((at.layer, at.kind, int(m.sum()), len(m)) for at, m in zip(sites, mask.sites.values()))
        lines = [
            f"{n} of {of} {unit_name(kind)}s of {kind} in layer{'' if layers.isdecimal() else 's'} {layers}"
            for kind, layers, n, of in counts
        ]
        if found is not None and {kind for kind, *_ in counts} <= found.unit_weights.keys():
            lines.append(f"{found.share(mask):.2%} of the editable weights, by {self.card.method.replace('_', ' ')}")
        elif self.card.weights:
            lines.append(f"{self.card.weights:,} weights, by {self.card.method.replace('_', ' ')}")
        return lines

    def to_html(self, path: str | Path, found: Localization | None = None, edit: AnyEdit | None = None) -> None:
        """Write one page that needs no network: the word and what it rests on, what was edited and where, figures, everything, run card.

        `found` adds its probe curve and the share of the weights, `edit` the map of its mask. It prints, and follows the reader's
        light or dark setting.
        """
        said, why = self.word()
        figures: dict[str, list[dict]] = {}
        drawn: list[dict] = []
        for section, made in self._by_section(found, edit).items():
            figures[section] = []
            for figure in made:
                name = f"figure-{len(drawn)}"
                title, height = unescape(figure.layout.title.text), figure.layout.height - 30
                figure.update_layout(title=None, height=height, margin={"t": 40})
                figures[section].append({"id": name, "title": title, "height": height})
                drawn.append({"id": name, **figure.to_plotly_json()})
        page = _PAGE.render(
            said=said or "not attacked",
            meaning=WORDS[said],
            why=f"{why}." if why else "",
            sentences=self._sentences(),
            tiles=self._tiles(),
            about=self.about,
            example=self.about.get("example"),
            where=self._where(found, edit),
            note=found.note if found is not None else "",
            columns={name: MEANING.get(name, "another edit") for name in self.columns},
            summary=_table(self.summary()),
            outcomes=_table(self.outcomes()) if len(self.outcomes()) else "",
            compared=multiple_comparisons(len(self.attacked.rows)),
            everything=_table(self.frame.round(3)),
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
        said, why = self.word()
        summary, outcomes = self.summary(short=True), self.outcomes()
        first = summary[~summary["what"].str.match(r"skills|forget, (?!training)")] if len(summary) else summary
        about = {
            "because": why,
            "facts": f"{self.about.get('forget', '?')} to forget, {self.about.get('retain', '?')} to retain, of {self.about.get('facts', '?')}",
            "all": f"{len(summary)} rows in .summary(), {len(self.frame)} in .frame; .to_html('report.html') draws them",
        }
        shown = card(f"Report: {said or 'not attacked'}", about, list(first.columns), first.to_numpy().tolist())
        if not len(outcomes):
            return shown
        short = outcomes[["attack", "outcome", "recovery", "truth came back", "floor", "ceiling", "n", "note"]]
        return shown + card("Attacks", {}, list(short.columns), short.to_numpy().tolist())

    def __repr__(self) -> str:
        return f"Report({len(self.frame)} rows; {self.verdict()})"


def describe(split: str, format: str, metric: str) -> str:
    """A row of the table in words."""
    asked = "training prompt" if format == "statement" and split in ("forget", "retain") else format.replace("_", " ")
    if split.startswith("same subject") or split == "neighbours":
        return split
    if split == "text":
        return "text loss, nats a token" if metric == "loss" else "text, KL to before, nats a token"
    if split == "forget":
        return f"forget, {asked}{': target' if metric == 'target accuracy' else ''}"
    return f"{split}, {asked}"


def _interval(mean: float, low: float, high: float) -> str:
    return "–" if pd.isna(mean) else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _table(frame: pd.DataFrame) -> Markup:
    return Markup(frame.to_html(index=False, border=0, classes="numbers"))


def _script(value: object) -> Markup:
    """JSON that may stand in a script."""
    return Markup(json.dumps(value, cls=PlotlyJSONEncoder).replace("<", "\\u003c"))


_PAGE = jinja2.Environment(autoescape=True).from_string(
    Path(__file__).with_name("report_page.html").read_text(encoding="utf-8")
)
