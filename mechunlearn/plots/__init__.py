"""Figures: one visual language, colour-blind safe, readable in light and dark, no global theme touched."""

from mechunlearn.plots.circuits import circuit_graph as circuit_graph
from mechunlearn.plots.curves import attack_curves as attack_curves
from mechunlearn.plots.curves import before_after as before_after
from mechunlearn.plots.curves import comparison as comparison
from mechunlearn.plots.curves import faithfulness_curve as faithfulness_curve
from mechunlearn.plots.curves import recoveries as recoveries
from mechunlearn.plots.curves import side_effects as side_effects
from mechunlearn.plots.maps import code_volcano as code_volcano
from mechunlearn.plots.maps import head_map as head_map
from mechunlearn.plots.maps import mask_map as mask_map
from mechunlearn.plots.maps import overlap_map as overlap_map
from mechunlearn.plots.maps import probe_curve as probe_curve
from mechunlearn.plots.maps import role_map as role_map
from mechunlearn.plots.style import COLOURS as COLOURS
from mechunlearn.plots.style import FIGURE_CSS as FIGURE_CSS
from mechunlearn.plots.style import SETTINGS as SETTINGS
from mechunlearn.plots.style import Figure as Figure
from mechunlearn.plots.style import save_figure as save_figure
