"""What trains an edit: rows or adapters as leaves, one loop, Fisher information, covariances."""

from typing import TYPE_CHECKING

from mechunlearn.core.lazy import lazy

if TYPE_CHECKING:
    from mechunlearn.training.adapters import LowRank as LowRank
    from mechunlearn.training.covariance import Covariance as Covariance
    from mechunlearn.training.fisher import DiagonalFisher as DiagonalFisher
    from mechunlearn.training.inputs import Sequences as Sequences
    from mechunlearn.training.loop import Schedule as Schedule
    from mechunlearn.training.parameterizations import SelectedRows as SelectedRows
    from mechunlearn.training.solve import Spectrum as Spectrum
else:
    lazy(__name__)
