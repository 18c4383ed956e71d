"""What an evaluation found: a table, and one self-contained page a person can read without the manual."""

import json
import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
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
from mechunlearn.core.tables import Table, interval, intervals, label, numbers
from mechunlearn.evaluation.cells import OTHER, UNSEEN
from mechunlearn.evaluation.damage import damage, harm_was_measured
from mechunlearn.evaluation.robustness import Attacked
from mechunlearn.evaluation.side_effects import as_text, side_effects
from mechunlearn.evaluation.status import ASKED, status
from mechunlearn.evaluation.words import DAMAGED, FIRST, MEANING, STATUS, against_random, cell, describe, sentences
from mechunlearn.evaluation.written import COLUMNS
from mechunlearn.features.feature_edit import FeatureEdit
from mechunlearn.model.component import Component

if TYPE_CHECKING:
    from collections.abc import Mapping

TILES = (
    ("Truth on the training prompt, of the forget facts", ("forget", "statement", "accuracy")),
    ("Efficacy: edit target there", ("forget", "statement", "target_accuracy")),
    ("Retention: retain facts right", ("retain", "statement", "accuracy")),
    ("Specificity: unseen facts still right", (UNSEEN, "statement", "kept")),
    ("Drift of neutral text", ("text", "neutral", "kl_to_before")),
    ("Drift of the model's own text", ("text", "own samples", "kl_to_before")),
)
TILE = "Most that an attack brings back"
SHORT = 90
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
        samples: What the model writes, from `written.written`: columns prompt, before and after.
    """

    frame: pd.DataFrame
    columns: list[str]
    card: RunCard
    about: dict[str, Any] = field(default_factory=dict)
    attacked: Attacked = field(default_factory=Attacked)
    samples: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=COLUMNS))

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
        cells = list(zip(frame.split, frame.format, frame.metric))
        first = [cells.index(cell) for cell in FIRST if cell in cells]
        forget = [i for i, (split, _, metric) in enumerate(cells) if split == "forget" and metric == "accuracy"]
        others = [
            i
            for i, (split, format, metric) in enumerate(cells)
            if split not in ("forget", UNSEEN, OTHER)
            and metric == "accuracy"
            and (format == "statement" or split == "skills")
        ]
        rows = frame.iloc[list(dict.fromkeys((*first, *forget, *others)))].reset_index(drop=True)
        shown = Table({"what": [describe(*row) for row in zip(rows.split, rows.format, rows.metric)], "n": rows["n"]})
        for name in self.columns:
            found = zip(rows[name], rows[f"{name}_low"], rows[f"{name}_high"], rows.metric)
            shown[name] = [interval(a, b, c, short, digits=3 if m == "kl_to_before" else 2) for a, b, c, m in found]
        return shown

    def side_effects(self, column: str = "after") -> pd.DataFrame:
        """Return efficacy, generalization, specificity, same subject, portability and fluency, with what each rests on.

        Args:
            column: The edit: "after", "control" or the name of another.

        Returns:
            One row a measure, as `evaluation.side_effects.side_effects` says.
        """
        return side_effects(self.frame, self.about.get("side effects", {}), column)

    def outcomes(self) -> pd.DataFrame:
        """Return one row an attack, as text: how much it recovered (0: the floor, 1: a model that was never edited)."""
        found = self._found
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
        """Return the status of the edit and the numbers behind it; empty without attacks, unless the model is damaged.

        Returns:
            "gone", "hidden", "collapsed" or "inconclusive" (see `evaluation.status`), and a reason.
        """
        harm, found = self.harm(), self._found
        if not harm and (not self.attacked.rows and not self.attacked.failed):
            return "", ""
        unmeasured = (
            "" if harm_was_measured(self.frame) else "no unseen fact and no ordinary text shows what else changed"
        )
        return status(found, harm, unmeasured)

    @cached_property
    def _found(self) -> pd.DataFrame:
        """What the training prompt and every attack bring back."""
        chances = [float(rows["chance"].iloc[0]) for rows in self.attacked.rows.values()]
        asked = [
            {"held_out": row["after"], "n": row["n"], "low": row["after_low"], "high": row["after_high"]}
            for row in self._rows("forget", "statement", "accuracy").to_dict("records")
            if self.attacked.rows or self.attacked.failed
        ]
        target = [row["after"] for row in self._rows("forget", "statement", "target_accuracy").to_dict("records")]
        more = {"chance": chances[0] if chances else 0.0, "edit_target": target[0] if target else math.nan}
        return self.attacked.outcomes(asked=asked[0] | more if asked else None)

    def harm(self, column: str = "after") -> list[str]:
        """Return what an edit has damaged: a phrase with its numbers for each; empty if no damage is seen.

        Args:
            column: The edit: "after", "control" or the name of another.
        """
        return damage(self.frame, column)

    def verdict(self) -> str:
        """Return what the numbers say, in sentences with the figures."""
        said, why = self.status()
        word = f"{said.capitalize()}: {DAMAGED}" if said == "collapsed" else said.capitalize()
        return " ".join(
            filter(None, (f"{word}: {why}." if said else "", sentences(self.frame), against_random(self.frame)))
        )

    def _rows(self, split: str, format: str, metric: str) -> pd.DataFrame:
        return cell(self.frame, split, format, metric)

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
            "attacks": [plots.recoveries(self._found)] if self.attacked.rows else [],
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
        for what, place in TILES:
            for row in self._rows(*place).to_dict("records"):
                spec = ".3f" if place[0] == "text" else ".0%"
                before, after, low, high = (
                    format(row[name], spec) for name in ("before", "after", "after_low", "after_high")
                )
                detail = f"95 % interval {low} to {high}, n = {row['n']:.0f}"
                if "control" in self.columns:
                    detail += f"; random mask: {row['control']:{spec}}"
                value = f"{after} nats a token" if place[0] == "text" else f"{before} → {after}"
                tiles.append({"what": what, "value": value, "detail": detail})
        found = self._found
        found = found[found["attack"] != ASKED]
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
        outcomes = self.outcomes()
        tables = {
            "summary": self.summary(),
            "outcomes": outcomes.drop(columns="note"),
            "effects": as_text(self.side_effects()),
            "everything": self.frame.round(3),
        }
        page = _PAGE.render(
            said=said or "not attacked",
            meaning=STATUS[said],
            why=f"{why}." if why else "",
            sentences=sentences(self.frame),
            tiles=self._tiles(),
            about=self.about,
            where=self._where(found, edit),
            note=found.note if found is not None else "",
            notes=[
                (label(row["attack"]), row["outcome"], row["note"])
                for row in outcomes.to_dict("records")
                if row["note"]
            ],
            against_random=against_random(self.frame),
            samples=self.samples.reset_index(names="what").to_dict("records"),
            left_out=self.about.get("left out", ()),
            columns={name: MEANING.get(name, "another edit") for name in self.columns},
            **{name: _table(table) if len(table) else "" for name, table in tables.items()},
            figures=figures,
            card=json.dumps(asdict(self.card), indent=1),
            figure_css=Markup(plots.FIGURE_CSS),
            plotlyjs=Markup(get_plotlyjs()),
            drawn=_script(drawn),
            settings=_script(plots.SETTINGS),
        )
        with whole_file(path) as beside:
            beside.write_text(page, encoding="utf-8")

    def _first(self) -> pd.DataFrame:
        """The rows of the summary to read first; the whole of it if there are none of these."""
        summary = self.summary(short=True)
        chosen = summary["what"].isin([describe(*cell) for cell in FIRST]) | summary["what"].str.startswith(
            "same subject"
        )
        return summary[chosen] if chosen.any() else summary

    def _repr_html_(self) -> str:
        said, why = self.status()
        first, outcomes = self._first(), self.outcomes()
        sizes: Mapping[str, Any] = {"forget": "?", "retain": "?", "facts": "?"} | self.about
        about = {
            "because": f"{DAMAGED}: {why}" if said == "collapsed" else why,
            "control": against_random(self.frame),
            "facts": "{forget} to forget, {retain} to retain, of {facts}".format(**sizes),
            "left out": " ".join(self.about.get("left out", ())),
            "all": f"{len(self.summary())} rows in .summary(), {len(self.frame)} in .frame; .to_html('report.html') draws them",
        }
        shown = card(f"Report: {said or 'not attacked'}", about, list(first.columns), first.to_numpy().tolist())
        if len(self.samples):
            rows = [[_one_line(text, SHORT) for text in row] for row in self.samples[COLUMNS].to_numpy().tolist()]
            shown += card("What the model writes", {}, COLUMNS, rows)
        if not len(outcomes):
            return shown
        attacks = outcomes[outcomes["attack"] != ASKED]
        short = attacks[["attack", "outcome", "recovery", "truth_came_back", "floor", "ceiling", "n", "note"]]
        return shown + card("Attacks", {}, [label(name) for name in short.columns], short.to_numpy().tolist())

    def __str__(self) -> str:
        """The first screen as text: what the numbers say, the table to read first, what the model writes, the attacks."""
        outcomes = self.outcomes()
        summary = self.summary(short=True)
        width = summary["what"].str.len().max()
        table = summary.assign(what=summary["what"].str.ljust(width)).rename(columns={"what": "what".ljust(width)})
        parts = [self.verdict() or "Not attacked.", table.to_string(index=False)]
        if len(self.samples):
            parts.append(self.samples_as_text())
        if len(outcomes):
            came = outcomes[["attack", "outcome", "recovery", "truth_came_back"]]
            parts.append(came.rename(columns=label).to_string(index=False))
            parts += [
                f"{row['attack']}: {row['outcome']}, {row['note']}"
                for row in outcomes.to_dict("records")
                if row["note"]
            ]
        return "\n\n".join([*parts, *self.about.get("left out", ())])

    def samples_as_text(self) -> str:
        """Return what the model writes before and after, a few lines a prompt."""
        return "\n".join(
            f"{what}: {_one_line(row['prompt'], SHORT)}\n  before: {_one_line(row['before'], SHORT)}\n"
            f"  after:  {_one_line(row['after'], SHORT)}"
            for what, row in self.samples.iterrows()
        )

    def __repr__(self) -> str:
        return f"Report({len(self.frame)} rows; {self.verdict() or 'not attacked'})"


def _one_line(text: str, most: int) -> str:
    """A text on one line, its end left out where it is long."""
    line = " ".join(text.split())
    return f"{line[:most]} ..." if len(line) > most else line or "(nothing)"


def _table(frame: pd.DataFrame) -> Markup:
    with pd.option_context("display.max_colwidth", None):  # else long cells end in dots
        return Markup(frame.rename(columns=label).to_html(index=False, border=0, classes="numbers"))


def _script(value: object) -> Markup:
    """JSON that may stand in a script."""
    return Markup(json.dumps(value, cls=PlotlyJSONEncoder).replace("<", "\\u003c"))


_PAGE = jinja2.Environment(autoescape=True).from_string(
    Path(__file__).with_name("report_page.html").read_text(encoding="utf-8")
)
