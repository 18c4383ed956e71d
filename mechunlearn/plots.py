"""Figures: one visual language, colour-blind safe, no global theme touched."""

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from mechunlearn.components import Component, ComponentMask, Localization
from mechunlearn.errors import MechunlearnError

COLOURS = ("#7f7f7f", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe-Ito


def before_after(frame: pd.DataFrame, columns: list[str], metric: str, split: str, title: str) -> go.Figure:
    """One row a format, one mark a model, with 95 % intervals."""
    rows = frame[(frame.metric == metric) & (frame.split == split)][::-1]
    figure = go.Figure()
    for i, name in enumerate(columns):
        figure.add_scatter(
            x=rows[name],
            y=[f"{r.format}" for r in rows.itertuples()],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": rows[f"{name} high"] - rows[name],
                "arrayminus": rows[name] - rows[f"{name} low"],
                "thickness": 1,
            },
            mode="markers",
            name=name,
            marker={"color": COLOURS[i % len(COLOURS)], "size": 9, "symbol": i},
            customdata=rows["n"],
            hovertemplate="%{y}: %{x:.3f} (n = %{customdata})<extra>" + name + "</extra>",
        )
    figure.update_xaxes(range=[-0.03, 1.03], title=metric)
    return _styled(figure, title, 90 + 30 * len(rows))


def side_effects(frame: pd.DataFrame, columns: list[str]) -> go.Figure:
    """Accuracy on everything that was to stay."""
    kept = frame[(frame.metric == "accuracy") & (frame.split != "forget")]
    kept = kept[(kept.format.isin(("statement", "question", "held_out"))) | (kept.split == "skills")]
    kept = kept.assign(format=kept.split + ": " + kept.format, split="kept")
    return before_after(kept, columns, "accuracy", "kept", "What was to stay")


def probe_curve(found: Localization) -> go.Figure:
    """The probe's accuracy by depth, with the chosen window of MLP layers."""
    curve, window = found.evidence["curve"], found.evidence["window"]
    figure = go.Figure()
    if window:
        figure.add_vrect(
            x0=window[0] + 0.5,
            x1=window[1] + 1.5,
            fillcolor=COLOURS[2],
            opacity=0.2,
            line_width=0,
            annotation_text=f"MLP {window[0]} to {window[1]}",
            annotation_position="top left",
        )
    figure.add_scatter(
        x=list(range(len(curve))), y=curve, mode="lines+markers", line={"color": COLOURS[1]}, name="probe"
    )
    figure.add_hline(
        y=found.evidence["majority"], line={"dash": "dot", "color": COLOURS[0]}, annotation_text="majority class"
    )
    figure.update_xaxes(title="blocks passed (0: embedding)", dtick=1)
    figure.update_yaxes(title="probe accuracy on held-out subjects", range=[0, 1.03])
    return _styled(figure, "Where the answer becomes readable at the subject's last token", 380)


def mask_map(mask: ComponentMask) -> go.Figure:
    """The share of each site that the mask selects."""
    kinds = sorted({Component.parse(site).kind for site in mask.sites}, key=lambda kind: Component(0, kind))
    layers = list(range(mask.signature.layers))
    shares = [
        [
            float(mask.sites[f"L{layer}.{kind}"].float().mean()) if f"L{layer}.{kind}" in mask.sites else 0.0
            for layer in layers
        ]
        for kind in kinds
    ]
    figure = make_subplots()
    figure.add_heatmap(
        z=shares,
        x=layers,
        y=kinds,
        zmin=0,
        zmax=1,
        colorscale="Blues",
        xgap=2,
        ygap=2,
        colorbar={"title": "share of units"},
        hovertemplate="L%{x}.%{y}: %{z:.1%}<extra></extra>",
    )
    figure.update_xaxes(title="layer", dtick=1)
    return _styled(figure, "What the mask selects", 160 + 40 * len(kinds))


def overlap_map(table: pd.DataFrame) -> go.Figure:
    """How much the masks of each two methods overlap: the table of `agreement.overlap`, with its values in the cells.

    The colours run from 0 to 1 whatever the values, so that two maps can be compared.
    """
    figure = go.Figure()
    figure.add_heatmap(
        z=table.to_numpy(),
        x=[str(name) for name in table.columns],
        y=[str(name) for name in table.index],
        zmin=0,
        zmax=1,
        colorscale="Blues",
        xgap=2,
        ygap=2,
        texttemplate="%{z:.2f}",
        colorbar={"title": "Jaccard index"},
        hovertemplate="%{y} and %{x}: %{z:.3f}<extra></extra>",
    )
    figure.update_xaxes(type="category", side="bottom", tickangle=-35, automargin=True)
    figure.update_yaxes(type="category", autorange="reversed", automargin=True)
    return _styled(figure, "Units that both methods choose", 220 + 45 * len(table))


def role_map(by_role: Mapping[str, Float[Tensor, "role _unit"]], roles: Sequence[str], title: str) -> go.Figure:
    """Effects by layer and token role (or position) for one kind of site, as `Localization.by_role` holds them.

    Units of a site are summed; colours are centred at zero, so red raises the metric and blue lowers it. Layers without
    scores stay empty. Raises `MechunlearnError` for several kinds, and unless there is one row a role.

    >>> effects = {"L0.resid_post": torch.tensor([[0.0], [-2.0]]), "L1.resid_post": torch.tensor([[0.5], [-1.0]])}
    >>> role_map(effects, ["relation", "last"], "Effect on the logit difference").data[0].z
    ([0.0, 0.5], [-2.0, -1.0])
    """
    addresses = {site: site.removeprefix("L").split(".", 1) for site in by_role}
    kinds = sorted({kind for _, kind in addresses.values()})
    wrong = [f"{site} with {len(rows)} rows" for site, rows in by_role.items() if len(rows) != len(roles)]
    if len(kinds) != 1 or wrong:
        raise MechunlearnError(
            f"A role map shows one kind of site with {len(roles)} rows, one a role. Given: kinds "
            f"{', '.join(kinds) or 'none'}{'; ' + wrong[0] if wrong else ''}. Choose the sites of one kind from by_role."
        )
    layers = sorted(int(layer) for layer, _ in addresses.values())
    effects = torch.stack([by_role[f"L{layer}.{kinds[0]}"].sum(1) for layer in layers], dim=1)
    largest = float(effects.abs().max()) or 1.0
    figure = go.Figure()
    figure.add_heatmap(
        z=effects.tolist(),
        x=layers,
        y=list(roles),
        zmin=-largest,
        zmax=largest,
        colorscale="RdBu_r",
        xgap=2,
        ygap=2,
        colorbar={"title": "effect"},
        hovertemplate="L%{x}." + kinds[0] + ", %{y}: %{z:.3f}<extra></extra>",
    )
    figure.update_xaxes(title="layer", dtick=1 if len(layers) <= 32 else None)
    figure.update_yaxes(type="category", autorange="reversed", automargin=True)
    return _styled(figure, title, 160 + 40 * len(roles))


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
    return _styled(figure, "Faithfulness of circuits of growing size", 380)


def comparison(frame: pd.DataFrame) -> go.Figure:
    """One panel a measure, one row an objective and budget, one mark a localizer, with 95 % intervals over seeds.

    Columns: measure, row, localizer, mean, low, high, n.
    """
    measures, rows, names = (list(frame[column].unique()) for column in ("measure", "row", "localizer"))
    figure = make_subplots(-(-len(measures) // 3), 3, shared_yaxes=True, subplot_titles=measures)
    for (measure, name), marks in frame.groupby(["measure", "localizer"], sort=False):
        panel, i = measures.index(measure), names.index(name)
        figure.add_scatter(
            x=marks["mean"],
            y=[rows.index(row) + 0.6 * ((i + 0.5) / len(names) - 0.5) for row in marks["row"]],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": marks.high - marks["mean"],
                "arrayminus": marks["mean"] - marks.low,
                "thickness": 1,
            },
            mode="markers",
            name=name,
            legendgroup=name,
            showlegend=panel == measures.index(frame[frame.localizer == name].measure.iloc[0]),
            marker={"color": COLOURS[i % len(COLOURS)], "size": 8, "symbol": i},
            customdata=marks[["row", "low", "high", "n"]].to_numpy(),
            hovertemplate="%{customdata[0]}: %{x:.3f} (%{customdata[1]:.3f} to %{customdata[2]:.3f}, "
            f"n = %{{customdata[3]}})<extra>{name}</extra>",
            row=panel // 3 + 1,
            col=panel % 3 + 1,
        )
    ends = [len(rows) - 0.5, -0.5]
    figure.update_yaxes(tickvals=list(range(len(rows))), ticktext=rows, range=ends, zeroline=False, automargin=True)
    for panel, measure in enumerate(measures):
        marks = frame[frame.measure == measure]
        if measure != "text loss" and marks.low.min() >= 0 and marks.high.max() <= 1:
            figure.update_xaxes(range=[-0.03, 1.03], row=panel // 3 + 1, col=panel % 3 + 1)
    figure = _styled(figure, "Localizers side by side", 160 + (70 + 50 * len(rows)) * -(-len(measures) // 3))
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
        y=rows["attack"],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": high - rows["recovery"],
            "arrayminus": rows["recovery"] - low,
            "thickness": 1,
        },
        mode="markers",
        marker={"color": COLOURS[1], "size": 9},
        customdata=rows[["held out", "n", "setting"]].to_numpy(),
        hovertemplate="%{y}: %{x:.2f} (right %{customdata[0]:.2f}, n = %{customdata[1]}, %{customdata[2]})<extra></extra>",
        showlegend=False,
    )
    figure.add_vline(x=0, line={"dash": "dot", "color": COLOURS[0]}, annotation_text="floor")
    figure.add_vline(x=1, line={"dash": "dot", "color": COLOURS[0]}, annotation_text="never edited")
    figure.update_xaxes(title="recovery (bars: 95 % interval over facts)")
    figure.update_yaxes(automargin=True)
    return _styled(figure, "What each attack brings back", 150 + 32 * len(rows))


def attack_curves(name: str, rows: pd.DataFrame) -> go.Figure:
    """What an attack got, state by state: over steps where it takes steps, else setting by setting."""
    stepped = (rows["step"] > 0).any()
    figure = go.Figure()
    for i, (state, mine) in enumerate(rows.groupby("state", sort=False)):
        parts = mine.groupby("setting", sort=False) if stepped else [("", mine)]
        for j, (setting, curve) in enumerate(parts):
            figure.add_scatter(
                x=curve["step"] if stepped else curve["setting"],
                y=curve["held out"],
                mode="lines+markers",
                name=str(state),
                legendgroup=str(state),
                showlegend=j == 0,
                line={
                    "color": COLOURS[i % len(COLOURS)],
                    "dash": ("solid", "dash", "dot", "dashdot")[j % 4],
                    "width": 1.5,
                },
                customdata=curve[["low", "high", "n", "retain"]].to_numpy(),
                hovertemplate=f"{setting!s} %{{x}}: %{{y:.2f}} (%{{customdata[0]:.2f}} to %{{customdata[1]:.2f}}, "
                f"n = %{{customdata[2]}}; retain %{{customdata[3]:.2f}})<extra>{state}</extra>",
            )
    figure.update_xaxes(title="step" if stepped else "", type=None if stepped else "category", automargin=True)
    figure.update_yaxes(title="facts right that the attack never saw", range=[-0.03, 1.03])
    return _styled(figure, name.replace("_", " "), 360)


def _styled(figure: go.Figure, title: str, height: int) -> go.Figure:
    return figure.update_layout(
        template="plotly_white",
        title={"text": title, "font": {"size": 15}},
        height=height,
        margin={"l": 10, "r": 10, "t": 60, "b": 10},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1, "xanchor": "right"},
        font={"family": "system-ui, sans-serif", "size": 13},
    )
