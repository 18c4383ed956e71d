"""How the explorer is drawn: the page that is served, and the picture for where no script runs."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

STATIC = Path(__file__).parent / "static"
UP, DOWN = "#0072b2", "#d55e00"  # as in the plots
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(STATIC, encoding="utf-8"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def served_page(view: dict[str, Any], key: str) -> str:
    """Write the page that `ExplorerServer` answers with.

    Args:
        view: What `Workbench.view` gives.
        key: Without it the server answers nothing.
    """
    style, script = ((STATIC / f"explorer.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    script = script.replace("export default", "const explorer =")
    return TEMPLATES.get_template("page.html.jinja").render(style=style, script=script, view=view, key=key)


def static_view(view: dict[str, Any]) -> str:
    """Write the map as a picture, its numbers as a table, and the mask in words, for where no script runs.

    Args:
        view: What `Workbench.view` gives.
    """
    picture = TEMPLATES.get_template("map.svg.jinja").render(view=view, shade=_shade(view["heat"]["values"]))
    encoded = base64.b64encode(picture.encode()).decode()
    return TEMPLATES.get_template("picture.html.jinja").render(view=view, picture=encoded)


def _shade(values: list[list[float | None]]) -> Callable[[float | None], tuple[str, str]]:
    """Colour and opacity of a cell, as the script shades it."""
    most = max((abs(value) for row in values for value in row if value is not None), default=0.0) or 1.0

    def shaded(value: float | None) -> tuple[str, str]:
        return (UP if (value or 0) > 0 else DOWN, f"{0.08 + 0.82 * abs(value) / most:.3f}" if value else "0")

    return shaded
