"""The Krylov search, against whole eigendecompositions."""

import pytest
import torch

from eigenlorax.core import krylov
from planted import assert_same_span, normal, orthonormal

D = 230
SPECTRA = {
    "flat": torch.ones(D, dtype=torch.float64),
    "slow": torch.arange(1, D + 1, dtype=torch.float64) ** -0.5,
    "fast": torch.arange(1, D + 1, dtype=torch.float64) ** -3.0,
    "step": torch.cat([torch.full((20,), 1.0), torch.full((D - 20,), 0.01)]).to(torch.float64),
}


def matrix(values, seed=1):
    vectors = orthonormal(D, D, seed)
    return vectors.mT @ torch.diag(values) @ vectors


def noisy(values, seed=1):
    """What a collection gives: a sample of rows with this spectrum, not the spectrum itself."""
    rows = normal(3 * D, D, seed=seed) * values.sqrt()
    return rows.mT @ rows / (3 * D)


def search(whole, k, *, tolerance=1e-6, block=8, dtype=torch.float64, seed=7):
    whole = whole.to(dtype)
    start = normal(D, block, seed=seed, dtype=dtype)
    return krylov.leading_eigenvectors(lambda columns: whole @ columns, start, k, tolerance=tolerance)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("k", [1, 13, 40])
def test_leading_vectors_keep_what_those_of_a_whole_decomposition_keep(kind, k):
    whole = noisy(SPECTRA[kind])
    wanted = torch.linalg.eigvalsh(whole).flip(0)
    found = search(whole, k, tolerance=1e-6 * float(wanted.sum()))
    kept = float((found.vectors.mT @ whole @ found.vectors).trace())
    assert float(wanted[:k].sum()) - kept <= 1e-6 * float(wanted.sum())
    torch.testing.assert_close(found.vectors.mT @ found.vectors, torch.eye(k, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", SPECTRA)
def test_values_are_at_most_the_eigenvalues_and_agree_where_the_search_has_ended(kind):
    whole = noisy(SPECTRA[kind])
    wanted = torch.linalg.eigvalsh(whole).flip(0)
    found = search(whole, 10, tolerance=1e-9)
    size = len(found.values)
    assert bool((found.values <= wanted[:size] * (1 + 1e-9) + 1e-12).all())
    torch.testing.assert_close(found.values[:10], wanted[:10], rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tolerance", [1e-3, 1e-4, 5e-5])
def test_the_shortfall_is_at_least_the_true_one(kind, seed, tolerance):
    whole = noisy(SPECTRA[kind], seed=seed)
    wanted = torch.linalg.eigvalsh(whole).flip(0)
    total = float(wanted.sum())
    found = search(whole, 12, tolerance=tolerance * total, seed=seed)
    true = float(wanted[:12].sum() - found.values[:12].sum())
    assert true <= found.shortfall + 1e-12
    assert found.shortfall <= tolerance * total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_of_low_rank_ends_the_search(dtype):
    rank = 9
    values = torch.cat([torch.linspace(1, 2, rank), torch.zeros(D - rank)]).to(torch.float64)
    found = search(matrix(values), 20, tolerance=0.0, dtype=dtype)
    assert found.shortfall == 0.0
    tiny = 1e-5 if dtype == torch.float32 else 1e-12
    assert int((found.values > tiny).sum()) == rank
    vectors = torch.linalg.eigh(matrix(values))[1][:, -rank:]
    assert_same_span(found.vectors[:, :rank].mT.double(), vectors.mT, atol=100 * tiny)


def test_equal_eigenvalues_more_than_a_block_has_columns_are_all_found():
    values = torch.cat([torch.ones(25), torch.full((D - 25,), 1e-3)]).to(torch.float64)
    found = search(matrix(values) + 1e-9 * noisy(SPECTRA["flat"]), 25, tolerance=1e-6, block=8)
    torch.testing.assert_close(found.values[:25], values[:25], rtol=1e-5, atol=0)


def test_missing_is_the_rest_of_a_geometric_series():
    sums = [1 - 0.7**n for n in range(1, 6)]
    assert krylov.estimate_missing(sums) == pytest.approx(0.7**5, rel=1e-9)
    assert krylov.estimate_missing(sums[:2]) == float("inf")
    assert krylov.estimate_missing([1.0, 2.0, 4.0]) == float("inf")
    assert krylov.estimate_missing([1.0, 2.0, 2.0]) == 0.0
    assert krylov.estimate_missing([1.0, 2.0, 2.01]) == pytest.approx(0.01)


@pytest.mark.parametrize("copies", [12, 30, 90])
@pytest.mark.parametrize("rest", [0.0, 0.3])
def test_equal_eigenvalues_are_found_as_often_as_they_are_there(copies, rest):
    """Where the matrix is exactly so: no rounding mixes the copies."""
    values = torch.cat([torch.ones(copies), torch.full((D - copies,), rest)]).to(torch.float64)
    k, total = 40, float(values.sum())
    start = normal(D, k, seed=3)
    found = krylov.leading_eigenvectors(
        lambda columns: values[:, None] * columns, start, k, tolerance=1e-9, trace=total
    )
    assert float(found.values[:k].sum()) == pytest.approx(float(values[:k].sum()), rel=1e-9)


def test_a_space_that_is_closed_is_left_while_something_is_left_of_the_trace():
    values = torch.cat([torch.ones(70), torch.zeros(D - 70)]).to(torch.float64)
    start = normal(D, 8, seed=3)
    found = krylov.leading_eigenvectors(
        lambda columns: values[:, None] * columns, start, 60, tolerance=1e-9, trace=70.0
    )
    assert float(found.values[:60].sum()) == pytest.approx(60.0, rel=1e-9)
    assert found.shortfall <= 1e-9
