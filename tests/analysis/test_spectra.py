"""Spectra, their null, and halves of a collection, against dense stacks."""

import numpy as np
import oracle
import pytest
import torch
from scipy.linalg import subspace_angles

from eigenlorax.adapter import LoRAFactors
from eigenlorax.analysis import spectra
from eigenlorax.basis import chooser
from eigenlorax.subspace import FitOptions, ModuleStack, delta_square
from made import of_one_subspace, random
from planted import factors_in, orthonormal, random_factors
from reference import dense, fit_delta, top_rows

N_OUT, N_IN = 41, 29


def members(n, *, make=None, ranks=(2, 3, 4)):
    make = make or (lambda rank, seed: random_factors(rank, N_OUT, N_IN, seed=seed, scaling=-1.5))
    factors = [make(ranks[i % len(ranks)], 100 * i) for i in range(n)]
    return factors, [delta_square(f) ** -0.5 for f in factors]


class TestNull:
    def test_has_ranks_norms_and_shapes_and_nothing_else(self):
        factors, _ = members(5)
        factors[2] = LoRAFactors(factors[2].down.half(), factors[2].up.half() * 0.01, 1e-3)
        found = spectra.gaussian_like(factors, torch.Generator().manual_seed(3))
        for one, other in zip(factors, found, strict=True):
            assert (one.down.shape, one.up.shape) == (other.down.shape, other.up.shape)
            assert np.linalg.norm(dense(other)) == pytest.approx(np.linalg.norm(dense(one)), rel=1e-9)
            assert abs((dense(one) * dense(other)).sum()) < 0.2 * np.square(dense(one)).sum()

    def test_is_of_the_generator(self):
        factors, _ = members(3)
        made = [spectra.gaussian_like(factors, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
        assert torch.equal(made[0][1].down, made[1][1].down)
        assert not torch.equal(made[0][1].down, made[2][1].down)

    def test_random_adapters_look_like_it_and_those_of_one_subspace_do_not(self):
        module = "layer.0.query"
        for collection, alike in ((random(12), True), (of_one_subspace(12), False)):
            factors = [one[module] for one in collection]
            weights = [delta_square(f) ** -0.5 for f in factors]
            null = spectra.gaussian_like(factors, torch.Generator().manual_seed(1))
            first, second = (
                np.cumsum(spectra.shares(stack.first(chooser(6, None))[0].singular_values, 6))
                for stack in (ModuleStack(f, weights, FitOptions(n_components=6)) for f in (factors, null))
            )
            assert (np.abs(first - second).max() < 0.03) == alike
            assert alike or first[5] > 0.999


class TestShares:
    @pytest.mark.parametrize("most", [3, 100])
    def test_of_squares(self, most):
        factors, weights = members(6)
        stack = ModuleStack(factors, weights, FitOptions(n_components=4))
        _, sigma = top_rows(np.concatenate([w * dense(f) for f, w in zip(factors, weights, strict=True)]), 1)
        found = spectra.shares(stack.first(chooser(4, None))[0].singular_values, most)
        expected = (np.square(sigma) / np.square(sigma).sum())[:most].tolist()
        assert found == pytest.approx(expected[: len(found)], rel=1e-9, abs=1e-13)
        # with as many rows as the stack has; all beyond is zero
        assert sum(found) == pytest.approx(sum(expected))

    def test_of_nothing(self):
        assert spectra.shares(torch.zeros(3), 2) == [0.0, 0.0]


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
            assert spectra.degrees(got[side]) == pytest.approx(angles.tolist(), abs=1e-5)
            assert bool((got[side].diff() <= 0).all())

    def test_of_one_subspace_agree(self):
        bases = orthonormal(5, N_IN, 1), orthonormal(6, N_OUT, 2)
        found = members(8, make=lambda rank, seed: factors_in(bases, rank, seed=seed))
        for angles, k in zip(spectra.halves(found, range(4), range(4, 8), (5, 6)), (5, 6), strict=True):
            assert spectra.degrees(angles) == pytest.approx([0.0] * k, abs=1e-5)

    def test_of_orthogonal_subspaces_do_not(self):
        right, left = orthonormal(6, N_IN, 1), orthonormal(6, N_OUT, 2)
        parts = [(right[:3], left[:3]), (right[3:], left[3:])]
        factors = [factors_in(parts[i % 2], 3, seed=10 * i) for i in range(6)]
        found = factors, [1.0] * 6
        for angles in spectra.halves(found, [0, 2, 4], [1, 3, 5], (3, 3)):
            assert spectra.degrees(angles) == pytest.approx([90.0] * 3)

    def test_of_fewer_directions_than_asked_for(self):
        found = members(4, ranks=(2,))
        got = spectra.halves(found, [0], [1, 2, 3], (7, 9))
        assert [len(angles) for angles in got] == [2, 2]

    def test_without_anybody_or_any_direction(self):
        found = members(3)
        assert [len(angles) for angles in spectra.halves(found, [], [0, 1, 2], (3, 3))] == [0, 0]
        assert [len(angles) for angles in spectra.halves(found, [0], [1, 2], (0, 2))] == [0, 2]


class TestEnergy:
    def test_of_updates(self):
        found, k = members(7), (4, 6)
        _, _, right_sigma, left_sigma = fit_delta([dense(f) for f in found[0]], found[1], 6, 0)
        expected = [
            np.square(sigma[:size]).sum() / np.square(sigma).sum()
            for sigma, size in ((right_sigma, k[0]), (left_sigma, k[1]))
        ]
        assert spectra.energy(found, k, "delta") == pytest.approx(expected, rel=1e-9)

    def test_of_factors_at_equal_norm(self):
        (factors, weights), k = members(7), (4, 6)
        factors[3] = LoRAFactors(factors[3].down * 1e8, factors[3].up * 1e-5, 7.0)
        expected = []
        for side, size in zip(("down", "up"), k, strict=True):
            rows = [oracle.rows(f, side) for f in factors]
            _, sigma = top_rows(np.concatenate([one / np.linalg.norm(one) for one in rows]), 1)
            expected.append(np.square(sigma[:size]).sum() / np.square(sigma).sum())
        assert spectra.energy((factors, weights), k, "factors") == pytest.approx(expected, rel=1e-9)

    def test_of_a_planted_subspace_is_all(self):
        bases = orthonormal(5, N_IN, 1), orthonormal(6, N_OUT, 2)
        found = members(8, make=lambda rank, seed: factors_in(bases, rank, seed=seed))
        for weighting in ("delta", "factors"):
            assert spectra.energy(found, (5, 6), weighting) == pytest.approx((1.0, 1.0))
            assert max(spectra.energy(found, (4, 5), weighting)) < 0.999


def test_a_start_in_common_is_energy_of_a_and_not_of_updates():
    """What the report weighs with and without: r directions hold all of A where it is the untouched start."""
    start = random_factors(3, N_OUT, N_IN, seed=1).down
    factors = [LoRAFactors(start, random_factors(3, N_OUT, N_IN, seed=10 * i).up, 1.0) for i in range(8)]
    found = factors, [delta_square(f) ** -0.5 for f in factors]
    a, b = spectra.energy(found, (3, 3), "factors")
    assert a == pytest.approx(1.0)
    assert b < 0.5
