"""Exact patching and what rests on it: sweeps, edges, paths, relevance rules, faithfulness."""

from typing import TYPE_CHECKING

from mechunlearn.core.lazy import lazy

if TYPE_CHECKING:
    from mechunlearn.patching.cost import BUDGET as BUDGET
    from mechunlearn.patching.cost import Cost as Cost
    from mechunlearn.patching.cost import preview as preview
    from mechunlearn.patching.faithfulness import faithfulness as faithfulness
    from mechunlearn.patching.faithfulness import faithfulness_curve as faithfulness_curve
    from mechunlearn.patching.faithfulness import mask_faithfulness as mask_faithfulness
    from mechunlearn.patching.faithfulness import stability as stability
    from mechunlearn.patching.sweep import Effects as Effects
    from mechunlearn.patching.sweep import effects as effects
else:
    lazy(__name__)
