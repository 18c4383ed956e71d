"""Run the notebooks and write them back with outputs that can be read anywhere: `python notebooks/execute.py [1-find ...]`.

Figures stay interactive where plotly is at hand and have a picture (SVG) for places where it is not; what differs from machine
to machine is taken out. Ends with 1 if some output has a warning or a path of this machine, or a notebook is too large.
Needs kaleido and a Chromium; running the notebooks themselves does not.
"""

import json
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

import kaleido
import nbformat
import plotly.io
from nbclient import NotebookClient
from rich.console import Console

FOLDER = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"
FIGURE = "application/vnd.plotly.v1+json"
GENERIC = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
PRIVATE = re.compile(r"/(?:work|root|tmp|home|Users|mnt)/|\b0x[0-9a-f]{6,}")
SECONDS, LIMIT, WIDTH = 900, 400_000, 860


def execute(path: Path) -> list[str]:
    """Run one notebook in an empty folder and write it back; returns what is wrong with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    with tempfile.TemporaryDirectory() as empty:
        client = NotebookClient(
            notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": empty}}
        )
        client.execute()
    wrong = []
    for i, cell in enumerate(notebook.cells):
        cell.metadata = {"tags": cell.metadata["tags"]} if "tags" in cell.metadata else {}
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if not _is_bar(output)]
        for output in cell.get("outputs", ()):
            wrong += [f"{path.name}, cell {i}: {what}" for what in _noise(output)]
            _add_picture(output, f"{path.stem}-{i}")
            output.get("data", {}).pop(WIDGET, None)  # its state is gone with the kernel; the table stays
    notebook.metadata = GENERIC
    text = nbformat.writes(notebook) + "\n"
    path.write_text(text, encoding="utf-8")
    if len(text) > LIMIT:
        wrong.append(f"{path.name} has {len(text) / 1000:.0f} kB. Expected less than {LIMIT / 1000:.0f} kB.")
    return wrong


def _add_picture(output: dict, name: str) -> None:
    """Put an SVG beside an interactive figure; the identifiers in it, random in every run, are given the name."""
    figure = output.get("data", {}).get(FIGURE)
    if figure is None:
        return
    figure.pop("config", None)
    drawn = plotly.io.from_json(json.dumps(figure)).to_image("svg", width=WIDTH).decode()
    random = re.findall(r'id="defs-(\w+)"', drawn) + re.findall(r"(?:trace|cb)[0-9a-f]{6}", drawn)
    for i, identifier in enumerate(dict.fromkeys(random)):
        drawn = drawn.replace(identifier, f"{name}-{i}")
    output["data"]["image/svg+xml"] = drawn


def _is_bar(output: dict) -> bool:
    """Whether an output is what a progress bar leaves behind."""
    data = output.get("data", {})
    return data.get("text/plain") == "Output()" or (
        data.get("text/plain") == "" and set(data) <= {"text/plain", "text/html"}
    )


def _noise(output: dict) -> list[str]:
    """What no committed output holds: warnings, errors, paths and addresses of this machine."""
    told = json.dumps(output.get("data", {})) + str(output.get("text", ""))
    found = [told[max(0, at.start() - 60) : at.end() + 60] for at in PRIVATE.finditer(told)]
    return found + ([told[:400]] if output["output_type"] == "error" or output.get("name") == "stderr" else [])


def main() -> None:
    names = sys.argv[1:] or [path.stem for path in sorted(FOLDER.glob("[0-9]-*.ipynb"))]
    console = Console(highlight=False)
    warnings.filterwarnings("ignore", module="plotly")  # of options that plotly itself gives to a running kaleido
    kaleido.start_sync_server(silence_warnings=True)
    wrong = []
    try:
        for name in names:
            path = FOLDER / f"{name}.ipynb"
            wrong += execute(path)
            console.print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
    finally:
        kaleido.stop_sync_server(silence_warnings=True)
    for what in wrong:
        console.print(what, markup=False)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
