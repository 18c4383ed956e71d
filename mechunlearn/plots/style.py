"""The visual language of all figures.

Okabe-Ito colours, grey axes and no background, so that they read on white and on black.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mechunlearn.core.files import whole_file
from mechunlearn.errors import MechunlearnError

Figure = go.Figure
COLOURS = ("#7f7f7f", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe-Ito
INK, RULE, CLEAR = "#777777", "rgba(128, 128, 128, 0.25)", "rgba(0, 0, 0, 0)"
SHARES = [[0, "#e3e9ee"], [0.5, "#56a5d0"], [1, "#00466e"]]
SIGNED = [[0, "#a84300"], [0.25, "#e08a4c"], [0.5, "#ececec"], [0.75, "#5aa2cc"], [1, "#005a8f"]]
SETTINGS = {"displaylogo": False, "responsive": True}
FIGURE_CSS = """
.js-plotly-plot .infolayer text, .js-plotly-plot .menulayer text, .js-plotly-plot g[class$="tick"] text {
fill: var(--ink) !important; }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>mechunlearn figure</title><style>
:root {{ color-scheme: light dark; --ink: #222; --ground: #fff; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #ddd; --ground: #15181c; }} }}
body {{ margin: 1rem; background: var(--ground); }}
@media print {{ :root {{ color-scheme: light; --ink: #111; --ground: #fff; }} }}
{css}</style></head><body>{figure}</body></html>
"""


def text(given: object) -> str:
    """Return a string as plotly shows it letter by letter: its labels know some HTML, links included.

    Args:
        given: The string.

    >>> text("<b>a & b</b>")
    '&lt;b&gt;a &amp; b&lt;/b&gt;'
    """
    return str(given).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def styled(figure: go.Figure, title: str, height: int) -> go.Figure:
    """Give a figure its title, size and the common look; plotly's default template is left as it is.

    Args:
        figure: The figure.
        title: The title.
        height: The height in pixels.
    """
    axis = {"gridcolor": RULE, "zerolinecolor": RULE, "linecolor": INK, "tickcolor": INK, "automargin": True}
    axis |= {"title": {"font": {"size": 12}}}
    look = {
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "colorway": COLOURS,
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "xaxis": axis,
        "yaxis": axis,
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1, "xanchor": "right", "bgcolor": CLEAR},
        "modebar": {"bgcolor": CLEAR, "color": RULE, "activecolor": INK},
    }
    return figure.update_layout(
        template=go.layout.Template(layout=look),
        title={"text": title, "font": {"size": 15}, "x": 0.01, "xanchor": "left"},
        height=height,
        margin={"l": 10, "r": 10, "t": 70, "b": 10},
    )


def bars(middle: pd.Series, low: pd.Series, high: pd.Series) -> dict[str, Any]:
    """Return error bars that end at the ends of an interval.

    Args:
        middle: The marks.
        low: The lower ends.
        high: The upper ends.
    """
    return {"type": "data", "symmetric": False, "array": high - middle, "arrayminus": middle - low, "thickness": 1}


def dotted(colour: str = COLOURS[0]) -> dict[str, str]:
    """Return the line of a reference, such as chance.

    Args:
        colour: Its colour.
    """
    return {"dash": "dot", "color": colour}


def heat(
    values: Sequence[Sequence[float | None]],
    x: Sequence[object],
    y: Sequence[object],
    key: str,
    hover: str,
    signed: bool = True,
    **more: object,
) -> dict[str, Any]:
    """Return the settings of a heat map with its key above its right end.

    Args:
        values: The values, row by row; None is empty.
        x: The names of the columns.
        y: The names of the rows.
        key: What the colours mean.
        hover: The template of what is shown under the pointer.
        signed: Whether colours are centred at zero and end at the largest value; else they run from 0 to 1.
        **more: Further settings, those of the key by `colorbar`.
    """
    largest = max((abs(value) for row in values for value in row if value is not None), default=0.0) or 1.0
    place = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "ypad": 6, "xpad": 20}
    title = {"text": key, "side": "top", "font": {"size": 12}}
    own: Any = more.pop("colorbar", {})
    return {
        "z": values,
        "x": x,
        "y": y,
        "zmin": -largest if signed else 0,
        "zmax": largest if signed else 1,
        "colorscale": SIGNED if signed else SHARES,
        "xgap": 2,
        "ygap": 2,
        "colorbar": {**place, "len": 0.4, "thickness": 8, "nticks": 5, "title": title, **own},
        "hovertemplate": f"{hover}<extra></extra>",
        **more,
    }


def ticks(values: Sequence[object], most: int = 32) -> int | None:
    """Return a distance of one between ticks while they are few; then plotly chooses.

    Args:
        values: What has the ticks.
        most: The largest number with a tick each.
    """
    return 1 if len(values) <= most else None


def save_figure(figure: go.Figure, path: str | Path, *, width: int = 900, scale: float = 2) -> None:
    """Write a figure as `.html` (interactive, one file, no network), `.svg`, or `.png` of `scale` times `width` pixels.

    Pictures need kaleido (`pip install mechunlearn[images]`) and a Chromium or Chrome: the one in `BROWSER_PATH`,
    else one on PATH. Their background is transparent.

    Args:
        figure: The figure.
        path: The file.
        width: The width of a picture in pixels.
        scale: What a `.png` is enlarged by.

    Raises:
        MechunlearnError: For another suffix, and where kaleido or a browser is missing.
    """
    path = Path(path)
    if path.suffix == ".html":
        shown = figure.to_html(full_html=False, include_plotlyjs=True, config=SETTINGS)
        made = _PAGE.format(css=FIGURE_CSS, figure=shown).encode()
    elif path.suffix in (".png", ".svg"):
        size = {"width": width, "height": figure.layout.height or 450, "scale": scale if path.suffix == ".png" else 1}
        made = _drawn(figure.to_dict(), {"format": path.suffix[1:], **size})
    else:
        raise MechunlearnError(
            f"A figure is not written as '{path.name}'. Expected a name ending in .png, .svg or .html."
        )
    with whole_file(path) as beside:
        beside.write_bytes(made)


def _drawn(figure: dict[str, Any], options: Mapping[str, Any]) -> bytes:
    try:
        import kaleido
        from kaleido.errors import BrowserClosedError, BrowserFailedError, ChromeNotFoundError
    except ImportError:
        raise MechunlearnError(
            "Pictures are drawn by kaleido, which is not installed. Run `pip install mechunlearn[images]`, or write "
            ".html."
        ) from None
    try:  # plotly.js comes from the installed plotly; MathJax would come from the network
        return bytes(kaleido.calc_fig_sync(figure, opts=dict(options), kopts={"mathjax": False}))
    except (ChromeNotFoundError, BrowserFailedError, BrowserClosedError) as error:
        reason = str(error).split(". ")[0]
        raise MechunlearnError(
            f"Pictures are drawn by a browser, and none could be used ({reason}). Install Chromium or Chrome, or set "
            "BROWSER_PATH to it; .html needs neither."
        ) from None
