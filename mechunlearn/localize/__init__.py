"""Localizers: `(model, prompts, *, ...) -> Localization`, one a file."""

from mechunlearn.localize.activation_patching import activation_patching as activation_patching
from mechunlearn.localize.attribution_patching import attribution_patching as attribution_patching
from mechunlearn.localize.fact_lookup import fact_lookup as fact_lookup
from mechunlearn.localize.random_units import random_units as random_units
