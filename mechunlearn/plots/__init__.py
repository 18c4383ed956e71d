"""Figures: one visual language, colour-blind safe, readable in light and dark, no global theme touched."""

import plotly.graph_objects as go

from mechunlearn.plots.circuits import circuit_graph
from mechunlearn.plots.curves import (
    attack_curves,
    before_after,
    comparison,
    faithfulness_curve,
    recoveries,
    side_effects,
)
from mechunlearn.plots.maps import code_volcano, head_map, mask_map, overlap_map, probe_curve, role_map
from mechunlearn.plots.style import COLOURS, FIGURE_CSS, SETTINGS, save_figure

__all__ = [
    "COLOURS",
    "FIGURE_CSS",
    "SETTINGS",
    "attack_curves",
    "before_after",
    "circuit_graph",
    "code_volcano",
    "comparison",
    "faithfulness_curve",
    "go",
    "head_map",
    "mask_map",
    "overlap_map",
    "probe_curve",
    "recoveries",
    "role_map",
    "save_figure",
    "side_effects",
]
