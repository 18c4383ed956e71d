"""Localizers: `(model, prompts, *, ...) -> Localization`, one a file."""

from typing import TYPE_CHECKING

from mechunlearn.core.lazy import lazy

if TYPE_CHECKING:
    from mechunlearn.localize.activation_patching import activation_patching as activation_patching
    from mechunlearn.localize.attribution_patching import attribution_patching as attribution_patching
    from mechunlearn.localize.causal_tracing import causal_tracing as causal_tracing
    from mechunlearn.localize.direct_logit_attribution import direct_logit_attribution as direct_logit_attribution
    from mechunlearn.localize.edge_attribution import edge_attribution as edge_attribution
    from mechunlearn.localize.edge_patching import edge_patching as edge_patching
    from mechunlearn.localize.fact_lookup import fact_lookup as fact_lookup
    from mechunlearn.localize.feature_discovery import feature_discovery as feature_discovery
    from mechunlearn.localize.logit_lens import logit_lens as logit_lens
    from mechunlearn.localize.path_patching import path_patching as path_patching
    from mechunlearn.localize.random_units import random_units as random_units
else:
    lazy(__name__, methods=True)
