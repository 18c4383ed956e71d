"""A circuit as a graph, with a threshold to move."""

from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mechunlearn.artifacts.circuit import Circuit
from mechunlearn.artifacts.graphs import NEGATIVE, POSITIVE
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.layout import Signature
from mechunlearn.plots.style import INK, RULE, styled, text

STEPS = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000)
BENDS = np.linspace(0, 1, 13)
EDGE = 0.7  # from the outer nodes to the frame


def circuit_graph(circuit: Circuit, most: int = 200, shown: int = 50) -> go.Figure:
    """Draw the strongest edges of a circuit between its heads and MLPs, from the input above to the logits below.

    A slider sets how many of the edges are kept, largest |score| first. Blue scores are above zero, orange ones below
    (of `edge_attribution` those support the answer); width is |score|, in steps of the slider. As in
    `Circuit.to_networkx`, an edge into the key or value of a group goes to each of its query heads.

    Args:
        circuit: The circuit.
        most: The largest number of edges on the slider.
        shown: Where the slider begins, or just below.

    Raises:
        MechunlearnError: If the circuit has no edge, or fewer than one edge is asked for.

    >>> from mechunlearn.localize import edge_attribution
    >>> from mechunlearn.world.toy import planted_facts
    >>> toy = planted_facts()
    >>> graph = circuit_graph(edge_attribution(toy.model, toy.prompts([1])), most=5)
    >>> [step.label for step in graph.layout.sliders[0].steps]
    ['1', '2', '3', '5']
    """
    if most < 1 or shown < 1 or not len(circuit):
        raise MechunlearnError(
            f"Cannot show {min(most, shown)} of {len(circuit)} edges. Expected a circuit with edges, and to show at "
            "least one."
        )
    graph = circuit.top(edges=min(most, len(circuit))).to_networkx()
    ranked = sorted(graph.edges(data=True), key=lambda edge: -abs(edge[2]["score"]))[:most]
    counts = [step for step in STEPS if step < len(ranked)] + [len(ranked)]
    sizes = [abs(edge[2]["score"]) for edge in ranked]
    figure, where = go.Figure(), _places(circuit.signature)
    _scaffold(figure, where)
    lines: list[int] = []
    for step, (first, last) in enumerate(pairwise([0, *counts])):
        width = 0.6 + 4.4 * float(np.mean(sizes[first:last])) / (sizes[0] or 1.0)
        for colour, sign in ((POSITIVE, 1), (NEGATIVE, -1)):
            part = [edge for edge in ranked[first:last] if (edge[2]["score"] >= 0) == (sign > 0)]
            if part:
                drawn = _drawn(part, where, circuit.signature.heads)
                figure.add_scatter(**drawn, line={"color": colour, "width": width}, opacity=0.75)
                lines.append(step)
    seen: set[str] = set()
    for step, (first, last) in enumerate(pairwise([0, *counts])):
        new = {node for edge in ranked[first:last] for node in edge[:2]} - seen
        seen |= new
        if new:
            figure.add_scatter(**_nodes(sorted(new), where))
            lines.append(step)
    start = max((step for step, count in enumerate(counts) if count <= shown), default=0)
    visible = [[True] + [step <= last for step in lines] for last in range(len(counts))]
    for trace, on in zip(figure.data, visible[start]):
        trace.visible = on
    steps = [
        {"label": str(count), "method": "restyle", "args": [{"visible": on}]} for count, on in zip(counts, visible)
    ]
    layers, heads = circuit.signature.layers, circuit.signature.heads
    ink = {"color": INK}
    slider = {"active": start, "steps": steps, "currentvalue": {"prefix": "edges kept: ", "font": ink}, "font": ink}
    slider |= {"pad": {"t": 45}, "bordercolor": RULE, "tickcolor": INK}
    figure.update_layout(sliders=[slider], showlegend=False, hovermode="closest")
    marked = range(0, heads, 4 if heads > 16 else 1)
    figure.update_xaxes(
        title="head", tickvals=[*marked, heads + 0.5], ticktext=[*map(str, marked), "MLP"], showgrid=False
    )
    figure.update_xaxes(range=[-0.8, heads + 1.6], zeroline=False)
    depth = {"input": 0.0, **{str(layer): 2.0 * layer + 1.5 for layer in range(layers)}, "logits": 2.0 * layers + 1}
    figure.update_yaxes(title="layer", tickvals=list(depth.values()), ticktext=list(depth), showgrid=False)
    figure.update_yaxes(range=[2 * layers + 1.8, -0.8], zeroline=False)
    title = f"Circuit by {text(circuit.card.method)}: the {len(ranked)} largest of {len(circuit)} edges"
    return styled(figure, title, 260 + min(70, 1400 // layers) * layers)


def _places(signature: Signature) -> dict[str, tuple[float, float]]:
    """Where each node is drawn: heads side by side, the MLP of a layer to their right and half a step below."""
    middle = (signature.heads - 1) / 2
    where = {"input": (middle, 0.0), "logits": (middle, 2.0 * signature.layers + 1)}
    for layer in range(signature.layers):
        where |= {f"a{layer}.h{head}": (float(head), 2.0 * layer + 1) for head in range(signature.heads)}
        where[f"m{layer}"] = (signature.heads + 0.5, 2.0 * layer + 2)
    return where


def _scaffold(figure: go.Figure, where: dict[str, tuple[float, float]]) -> None:
    """Every head and MLP of the model as a faint mark, so that what is missing shows."""
    x, y = zip(*where.values())
    figure.add_scatter(x=x, y=y, mode="markers", marker={"color": RULE, "size": 5}, hoverinfo="skip")


def _drawn(
    part: list[tuple[str, str, dict[str, Any]]], where: dict[str, tuple[float, float]], heads: int
) -> dict[str, Any]:
    """Edges as lines that bend within the frame, so that those along a column do not run through the nodes between."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    told: list[str] = []
    for source, target, about in part:
        (x0, y0), (x1, y1) = where[source], where[target]
        bow = 0.12 * (y1 - y0 - 1) * (1 if x0 >= x1 else -1) + (0.25 if source[0] == target[0] == "m" else 0)
        bow = min(max(bow, -2 * (min(x0, x1) + EDGE)), 2 * (heads + 0.5 + EDGE - max(x0, x1)))
        xs += [*(x0 + (x1 - x0) * BENDS + 2 * bow * BENDS * (1 - BENDS)).tolist(), None]
        ys += [*(y0 + (y1 - y0) * BENDS).tolist(), None]
        told += [f"{about['name']}: {about['score']:+.3g}"] * (len(BENDS) + 1)
    names = [text(one) for one in told]
    return {"x": xs, "y": ys, "mode": "lines", "text": names, "hovertemplate": "%{text}<extra></extra>"}


def _nodes(names: list[str], where: dict[str, tuple[float, float]]) -> dict[str, Any]:
    shapes = [{"a": "circle", "m": "square"}.get(name[0], "diamond") for name in names]
    return {
        "x": [where[name][0] for name in names],
        "y": [where[name][1] for name in names],
        "mode": "markers",
        "text": names,
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"color": INK, "symbol": shapes, "size": 11},
    }
