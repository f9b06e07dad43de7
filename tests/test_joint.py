"""Joint diagonalisation finds what was planted, never gets worse, and loses what dense matrices say it loses."""

from itertools import pairwise

import joint
import numpy as np
import pytest
import torch

from eigenlorax.core.batch import delta_squares, pad_factors, scaled_batch
from made import awkward
from planted import MODULES, factors_in, normal, orthonormal, random_factors
from reference import dense, fit_delta, objective

QUERY, _ = MODULES
N_OUT, N_IN = MODULES[QUERY]


def collection(n=9, rank=3, noise=None):
    """Of one module, ranks that differ."""
    return [random_factors(rank + i % 2, N_OUT, N_IN, seed=10 * i, size=1 + i) for i in range(n)]


def unit(one):
    return delta_squares(one).clamp_min(1e-300).rsqrt() * (delta_squares(one) > 0)


def dense_of(found, i):
    """What comes back of adapter i, (out, in)."""
    core = found.cores[i] if found.cores.ndim == 3 else torch.diag(found.cores[i])
    return (found.up.mT @ core @ found.down).numpy()


def square(matrix):
    return float(np.square(matrix).sum())


def relative(found, one):
    return (found.lost / delta_squares(one)).sqrt()


def with_diagonal_cores(n, k, seed=3):
    """D_i = Σ_k s_ik u_k v_kᵀ, of factors that are not orthogonal; the factors too."""
    down, up, cores = normal(k, N_IN, seed=seed), normal(k, N_OUT, seed=seed + 1), normal(n, k, seed=seed + 2)
    made = scaled_batch(
        down.expand(n, k, N_IN).clone(), cores[:, :, None] * up, torch.ones(n, dtype=torch.float64), (k,) * n
    )
    return made, down, up


class TestFull:
    @pytest.mark.parametrize("k", [1, 4, 11])
    def test_agrees_with_many_sweeps_of_dense_svds(self, k):
        made = collection()
        one = pad_factors(made, N_IN, N_OUT)
        weights = unit(one)
        found = joint.full(one, weights, k, tolerance=1e-12)
        right, left, _, _ = fit_delta([dense(f) for f in made], weights.tolist(), k, 300)
        expected = objective([dense(f) for f in made], weights.tolist(), right, left)
        assert float((weights.square() * found.lost).sum()) == pytest.approx(expected, rel=1e-6)

    def test_lost_and_cores_are_those_of_dense_matrices(self):
        made = [one.get(QUERY) for one in awkward()]
        one = pad_factors(made, N_IN, N_OUT)
        found = joint.full(one, unit(one), 5)
        for side in (found.down, found.up):
            torch.testing.assert_close(side @ side.mT, torch.eye(5).double(), atol=1e-10, rtol=0)
        for i, factors in enumerate(made):
            update = dense(factors) if factors is not None else np.zeros((N_OUT, N_IN))
            assert float(found.lost[i]) == pytest.approx(square(update - dense_of(found, i)), rel=1e-9)
            np.testing.assert_allclose(found.up.numpy() @ update @ found.down.numpy().T, found.cores[i], rtol=1e-7)

    def test_a_planted_pair_of_bases_is_found(self):
        bases = orthonormal(6, N_IN, 1), orthonormal(6, N_OUT, 2)
        one = pad_factors([factors_in(bases, 3, seed=20 * i) for i in range(8)], N_IN, N_OUT)
        found = joint.full(one, unit(one), 6)
        assert float(relative(found, one).max()) < 1e-9
        for planted, side in zip(bases, (found.down, found.up), strict=True):
            torch.testing.assert_close(side.mT @ side, planted.mT @ planted, atol=1e-9, rtol=0)

    def test_no_more_rows_than_there_are_directions(self):
        one = pad_factors(collection(2), N_IN, N_OUT)
        found = joint.full(one, unit(one), 100)
        assert (len(found.down), len(found.up)) == (7, 7)
        assert float(relative(found, one).max()) < 1e-7

    def test_rounds_never_lose_more(self):
        one = pad_factors(collection(), N_IN, N_OUT)
        weights = unit(one)
        lost = [float((weights.square() * joint.full(one, weights, 6, rounds=r).lost).sum()) for r in range(12)]
        assert all(after <= before * (1 + 1e-12) for before, after in pairwise(lost))
        assert lost[5] < lost[0] * (1 - 1e-4)

    def test_it_goes_on_from_a_start(self):
        one = pad_factors(collection(), N_IN, N_OUT)
        weights = unit(one)
        start = orthonormal(6, N_IN, 5), orthonormal(6, N_OUT, 6)
        kept = [
            float((weights.square() * joint.full(one, weights, 6, start=start, rounds=r).lost).sum())
            for r in (0, 1, 40)
        ]
        assert kept[0] > kept[1] > kept[2]

    def test_wide_sides_are_searched_and_give_the_same(self, monkeypatch):
        one = pad_factors([random_factors(5, N_OUT, N_IN, seed=10 * i) for i in range(12)], N_IN, N_OUT)
        weights = unit(one)
        narrow = joint.full(one, weights, 4)
        monkeypatch.setattr(joint, "_WIDE", 16)
        wide = joint.full(one, weights, 4)
        assert float(wide.lost.sum()) == pytest.approx(float(narrow.lost.sum()), rel=1e-5)

    def test_who_has_no_weight_has_no_say(self):
        one = pad_factors(collection(), N_IN, N_OUT)
        weights = unit(one)
        weights[0] = 0
        found, without = joint.full(one, weights, 5), joint.full(one.select(range(1, 9)), weights[1:], 5)
        torch.testing.assert_close(found.lost[1:], without.lost)
        assert float(found.lost[0]) > 0


class TestDiagonal:
    @pytest.mark.parametrize("n", [2, 12])
    def test_planted_factors_are_found(self, n):
        one, down, up = with_diagonal_cores(n, 5)
        found = joint.diagonal(one, unit(one), 5)
        assert float(relative(found, one).max()) < 1e-6
        for planted, side in ((down, found.down), (up, found.up)):
            alike = (torch.nn.functional.normalize(planted) @ side.mT).abs()
            # each is one of those planted, up to its sign
            assert alike.amax(1).tolist() == pytest.approx([1.0] * 5, abs=1e-9)

    def test_lost_is_that_of_dense_matrices(self):
        made = [one.get(QUERY) for one in awkward()]
        one = pad_factors(made, N_IN, N_OUT)
        found = joint.diagonal(one, unit(one), 9, rounds=30)
        assert torch.linalg.vector_norm(found.down, dim=1).tolist() == pytest.approx([1.0] * 9)
        for i, factors in enumerate(made):
            update = dense(factors) if factors is not None else np.zeros((N_OUT, N_IN))
            scale = square(update)
            assert float(found.lost[i]) == pytest.approx(
                square(update - dense_of(found, i)), rel=1e-6, abs=1e-9 * scale
            )

    def test_rounds_never_lose_more_and_full_cores_lose_less(self):
        one = pad_factors(collection(), N_IN, N_OUT)
        weights = unit(one)
        lost = [
            float((weights.square() * joint.diagonal(one, weights, 8, rounds=r).lost).sum()) for r in (6, 7, 9, 20, 60)
        ]
        assert all(after <= before * (1 + 1e-9) for before, after in pairwise(lost))
        assert float((weights.square() * joint.full(one, weights, 8).lost).sum()) < lost[-1]

    def test_as_many_as_all_ranks_lose_nothing(self):
        made = collection()
        one = pad_factors(made, N_IN, N_OUT)
        found = joint.diagonal(one, unit(one), 100)
        assert len(found.down) == sum(f.down.shape[0] for f in made)
        assert float(relative(found, one).max()) < 1e-5

    def test_the_best_cores_between_given_factors(self):
        one = pad_factors(collection(3), N_IN, N_OUT)
        rows = normal(4, N_IN, seed=1), normal(4, N_OUT, seed=2)
        found = joint.in_diagonal(one, rows)
        design = torch.stack([torch.outer(u, v).flatten() for v, u in zip(*rows, strict=True)], dim=1)
        updates = (one.up.mT @ one.down).flatten(1)
        expected = torch.linalg.lstsq(design, updates.mT).solution.mT
        torch.testing.assert_close(found.cores, expected, rtol=1e-8, atol=1e-10)


def test_singular_directions_are_those_of_dense_svds():
    made = [one.get(QUERY) for one in awkward()]
    down, up, sigma = joint.singular_rows(pad_factors(made, N_IN, N_OUT))
    for i, factors in enumerate(made):
        update = dense(factors) if factors is not None else np.zeros((N_OUT, N_IN))
        expected = np.linalg.svd(update, compute_uv=False)[: sigma.shape[1]]
        scale = max(expected[0], 1e-300)
        np.testing.assert_allclose(sigma[i].numpy() / scale, expected / scale, atol=1e-7)
        back = (up[i].mT * sigma[i]) @ down[i]
        np.testing.assert_allclose(back.numpy() / scale, update / scale, atol=1e-6)
