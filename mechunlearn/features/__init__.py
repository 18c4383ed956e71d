"""Codebooks and sparse autoencoders: train, look at, intervene, edit."""

from typing import TYPE_CHECKING

from mechunlearn.core.lazy import lazy

if TYPE_CHECKING:
    from mechunlearn.features.codebook import Codebook as Codebook
    from mechunlearn.features.dashboard import Exploration as Exploration
    from mechunlearn.features.dashboard import explore_dictionary as explore_dictionary
    from mechunlearn.features.dictionaries import SAE as SAE
    from mechunlearn.features.dictionaries import Dictionary as Dictionary
    from mechunlearn.features.dictionaries import load_dictionary as load_dictionary
    from mechunlearn.features.dictionaries import spliced as spliced
    from mechunlearn.features.feature_edit import FeatureEdit as FeatureEdit
    from mechunlearn.features.feature_edit import FeaturePart as FeaturePart
    from mechunlearn.features.feature_edit import load_edit as load_edit
    from mechunlearn.features.firing import FiringStatistics as FiringStatistics
    from mechunlearn.features.firing import matched_mask as matched_mask
    from mechunlearn.features.firing import matched_units as matched_units
    from mechunlearn.features.firing import quality as quality
    from mechunlearn.features.firing import swapped as swapped
    from mechunlearn.features.training import train_codebook as train_codebook
    from mechunlearn.features.training import train_sae as train_sae
else:
    lazy(__name__)
