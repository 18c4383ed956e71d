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
from mechunlearn.runcard import RunCard

MEANING = {
    "before": "the model as it came",
    "after": "with the edit",
    "control": "the same editor and settings on a random mask of the same kinds and weight",
    "patching": "the same editor and settings on attribution patching's largest units, of the same weight",
}


@dataclass(frozen=True, eq=False)
class Report:
    """Split x format x metric, one column a model with its 95 % interval (`<name> low`, `<name> high`).

    `columns` lists the models: `before`, `after`, `control` and any others set beside them.
    """

    frame: pd.DataFrame
    columns: list[str]
    card: RunCard
    about: dict = field(default_factory=dict)

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
        return " ".join(parts)

    def figures(self, found: Localization | None = None, edit: WeightEdit | None = None) -> list[go.Figure]:
        made = [
            plots.before_after(self.frame, self.columns, "accuracy", "forget", "Forget facts: the truth, by format"),
            plots.before_after(
                self.frame, self.columns, "target accuracy", "forget", "Forget facts: the edit target, by format"
            ),
            plots.side_effects(self.frame, self.columns),
        ]
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
            everything=_table(self.frame.round(3)),
            figures=figures,
            note=found.note if found is not None else "",
            card=json.dumps(asdict(self.card), indent=1),
        )
        with whole_file(path) as beside:
            beside.write_text(page, encoding="utf-8")

    def _repr_html_(self) -> str:
        return f"<p>{self.verdict()}</p>{_table(self.summary())}"

    def __repr__(self) -> str:
        return f"Report({len(self.frame)} rows; {self.verdict()})"


def describe(split: str, format: str, metric: str) -> str:
    """A row of the table in words."""
    asked = "training prompt" if format == "statement" and split in ("forget", "retain") else format.replace("_", " ")
    if split.startswith("same subject") or split == "neighbours":
        return split
    if split == "text":
        return "text loss, nats a token"
    if split == "forget":
        return f"forget, {asked}{': target' if metric == 'target accuracy' else ''}"
    return f"{split}, {asked}"


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
