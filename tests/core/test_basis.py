import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eigenlorax.core import basis
from eigenlorax.errors import OptionError, ShapeError
from planted import TOLERANCE, assert_same_span, decaying_rows, normal, orthonormal

N, D, K = 40, 17, 3


def test_fit_recovers_a_planted_subspace():
    components = orthonormal(K, D, seed=1)
    found = basis.fit(normal(N, K, seed=2) @ components, n_components=K)
    assert_same_span(found.components, components, atol=1e-12)
    assert found.energy == pytest.approx(1.0, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 23), d=st.integers(1, 23), k=st.integers(1, 23), seed=st.integers(0, 9))
def test_squared_error_is_the_discarded_spectrum(n, d, k, seed):
    rows = normal(n, d, seed=seed)
    found = basis.fit(rows, n_components=k)
    lost = (rows - basis.reconstruct(basis.project(rows, found), found)).square().sum()
    discarded = torch.linalg.svdvals(rows)[found.k :].square().sum()
    torch.testing.assert_close(lost, discarded, atol=1e-9, rtol=1e-8)
    assert found.k == min(n, d, k)
    assert found.energy == pytest.approx(1 - float(discarded / rows.square().sum()), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 50), k=st.integers(1, 9))
def test_reconstruct_after_project_is_idempotent(seed, k):
    rows, found = normal(5, D, seed=seed), basis.fit(normal(N, D, seed=seed + 1), n_components=k)
    once = basis.reconstruct(basis.project(rows, found), found)
    torch.testing.assert_close(basis.reconstruct(basis.project(once, found), found), once)


@pytest.mark.parametrize(("energy", "wanted"), [(1e-9, 1), (0.80, 1), (0.801, 2), (0.97, 2), (0.98, 3), (1.0, 4)])
def test_energy_keeps_the_smallest_sufficient_number(energy, wanted):
    # squares 64, 13.69, 2.25 and 0.01 of 79.95: cumulative shares 0.8005, 0.9717, 0.9999, 1
    sigma = torch.tensor([8.0, 3.7, 1.5, 0.1], dtype=torch.float64)
    rows = orthonormal(4, 4, seed=4) @ torch.diag(sigma) @ orthonormal(4, 9, seed=5)
    found = basis.fit(rows, energy=energy)
    assert found.k == wanted
    assert found.energy >= energy - 1e-12


def test_energy_one_is_the_numerical_rank():
    rows = normal(N, 5, seed=1) @ normal(5, D, seed=2)
    assert basis.fit(rows, energy=1.0).k == 5


def test_spectrum_goes_on_beyond_the_components():
    rows = normal(N, D, seed=1)
    found = basis.fit(rows, n_components=K)
    torch.testing.assert_close(found.singular_values, torch.linalg.svdvals(rows).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_coefficients_are_least_squares_in_the_basis_as_stored(dtype):
    stored = basis.fit(normal(N, D, seed=1), n_components=K, dtype=dtype)
    assert stored.components.dtype == dtype
    rows = normal(4, D, seed=2)
    wanted = np.linalg.lstsq(stored.components.double().numpy().T, rows.numpy().T, rcond=None)[0].T
    np.testing.assert_allclose(basis.project(rows, stored).numpy(), wanted, atol=1e-12)
    exact = basis.fit(normal(N, D, seed=1), n_components=K)
    assert_same_span(stored.components.double(), exact.components, atol=20 * TOLERANCE[dtype])


def test_the_mean_is_kept():
    # centring as the authors' code does it, without keeping the mean, would lose exactly this direction
    mean = 10 * normal(1, D, seed=1)
    rows = mean + 0.01 * normal(N, D, seed=2)
    found = basis.fit(rows, n_components=1)
    lost = rows - basis.reconstruct(basis.project(rows, found), found)
    assert float(lost.norm() / rows.norm()) < 0.01


class TestAugment:
    def test_rows_are_orthonormal_to_all(self):
        found = basis.augment(basis.fit(normal(N, D, seed=1), n_components=K), 6, seed=5, label="m.down")
        assert (found.k, found.n_extra) == (K + 6, 6)
        torch.testing.assert_close(found.components @ found.components.mT, torch.eye(9, dtype=torch.float64))

    def test_fitted_rows_are_untouched(self):
        fitted = basis.fit(normal(N, D, seed=1), n_components=K, dtype=torch.float16)
        found = basis.augment(fitted, 6, seed=5, label="m.down")
        assert torch.equal(found.fitted, fitted.components)

    def test_old_rows_mean_what_they_meant(self):
        fitted = basis.fit(normal(N, D, seed=1), n_components=K)
        found = basis.augment(fitted, 6, seed=5, label="m.down")
        coefficients = basis.project(normal(2, D, seed=3), fitted)
        padded = torch.nn.functional.pad(coefficients, (0, 6))
        assert torch.equal(basis.reconstruct(padded, found), basis.reconstruct(coefficients, fitted))

    def test_rows_are_a_function_of_seed_and_label(self):
        fitted = basis.fit(normal(N, D, seed=1), n_components=K)
        one, again, other_seed, other_label = (
            basis.augment(fitted, 2, seed=seed, label=label).components
            for seed, label in [(5, "m.down"), (5, "m.down"), (6, "m.down"), (5, "m.up")]
        )
        assert torch.equal(one, again)
        assert not torch.allclose(one, other_seed)
        assert not torch.allclose(one, other_label)

    def test_the_stream_is_fixed(self):
        # the literal numbers: another NumPy, or a change of the recipe, would make old packs mean something else
        found = basis.seeded_normal_rows(1, 3, seed=7, label="encoder.0.query.down")
        np.testing.assert_allclose(found, STREAM, rtol=1e-12)

    def test_the_numbers_are_standard_normal(self):
        found = basis.seeded_normal_rows(200, 500, seed=1, label="x")
        assert abs(found.mean()) < 0.02
        assert abs(found.std() - 1) < 0.02
        assert abs((np.abs(found) < 1).mean() - 0.6827) < 0.01

    def test_more_rows_than_dimensions_are_refused(self):
        with pytest.raises(ShapeError, match="n_extra can be at most 14"):
            basis.augment(basis.fit(normal(N, D, seed=1), n_components=K), 15, seed=5, label="m.down")
        full = basis.augment(basis.fit(normal(N, D, seed=1), n_components=K), 14, seed=5, label="m.down")
        torch.testing.assert_close(full.components @ full.components.mT, torch.eye(D, dtype=torch.float64))

    def test_none_is_refused(self):
        with pytest.raises(OptionError, match="at least 1, got 0"):
            basis.augment(basis.fit(normal(N, D, seed=1), n_components=K), 0, seed=5, label="m.down")


STREAM = [[-1.699641271669674, 0.6628674901679351, 0.46981092874452823]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either n_components or energy"),
        ({"n_components": 2, "energy": 0.5}, "either n_components or energy"),
        ({"n_components": 0}, "at least 1, got 0"),
        ({"energy": 0.0}, "above 0 and at most 1, got 0.0"),
        ({"energy": 1.5}, "above 0 and at most 1, got 1.5"),
        ({"energy": float("nan")}, "above 0 and at most 1, got nan"),
    ],
)
def test_sizes_out_of_range_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        basis.fit(normal(N, D, seed=1), **options)


def test_zero_rows_have_no_basis():
    with pytest.raises(OptionError, match="every row of the .* is zero"):
        basis.fit(torch.zeros(4, 7, dtype=torch.float64), n_components=2)


def test_widths_must_agree():
    found = basis.fit(normal(N, D, seed=1), n_components=K)
    with pytest.raises(ShapeError, match="width 5 cannot be projected on a basis of width 17"):
        basis.project(normal(2, 5, seed=1), found)
    with pytest.raises(ShapeError, match="4 coefficients per row exceed the 3 components"):
        basis.reconstruct(normal(2, 4, seed=1), found)


def test_four_decades_come_back():
    rows = decaying_rows(11, D, 4, seed=2)
    found = basis.fit(rows, n_components=11)
    torch.testing.assert_close(basis.reconstruct(basis.project(rows, found), found), rows, atol=1e-13, rtol=1e-9)
