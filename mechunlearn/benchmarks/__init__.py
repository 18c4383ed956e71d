"""The benchmarks of unlearning and model editing: their data as typed rows, their metrics, one table a model."""

from typing import TYPE_CHECKING

from mechunlearn.core.lazy import lazy

if TYPE_CHECKING:
    from mechunlearn.benchmarks import counterfact as counterfact
    from mechunlearn.benchmarks import mquake as mquake
    from mechunlearn.benchmarks import muse as muse
    from mechunlearn.benchmarks import rwku as rwku
    from mechunlearn.benchmarks import tofu as tofu
    from mechunlearn.benchmarks import wmdp as wmdp
    from mechunlearn.benchmarks import zsre as zsre
    from mechunlearn.benchmarks.scores import Scores as Scores
else:
    lazy(__name__)
