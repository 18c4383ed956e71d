"""Editors: `(model, mask, forget, retain, *, ...) -> Edit`, one a file."""

from typing import TYPE_CHECKING

from mechunlearn.core.lazy import lazy

if TYPE_CHECKING:
    from mechunlearn.edit.codebook_delete import codebook_delete as codebook_delete
    from mechunlearn.edit.dictionary_rows import dictionary_rows as dictionary_rows
    from mechunlearn.edit.feature_clamp import feature_clamp as feature_clamp
    from mechunlearn.edit.fisher_lora import fisher_lora as fisher_lora
    from mechunlearn.edit.masked_gradient import masked_gradient as masked_gradient
    from mechunlearn.edit.memit import memit as memit
    from mechunlearn.edit.mlp_washing import mlp_washing as mlp_washing
    from mechunlearn.edit.null_space import null_space as null_space
else:
    lazy(__name__, methods=True)
