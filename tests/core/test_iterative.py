"""The fit by rounds over chunks, against the exact one and dense matrices."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from eigenlorax.core import iterative, krylov
from eigenlorax.core.adapter import LoRAFactors, delta_square
from eigenlorax.core.batch import stack_factors
from eigenlorax.core.exact_fit import fit_module
from eigenlorax.core.fit_options import FitOptions
from planted import assert_same_span, factors_in, normal, orthonormal

OUT, IN, K = 190, 230, 9


def collection(n=60, ranks=(2, 5, 3), noise=0.05, seed=0, dtype=torch.float64, directions=30):
    """Adapters whose common directions decay in strength, and a part of their own."""
    strengths = torch.arange(1, directions + 1, dtype=torch.float64)[:, None] ** -0.8
    bases = (strengths * orthonormal(directions, IN, 1), strengths * orthonormal(directions, OUT, 2))
    found = []
    for index in range(n):
        one = factors_in(bases, ranks[index % len(ranks)], seed=seed + 10 * index, scaling=0.5 + index % 4, noise=noise)
        found.append(LoRAFactors(one.down.to(dtype), one.up.to(dtype), one.scaling))
    return found


def weights_of(factors):
    return [delta_square(f) ** -0.5 for f in factors]


def at_hand(factors, weights, size=16):
    """The chunks of a collection, by rank."""
    held = []
    for rank in sorted({f.spec.rank for f in factors}):
        members = [i for i, f in enumerate(factors) if f.spec.rank == rank]
        for start in range(0, len(members), size):
            part = members[start : start + size]
            one = stack_factors([factors[i] for i in part], [weights[i] for i in part])
            held.append(partial(lambda found: found, one))
    return held


def fitted(factors, weights=None, *, size=16, dtype=torch.float64, **options):
    held = at_hand(factors, weights or weights_of(factors), size)
    return iterative.fit(held, FitOptions(**{"n_components": K, **options}), "a.module", dtype=dtype)


def kept(factors, weights, bases):
    """Σ w²‖P_U D P_V‖², what a fit maximises, from whole matrices."""
    total = 0.0
    for one, weight in zip(factors, weights, strict=True):
        dense = weight * one.scaling * one.up.double() @ one.down.double()
        total += float((bases.up.components @ dense @ bases.down.components.mT).square().sum())
    return total


@pytest.fixture
def narrow(monkeypatch):
    """Blocks of a few columns, as many as such small modules have use for."""
    monkeypatch.setattr(krylov, "BLOCK", 6)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("weighting", ["delta", "factors"])
@pytest.mark.parametrize("noise", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_side_keeps_the_energy_of_the_exact_fit(weighting, noise, dtype):
    factors = collection(noise=noise)
    found = fitted(factors, weighting=weighting, sweeps=0, dtype=dtype)
    exact = fit_module(factors, weights_of(factors), FitOptions(n_components=K, weighting=weighting, sweeps=0))
    for side in ("down", "up"):
        one, other = found.side(side), exact.side(side)
        assert 0 <= other.energy - one.energy + 1e-6 < 1e-4
        assert other.energy - one.energy <= one.shortfall + 1e-6
        assert one.square == pytest.approx(other.square, rel=1e-6)
        torch.testing.assert_close(one.singular_values, other.singular_values[:K], rtol=1e-2, atol=0)
        torch.testing.assert_close(
            one.components @ one.components.mT, torch.eye(K, dtype=torch.float64), atol=1e-12, rtol=0
        )


@pytest.mark.usefixtures("narrow")
def test_energy_is_the_share_that_the_basis_keeps():
    factors = collection()
    weights = weights_of(factors)
    found = fitted(factors, weights, sweeps=2)
    lost = total = 0.0
    for one, weight in zip(factors, weights, strict=True):
        dense = weight * one.scaling * one.up @ one.down
        rows = found.down.components
        lost += float((dense - dense @ rows.mT @ rows).square().sum())
        total += float(dense.square().sum())
    assert found.down.energy == pytest.approx(1 - lost / total, abs=1e-9)
    assert found.down.square == pytest.approx(total, rel=1e-6)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("noise", [0.0, 0.05, 1.0])
def test_a_sweep_never_lowers_what_is_kept_and_comes_near_the_exact_ones(noise):
    factors = collection(noise=noise)
    weights = weights_of(factors)
    values = [kept(factors, weights, fitted(factors, weights, sweeps=n)) for n in range(4)]
    assert all(later >= earlier * (1 - 1e-9) for earlier, later in pairwise(values))
    exact = fit_module(factors, weights, FitOptions(n_components=K, sweeps=2))
    assert values[2] >= (1 - 1e-2) * kept(factors, weights, exact)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("sweeps", [0, 2])
def test_neither_chunks_nor_order_matter(sweeps):
    factors = collection()
    one = fitted(factors, size=60, sweeps=sweeps)
    for other in (fitted(factors, size=7, sweeps=sweeps), fitted(factors[::-1], size=16, sweeps=sweeps)):
        for side in ("down", "up"):
            assert other.side(side).energy == pytest.approx(one.side(side).energy, abs=1e-7)
        weights = weights_of(factors)
        assert kept(factors, weights, other) == pytest.approx(kept(factors, weights, one), rel=1e-6)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("sweeps", [0, 2])
def test_a_planted_subspace_comes_back_to_the_last_digits(sweeps):
    bases = orthonormal(7, IN, 3), orthonormal(5, OUT, 4)
    factors = [factors_in(bases, 2, seed=10 * i, scaling=1.0 + i) for i in range(90)]
    found = fitted(factors, sweeps=sweeps)
    assert (found.down.k, found.up.k) == (7, 5)
    assert_same_span(found.down.components, bases[0], atol=1e-9)
    assert_same_span(found.up.components, bases[1], atol=1e-9)
    assert found.down.energy == pytest.approx(1.0, abs=1e-9)
    assert found.down.tail == pytest.approx(0.0, abs=1e-6 * found.down.square)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_sizes_that_float32_has_no_room_for_change_nothing(size):
    factors = collection(n=40)
    scaled = [LoRAFactors(f.down * size, f.up / size, f.scaling) for f in factors]
    assert_same_span(fitted(scaled).down.components, fitted(factors).down.components, atol=1e-3)
    assert fitted(scaled).down.energy == pytest.approx(fitted(factors).down.energy, abs=1e-6)


@pytest.mark.usefixtures("narrow")
def test_adapters_of_weight_zero_have_no_part():
    factors = collection(n=45)
    strangers = [LoRAFactors(normal(3, IN, seed=900 + i), normal(OUT, 3, seed=950 + i), 9.0) for i in range(6)]
    weights = weights_of(factors)
    alone = fitted(factors, weights)
    beside = fitted([*factors, *strangers], [*weights, *[0.0] * 6])
    assert beside.down.energy == pytest.approx(alone.down.energy, abs=1e-7)
    assert kept(factors, weights, beside) == pytest.approx(kept(factors, weights, alone), rel=1e-6)


@pytest.mark.parametrize(
    ("rows", "n_in", "n_out", "options", "due"),
    [
        (8000, 4096, 4096, {"n_components": 64}, True),
        (8000, 4096, 1024, {"n_components": 64}, True),
        (512, 4096, 4096, {"n_components": 32}, True),
        (384, 4096, 4096, {"n_components": 32}, False),
        (8000, 768, 768, {"n_components": 32}, True),
        (8000, 384, 384, {"n_components": 32}, False),
        (100_000, 384, 384, {"n_components": 32}, True),
        (8000, 4096, 4096, {"n_components": 2000}, False),
        (8000, 4096, 4096, {"energy": 0.9}, False),
        (8000, 4096, 4096, {"max_error": 0.5}, False),
    ],
)
def test_it_is_for_large_stacks_and_few_components(rows, n_in, n_out, options, due):
    assert iterative.is_suitable(rows, n_in, n_out, FitOptions(**options)) is due


@pytest.mark.parametrize("k", [K, 50])
def test_orthonormal_rows_that_nothing_tells_apart_are_kept_as_the_exact_fit_keeps_them(k):
    """Every eigenvalue is there many times."""
    factors = []
    for index in range(60):
        rows = [(3 * index + row) % IN for row in range(3)]
        columns = [(3 * index + row) % OUT for row in range(3)]
        down, up = torch.zeros(3, IN), torch.zeros(OUT, 3)
        down[range(3), rows], up[columns, range(3)] = 1.0, 1.0
        factors.append(LoRAFactors(down, up, 1.0))
    found = fitted(factors, n_components=k, sweeps=0, dtype=torch.float32)
    exact = fit_module(factors, weights_of(factors), FitOptions(n_components=k, sweeps=0))
    for side in ("down", "up"):
        assert found.side(side).k == exact.side(side).k == k
        assert found.side(side).energy == pytest.approx(exact.side(side).energy, abs=1e-4)
