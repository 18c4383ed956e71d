"""From a method's scores to a `Localization` of this model."""

from collections.abc import Mapping

from torch import Tensor

from mechunlearn.artifacts.localization import Localization
from mechunlearn.core.runcard import RunCard
from mechunlearn.model.hooked import HookedModel
from mechunlearn.model.layout import KINDS
from mechunlearn.patching.sweep import Effects

SAME = "no difference: clean and corrupt prompts are the same, so nothing can be found"
WHOLE = {"attn_out": "attn.o", "mlp_out": "mlp.out"}


def localization(
    model: HookedModel,
    scores: Mapping[str, Tensor],
    card: RunCard,
    evidence: dict | None = None,
    note: str = "",
    by_role: Mapping[str, Tensor] | None = None,
    roles: tuple[str, ...] = (),
) -> Localization:
    """Add what every localization says of its model: weights per unit and all editable weights."""
    unit_weights, total = editable(model)
    return Localization(scores, model.signature, unit_weights, total, card, evidence or {}, note, by_role or {}, roles)


def editable(model: HookedModel) -> tuple[dict[str, int], int]:
    """Weights of one unit of each kind, and all editable weights of the model."""
    unit_weights = {kind: model.unit_weights(kind) for kind in model.layout.kinds}
    units = {kind: model.signature.units(kind) or 0 for kind in unit_weights}
    return unit_weights, sum(unit_weights[kind] * units[kind] for kind in units) * model.signature.layers


def from_effects(model: HookedModel, found: Effects, card: RunCard, evidence: dict | None = None) -> Localization:
    """The mean effects over facts. A block's score goes to each of its neurons, a whole layer's to each of its units."""
    scores: dict[str, Tensor] = {}
    by_role: dict[str, Tensor] = {}
    for site, change in found.by_site.items():
        layer, kind = site.split(".", 1)
        rows, units = change.mean(-1), model.signature.units(WHOLE.get(kind, kind))
        if kind in KINDS and units is not None:
            rows = rows.repeat_interleave(found.neurons if kind == "mlp.out" else 1, dim=1)[:, :units]
        if units is not None:
            scores[f"{layer}.{WHOLE.get(kind, kind)}"] = rows[0].expand(units)
        if len(found.rows) > 1 or kind not in KINDS:
            by_role[site] = rows
    note = (
        f"{found.unchanged} facts have no corrupt partner that differs: they count as zero" if found.unchanged else ""
    )
    note = SAME if found.unchanged == len(found.clean) else note
    numbers = {"clean": float(found.clean.mean()), "corrupt": float(found.corrupt.mean())}
    return localization(
        model,
        scores,
        card,
        {**numbers, **(evidence or {})},
        note,
        by_role,
        found.rows if by_role else (),
    )
