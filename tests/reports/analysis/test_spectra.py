"""Spectra and halves of a collection, against dense stacks."""

import numpy as np
import oracle
import pytest
import torch
from scipy.linalg import subspace_angles

from eigenlorax.core.adapter import LoRAFactors, delta_square
from eigenlorax.core.basis import component_rule
from eigenlorax.core.batch import pad_factors
from eigenlorax.core.exact_fit import ExactFit
from eigenlorax.core.fit_options import FitOptions
from eigenlorax.reports.analysis import spectra
from planted import factors_in, orthonormal, random_factors
from reference import dense, fit_delta, top_rows

N_OUT, N_IN = 41, 29


def members(n, *, make=None, ranks=(2, 3, 4)):
    make = make or (lambda rank, seed: random_factors(rank, N_OUT, N_IN, seed=seed, scaling=-1.5))
    factors = [make(ranks[i % len(ranks)], 100 * i) for i in range(n)]
    return factors, [delta_square(f) ** -0.5 for f in factors]


class TestShares:
    @pytest.mark.parametrize("most", [3, 100])
    def test_of_squares(self, most):
        factors, weights = members(6)
        module_fit = ExactFit.stack(factors, weights, FitOptions(n_components=4))
        _, sigma = top_rows(np.concatenate([w * dense(f) for f, w in zip(factors, weights, strict=True)]), 1)
        found = spectra.explained_ratios(module_fit.leading(component_rule(4, None))[0].singular_values, most)
        expected = (np.square(sigma) / np.square(sigma).sum())[:most].tolist()
        assert found == pytest.approx(expected[: len(found)], rel=1e-9, abs=1e-13)
        # with as many rows as the stack has; all beyond is zero
        assert sum(found) == pytest.approx(sum(expected))

    def test_of_nothing(self):
        assert spectra.explained_ratios(torch.zeros(3), 2) == [0.0, 0.0]


class TestHalves:
    @pytest.mark.parametrize("k", [(3, 4), (5, 2), (1, 1)])
    def test_angles_equal_those_of_dense_subspaces(self, k):
        found, first, second = members(9), [0, 3, 4, 8], [1, 2, 5, 6, 7]
        got = spectra.halves(found, first, second, k)
        expected = []
        for half in (first, second):
            deltas, weights = ([values[i] for i in half] for values in ([dense(f) for f in found[0]], found[1]))
            expected.append(fit_delta(deltas, weights, max(k), 0)[:2])
        for side in (0, 1):
            rows, other = (half[side][: k[side]] for half in expected)
            angles = np.degrees(np.sort(subspace_angles(rows.T, other.T)))
            assert spectra.degrees(got[side].cosines) == pytest.approx(angles.tolist(), abs=1e-5)
            assert bool((got[side].cosines.diff() <= 0).all())
            assert got[side].sizes == (k[side], k[side])

    def test_of_one_subspace_agree(self):
        bases = orthonormal(5, N_IN, 1), orthonormal(6, N_OUT, 2)
        found = members(8, make=lambda rank, seed: factors_in(bases, rank, seed=seed))
        for side, k in zip(spectra.halves(found, range(4), range(4, 8), (5, 6)), (5, 6), strict=True):
            assert spectra.degrees(side.cosines) == pytest.approx([0.0] * k, abs=1e-5)

    def test_of_orthogonal_subspaces_do_not(self):
        right, left = orthonormal(6, N_IN, 1), orthonormal(6, N_OUT, 2)
        parts = [(right[:3], left[:3]), (right[3:], left[3:])]
        factors = [factors_in(parts[i % 2], 3, seed=10 * i) for i in range(6)]
        found = factors, [1.0] * 6
        for side in spectra.halves(found, [0, 2, 4], [1, 3, 5], (3, 3)):
            assert spectra.degrees(side.cosines) == pytest.approx([90.0] * 3)

    def test_of_fewer_directions_than_asked_for(self):
        found = members(4, ranks=(2,))
        got = spectra.halves(found, [0], [1, 2, 3], (7, 9))
        assert [len(side.cosines) for side in got] == [2, 2]
        assert [side.sizes for side in got] == [(2, 6), (2, 6)]

    def test_without_anybody_or_any_direction(self):
        found = members(3)
        assert [len(side.cosines) for side in spectra.halves(found, [], [0, 1, 2], (3, 3))] == [0, 0]
        assert [len(side.cosines) for side in spectra.halves(found, [0], [1, 2], (0, 2))] == [0, 2]


def energy(found, k, weighting):
    factors, weights = found
    return spectra.energy(pad_factors(factors, N_IN, N_OUT), torch.tensor(weights, dtype=torch.float64), k, weighting)


class TestEnergy:
    def test_of_updates(self):
        found, k = members(7), (4, 6)
        _, _, right_sigma, left_sigma = fit_delta([dense(f) for f in found[0]], found[1], 6, 0)
        expected = [
            np.square(sigma[:size]).sum() / np.square(sigma).sum()
            for sigma, size in ((right_sigma, k[0]), (left_sigma, k[1]))
        ]
        assert energy(found, k, "delta") == pytest.approx(expected, rel=1e-9)

    def test_of_factors_at_equal_norm(self):
        (factors, weights), k = members(7), (4, 6)
        factors[3] = LoRAFactors(factors[3].down * 1e8, factors[3].up * 1e-5, 7.0)
        expected = []
        for side, size in zip(("down", "up"), k, strict=True):
            rows = [oracle.rows(f, side) for f in factors]
            _, sigma = top_rows(np.concatenate([one / np.linalg.norm(one) for one in rows]), 1)
            expected.append(np.square(sigma[:size]).sum() / np.square(sigma).sum())
        assert energy((factors, weights), k, "factors") == pytest.approx(expected, rel=1e-9)

    def test_of_a_planted_subspace_is_all(self):
        bases = orthonormal(5, N_IN, 1), orthonormal(6, N_OUT, 2)
        found = members(8, make=lambda rank, seed: factors_in(bases, rank, seed=seed))
        for weighting in ("delta", "factors"):
            assert energy(found, (5, 6), weighting) == pytest.approx((1.0, 1.0))
            assert max(energy(found, (4, 5), weighting)) < 0.999


def test_a_start_in_common_is_energy_of_a_and_not_of_updates():
    """What the report weighs with and without: r directions hold all of A where it is the untouched start."""
    start = random_factors(3, N_OUT, N_IN, seed=1).down
    factors = [LoRAFactors(start, random_factors(3, N_OUT, N_IN, seed=10 * i).up, 1.0) for i in range(8)]
    found = factors, [delta_square(f) ** -0.5 for f in factors]
    a, b = energy(found, (3, 3), "factors")
    assert a == pytest.approx(1.0)
    assert b < 0.5
