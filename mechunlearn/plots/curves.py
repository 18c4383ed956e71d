"""How much: accuracy before and after, side effects, localizers and attacks side by side, faithfulness by size."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechunlearn.attack.states import EDITED, NEVER_TAUGHT, SEARCHED, UNEDITED
from mechunlearn.core.tables import label
from mechunlearn.plots.style import COLOURS, INK, bars, dotted, styled, text

STATES = {EDITED: COLOURS[1], UNEDITED: COLOURS[0], NEVER_TAUGHT: COLOURS[2]}
SHARE = [-0.03, 1.03]


def before_after(frame: pd.DataFrame, columns: list[str], metric: str, split: str, title: str) -> go.Figure:
    """Draw one row a format and one mark a model, with 95 % intervals over facts.

    Args:
        frame: `Report.frame`.
        columns: The models.
        metric: The metric, such as "accuracy".
        split: The split, such as "forget".
        title: The title.
    """
    rows = frame[(frame.metric == metric) & (frame.split == split)]
    names = [label(str(name)) for name in rows.format]
    figure = go.Figure()
    for i, name in enumerate(columns):
        offset = 0.6 * ((i + 0.5) / len(columns) - 0.5)
        _marks(figure, _of(rows, name, names), [row + offset for row in range(len(rows))], name, i)
    figure.update_xaxes(range=SHARE, title=f"{text(label(metric))}, share of facts")
    _rows(figure, names, title="format of the question")
    return styled(figure, text(title), 140 + (14 + 14 * len(columns)) * len(rows))


def side_effects(frame: pd.DataFrame, columns: list[str]) -> go.Figure:
    """Draw what is still right of all that was to stay: from before to after along a line, and the other models beneath it.

    Only facts and tasks that were right before are counted, so every line begins at 1.

    Args:
        frame: `Report.frame`: unseen facts, the retain set, neighbours, the same subjects' other facts and skills are
            drawn, by the metric `kept`.
        columns: The models.
    """
    kept = frame[(frame.metric == "kept") & ~frame.split.isin(("generalization", "portability"))]
    kept = kept[(kept.format.isin(("statement", "question", "held_out"))) | (kept.split == "skills")]
    names = [f"{split}: {label(format)}" for split, format in zip(kept.split, kept.format)]
    others = [name for name in columns if name not in ("before", "after")]
    figure = go.Figure()
    if len(columns) - len(others) == 2:
        figure.add_scatter(
            x=[x for pair in zip(kept.before, kept.after) for x in (*pair, None)],
            y=[y for row in range(len(kept)) for y in (row, row, None)],
            mode="lines",
            line={"color": INK, "width": 3},
            opacity=0.5,
            name="change",
            hoverinfo="skip",
            showlegend=False,
        )
    for i, name in enumerate(columns):
        offset = 0.32 * (others.index(name) + 1) / len(others) if name in others else 0.0
        _marks(figure, _of(kept, name, names), [row + offset for row in range(len(kept))], name, i)
    figure.update_xaxes(range=SHARE, title="share still right of what was right before")
    _rows(figure, names, title="what was to stay")
    return styled(figure, "What was to stay, before and after", 140 + 34 * len(kept))


def _of(rows: pd.DataFrame, name: str, shown: Sequence[str]) -> pd.DataFrame:
    """A model of a report, with its intervals."""
    columns = {"mean": name, "low": f"{name}_low", "high": f"{name}_high", "n": "n"}
    return pd.DataFrame({new: rows[old] for new, old in columns.items()}).assign(row=list(shown))


def _marks(figure: go.Figure, marks: pd.DataFrame, y: Sequence[float], name: str, i: int, **more: object) -> None:
    """Marks with their intervals, and what they are under the pointer: columns mean, low, high, n and row."""
    figure.add_scatter(
        x=marks["mean"],
        y=y,
        error_x=bars(marks["mean"], marks.low, marks.high),
        mode="markers",
        name=text(name),
        marker={"color": COLOURS[i % len(COLOURS)], "size": 9, "symbol": i},
        customdata=marks[["row", "low", "high", "n"]].assign(row=marks["row"].map(text)).to_numpy(),
        hovertemplate="%{customdata[0]}: %{x:.3f} (%{customdata[1]:.3f} to %{customdata[2]:.3f}, n = %{customdata[3]})"
        f"<extra>{text(name)}</extra>",
        **more,
    )


def _rows(figure: go.Figure, names: Sequence[str], **more: object) -> None:
    """Named rows from top to bottom, for marks at 0, 1, 2 ..."""
    ends: Any = {"range": [len(names) - 0.4, -0.6], "zeroline": False, "automargin": True}
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=[text(name) for name in names], **ends, **more)


def faithfulness_curve(frame: pd.DataFrame) -> go.Figure:
    """Draw how much of the model's behaviour circuits of growing size keep.

    The x axis is logarithmic, so a row of fraction 0 is left out; the dotted line is the whole model.

    Args:
        frame: Columns fraction, faithfulness, low and high.
    """
    rows = frame[frame.fraction > 0].sort_values("fraction")
    band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    figure = go.Figure()
    figure.add_scatter(x=rows.fraction, y=rows.low, name="low", **band)
    filled = {"fill": "tonexty", "fillcolor": "rgba(0, 114, 178, 0.2)"}
    figure.add_scatter(x=rows.fraction, y=rows.high, name="high", **filled, **band)
    figure.add_scatter(
        x=rows.fraction,
        y=rows.faithfulness,
        name="faithfulness",
        mode="lines+markers",
        line={"color": COLOURS[1]},
        showlegend=False,
        customdata=rows[["low", "high"]].to_numpy(),
        hovertemplate="%{x:.2%}: %{y:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})<extra></extra>",
    )
    figure.add_hline(y=1, line=dotted(), annotation_text="whole model", annotation_position="top left")
    figure.update_xaxes(type="log", title="share of edges kept", tickformat="~%")
    figure.update_yaxes(title="faithfulness (band: 95 % interval)")
    return styled(figure, "Faithfulness of circuits of growing size", 380)


def comparison(frame: pd.DataFrame) -> go.Figure:
    """Draw one panel a measure, one row an objective and budget, one mark a localizer, with 95 % intervals over seeds.

    Args:
        frame: Columns measure, row, localizer, mean, low, high and n.
    """
    measures, rows, names = (list(frame[column].unique()) for column in ("measure", "row", "localizer"))
    down = -(-len(measures) // 3)
    places = [{"row": panel // 3 + 1, "col": panel % 3 + 1} for panel in range(3 * down)]
    figure = make_subplots(down, 3, shared_yaxes=True)
    groups: Any = frame.groupby(["measure", "localizer"], sort=False)
    for (measure, name), marks in groups:
        i, first = names.index(name), frame[frame.localizer == name].measure.iloc[0]
        y = [rows.index(row) + 0.6 * ((i + 0.5) / len(names) - 0.5) for row in marks["row"]]
        place = places[measures.index(measure)]
        _marks(figure, marks, y, name, i, legendgroup=text(name), showlegend=measure == first, **place)
    _rows(figure, rows)
    figure.update_yaxes(title="objective, budget", col=1)
    for measure, place in zip(measures, places):
        marks = frame[frame.measure == measure]
        figure.update_xaxes(title=text(label(measure)), **place)
        if measure != "text_loss" and marks.low.min() >= 0 and marks.high.max() <= 1:
            figure.update_xaxes(range=SHARE, **place)
    for place in places[len(measures) :]:
        figure.update_xaxes(visible=False, **place)
        figure.update_yaxes(visible=False, **place)
    figure = styled(figure, "Localizers side by side", 160 + (70 + 50 * len(rows)) * down)
    return figure.update_layout(legend={"y": -0.08, "yanchor": "top"}, margin={"b": 60})


def recoveries(frame: pd.DataFrame) -> go.Figure:
    """Draw how much each attack brought back, scaled so that 0 is the floor and 1 the unedited model.

    Bars are the 95 % interval over facts on the same scale.

    Args:
        frame: The table of `robustness.Attacked.outcomes`, one row an attack.
    """
    rows = frame[frame["recovery"].notna()][::-1]
    room = rows["ceiling"] - rows["floor"]
    low, high = ((rows[end] - rows["floor"]) / room for end in ("low", "high"))
    figure = go.Figure()
    figure.add_scatter(
        x=rows["recovery"],
        y=[text(label(name)) for name in rows["attack"]],
        error_x=bars(rows["recovery"], low, high),
        mode="markers",
        marker={"color": COLOURS[1], "size": 9},
        customdata=rows[["held_out", "n", "setting"]].assign(setting=rows["setting"].map(text)).to_numpy(),
        hovertemplate="%{y}: %{x:.2f} (right %{customdata[0]:.2f}, n = %{customdata[1]}, %{customdata[2]})<extra></extra>",
        showlegend=False,
    )
    for x, what in enumerate(("floor", "never edited")):
        figure.add_vline(x, line=dotted(), annotation={"text": what, "y": 1, "yanchor": "bottom", "xanchor": "center"})
    figure.update_xaxes(title="recovery (0: floor, 1: unedited)")
    figure.update_yaxes(title="attack", automargin=True, range=[-0.6, len(rows) - 0.4])
    return styled(figure, "What each attack brings back", 150 + 32 * len(rows))


def attack_curves(name: str, rows: pd.DataFrame) -> go.Figure:
    """Draw what an attack got, state by state: over steps where it takes steps, else setting by setting.

    Args:
        name: The name of the attack.
        rows: Its rows; those of a search for budgets are left out.
    """
    rows = rows[rows["state"] != SEARCHED]
    stepped = bool((rows["step"] > 0).any())
    figure = go.Figure()
    for i, (state, mine) in enumerate(rows.groupby("state", sort=False)):
        parts = mine.groupby("setting", sort=False) if stepped else [("", mine)]
        colour = STATES.get(str(state), COLOURS[i % len(COLOURS)])
        for j, (setting, curve) in enumerate(parts):
            figure.add_scatter(
                x=curve["step"] if stepped else [text(setting) for setting in curve["setting"]],
                y=curve["held_out"],
                error_y=None if stepped else bars(curve["held_out"], curve["low"], curve["high"]),
                mode="lines+markers" if stepped else "markers",
                name=text(state),
                legendgroup=text(state),
                showlegend=j == 0,
                line={"color": colour, "dash": ("solid", "dash", "dot", "dashdot")[j % 4], "width": 1.5},
                customdata=curve[["low", "high", "n", "retain"]].to_numpy(),
                hovertemplate=f"{text(setting)} %{{x}}: %{{y:.2f}} (%{{customdata[0]:.2f}} to %{{customdata[1]:.2f}}, "
                f"n = %{{customdata[2]}}; retain %{{customdata[3]:.2f}})<extra>{text(state)}</extra>",
            )
    if stepped:
        figure.update_xaxes(title="steps of the attack", automargin=True)
    else:
        angle = -35 if rows["setting"].nunique() > 4 else 0
        figure.update_xaxes(title="setting", type="category", tickangle=angle, automargin=True)
        figure.update_layout(scattermode="group", scattergap=0.7)
    figure.update_yaxes(title="share right of held-out facts", range=SHARE)
    return styled(figure, text(label(name)), 380)
