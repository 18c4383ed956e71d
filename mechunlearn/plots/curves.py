"""How much: accuracy before and after, side effects, localizers and attacks side by side, faithfulness by size."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechunlearn.attack.states import EDITED, NEVER_TAUGHT, UNEDITED
from mechunlearn.plots.style import COLOURS, INK, bars, styled, text

STATES = {EDITED: COLOURS[1], UNEDITED: COLOURS[0], NEVER_TAUGHT: COLOURS[2]}


def before_after(frame: pd.DataFrame, columns: list[str], metric: str, split: str, title: str) -> go.Figure:
    """One row a format, one mark a model, with 95 % intervals over facts: rows of `Report.frame` and its `columns`."""
    rows = frame[(frame.metric == metric) & (frame.split == split)]
    figure = go.Figure()
    names = [str(name).replace("_", " ") for name in rows.format]
    for i, name in enumerate(columns):
        _marks(figure, rows, name, i, 0.6 * ((i + 0.5) / len(columns) - 0.5), names)
    figure.update_xaxes(range=[-0.03, 1.03], title=f"{text(metric)}, share of facts")
    _rows(figure, names, "format of the question")
    return styled(figure, text(title), 140 + (14 + 14 * len(columns)) * len(rows))


def side_effects(frame: pd.DataFrame, columns: list[str]) -> go.Figure:
    """Accuracy on everything that was to stay: from before to after along a line, and the other columns beneath it.

    Rows of `Report.frame`: the retain set, neighbours, the same subjects' other facts and skills.
    """
    kept = frame[(frame.metric == "accuracy") & (frame.split != "forget")]
    kept = kept[(kept.format.isin(("statement", "question", "held_out"))) | (kept.split == "skills")]
    names = [f"{split}: {format.replace('_', ' ')}" for split, format in zip(kept.split, kept.format)]
    ends, beneath = [name for name in columns if name in ("before", "after")], 0.32
    figure = go.Figure()
    if len(ends) == 2:
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
    others = [name for name in columns if name not in ends]
    for i, name in enumerate(columns):
        offset = 0.0 if name in ends else beneath * (others.index(name) + 1) / len(others)
        _marks(figure, kept, name, i, offset, names)
    figure.update_xaxes(range=[-0.03, 1.03], title="accuracy, share of facts")
    _rows(figure, names, "what was to stay")
    return styled(figure, "What was to stay, before and after", 140 + 34 * len(kept))


def _marks(figure: go.Figure, rows: pd.DataFrame, name: str, i: int, offset: float, names: list[str]) -> None:
    """A column of a report, one mark a row, with its interval."""
    figure.add_scatter(
        x=rows[name],
        y=[row + offset for row in range(len(rows))],
        error_x=bars(rows[name], rows[f"{name} low"], rows[f"{name} high"]),
        mode="markers",
        name=text(name),
        marker={"color": COLOURS[i % len(COLOURS)], "size": 9, "symbol": i},
        customdata=[
            [text(shown), low, high, n]
            for shown, low, high, n in zip(names, rows[f"{name} low"], rows[f"{name} high"], rows["n"])
        ],
        hovertemplate="%{customdata[0]}: %{x:.3f} (%{customdata[1]:.3f} to %{customdata[2]:.3f}, n = %{customdata[3]})"
        f"<extra>{text(name)}</extra>",
    )


def _rows(figure: go.Figure, names: Sequence[str], title: str) -> None:
    """Named rows from top to bottom, for marks at 0, 1, 2 ..."""
    shown = [text(name) for name in names]
    figure.update_yaxes(tickvals=list(range(len(shown))), ticktext=shown, range=[len(shown) - 0.4, -0.6], title=title)
    figure.update_yaxes(zeroline=False, automargin=True)


def faithfulness_curve(frame: pd.DataFrame) -> go.Figure:
    """How much of the model's behaviour circuits of growing size keep: columns fraction, faithfulness, low and high.

    The x axis is logarithmic, so a row of fraction 0 is left out; the dotted line is the whole model.
    """
    rows = frame[frame.fraction > 0].sort_values("fraction")
    colour = COLOURS[1]
    band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    figure = go.Figure()
    figure.add_scatter(x=rows.fraction, y=rows.low, name="low", **band)
    figure.add_scatter(
        x=rows.fraction, y=rows.high, name="high", fill="tonexty", fillcolor="rgba(0, 114, 178, 0.2)", **band
    )
    figure.add_scatter(
        x=rows.fraction,
        y=rows.faithfulness,
        name="faithfulness",
        mode="lines+markers",
        line={"color": colour},
        showlegend=False,
        customdata=rows[["low", "high"]].to_numpy(),
        hovertemplate="%{x:.2%}: %{y:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})<extra></extra>",
    )
    figure.add_hline(
        y=1, line={"dash": "dot", "color": COLOURS[0]}, annotation_text="whole model", annotation_position="top left"
    )
    figure.update_xaxes(type="log", title="share of edges kept", tickformat="~%")
    figure.update_yaxes(title="faithfulness (band: 95 % interval)")
    return styled(figure, "Faithfulness of circuits of growing size", 380)


def comparison(frame: pd.DataFrame) -> go.Figure:
    """One panel a measure, one row an objective and budget, one mark a localizer, with 95 % intervals over seeds.

    Columns: measure, row, localizer, mean, low, high, n.
    """
    measures, rows, names = (list(frame[column].unique()) for column in ("measure", "row", "localizer"))
    figure = make_subplots(-(-len(measures) // 3), 3, shared_yaxes=True)
    for (measure, name), marks in frame.groupby(["measure", "localizer"], sort=False):
        panel, i = measures.index(measure), names.index(name)
        figure.add_scatter(
            x=marks["mean"],
            y=[rows.index(row) + 0.6 * ((i + 0.5) / len(names) - 0.5) for row in marks["row"]],
            error_x=bars(marks["mean"], marks.low, marks.high),
            mode="markers",
            name=text(name),
            legendgroup=text(name),
            showlegend=panel == measures.index(frame[frame.localizer == name].measure.iloc[0]),
            marker={"color": COLOURS[i % len(COLOURS)], "size": 8, "symbol": i},
            customdata=marks[["row", "low", "high", "n"]].assign(row=marks["row"].map(text)).to_numpy(),
            hovertemplate="%{customdata[0]}: %{x:.3f} (%{customdata[1]:.3f} to %{customdata[2]:.3f}, "
            f"n = %{{customdata[3]}})<extra>{text(name)}</extra>",
            row=panel // 3 + 1,
            col=panel % 3 + 1,
        )
    ends = [len(rows) - 0.5, -0.5]
    shown = [text(row) for row in rows]
    figure.update_yaxes(tickvals=list(range(len(rows))), ticktext=shown, range=ends, zeroline=False, automargin=True)
    figure.update_yaxes(title="objective, budget", col=1)
    for panel, measure in enumerate(measures):
        marks = frame[frame.measure == measure]
        figure.update_xaxes(title=text(measure), row=panel // 3 + 1, col=panel % 3 + 1)
        if measure != "text loss" and marks.low.min() >= 0 and marks.high.max() <= 1:
            figure.update_xaxes(range=[-0.03, 1.03], row=panel // 3 + 1, col=panel % 3 + 1)
    for panel in range(len(measures), 3 * -(-len(measures) // 3)):
        figure.update_xaxes(visible=False, row=panel // 3 + 1, col=panel % 3 + 1)
        figure.update_yaxes(visible=False, row=panel // 3 + 1, col=panel % 3 + 1)
    figure = styled(figure, "Localizers side by side", 160 + (70 + 50 * len(rows)) * -(-len(measures) // 3))
    return figure.update_layout(legend={"y": -0.08, "yanchor": "top"}, margin={"b": 60})


def recoveries(frame: pd.DataFrame) -> go.Figure:
    """How much each attack brought back: the table of `robustness.Attacked.outcomes`, one row an attack.

    Scaled so that 0 is the floor and 1 the unedited model; bars are the 95 % interval over facts on the same scale.
    """
    rows = frame[frame["recovery"].notna()][::-1]
    room = rows["ceiling"] - rows["floor"]
    low, high = ((rows[end] - rows["floor"]) / room for end in ("low", "high"))
    figure = go.Figure()
    figure.add_scatter(
        x=rows["recovery"],
        y=[text(name).replace("_", " ") for name in rows["attack"]],
        error_x=bars(rows["recovery"], low, high),
        mode="markers",
        marker={"color": COLOURS[1], "size": 9},
        customdata=rows[["held out", "n", "setting"]].assign(setting=rows["setting"].map(text)).to_numpy(),
        hovertemplate="%{y}: %{x:.2f} (right %{customdata[0]:.2f}, n = %{customdata[1]}, %{customdata[2]})<extra></extra>",
        showlegend=False,
    )
    above = {"y": 1, "yanchor": "bottom", "xanchor": "center"}
    figure.add_vline(x=0, line={"dash": "dot", "color": COLOURS[0]}, annotation={"text": "floor", **above})
    figure.add_vline(x=1, line={"dash": "dot", "color": COLOURS[0]}, annotation={"text": "never edited", **above})
    figure.update_xaxes(title="recovery (0: floor, 1: unedited)")
    figure.update_yaxes(title="attack", automargin=True, range=[-0.6, len(rows) - 0.4])
    return styled(figure, "What each attack brings back", 150 + 32 * len(rows))


def attack_curves(name: str, rows: pd.DataFrame) -> go.Figure:
    """What an attack got, state by state: over steps where it takes steps, else setting by setting."""
    stepped = (rows["step"] > 0).any()
    figure = go.Figure()
    for i, (state, mine) in enumerate(rows.groupby("state", sort=False)):
        parts = mine.groupby("setting", sort=False) if stepped else [("", mine)]
        for j, (setting, curve) in enumerate(parts):
            figure.add_scatter(
                x=curve["step"] if stepped else [text(setting) for setting in curve["setting"]],
                y=curve["held out"],
                error_y=None if stepped else bars(curve["held out"], curve["low"], curve["high"]),
                mode="lines+markers" if stepped else "markers",
                name=text(state),
                legendgroup=text(state),
                showlegend=j == 0,
                line={
                    "color": STATES.get(str(state), COLOURS[i % len(COLOURS)]),
                    "dash": ("solid", "dash", "dot", "dashdot")[j % 4],
                    "width": 1.5,
                },
                customdata=curve[["low", "high", "n", "retain"]].to_numpy(),
                hovertemplate=f"{text(setting)} %{{x}}: %{{y:.2f}} (%{{customdata[0]:.2f}} to %{{customdata[1]:.2f}}, "
                f"n = %{{customdata[2]}}; retain %{{customdata[3]:.2f}})<extra>{text(state)}</extra>",
            )
    figure.update_xaxes(
        title="steps of the attack" if stepped else "setting",
        type=None if stepped else "category",
        tickangle=-35 if not stepped and rows["setting"].nunique() > 4 else 0,
        automargin=True,
    )
    if not stepped:
        figure.update_layout(scattermode="group", scattergap=0.7)
    figure.update_yaxes(title="share right of held-out facts", range=[-0.03, 1.03])
    return styled(figure, text(name.replace("_", " ")), 380)
