"""From a method's scores to a `Localization` of this model."""

from collections.abc import Mapping

from torch import Tensor

from mechunlearn.components import Localization
from mechunlearn.hooked import HookedModel
from mechunlearn.runcard import RunCard


def localization(
    model: HookedModel, scores: Mapping[str, Tensor], card: RunCard, evidence: dict | None = None, note: str = ""
) -> Localization:
    """Add what every localization says of its model: weights per unit and all editable weights."""
    unit_weights = {kind: model.unit_weights(kind) for kind in model.layout.kinds}
    total = sum(
        weights * (model.signature.units(kind) or 0) * model.signature.layers for kind, weights in unit_weights.items()
    )
    return Localization(scores, model.signature, unit_weights, total, card, evidence or {}, note)
