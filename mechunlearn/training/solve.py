"""Linear algebra of closed-form weight updates: ridge solutions, their norms over a path, projections.

Everything takes second moments (`[unit other]`, symmetric) and products of keys with residuals (`[unit d_model]`),
never the facts themselves, so memory does not depend on how many there are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

from mechunlearn.errors import MechunlearnError

JITTERS = (0.0, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6)
REFINED, MOST_REFINEMENTS = 1e-13, 8
STRIPS, SMALL = 8, 512  # strips of rows that a second moment is computed in, none of fewer rows than SMALL
TOKENS = 4096  # rows of keys that are multiplied at a time


def add_products(total: Float[Tensor, "unit other"], k: Float[Tensor, "token unit"]) -> None:
    """Add k^T k on and above the diagonal, in strips of rows that begin at the diagonal; `symmetric` fills in the rest.

    Args:
        total: What is added to.
        k: Rows; products are of their dtype, and of float32 at least.
    """
    size = max(SMALL, -(-len(total) // STRIPS))
    for rows in torch.split(k, TOKENS):
        wide = rows.to(torch.promote_types(k.dtype, torch.float32))
        for start in range(0, len(total), size):
            total[start : start + size, start:] += wide[:, start : start + size].mT @ wide[:, start:]


def symmetric(upper: Float[Tensor, "unit other"]) -> Float[Tensor, "unit other"]:
    """Return the symmetric matrix of which this is the part on and above the diagonal.

    Args:
        upper: That part; what is below the diagonal is not read.

    >>> total = torch.zeros(2, 2)
    >>> add_products(total, torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    >>> symmetric(total).tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """
    return upper.triu() + upper.triu(1).mT


def cholesky(matrix: Float[Tensor, "unit unit"]) -> tuple[Float[Tensor, "unit unit"], float]:
    """Return the lower factor of a positive matrix, and the jitter (a share of the mean diagonal) that it took.

    Args:
        matrix: Symmetric.

    Raises:
        MechunlearnError: If 1e-6 of the mean diagonal is not enough.
    """
    scale = float(matrix.diagonal().mean())
    for jitter in JITTERS:
        shifted = matrix + jitter * scale * torch.eye(len(matrix)).to(matrix) if jitter else matrix
        lower, info = torch.linalg.cholesky_ex(shifted)
        if not info.any():
            return lower, jitter
    raise MechunlearnError(
        f"A matrix of {len(matrix)} units is singular: {JITTERS[-1]:g} of its mean diagonal ({scale:.2g}) added to the "
        "diagonal "
        "is not enough. Collect the covariance from more text, or raise covariance_weight."
    )


def solve(
    matrix: Float[Tensor, "unit unit"], right: Float[Tensor, "unit column"], mixed: bool | None = None
) -> tuple[Float[Tensor, "unit column"], float]:
    """Return matrix^-1 right for a symmetric positive matrix in float64, and the jitter that it took.

    Args:
        matrix: Symmetric and positive.
        right: Right-hand sides.
        mixed: Factorise in float32 and refine with float64 residuals, falling back to a float64 factorisation where
            that does not come to 1e-10; by default on a GPU.

    Raises:
        MechunlearnError: For a singular matrix.

    >>> matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    >>> [round(x, 12) for x in solve(matrix, torch.ones(2, 1, dtype=torch.float64))[0].flatten().tolist()]
    [0.181818181818, 0.272727272727]
    """
    if mixed is None:
        mixed = matrix.is_cuda
    if mixed:
        found = _refined(matrix, right)
        if found is not None:
            return found, 0.0
    lower, jitter = cholesky(matrix)
    return torch.cholesky_solve(right, lower), jitter


def _refined(matrix: Tensor, right: Tensor) -> Tensor | None:
    """Return the solution by a float32 factorisation, if it comes to float64 accuracy."""
    scale = matrix.diagonal().rsqrt()
    lower, info = torch.linalg.cholesky_ex((scale[:, None] * matrix * scale).float())
    if info.any():
        return None
    found, size, before = torch.zeros_like(right), float(right.norm()), math.inf
    for _ in range(MOST_REFINEMENTS):
        residual = right - matrix @ found
        error = float(residual.norm()) / size if size else 0.0
        if error <= REFINED or error > before / 2:
            break
        before = error
        found = found + scale[:, None] * torch.cholesky_solve((scale[:, None] * residual).float(), lower).double()
    return found if error <= 1e-10 else None


@dataclass(frozen=True)
class Spectrum:
    """Generalised eigenpairs of (gram, covariance): basis^T covariance basis = 1, basis^T gram basis = diag(values).

    One decomposition gives every ridge solution (weight * covariance + gram)^-1 cross, its norm in O(unit^2), and the
    whole path of gradient ascent.

    Attributes:
        values: The eigenvalues.
        rotation: Q = L^T basis.
        lower: The Cholesky factor L of the covariance.
        jitter: What it took (see `cholesky`).
    """

    values: Float[Tensor, " unit"]
    rotation: Float[Tensor, "unit unit"]
    lower: Float[Tensor, "unit unit"]
    jitter: float

    @classmethod
    def of(cls, gram: Float[Tensor, "unit unit"], covariance: Float[Tensor, "unit unit"]) -> "Spectrum":
        """Return the eigenpairs.

        Args:
            gram: K K^T.
            covariance: C.

        Raises:
            MechunlearnError: For a singular covariance.
        """
        lower, jitter = cholesky(covariance)
        half = torch.linalg.solve_triangular(lower, gram, upper=False)
        whitened = torch.linalg.solve_triangular(lower, half.T, upper=False)
        values, rotation = torch.linalg.eigh((whitened + whitened.T) / 2)
        return cls(values.clamp_min(0), rotation, lower, jitter)

    @property
    def basis(self) -> Float[Tensor, "unit unit"]:
        """The generalised eigenvectors, as columns."""
        basis: Tensor = torch.linalg.solve_triangular(self.lower.T, self.rotation, upper=True)
        return basis

    def norms(self, cross: Float[Tensor, "unit column"]) -> Callable[[float], float]:
        """Return the Frobenius norm of the ridge solution as a function of the weight of C.

        Args:
            cross: K R^T.
        """
        basis = self.basis
        coefficients = basis.T @ cross
        pairs = (basis.T @ basis) * (coefficients @ coefficients.T)

        def norm(weight: float) -> float:
            weights = 1 / (weight + self.values)
            return math.sqrt(max(float(weights @ pairs @ weights), 0.0))

        return norm

    def ascended(self, change: Float[Tensor, "row unit"], growth: float) -> Float[Tensor, "row unit"]:
        """Return where gradient ascent on ||D K||_F^2 at constant tr(D C D^T) takes a change D, in closed form.

        In whitened coordinates X = D L the flow is dX/dt = 2 X M with M = L^-1 K K^T L^-T, so X(t) = X exp(2 t M),
        here of the norm of X again. t is such that the strongest direction grows `growth` times as much as one
        without keys: 1 leaves D as it is, infinity leaves the strongest direction alone (rank one).

        Args:
            change: D.
            growth: How many times as much the strongest direction grows.
        """
        start = change @ self.lower @ self.rotation
        share = self.values / self.values.max().clamp_min(torch.finfo(self.values.dtype).tiny)
        grown = start * torch.exp((share - 1) * math.log(growth))
        grown = grown * (start.norm() / grown.norm().clamp_min(torch.finfo(grown.dtype).tiny))
        moved: Tensor = torch.linalg.solve_triangular(self.lower, grown @ self.rotation.T, upper=False, left=False)
        return moved


def within_band(
    norm: Callable[[float], float], start: float, band: tuple[float, float], floor: float = 1e-8
) -> tuple[float, bool]:
    """Return the weight of C nearest to `start` at which the norm of the solution lies in a band, and whether it does.

    Where the norm stays below the band down to `floor * start`, it is that smallest weight and False.

    Args:
        norm: The norm as a function of the weight, which falls (`Spectrum.norms`).
        start: Where the search begins.
        band: The least and the largest norm.
        floor: How far the search goes, as a share of `start`.

    >>> weight, reached = within_band(lambda weight: 1 / weight, 100.0, (0.5, 2.0))
    >>> round(weight, 6), reached
    (2.0, True)
    """
    low, high = band
    at, now = float(start), norm(float(start))
    if low <= now <= high:
        return at, True
    edge, factor = (high, 2.0) if now > high else (low, 0.5)
    while (now > high) if factor > 1 else (now < low):
        before, at = at, at * factor
        now = norm(at)
        if at < floor * start or at > start / floor:
            return at, False
    found = brentq(lambda weight: norm(weight) - edge, *sorted((before, at)), xtol=1e-14 * at, rtol=1e-13)
    return float(found), True


def null_space(covariance: Float[Tensor, "unit unit"], energy: float) -> Float[Tensor, "unit _null"]:
    """Return an orthonormal basis of the directions of least energy that together hold at most this share of the trace.

    A share of the whole, so it means the same for any model and scale of text.

    Args:
        covariance: C.
        energy: The share.

    >>> null_space(torch.diag(torch.tensor([10.0, 1e-3, 5.0])).double(), 0.01).abs().flatten().tolist()
    [0.0, 1.0, 0.0]
    """
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0)
    basis: Tensor = vectors[:, values.cumsum(0) <= energy * values.sum()]
    return basis
