"""Figures: one visual language, colour-blind safe, no global theme touched."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechunlearn.components import Component, ComponentMask, Localization

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


def _styled(figure: go.Figure, title: str, height: int) -> go.Figure:
    return figure.update_layout(
        template="plotly_white",
        title={"text": title, "font": {"size": 15}},
        height=height,
        margin={"l": 10, "r": 10, "t": 60, "b": 10},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1, "xanchor": "right"},
        font={"family": "system-ui, sans-serif", "size": 13},
    )
