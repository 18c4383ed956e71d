"""The maps of the explorer: scores by layer and site, by layer and head, and whole layers by token role."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from mechunlearn.artifacts.localization import Localization
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.facts.prompts import ROLES, Prompts
from mechunlearn.model.component import Component

MAPS = {
    "site": "layers and sites",
    "head": "layers and heads",
    "mlp_out": "MLPs by token role",
    "attn_out": "attention by token role",
}
WHOLE = {"mlp_out": "mlp.out", "attn_out": "attn.o"}


def by_site(found: Localization, mask: ComponentMask) -> dict[str, Any]:
    """Draw one row a kind of site: the score of each site.

    Args:
        found: The localization.
        mask: What is selected.

    Returns:
        Names of `rows` and `columns` (layers), `values`, the component behind each of the `cells`, the share of it
        that is `selected`, and `what` the values are.
    """
    kinds = sorted({Component.parse(site).kind for site in found.scores}, key=lambda kind: Component(0, kind))
    cells = [[f"L{layer}.{kind}" for layer in range(found.signature.layers)] for kind in kinds]
    values = [[whole(found.scores[site]) if site in found.scores else None for site in row] for row in cells]
    what = "score of a site: the sum over its units, or its own where it was scored as a whole"
    return _map(kinds, values, cells, mask, what)


def by_head(found: Localization, mask: ComponentMask) -> dict[str, Any]:
    """Draw one row a head: the score of its output in each layer.

    Args:
        found: The localization.
        mask: What is selected.

    Returns:
        A map as of `by_site`.
    """
    heads, layers = range(found.signature.heads), range(found.signature.layers)
    outputs = [found.scores.get(f"L{layer}.attn.o") for layer in layers]
    values = [[None if scores is None else float(scores[head]) for scores in outputs] for head in heads]
    cells = [[f"L{layer}.attn.o[{head}]" for layer in layers] for head in heads]
    return _map([f"head {head}" for head in heads], values, cells, mask, "score of a head")


def by_role(found: Localization, kind: str, facts: Prompts, metric: str, mask: ComponentMask) -> dict[str, Any]:
    """Draw one row a token role: whole MLPs or attention layers, patched at its tokens.

    Args:
        found: Activation patching of this kind, by role.
        kind: `mlp_out` or `attn_out`.
        facts: What was patched; roles that they do not have are left out.
        metric: The name of what was measured.
        mask: What is selected.

    Returns:
        A map as of `by_site`.
    """
    here = {ROLES[i] for i in facts.roles.flatten().tolist()}
    layers, roles = range(found.signature.layers), [i for i, role in enumerate(found.roles) if role in here]
    values = [[float(found.by_role[f"L{layer}.{kind}"][role, 0]) for layer in layers] for role in roles]
    cells = [[f"L{layer}.{WHOLE[kind]}" for layer in layers] for _ in roles]
    what = f"change of the {metric.replace('_', ' ')} with the corrupt activation at these tokens"
    return _map([found.roles[role] for role in roles], values, cells, mask, what)


def whole(scores: Float[Tensor, " unit"]) -> float:
    """Give a site's score: its units share one where it was scored as a whole, else their sum.

    Args:
        scores: Of its units.
    """
    return float(scores[0] if len(scores) > 1 and (scores == scores[0]).all() else scores.sum())


def _map(rows: list[str], values: list[Any], cells: list[list[str]], mask: ComponentMask, what: str) -> dict[str, Any]:
    selected = [[_selected(cell, mask) for cell in row] for row in cells]
    columns = list(range(mask.signature.layers))
    return {"rows": rows, "columns": columns, "values": values, "cells": cells, "selected": selected, "what": what}


def _selected(component: str, mask: ComponentMask) -> float:
    """The share of a component that is in the mask."""
    address = Component.parse(component)
    chosen = mask.sites.get(address.site)
    if chosen is None:
        return 0.0
    return float(chosen.float().mean() if address.unit is None else chosen[address.unit])
