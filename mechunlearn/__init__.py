"""Find where a language model keeps a fact, change it there and nowhere else, and prove that it is gone."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mechunlearn.circuit import Circuit as Circuit
    from mechunlearn.components import Component as Component
    from mechunlearn.components import ComponentMask as ComponentMask
    from mechunlearn.components import Localization as Localization
    from mechunlearn.edits import Edit as Edit
    from mechunlearn.edits import WeightEdit as WeightEdit
    from mechunlearn.errors import MechunlearnError as MechunlearnError
    from mechunlearn.evaluation import evaluate as evaluate
    from mechunlearn.facts import FactDataset as FactDataset
    from mechunlearn.facts import load_facts as load_facts
    from mechunlearn.feature_edits import FeatureEdit as FeatureEdit
    from mechunlearn.hooked import HookedModel as HookedModel
    from mechunlearn.hooked import load_model as load_model
    from mechunlearn.prompts import Prompts as Prompts
    from mechunlearn.report import Report as Report
    from mechunlearn.workflow import edit_facts as edit_facts

_HOMES = {
    "Circuit": "circuit",
    "Component": "components",
    "ComponentMask": "components",
    "Localization": "components",
    "Edit": "edits",
    "WeightEdit": "edits",
    "MechunlearnError": "errors",
    "evaluate": "evaluation",
    "FactDataset": "facts",
    "load_facts": "facts",
    "FeatureEdit": "feature_edits",
    "HookedModel": "hooked",
    "load_model": "hooked",
    "Prompts": "prompts",
    "Report": "report",
    "edit_facts": "workflow",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Import a noun when it is first used, so that `mechunlearn --help` does not pay for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mechunlearn' has no attribute '{name}'")
    found = getattr(importlib.import_module(f"mechunlearn.{_HOMES[name]}"), name)
    globals()[name] = found
    return found
