"""The search in Gram matrices, against dense float64 SVDs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_fits import unit_weights

import reference
from eigenlorax.core import gram_search, iterative, krylov
from eigenlorax.core.batch import stack_factors
from eigenlorax.core.fit_options import FitOptions
from planted import assert_same_span, factors_in, normal, orthonormal

OUT, IN, K, RANK, N = 90, 110, 9, 3, 28
DECADES = torch.logspace(0, -8, RANK, dtype=torch.float64)[:, None]


def related(n=N, noise=0.05):
    strengths = torch.arange(1, 31, dtype=torch.float64)[:, None] ** -0.8
    bases = (strengths * orthonormal(30, IN, 1), strengths * orthonormal(30, OUT, 2))
    return [factors_in(bases, RANK, seed=10 * index, scaling=0.5 + index % 4, noise=noise) for index in range(n)]


def along_decades():
    """Each adapter's own singular values fall over 8 decades and more, in both factors."""
    return [replace(f, down=DECADES * f.down, up=f.up * DECADES.mT) for f in related()]


def against_decades():
    """The strong rows of one factor meet the weak columns of the other, so that all terms are equally small."""
    return [replace(f, down=DECADES * f.down, up=f.up * DECADES.mT.flip(1)) for f in related()]


def cancelling():
    """Rows and columns of an adapter are nearly the same one, and their products nearly cancel."""
    signs = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)[:, None]
    return [
        replace(f, down=normal(1, IN, seed=3) + 1e-3 * f.down, up=(signs * normal(1, OUT, seed=4)).mT + 1e-3 * f.up)
        for f in related()
    ]


def near_copies():
    originals = related(N // 2)
    return originals + [replace(f, up=f.up + 1e-9 * normal(OUT, RANK, seed=7000 + i)) for i, f in enumerate(originals)]


def duplicates():
    return related(N // 4) * 4


def in_bfloat16():
    return [replace(f, down=f.down.bfloat16(), up=f.up.bfloat16()) for f in related()]


def of_all_sizes():
    """Adapters whose norms fall over 8 decades; each has the same weight in the fit."""
    return [replace(f, up=f.up * 10.0 ** (-8 * i / N)) for i, f in enumerate(related())]


COLLECTIONS = [related, along_decades, against_decades, cancelling, near_copies, duplicates, in_bfloat16, of_all_sizes]


def loaders_of(factors, weights):
    batches = [stack_factors(factors[start : start + 16], weights[start : start + 16]) for start in (0, 16)]
    return [lambda batch=batch: batch for batch in batches]


def fitted(factors, weights=None, **options):
    batches = [load() for load in loaders_of(factors, weights or unit_weights(factors))]
    return gram_search.fit(batches, FitOptions(**{"n_components": K, **options}), "a.module", torch.float64)


def lost(deltas, weights, right, left):
    return reference.objective(deltas, weights, right, left) / len(deltas)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Blocks of a few columns, as many as such small modules have use for."""
    monkeypatch.setattr(krylov, "BLOCK", 6)


@pytest.mark.parametrize("collection", COLLECTIONS, ids=lambda collection: collection.__name__)
def test_bases_are_as_good_as_those_of_passes_over_the_rows_and_of_dense_matrices(collection, monkeypatch):
    factors = collection()
    weights, deltas = unit_weights(factors), [reference.dense(f) for f in factors]
    # an untrained adapter has no part
    with_zero = [*factors[:5], replace(factors[0], up=torch.zeros_like(factors[0].up)), *factors[5:]]
    loaders = loaders_of(with_zero, [*weights[:5], 0.0, *weights[5:]])
    for sweeps, most in ((0, 2e-6), (2, 6e-4)):
        options = FitOptions(n_components=K, sweeps=sweeps)
        found = gram_search.fit([load() for load in loaders], options, "a.module", torch.float64)
        with monkeypatch.context() as patch:
            patch.setattr(gram_search, "LARGEST_GRAM", 0)
            by_passes = iterative.fit(loaders, options, "a.module", dtype=torch.float64)
        right, left, *sigmas = reference.fit_delta(deltas, weights, K, sweeps)
        losses = [
            lost(deltas, weights, bases.down.components.numpy(), bases.up.components.numpy())
            for bases in (found, by_passes)
        ]
        assert losses[0] == pytest.approx(losses[1], abs=2e-6)
        # a sweep is one step of subspace iteration, so that two sweeps are not yet those of whole SVDs
        assert losses[0] < lost(deltas, weights, right, left) + most
        for name, sigma in zip(("down", "up"), sigmas, strict=True):
            basis, other = found.side(name), by_passes.side(name)
            assert basis.square == pytest.approx(np.square(sigma).sum(), rel=1e-6)
            assert basis.energy == pytest.approx(other.energy, abs=1e-6)
            torch.testing.assert_close(basis.singular_values, other.singular_values, rtol=1e-4, atol=0)
            gram = basis.components @ basis.components.mT
            torch.testing.assert_close(gram, torch.eye(K, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("collection", COLLECTIONS, ids=lambda collection: collection.__name__)
def test_the_energy_is_what_the_basis_keeps_of_dense_matrices(collection):
    factors = collection()
    found = fitted(factors)
    kept = [
        weight**2 * np.square(reference.dense(f) @ found.down.components.numpy().T).sum()
        for f, weight in zip(factors, unit_weights(factors), strict=True)
    ]
    # the total is from a Gram matrix in float32
    assert found.down.energy == pytest.approx(sum(kept) / len(factors), rel=1e-6)


def test_components_that_float32_does_not_resolve_are_found_in_float64():
    """All adapters have the same few directions, whose strength falls beyond what float32 resolves of a square."""
    strengths = torch.logspace(0, -3, K, dtype=torch.float64)[:, None]
    bases = orthonormal(K, IN, 3), orthonormal(K, OUT, 4)
    spread = tuple(strengths * basis for basis in bases)
    factors = [factors_in(spread, RANK, seed=10 * index) for index in range(N)]
    found = fitted(factors)
    assert_same_span(found.down.components, bases[0], atol=1e-9)
    assert_same_span(found.up.components, bases[1], atol=1e-9)
    assert found.down.energy == pytest.approx(1.0, abs=1e-12)


def test_more_components_than_directions_are_left_to_passes_over_the_rows():
    bases = orthonormal(7, IN, 3), orthonormal(5, OUT, 4)
    factors = [factors_in(bases, RANK, seed=10 * index) for index in range(N)]
    assert fitted(factors) is None
    loaders = loaders_of(factors, unit_weights(factors))
    found = iterative.fit(loaders, FitOptions(n_components=K), "a.module", dtype=torch.float64)
    assert (found.down.k, found.up.k) == (7, 5)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_sizes_that_float32_has_no_room_for_change_nothing(size):
    factors = related()
    scaled = [replace(f, down=f.down * size, up=f.up / size) for f in factors]
    assert_same_span(fitted(scaled).down.components, fitted(factors).down.components, atol=1e-4)


def test_weighting_of_the_factors_is_that_of_their_stack():
    factors = related()
    found = fitted(factors, weighting="factors")
    stack = np.concatenate([f.down.numpy() for f in factors])
    _, sigma = reference.top_rows(stack, K)
    kept = np.square(stack @ found.down.components.numpy().T).sum()
    assert kept == pytest.approx(np.square(sigma[:K]).sum(), rel=1e-5)
    assert found.down.energy == pytest.approx(kept / np.square(sigma).sum(), rel=1e-6)


def test_the_rows_of_all_batches_count_and_none_is_loaded_after_too_many():
    def fail():
        raise AssertionError("a batch is loaded that cannot matter")

    loaders = loaders_of(related(), [1.0] * N)
    assert [len(batch) for batch in gram_search.load_few_rows(loaders)] == [16, N - 16]
    assert gram_search.load_few_rows([*loaders * 2, fail]) is None
