"""What the explorer tells of one component: its score, its effects, what it attends to or is active on, its units."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechunlearn.artifacts.localization import Localization
from mechunlearn.artifacts.mask import ComponentMask
from mechunlearn.errors import MechunlearnError
from mechunlearn.explore.maps import whole
from mechunlearn.facts.prompts import ROLES, Prompts
from mechunlearn.features.dashboard import pieces
from mechunlearn.metrics.answers import Metric
from mechunlearn.model.component import Component
from mechunlearn.model.hooked import HookedModel
from mechunlearn.patching.sweep import effects

UNITS = 12


def place_of(model: HookedModel, address: Component) -> str:
    """Find the site of a component's activation: a neuron's is what enters `mlp.out`.

    Args:
        model: The model.
        address: The component.

    Raises:
        MechunlearnError: The model has no such component.
    """
    if address.kind not in model.layout.kinds:
        raise MechunlearnError(
            f"'{address}' is no head or neuron of this model. Expected one such as L3.attn.o[1] or L2.mlp.out, of the "
            "kinds "
            f"{', '.join(model.layout.kinds)}."
        )
    return f"L{address.layer}.{'mlp.out' if address.kind in ('mlp.in', 'mlp.gate') else address.kind}"


def exact_effects(
    model: HookedModel, facts: Prompts, metric: Metric, place: str, units: Bool[Tensor, " unit"]
) -> tuple[Float[Tensor, " fact"], dict[str, float]]:
    """Patch some units of a site together.

    Args:
        model: The model.
        facts: The facts.
        metric: What is measured.
        place: The site.
        units: The units.

    Returns:
        The change of the metric by fact, and its mean by token role.
    """
    found = effects(model, facts, metric, [], by="role", only={place: units[None]})
    changes = found.by_site[place][:, 0]
    here = [role for role, name in enumerate(ROLES) if (facts.roles == role).any() and name != "padding"]
    return changes[0], {found.rows[i + 1]: float(changes[i + 1].mean()) for i in here}


def score_of(found: Localization, address: Component) -> dict[str, Any] | None:
    """Give a component's score, and of a unit its rank among all; None if it has none.

    Args:
        found: The localization.
        address: The component.
    """
    scores = found.scores.get(address.site)
    if scores is None:
        return None
    if address.unit is None:
        return {"value": whole(scores), "rank": None, "of": None}
    every = torch.cat([values.abs() for values in found.scores.values()])
    value = float(scores[address.unit])
    return {"value": value, "rank": int((every > abs(value)).sum()) + 1, "of": len(every)}


def units_of(found: Localization, mask: ComponentMask, address: Component) -> list[dict[str, Any]]:
    """List the units of a site with the largest scores.

    Args:
        found: The localization.
        mask: What is selected.
        address: The site.
    """
    none = torch.zeros(found.signature.units(address.kind) or 0)
    scores, chosen = found.scores.get(address.site, none), mask.sites.get(address.site, none)
    return [
        {"component": f"{address.site}[{unit}]", "score": float(scores[unit]), "selected": bool(chosen[unit])}
        for unit in scores.abs().argsort(descending=True, stable=True)[:UNITS].tolist()
    ]


def activations(model: HookedModel, facts: Prompts, row: int, place: str, unit: int) -> dict[str, Any]:
    """Give a neuron's activation at each token of one fact.

    Args:
        model: The model.
        facts: The facts.
        row: Which of them.
        place: The neuron's site.
        unit: Its number.
    """
    tokens = _tokens(facts, row)
    _, kept = model.cache(tokens, [place])
    return {"tokens": pieces(model, tokens[0].tolist()), "values": kept[place][0, :, unit].float().tolist()}


def attention(model: HookedModel, facts: Prompts, row: int, address: Component) -> dict[str, Any]:
    """Give a head's attention pattern on one fact.

    Args:
        model: The model.
        facts: The facts.
        row: Which of them.
        address: The head.
    """
    tokens = _tokens(facts, row)
    pattern = model.attention(tokens, address.layer)[0, address.unit].float()
    rounded = [[round(value, 3) for value in line] for line in pattern.tolist()]
    return {"tokens": pieces(model, tokens[0].tolist()), "pattern": rounded}


def fact_told(model: HookedModel, facts: Prompts, row: int) -> dict[str, str]:
    """Tell a fact as text in three parts and its answer, or its tokens where there is no text.

    Args:
        model: The model.
        facts: The facts.
        row: Which of them.
    """
    if not facts.queries:
        text = "".join(pieces(model, _tokens(facts, row)[0].tolist()))
        return {"before": text, "subject": "", "after": "", "answer": ""}
    asked = facts.queries[row]
    at = asked.prompt.rfind(asked.subject) if asked.subject else -1
    before, after = (asked.prompt[:at], asked.prompt[at + len(asked.subject) :]) if at >= 0 else (asked.prompt, "")
    return {"before": before, "subject": asked.subject, "after": after, "answer": asked.answer}


def named(address: Component) -> str:
    """Name a component in words.

    Args:
        address: The component.
    """
    attention = {"attn.o": "attention", "attn.q": "queries", "attn.k": "keys", "attn.v": "values"}
    if address.kind in attention:
        kind, head = attention[address.kind], "kv head" if address.kind in ("attn.k", "attn.v") else "head"
        one = f"{head} {address.unit}, {kind}, layer {address.layer}"
        return one if address.unit is not None else f"{kind} of layer {address.layer}"
    part = {"mlp.in": " (in)", "mlp.gate": " (gate)", "mlp.out": ""}[address.kind]
    one = f"neuron {address.unit}{part}, layer {address.layer}"
    return one if address.unit is not None else f"MLP of layer {address.layer}{part}"


def _tokens(facts: Prompts, row: int) -> Tensor:
    """The tokens of one fact without padding, `[1 pos]`."""
    return facts.tokens[row : row + 1, : int(facts.lengths[row])]
