"""Directions that bases miss of new updates: planted answers, dense searches, laws."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from eigenlorax.core import extension
from eigenlorax.core.adapter import LoRAFactors, delta_square
from eigenlorax.core.basis import Basis
from eigenlorax.core.subspace import ModuleBases
from planted import TOLERANCE, normal, orthonormal, random_factors

N_OUT, N_IN, K_DOWN, K_UP = 41, 29, 5, 6


def basis(rows, dtype=torch.float64):
    return Basis(rows.to(dtype), torch.zeros(0), energy=1.0)


def bases(dtype=torch.float64, k_down=K_DOWN, k_up=K_UP):
    return ModuleBases(basis(orthonormal(k_down, N_IN, 1), dtype), basis(orthonormal(k_up, N_OUT, 2), dtype))


def outside(side, n, seed):
    """Orthonormal rows beside those of a basis."""
    clean = torch.linalg.qr(side.components.double().mT)[0].mT
    rows = normal(n, side.dimension, seed=seed)
    return torch.linalg.qr((rows - (rows @ clean.mT) @ clean).mT)[0].mT


def planted(there, sigmas, *, rank=3, seed=0, scaling=2.0):
    """An update with `rank` random directions in the spans, and beside them one with these singular values; factors
    in a gauge of their own."""
    q = len(sigmas)
    down = torch.cat(
        [normal(rank, there.down.k, seed=seed) @ there.down.components.double(), outside(there.down, q, seed + 1)]
    )
    up = torch.cat(
        [
            normal(rank, there.up.k, seed=seed + 2) @ there.up.components.double(),
            torch.tensor(sigmas, dtype=torch.float64)[:, None] * outside(there.up, q, seed + 3) / scaling,
        ]
    ).mT
    gauge = normal(rank + q, rank + q, seed=seed + 4)
    return LoRAFactors(torch.linalg.inv(gauge) @ down, up @ gauge, scaling)


def extended(there, rows):
    return ModuleBases(
        *(basis(torch.cat([s.components.double(), r])) for s, r in zip((there.down, there.up), rows, strict=True))
    )


def lost(factors, there):
    """‖D − P_U D P_V‖², by dense matrices."""
    down, up = (torch.linalg.qr(s.components.double().mT)[0].mT.numpy() for s in (there.down, there.up))
    delta = reference.dense(factors)
    return float(np.square(delta - reference.projected(delta, down, up)).sum())


def unit(factors):
    return delta_square(factors) ** -0.5


class TestOneUpdate:
    SIGMAS = (3.0, 2.0, 0.7, 0.1)

    @pytest.mark.parametrize("most", [4, 5, 20])
    def test_as_many_directions_as_are_missing_make_it_exact(self, most):
        there = bases()
        one = planted(there, self.SIGMAS)
        rows = extension.missing_components([one], [unit(one)], there, most)
        assert [len(side) for side in rows] == [4, 4]
        assert lost(one, extended(there, rows)) < 1e-20 * delta_square(one)

    @pytest.mark.parametrize("most", [1, 2, 3])
    def test_fewer_are_the_leading_ones_where_what_is_missing_lies_apart(self, most):
        there = bases()
        one = planted(there, self.SIGMAS)
        rows = extension.missing_components([one], [unit(one)], there, most)
        assert [len(side) for side in rows] == [most, most]
        wanted = sum(sigma**2 for sigma in self.SIGMAS[most:])
        assert lost(one, extended(there, rows)) == pytest.approx(wanted, rel=1e-10)

    def test_only_the_side_that_misses_something_grows(self):
        there = bases()
        inside = normal(3, K_DOWN, seed=1) @ there.down.components
        one = LoRAFactors(inside, normal(N_OUT, 3, seed=2), 1.0)
        down, up = extension.missing_components([one], [1.0], there, 2)
        assert (down.shape, up.shape) == ((0, N_IN), (2, N_OUT))
        down, up = extension.missing_components([one], [1.0], there, 3)
        assert lost(one, extended(there, (down, up))) < 1e-20 * delta_square(one)

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_what_lies_in_the_span_but_for_rounding_misses_nothing(self, dtype):
        there = bases(dtype)
        down = normal(7, K_DOWN, seed=1) @ there.down.components.double()
        up = (normal(7, K_UP, seed=2) @ there.up.components.double()).mT
        one = LoRAFactors(down.to(dtype), up.to(dtype).contiguous(), 1.0)
        assert [len(side) for side in extension.missing_components([one], [1.0], there, 4)] == [0, 0]

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_rows_are_orthonormal_beside_those_as_stored(self, dtype):
        there, one = bases(dtype), random_factors(4, N_OUT, N_IN, seed=3)
        for rows, side in zip(
            extension.missing_components([one], [1.0], there, 3), (there.down, there.up), strict=True
        ):
            torch.testing.assert_close(rows @ rows.mT, torch.eye(3, dtype=torch.float64), atol=1e-13, rtol=0)
            assert float((rows @ side.components.double().mT).abs().max()) < 1e-13

    def test_a_module_without_components_gets_its_first(self):
        there = bases(k_down=0, k_up=0)
        one = random_factors(4, N_OUT, N_IN, seed=3)
        rows = extension.missing_components([one], [unit(one)], there, 2)
        sigma = torch.linalg.svdvals(torch.from_numpy(reference.dense(one)))
        assert lost(one, extended(there, rows)) == pytest.approx(float(sigma[2:].square().sum()), rel=1e-10)

    def test_no_more_than_the_dimension_has_room_for(self):
        there = bases(k_down=N_IN - 1)
        rows = extension.missing_components([random_factors(4, N_OUT, N_IN, seed=3)], [1.0], there, 3)
        assert [len(side) for side in rows] == [1, 3]
        full = bases(k_down=N_IN)
        assert len(extension.missing_components([random_factors(4, N_OUT, N_IN, seed=3)], [1.0], full, 3)[0]) == 0

    def test_the_gauge_does_not_matter(self):
        there, one = bases(), random_factors(4, N_OUT, N_IN, seed=3)
        gauge = normal(4, 4, seed=9)
        other = LoRAFactors(torch.linalg.inv(gauge) @ one.down, one.up @ gauge, one.scaling)
        for rows, same in zip(*(extension.missing_components([f], [1.0], there, 2) for f in (one, other)), strict=True):
            torch.testing.assert_close(rows.mT @ rows, same.mT @ same, atol=1e-8, rtol=0)


class TestSeveral:
    @pytest.mark.parametrize("shared", [0.1, 1.0])
    @pytest.mark.parametrize(("n", "most"), [(1, 2), (3, 2), (5, 4)])
    def test_no_search_from_random_directions_finds_much_better_ones(self, n, most, shared):
        there = bases()
        some = [mixed(there, seed=10 * i, shared=shared) for i in range(n)]
        weights = [unit(one) for one in some]

        def total(rows):
            return sum(w**2 * lost(one, extended(there, rows)) for w, one in zip(weights, some, strict=True))

        before = total((torch.zeros(0, N_IN), torch.zeros(0, N_OUT)))
        best = min(total(search(there, some, weights, most, seed)) for seed in range(12))
        # of what can be gained at all
        assert total(extension.missing_components(some, weights, there, most)) - best <= 5e-3 * (before - best)

    def test_weights_say_whose_directions_come_first(self):
        there = bases()
        loud, quiet = planted(there, (4.0,), seed=10), planted(there, (1.0,), seed=20)
        for weights, first in (((1.0, 1.0), loud), ((1.0, 8.0), quiet)):
            rows = extension.missing_components([loud, quiet], weights, there, 1)
            assert lost(first, extended(there, rows)) < 0.3

    @given(seed=st.integers(0, 10**6), n=st.integers(1, 4), most=st.integers(1, 6))
    @settings(max_examples=25, deadline=None)
    def test_more_directions_keep_more_and_none_lose(self, seed, n, most):
        there = bases()
        some = [random_factors(1 + i, N_OUT, N_IN, seed=seed + i, size=10.0**i) for i in range(n)]
        weights = [unit(one) for one in some]
        less, more = (extended(there, extension.missing_components(some, weights, there, m)) for m in (most, most + 1))
        for one in some:
            assert lost(one, less) <= lost(one, there) * (1 + 1e-9)
        sums = [sum(w**2 * lost(one, b) for w, one in zip(weights, some, strict=True)) for b in (less, more)]
        assert sums[1] <= sums[0] * (1 + 1e-2)


def mixed(there, *, seed, shared, rank=4):
    """An update partly in the spans, with what is outside falling off."""
    fall = [torch.logspace(0, -1, d, dtype=torch.float64) for d in (N_IN, N_OUT)]
    down = shared * normal(rank, K_DOWN, seed=seed) @ there.down.components + fall[0] * normal(
        rank, N_IN, seed=seed + 1
    )
    up = shared * normal(rank, K_UP, seed=seed + 2) @ there.up.components + fall[1] * normal(rank, N_OUT, seed=seed + 3)
    return LoRAFactors(down, up.mT.contiguous(), 2.0)


def search(there, some, weights, most, seed):
    """Alternating dense SVDs from random directions until they stand still."""
    deltas = [w * torch.from_numpy(reference.dense(one)) for w, one in zip(weights, some, strict=True)]
    up = outside(there.up, most, 1000 + seed)
    for _ in range(60):
        left = torch.cat([there.up.components, up])
        down = leading(torch.cat([left @ delta for delta in deltas]), there.down.components, most)
        right = torch.cat([there.down.components, down])
        up = leading(torch.cat([right @ delta.mT for delta in deltas]), there.up.components, most)
    return down, up


def leading(rows, clean, most):
    return torch.linalg.svd(rows - (rows @ clean.mT) @ clean, full_matrices=False)[2][:most]
