"""What an evaluation found: a table, and one self-contained page a person can read without the manual."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jinja2
import pandas as pd
import plotly.graph_objects as go

from mechunlearn import plots
from mechunlearn.components import Localization
from mechunlearn.edits import WeightEdit
from mechunlearn.files import whole_file
from mechunlearn.robustness import Attacked, word
from mechunlearn.runcard import RunCard
from mechunlearn.stats import multiple_comparisons

MEANING = {
    "before": "the model as it came",
    "after": "with the edit",
    "control": "the same editor and settings on a random mask of the same kinds and weight",
    "patching": "the same editor and settings on attribution patching's largest units, of the same weight",
}


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
        if "statement" not in set(self.frame[self.frame.split == "forget"].format):
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
        said, why = self.word()
        return (f"{said.capitalize()}: {why}. " if said else "") + " ".join(parts)

    def figures(self, found: Localization | None = None, edit: WeightEdit | None = None) -> list[go.Figure]:
        made = [
            plots.before_after(self.frame, self.columns, "accuracy", "forget", "Forget facts: the truth, by format"),
            plots.before_after(
                self.frame, self.columns, "target accuracy", "forget", "Forget facts: the edit target, by format"
            ),
            plots.side_effects(self.frame, self.columns),
        ]
        if self.attacked.rows:
            made.insert(0, plots.recoveries(self.attacked.outcomes()))
            made += [plots.attack_curves(name, rows) for name, rows in self.attacked.rows.items()]
        if found is not None and "curve" in found.evidence:
            made.append(plots.probe_curve(found))
        if edit is not None:
            made.append(plots.mask_map(edit.mask))
        return made

    def to_html(self, path: str | Path, found: Localization | None = None, edit: WeightEdit | None = None) -> None:
        """Write one file that needs no network: verdict, table, figures, everything measured, run card."""
        figures = [
            figure.to_html(full_html=False, include_plotlyjs=i == 0, config={"displaylogo": False})
            for i, figure in enumerate(self.figures(found, edit))
        ]
        meaning = {name: MEANING.get(name, "another edit") for name in self.columns}
        page = _PAGE.render(
            verdict=self.verdict(),
            about=self.about,
            meaning=meaning,
            summary=_table(self.summary()),
            outcomes=_table(self.outcomes()) if len(self.outcomes()) else "",
            compared=multiple_comparisons(len(self.attacked.rows)),
            everything=_table(self.frame.round(3)),
            figures=figures,
            note=found.note if found is not None else "",
            card=json.dumps(asdict(self.card), indent=1),
        )
        with whole_file(path) as beside:
            beside.write_text(page, encoding="utf-8")

    def _repr_html_(self) -> str:
        attacks = _table(self.outcomes()) if len(self.outcomes()) else ""
        return f"<p>{self.verdict()}</p>{attacks}{_table(self.summary())}"

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


def _table(frame: pd.DataFrame) -> str:
    return frame.to_html(index=False, border=0, classes="numbers")


_PAGE = jinja2.Environment(autoescape=False).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>mechunlearn report</title><style>
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { margin-top: 2.5rem; font-size: 1.2rem; }
.lead { font-size: 1.1rem; } .scroll { overflow-x: auto; }
table.numbers { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
.numbers th, .numbers td { padding: .25rem .6rem; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap; }
.numbers th:first-child, .numbers td:first-child { text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; } dt { font-weight: 600; } dd { margin: 0; }
pre { overflow-x: auto; background: #f6f6f6; padding: 1rem; font-size: .8rem; } details { margin: 1rem 0; }
</style></head><body>
<h1>Is the knowledge gone?</h1>
<p>{{ about.facts|e }}: {{ about.forget }} facts to forget, {{ about.retain }} to retain, on {{ about.model|e }}</p>
<p class="lead">{{ verdict|e }}</p>
{% if note %}<p>Localization: {{ note|e }}.</p>{% endif %}
{% if outcomes %}<h2>Does it come back?</h2>
<div class="scroll">{{ outcomes }}</div>
<p>Recovery is (what came back &minus; floor) / (ceiling &minus; floor): 0 is what the same attack gets on subjects that the model was never taught (or
chance, if that is more), 1 what it gets on the unedited model; both get the same best of all settings. An attack counts as
<em>back</em> from .2 on, if the interval lies above the floor, and only settings count that leave the retain facts. {{ compared|e }}</p>{% endif %}
<h2>The numbers to read first</h2>
<dl>{% for name, text in meaning.items() %}<dt>{{ name|e }}</dt><dd>{{ text|e }}</dd>{% endfor %}</dl>
<div class="scroll">{{ summary }}</div>
<p>Accuracy of the truth unless the row says target: greedy decoding over the full vocabulary, all answer tokens right. In brackets: 95 % bootstrap intervals
over facts. This is one model and one edit of it: the intervals say nothing of other models or seeds.</p>
<h2>Pictures</h2>
{% for figure in figures %}{{ figure }}{% endfor %}
<h2>Everything</h2>
<details><summary>All splits, formats and metrics</summary><div class="scroll">{{ everything }}</div></details>
<details><summary>Run card: how to make this again</summary><pre>{{ card|e }}</pre></details>
</body></html>
""")
