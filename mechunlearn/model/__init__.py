"""A Hugging Face model with names for its parts, and hooks."""

from typing import TYPE_CHECKING

from mechunlearn.core.lazy import lazy

if TYPE_CHECKING:
    from mechunlearn.model.component import Component as Component
    from mechunlearn.model.decoder import Decoder as Decoder
    from mechunlearn.model.families import FAMILIES as FAMILIES
    from mechunlearn.model.families import Matrix as Matrix
    from mechunlearn.model.families import Modules as Modules
    from mechunlearn.model.families import register_family as register_family
    from mechunlearn.model.hooked import HookedModel as HookedModel
    from mechunlearn.model.hooked import load_model as load_model
    from mechunlearn.model.layout import Layout as Layout
    from mechunlearn.model.layout import Signature as Signature
else:
    lazy(__name__)
