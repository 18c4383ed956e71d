"""How nouns show themselves in a notebook: a heading, a few facts, a small table.

Escaped, without scripts or styles.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

RULE = "border-bottom:1px solid rgba(128,128,128,.35)"
CELL = f"{RULE};padding:.15rem .8rem .15rem 0;text-align:left;vertical-align:top;background:none;color:inherit;font-weight:"


def unit_name(kind: str) -> str:
    """Return what one unit of a site is called.

    Args:
        kind: The kind of the site, such as `attn.o` or `sae:<id>`.

    >>> unit_name("attn.k"), unit_name("mlp.gate"), unit_name("sae:1f0a9c3e")
    ('kv head', 'neuron', 'feature')
    """
    if kind.startswith("attn."):
        return "kv head" if kind in ("attn.k", "attn.v") else "head"
    return {"sae": "feature", "codebook": "code"}.get(kind.split(":")[0], "neuron")


def listed(numbers: Iterable[int]) -> str:
    """Write numbers as runs.

    Args:
        numbers: In any order, also repeated.

    >>> listed([4, 0, 1, 2, 6])
    '0-2, 4, 6'
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def by_kind(sites: Iterable[tuple[int, str, int, int]]) -> list[tuple[str, str, int, int]]:
    """Sum the units of sites by kind, without the sites that have none selected.

    Args:
        sites: Layer, kind, number of selected units and number of units, a site.

    Returns:
        Kind, its layers as runs, selected units and units, a kind.

    >>> by_kind([(0, "mlp.out", 3, 64), (1, "mlp.out", 1, 64), (1, "attn.o", 0, 4)])
    [('mlp.out', '0-1', 4, 128)]
    """
    found: dict[str, tuple[list[int], list[int], list[int]]] = {}
    for layer, kind, selected, units in sites:
        if selected:
            for held, value in zip(found.setdefault(kind, ([], [], [])), (layer, selected, units)):
                held.append(value)
    return [(kind, listed(layers), sum(some), sum(units)) for kind, (layers, some, units) in found.items()]


def card(
    title: str, about: Mapping[str, object], columns: Sequence[str] = (), rows: Iterable[Sequence[object]] = ()
) -> str:
    """Return the HTML of one noun. All text is escaped, and the colours are those of the page.

    Args:
        title: The heading.
        about: Facts by name, one a line; empty ones are left out.
        columns: The heads of the table.
        rows: The cells of the table, a row; without rows there is no table.

    >>> card("Mask", {"note": "<b>", "empty": ""}, ["site"], [["L0.mlp.out"]]).count("&lt;b&gt;")
    1
    """
    facts = "".join(
        f'<div><span style="opacity:.7">{escape(str(name))}:</span> {escape(str(value))}</div>'
        for name, value in about.items()
        if value not in ("", None)
    )
    head = "".join(f'<th style="{CELL}600">{escape(str(name))}</th>' for name in columns)
    cells = ("".join(f'<td style="{CELL}400">{escape(str(value))}</td>' for value in row) for row in rows)
    body = "".join(f'<tr style="background:none">{row}</tr>' for row in cells)
    table = (
        f'<table style="border-collapse:collapse;margin:.4rem 0 0;font-size:.9em"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
        if body
        else ""
    )
    return (
        '<div style="font:13px/1.5 system-ui,sans-serif;color:inherit;overflow-x:auto">'
        f'<div style="font-weight:600;font-size:15px">{escape(title)}</div>{facts}{table}</div>'
    )
