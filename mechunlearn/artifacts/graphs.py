"""Circuits in the formats of others: the graphs of the MIB circuit track (and EAP-IG), and DOT."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.artifacts.edges import described, edge_names, edges, readers, shared, writers
from mechunlearn.core.files import whole_file
from mechunlearn.core.tensors import reading
from mechunlearn.errors import MechunlearnError
from mechunlearn.model.layout import Signature

if TYPE_CHECKING:
    import networkx

POSITIVE, NEGATIVE = "#0072b2", "#d55e00"  # Okabe-Ito, as in plots


def _config(signature: Signature, parallel: bool) -> dict[str, int | bool]:
    sizes = {"n_layers": signature.layers, "n_heads": signature.heads, "d_model": signature.d_model}
    return {**sizes, "parallel_attn_mlp": parallel}


def mib_graph(
    signature: Signature,
    parallel: bool,
    scores: Float[Tensor, "writer reader"],
    chosen: Bool[Tensor, "writer reader"],
) -> dict[str, Any]:
    """Return the graph that the MIB circuit track and EAP-IG read: all edges, and which are in the circuit.

    Args:
        signature: The architecture, with a key and a value for each query head.
        parallel: Whether the MLP of a layer reads what its attention reads.
        scores: How much each edge matters.
        chosen: Which edges are in the circuit.

    Returns:
        An object for JSON.
    """
    valid, inside = edges(signature, parallel), set(edge_names(signature, chosen))
    names = edge_names(signature, valid)
    touched = {"logits", *(end.partition("<")[0] for name in inside for end in name.split("->"))}
    return {
        "cfg": _config(signature, parallel),
        "nodes": {node: {"in_graph": node in touched} for node in [*writers(signature), "logits"]},
        "edges": {n: {"score": score, "in_graph": n in inside} for n, score in zip(names, scores[valid].tolist())},
    }


def read_mib(
    source: Mapping[str, Any] | str | Path, signature: Signature, parallel: bool
) -> tuple[Float[Tensor, "writer reader"], Bool[Tensor, "writer reader"]]:
    """Read a graph of the MIB circuit track or EAP-IG.

    Args:
        source: A JSON file or a dict: a graph, or `{edge name: score}`.
        signature: The architecture.
        parallel: Whether the MLP of a layer reads what its attention reads.

    Returns:
        Scores and choice; those of the query heads of a group are summed.

    Raises:
        MechunlearnError: If the file is not whole, is of another architecture, or names an edge that this one lacks.
    """
    where, data = "the given circuit", source
    if not isinstance(data, Mapping):
        where = f"'{source}'"
        with reading(str(source), "circuit file", "Expected JSON as `save_mib` or the MIB circuit track writes it."):
            data = json.loads(Path(str(source)).read_text(encoding="utf-8"))
            if not isinstance(data, dict):
                raise MechunlearnError(f"it holds a {type(data).__name__}, not an object")
    is_graph = isinstance(data.get("edges"), Mapping)
    entries: Mapping[str, Any] = data["edges"] if is_graph else data
    expected, config = _config(signature, parallel), data.get("cfg") if is_graph else None
    if isinstance(config, Mapping) and any(config.get(key, value) != value for key, value in expected.items()):
        raise MechunlearnError(f"{where} is of another architecture: its cfg is {dict(config)}, expected {expected}.")
    try:
        rows = [
            (float(entry.get("score", 0.0)), bool(entry["in_graph"])) if is_graph else (float(entry), True)
            for entry in entries.values()
        ]
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise MechunlearnError(
            f"{where} is no circuit as the MIB circuit track writes it ({type(error).__name__}: {error}). "
            'Expected {"a0.h0->logits": 0.5, ...}, or a graph whose edges have a score and in_graph.'
        ) from None
    whole = replace(signature, kv_heads=signature.heads)
    valid = edges(whole, parallel)
    place = {name: index for index, name in enumerate(edge_names(whole, valid))}
    unknown = next((name for name in entries if name not in place), None)
    if unknown is not None:
        raise MechunlearnError(
            f"{where} names '{unknown}', which is no edge of ({described(signature, parallel)}). "
            "Expected names such as 'input->a0.h0<q>', 'input->m0' or 'a0.h0->logits', the writer first."
        )
    table = torch.tensor(rows, dtype=torch.float64).view(-1, 2)
    if not table[:, 1].any():
        table[:, 1] = 1
    found = torch.zeros(*valid.shape, 2, dtype=torch.float64)
    found[tuple(valid.nonzero()[[place[name] for name in entries]].T)] = table
    grouped = found.new_zeros(len(valid), len(readers(signature)), 2).index_add_(1, shared(signature), found)
    return grouped[..., 0], grouped[..., 1] > 0


def network(frame: pd.DataFrame) -> "networkx.MultiDiGraph":
    """Make a graph for networkx, whose edges carry score, input and name, and are keyed by input.

    Args:
        frame: Source, target, input, score and name of every edge.
    """
    import networkx

    attributes = ["score", "input", "name"]
    return networkx.from_pandas_edgelist(frame, "source", "target", attributes, networkx.MultiDiGraph, edge_key="input")


def write_graph(path: Path, frame: pd.DataFrame) -> None:
    """Write edges for graph programs.

    Args:
        path: A name in `.dot`, else the file is GraphML.
        frame: Source, target, input, score and name of every edge.

    Raises:
        MechunlearnError: If the disk refuses.
    """
    with whole_file(path) as beside:
        if path.suffix == ".dot":
            beside.write_text(dot(frame.drop(columns="name")), encoding="utf-8")
        else:
            import networkx

            networkx.write_graphml(network(frame), beside, edge_id_from_attribute="name")


def dot(frame: pd.DataFrame) -> str:
    """Draw edges in DOT: colour is the sign of the score (blue positive, orange negative) and width its size.

    Args:
        frame: Source, target, input and score of every edge, as `Circuit.to_frame` gives them.
    """
    largest = float(frame.score.abs().max()) if len(frame) else 0.0
    lines = ["digraph circuit {", "  rankdir=BT;", "  node [shape=box];"]
    for source, target, one, score in frame.itertuples(index=False, name=None):
        width = 0.5 + 4.5 * abs(score) / (largest or 1.0)
        colour = POSITIVE if score >= 0 else NEGATIVE
        style = f'label="{one}", color="{colour}", penwidth={width:.3g}, tooltip="{score:+.4g}"'
        lines.append(f'  "{source}" -> "{target}" [{style}];')
    return "\n".join([*lines, "}"]) + "\n"
