"""What methods give and take: masks, localizations, circuits, weight edits."""

from typing import TYPE_CHECKING

from mechunlearn.core.lazy import lazy

if TYPE_CHECKING:
    from mechunlearn.artifacts.circuit import Circuit as Circuit
    from mechunlearn.artifacts.localization import Localization as Localization
    from mechunlearn.artifacts.mask import ComponentMask as ComponentMask
    from mechunlearn.artifacts.overlap import auroc as auroc
    from mechunlearn.artifacts.overlap import jaccard_at as jaccard_at
    from mechunlearn.artifacts.overlap import layer_auroc as layer_auroc
    from mechunlearn.artifacts.overlap import overlap as overlap
    from mechunlearn.artifacts.restrict import Restriction as Restriction
    from mechunlearn.artifacts.weight_edit import Edit as Edit
    from mechunlearn.artifacts.weight_edit import WeightEdit as WeightEdit
else:
    lazy(__name__)
