"""Find where a language model keeps a fact, change it there and nowhere else, and prove that it is gone."""

from typing import TYPE_CHECKING

from mechunlearn.core.lazy import lazy

if TYPE_CHECKING:
    from mechunlearn import artifacts as artifacts
    from mechunlearn import attack as attack
    from mechunlearn import benchmarks as benchmarks
    from mechunlearn import edit as edit
    from mechunlearn import evaluation as evaluation
    from mechunlearn import facts as facts
    from mechunlearn import features as features
    from mechunlearn import localize as localize
    from mechunlearn import metrics as metrics
    from mechunlearn import model as model
    from mechunlearn import patching as patching
    from mechunlearn import plots as plots
    from mechunlearn import training as training
    from mechunlearn.artifacts.circuit import Circuit as Circuit
    from mechunlearn.artifacts.localization import Localization as Localization
    from mechunlearn.artifacts.mask import ComponentMask as ComponentMask
    from mechunlearn.artifacts.weight_edit import Edit as Edit
    from mechunlearn.artifacts.weight_edit import WeightEdit as WeightEdit
    from mechunlearn.core.version import __version__ as __version__
    from mechunlearn.errors import MechunlearnError as MechunlearnError
    from mechunlearn.evaluation.compare import compare as compare
    from mechunlearn.evaluation.evaluate import evaluate as evaluate
    from mechunlearn.evaluation.report import Report as Report
    from mechunlearn.evaluation.workflow import edit_facts as edit_facts
    from mechunlearn.explore.widget import explore as explore
    from mechunlearn.facts.dataset import FactDataset as FactDataset
    from mechunlearn.facts.load import load_facts as load_facts
    from mechunlearn.facts.prompts import Prompts as Prompts
    from mechunlearn.features.dictionaries import load_dictionary as load_dictionary
    from mechunlearn.features.feature_edit import FeatureEdit as FeatureEdit
    from mechunlearn.features.feature_edit import load_edit as load_edit
    from mechunlearn.model.component import Component as Component
    from mechunlearn.model.hooked import HookedModel as HookedModel
    from mechunlearn.model.hooked import load_model as load_model
else:
    lazy(__name__)
