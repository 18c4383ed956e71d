"""Draw who imports whom, folder by folder, and refuse a cycle: `python docs/imports.py` writes docs/images/architecture.svg.

With `--check` it writes nothing, and fails if the picture is not that of the code.

Arrows are those of the transitive reduction (what is implied by others is not drawn); the count of all is in the caption.
Imports for type checkers alone do not count, as in the contracts of pyproject.toml.
"""

import sys
from html import escape
from pathlib import Path

import grimp
import networkx as nx
from importlinter.api import read_configuration

ROOT = Path(__file__).resolve().parent.parent
WIDTH, ROW, BOX, HIGH = 860, 74, 118, 34


def layers() -> list[list[str]]:
    """Return the folders of each layer, highest first, as the contract of pyproject.toml has them."""
    contracts = read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]
    rows = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[name.strip().removeprefix("mechunlearn.") for name in row.split("|")] for row in rows]


def folders() -> nx.DiGraph:
    """Return the graph of folders: an arrow for every folder of which another imports a module."""
    modules = grimp.build_graph("mechunlearn", exclude_type_checking_imports=True)
    graph = nx.DiGraph()
    for importer in modules.modules:
        for imported in modules.find_modules_directly_imported_by(importer):
            here, there = (f"{name}.".split(".")[1] for name in (importer, imported))
            if here and there and here != there:
                graph.add_edge(here, there)
    return graph


def picture(graph: nx.DiGraph, rows: list[list[str]]) -> str:
    """Return the graph as SVG, one row a layer."""
    at = {
        name: (WIDTH * (i + 1) / (len(row) + 1), 30 + ROW * j)
        for j, row in enumerate(rows)
        for i, name in enumerate(row)
    }
    arrows, boxes = [], []
    for here, there in sorted(nx.transitive_reduction(graph).edges):
        (x, y), (u, v) = at[here], at[there]
        y, v = y + HIGH / 2, v - HIGH / 2 - 5
        bend = 26 if v - y < ROW else (v - y) / 3
        arrows.append(f'<path d="M{x:.0f} {y:.0f} C{x:.0f} {y + bend:.0f} {u:.0f} {v - bend:.0f} {u:.0f} {v:.0f}"/>')
    for name, (x, y) in at.items():
        left, top = x - BOX / 2, y - HIGH / 2
        boxes.append(f'<rect x="{left:.0f}" y="{top:.0f}" width="{BOX}" height="{HIGH}" rx="6"/>')
        boxes.append(f'<text x="{x:.0f}" y="{y + 5:.0f}">{escape(name)}</text>')
    high = 30 + ROW * (len(rows) - 1) + 60
    caption = (
        f"{graph.number_of_nodes()} folders, {graph.number_of_edges()} arrows, no cycle; implied arrows are left out"
    )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {high}" role="img" aria-label="{caption}">
<style>
  path {{ fill: none; stroke: #7f8ea3; stroke-width: 1.3; marker-end: url(#tip) }}
  rect {{ fill: #eef4fb; stroke: #0072b2; stroke-width: 1.3 }}
  text {{ font: 14px system-ui, sans-serif; text-anchor: middle; fill: #14324a }}
  .caption {{ font-size: 12px; fill: #5c6b7d }}
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" style="fill:#7f8ea3;stroke:none"/></marker></defs>
<rect x="0" y="0" width="{WIDTH}" height="{high}" style="fill:#ffffff;stroke:none"/>
{chr(10).join(arrows)}
{chr(10).join(boxes)}
<text class="caption" x="{WIDTH / 2:.0f}" y="{high - 12}">{caption}</text>
</svg>
"""


def main() -> int:
    graph, rows = folders(), layers()
    if unknown := set(graph) - {name for row in rows for name in row}:
        print(f"Folders without a layer in pyproject.toml: {', '.join(sorted(unknown))}")  # noqa: T201
        return 1
    if not nx.is_directed_acyclic_graph(graph):
        print(f"A cycle of imports: {' -> '.join(here for here, _ in nx.find_cycle(graph))}")  # noqa: T201
        return 1
    drawn, file = picture(graph, rows), ROOT / "docs" / "images" / "architecture.svg"
    if "--check" in sys.argv[1:]:
        if file.read_text(encoding="utf-8") != drawn:
            print(f"{file.name} is not the picture of this code: run python docs/imports.py")  # noqa: T201
            return 1
    else:
        file.write_text(drawn, encoding="utf-8")
    print(f"{graph.number_of_nodes()} folders, {graph.number_of_edges()} arrows, no cycle")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
