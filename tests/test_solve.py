"""Solutions equal those of a plain float64 solver, and the path in closed form that of many small steps of ascent."""

import math
from itertools import pairwise

import pytest
import torch

from mechunlearn import MechunlearnError
from mechunlearn.training.solve import Spectrum, cholesky, null_space, solve, within_band

UNITS, COLUMNS = 24, 5


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_condition(condition: float, units: int = UNITS) -> torch.Tensor:
    """A positive matrix with this condition number, in a rotated basis and with rows of unlike size."""
    basis = torch.linalg.qr(normal(units, units)).Q
    return basis @ torch.logspace(0, -math.log10(condition), units, dtype=torch.float64).diag() @ basis.T


@pytest.fixture
def problem():
    """Keys, residuals and a covariance: gram = K K^T and cross = K R^T."""
    keys, residuals = normal(UNITS, 9, seed=1), normal(COLUMNS, 9, seed=2)
    stream = normal(UNITS, 4 * UNITS, seed=3) * torch.linspace(0.2, 2, UNITS, dtype=torch.float64)[:, None]
    return keys @ keys.T, keys @ residuals.T, stream @ stream.T / stream.shape[1]


class TestSolve:
    @pytest.mark.parametrize("mixed", [True, False, None])
    @pytest.mark.parametrize("condition", [10, 1e6])
    def test_it_equals_a_plain_solver(self, condition, mixed):
        matrix, right = of_condition(condition), normal(UNITS, COLUMNS, seed=4)
        found, jitter = solve(matrix, right, mixed)
        wanted = torch.linalg.solve(matrix, right)
        assert (found - wanted).norm() <= 1e-9 * wanted.norm() and jitter == 0

    def test_mixed_precision_is_really_used_and_refined(self, monkeypatch):
        """A float32 factorisation alone is off by far more than what comes back."""
        matrix, right = of_condition(1e4), normal(UNITS, COLUMNS, seed=4)
        kinds = []
        factorise = torch.linalg.cholesky_ex
        monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda m: kinds.append(m.dtype) or factorise(m))
        found, _ = solve(matrix, right, mixed=True)
        assert kinds == [torch.float32]
        wanted = torch.linalg.solve(matrix, right)
        lower = factorise(matrix.float()).L
        coarse = torch.cholesky_solve(right.float(), lower).double()
        assert (coarse - wanted).norm() > 1e-6 * wanted.norm()
        assert (found - wanted).norm() <= 1e-10 * wanted.norm()

    @pytest.mark.parametrize("scale", [1e-60, 1e60])
    def test_mixed_precision_works_where_float32_alone_would_overflow(self, scale):
        matrix, right = of_condition(1e3), normal(UNITS, COLUMNS, seed=4)
        found, jitter = solve(scale * matrix, scale * right, mixed=True)
        wanted = torch.linalg.solve(matrix, right)
        assert (found - wanted).norm() <= 1e-10 * wanted.norm() and jitter == 0
        assert not torch.equal(found, solve(scale * matrix, scale * right, mixed=False)[0]), "no fallback was needed"

    @pytest.mark.parametrize("condition", [1e8, 1e11])
    def test_it_falls_back_where_refinement_does_not_converge(self, condition):
        """The first has a float32 factor, the second has none."""
        matrix, right = of_condition(condition), normal(UNITS, COLUMNS)
        mixed, plain = solve(matrix, right, mixed=True), solve(matrix, right, mixed=False)
        assert torch.equal(mixed[0], plain[0]) and mixed[1] == plain[1] == 0

    def test_zero_on_the_right_gives_zero(self):
        for mixed in (True, False):
            found, jitter = solve(of_condition(10), torch.zeros(UNITS, COLUMNS, dtype=torch.float64), mixed)
            assert not found.any() and jitter == 0

    def test_the_jitter_of_a_singular_matrix_is_reported(self):
        keys = normal(UNITS, 3)
        matrix = keys @ keys.T
        for mixed in (True, False):
            found, jitter = solve(matrix, keys, mixed)
            assert 0 < jitter <= 1e-6
            # a jitter of a share of the mean diagonal, not of a number that is right for one scale only
            scaled, again = solve(1e8 * matrix, keys, mixed)
            assert again == jitter
            torch.testing.assert_close(1e8 * matrix @ scaled, matrix @ found, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(matrix @ found, keys, atol=1e-3, rtol=1e-3)

    def test_a_matrix_that_no_jitter_helps_is_refused(self):
        with pytest.raises(MechunlearnError, match="24 units is singular: 1e-06 of its mean diagonal .*more text"):
            cholesky(torch.eye(UNITS, dtype=torch.float64) - 0.5 * torch.ones(UNITS, UNITS, dtype=torch.float64))


class TestSpectrum:
    def test_it_diagonalises_both(self, problem):
        gram, _, covariance = problem
        spectrum = Spectrum.of(gram, covariance)
        basis = spectrum.basis
        torch.testing.assert_close(basis.T @ covariance @ basis, torch.eye(UNITS).double(), atol=1e-10, rtol=0)
        torch.testing.assert_close(basis.T @ gram @ basis, spectrum.values.diag(), atol=1e-8, rtol=0)
        assert (spectrum.values >= 0).all() and int((spectrum.values > 1e-9).sum()) == 9 and spectrum.jitter == 0

    def test_norms_are_those_of_direct_solutions(self, problem):
        gram, cross, covariance = problem
        norm = Spectrum.of(gram, covariance).norms(cross)
        for strength in (1e-3, 0.3, 1.0, 70.0, 20_000.0, 1e8):
            wanted = torch.linalg.solve(strength * covariance + gram, cross).norm()
            assert norm(strength) == pytest.approx(float(wanted), rel=1e-9)

    def test_the_path_is_that_of_projected_gradient_ascent(self, problem):
        """max ||D K||^2 with tr(D C D^T) held, by small steps in X = D L."""
        gram, cross, covariance = problem
        growth, steps = 2.0, 40_000
        change = torch.linalg.solve(covariance + gram, cross).T
        spectrum = Spectrum.of(gram, covariance)
        lower = torch.linalg.cholesky(covariance)
        whitened = torch.linalg.solve(lower, torch.linalg.solve(lower, gram).T)
        x = (change @ lower).requires_grad_()
        keys = torch.linalg.cholesky(gram + 1e-12 * torch.eye(UNITS))
        gradient = torch.autograd.grad((x @ torch.linalg.inv(lower) @ keys).square().sum(), x)[0]
        torch.testing.assert_close(gradient, 2 * x.detach() @ whitened, atol=1e-6, rtol=1e-6)
        rate = math.log(growth) / (2 * float(torch.linalg.eigvalsh(whitened).max())) / steps
        x = x.detach().clone()
        radius = x.norm()
        for _ in range(steps):
            x = x + rate * 2 * x @ whitened
            x = x * (radius / x.norm())
        found = spectrum.ascended(change, growth) @ lower
        assert (found - x).norm() <= 2e-5 * radius
        assert (found - change @ lower).norm() > 1e-2 * radius, "the path leads somewhere"

    def test_it_climbs_at_constant_energy(self, problem):
        gram, cross, covariance = problem
        change = torch.linalg.solve(covariance + gram, cross).T
        spectrum = Spectrum.of(gram, covariance)

        def energy(d):
            return float((d @ covariance @ d.T).trace())

        def objective(d):
            return float((d @ gram @ d.T).trace())

        torch.testing.assert_close(spectrum.ascended(change, 1), change, atol=1e-12, rtol=1e-10)
        path = [spectrum.ascended(change, growth) for growth in (1, 1.5, 2, 5, 100, 1e6, 1e29)]
        assert [energy(d) for d in path] == pytest.approx([energy(change)] * len(path), rel=1e-9)
        heights = [objective(d) for d in path]
        assert all(after > before for before, after in pairwise(heights))
        assert heights[-1] == pytest.approx(float(spectrum.values.max()) * energy(change), rel=1e-6)
        singular = torch.linalg.svdvals(path[-1])
        assert singular[1] < 1e-4 * singular[0], "its limit has rank one"
        assert torch.linalg.svdvals(change)[1] > 1e-2 * torch.linalg.svdvals(change)[0]

    def test_nothing_to_climb_is_no_accident(self, problem):
        """A change of zero, and keys of zero."""
        gram, cross, covariance = problem
        zero = torch.zeros(COLUMNS, UNITS, dtype=torch.float64)
        assert torch.equal(Spectrum.of(gram, covariance).ascended(zero, 2), zero)
        nothing = Spectrum.of(torch.zeros_like(gram), covariance)
        torch.testing.assert_close(nothing.ascended(cross.T, 5), cross.T, atol=1e-12, rtol=1e-9)

    def test_a_singular_covariance_takes_a_jitter(self, problem):
        gram, cross, _ = problem
        few = normal(UNITS, 6)
        spectrum = Spectrum.of(gram, few @ few.T)
        assert 0 < spectrum.jitter <= 1e-6 and math.isfinite(spectrum.norms(cross)(1.0))


class TestWithinBand:
    @staticmethod
    def inverse(strength: float) -> float:
        return 10 / (1 + strength)

    @pytest.mark.parametrize(
        "start, band, wanted",
        [
            (4.0, (1.0, 3.0), 4.0),  # norm 2: stays
            (1.0, (1.0, 2.0), 4.0),  # norm 5: up to the upper edge
            (99.0, (1.0, 2.0), 9.0),  # norm 0.1: down to the lower edge
            (1e-3, (0.2, 0.25), 39.0),
            (1e5, (5.0, 6.0), 1.0),
        ],
    )
    def test_the_nearest_strength_up_and_down(self, start, band, wanted):
        found, reached = within_band(self.inverse, start, band)
        assert reached and found == pytest.approx(wanted, rel=1e-10)
        assert band[0] * (1 - 1e-9) <= self.inverse(found) <= band[1] * (1 + 1e-9)

    @pytest.mark.parametrize("start", [1e-3, 1.0, 1e4])
    def test_a_band_of_no_width_is_one_norm(self, start):
        found, reached = within_band(self.inverse, start, (2.0, 2.0))
        assert reached and found == pytest.approx(4.0, rel=1e-9)

    def test_out_of_reach(self):
        """The norm never gets above 10: the smallest strength, within the floor, and False."""
        found, reached = within_band(self.inverse, 100.0, (20.0, 30.0))
        assert not reached and 1e-8 * 100 / 2 <= found < 1e-8 * 100
        assert within_band(lambda strength: 0.0, 1.0, (1.0, 2.0))[1] is False
        found, reached = within_band(lambda strength: 5.0, 1.0, (1.0, 2.0))
        assert not reached and found > 1e8

    def test_asked_no_more_than_needed(self):
        calls = []
        within_band(lambda s: calls.append(s) or self.inverse(s), 4.0, (1.0, 3.0))
        assert calls == [4.0]


class TestNullSpace:
    def test_directions_of_least_energy_up_to_a_share_of_all(self):
        basis = torch.linalg.qr(normal(5, 5)).Q
        covariance = basis @ torch.tensor([1.0, 2.0, 3.0, 14.0, 80.0]).double().diag() @ basis.T
        for energy, count in ((0.009, 0), (0.0101, 1), (0.031, 2), (0.0601, 3), (0.19, 3), (0.201, 4), (0.999, 4)):
            found = null_space(covariance, energy)
            assert found.shape == (5, count)
            torch.testing.assert_close(found @ found.T, basis[:, :count] @ basis[:, :count].T, atol=1e-10, rtol=0)

    @pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e9])
    def test_the_threshold_is_relative(self, scale):
        covariance = of_condition(1e4)
        wanted = null_space(covariance, 0.02)
        found = null_space(scale * covariance, 0.02)
        assert 0 < wanted.shape[1] == found.shape[1] < UNITS
        torch.testing.assert_close(found @ found.T, wanted @ wanted.T, atol=1e-8, rtol=0)

    def test_what_text_never_uses_counts_as_nothing(self):
        """Rounding gives eigenvalues below zero, which do not make room for others."""
        used = normal(UNITS, 4)
        found = null_space(used @ used.T, 1e-9)
        assert found.shape[1] == UNITS - 4 and float((found.T @ used).norm()) < 1e-6
