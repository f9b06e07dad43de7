"""Spectra of modules with many rows, and each adapter taken out of them, against dense matrices and real refits."""

import numpy as np
import oracle
import pytest
import torch

import eigenlorax as ex
from eigenlorax.core.adapter import LoRAFactors, delta_square, from_factors
from eigenlorax.core.batch import pad_factors
from eigenlorax.reports.analysis import crowded, losses
from made import gauged
from planted import assert_same_span, factors_in, normal, orthonormal, random_factors
from reference import dense, fit_delta

N_OUT, N_IN = 41, 29


def members(n, *, make=None, ranks=(2, 3, 4), shape=(N_OUT, N_IN)):
    make = make or (lambda rank, seed: random_factors(rank, *shape, seed=seed))
    factors = [make(ranks[i % len(ranks)], 100 * i) for i in range(n)]
    factors[1::3] = [LoRAFactors(f.down, f.up, -0.3) for f in factors[1::3]]
    return factors, torch.tensor([delta_square(f) ** -0.5 for f in factors], dtype=torch.float64)


def decaying(noise, shape):
    """Factors near a subspace, whose directions matter less and less, and noise."""
    n_out, n_in = shape
    sizes = torch.arange(1, 25).double()[:, None] ** -0.7
    bases = sizes * orthonormal(24, n_in, 3), sizes * orthonormal(24, n_out, 4)
    return lambda rank, seed: factors_in(bases, rank, seed=seed, noise=noise)


class TestSpectrum:
    @pytest.mark.parametrize("n", [5, 40])
    @pytest.mark.parametrize("size", [1.0, 1e-20, 1e20])
    def test_equals_that_of_dense_rows(self, n, size):
        rows = normal(n, 3, N_IN, seed=2) * size
        found = crowded.Spectrum.of(rows)
        _, sigma, right = np.linalg.svd(rows.reshape(-1, N_IN).numpy(), full_matrices=False)
        assert found.values.tolist() == pytest.approx((sigma**2).tolist(), rel=1e-5)
        assert_same_span(found.vectors[:7], torch.from_numpy(right[:7]), atol=1e-5)
        torch.testing.assert_close(
            found.vectors @ found.vectors.mT, torch.eye(len(found.values)).double(), atol=1e-12, rtol=0
        )

    @pytest.mark.parametrize("n", [4, 40])
    def test_of_low_rank(self, n):
        """Beyond the rank there is nothing but float32's rounding."""
        found = crowded.Spectrum.of(normal(n, 3, 5, seed=1) @ orthonormal(5, N_IN, 2))
        assert float(found.values[4]) > 0.01 * float(found.values[0])
        assert float(found.values[5:].sum()) < 1e-5 * float(found.values[0])
        assert_same_span(found.vectors[:5], orthonormal(5, N_IN, 2), atol=1e-6)

    def test_total(self):
        rows = normal(50, 3, N_IN, seed=4) * 1e9
        expected = sum(one.mT @ one for one in rows)
        torch.testing.assert_close(crowded.gram(rows), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


class TestWithout:
    @pytest.mark.parametrize("index", [0, 7])
    @pytest.mark.parametrize("k", [3, 9])
    def test_is_exact_among_few_dimensions(self, k, index):
        rows = normal(40, 3, N_IN, seed=2) * torch.arange(1, N_IN + 1).double() ** -0.5
        others = torch.cat([rows[:index], rows[index + 1 :]])
        _, _, right = np.linalg.svd(others.reshape(-1, N_IN).numpy(), full_matrices=False)
        found = crowded.Spectrum.of(rows).without(rows[index], k)
        assert_same_span(found, torch.from_numpy(right[:k]), atol=1e-4)

    def test_is_near_among_many(self):
        """Among more than are looked at, what is kept of the left out differs little from what the others' keep."""
        d, k = 113, 8
        assert crowded.required_components(k) < d
        for noise in (0.02, 0.1):
            factors, weights = members(60, make=decaying(noise, (N_OUT, d)), ranks=(3,))
            one = pad_factors(factors, d, N_OUT)
            rows, _ = crowded.weighted(one, weights, "delta")
            spectrum = crowded.Spectrum.of(rows)
            for index in (0, 5, 30):
                others = torch.cat([rows[:index], rows[index + 1 :]])
                exact = torch.linalg.svd(others.reshape(-1, d), full_matrices=False)[2][:k]
                found = spectrum.without(rows[index], k)
                shares = [
                    float((rows[index] @ basis.mT).square().sum()) for basis in (exact, found, spectrum.vectors[:k])
                ]
                assert shares[1] == pytest.approx(shares[0], abs=2e-5)
                # what is subtracted makes a difference
                assert abs(shares[2] - shares[0]) > 1e-3

    @pytest.mark.parametrize("n", [40, 6])
    def test_what_only_one_has_is_gone(self, n):
        rows = normal(n, 3, 5, seed=1) @ orthonormal(8, N_IN, 2)[:5]
        rows[0] = normal(3, 8, seed=5) @ orthonormal(8, N_IN, 2)
        found = crowded.Spectrum.of(rows).without(rows[0], 9)
        assert found.shape == (5, N_IN)
        assert_same_span(found, orthonormal(8, N_IN, 2)[:5], atol=1e-4)

    def test_a_copy_leaves_everything(self):
        rows = normal(40, 3, N_IN, seed=2)
        rows[1] = rows[0]
        found = crowded.Spectrum.of(rows).without(rows[0], N_IN)
        assert found.shape == (N_IN, N_IN)


class TestRows:
    def test_weighted_by_the_other_factor(self):
        factors, weights = members(7)
        one = pad_factors(factors, N_IN, N_OUT)
        down, up = crowded.weighted(one, weights, "delta")
        for i, (f, w) in enumerate(zip(factors, weights.tolist(), strict=True)):
            delta = w * dense(f)
            np.testing.assert_allclose((down[i].mT @ down[i]).numpy(), delta.T @ delta, atol=1e-12)
            np.testing.assert_allclose((up[i].mT @ up[i]).numpy(), delta @ delta.T, atol=1e-12)

    def test_factors_as_they_are(self):
        factors, weights = members(7)
        down, up = crowded.weighted(pad_factors(factors, N_IN, N_OUT), weights, "factors")
        for i, f in enumerate(factors):
            rank = f.down.shape[0]
            np.testing.assert_allclose(down[i, :rank].numpy(), oracle.rows(f, "down"))
            np.testing.assert_allclose(up[i, :rank].numpy(), oracle.rows(f, "up"), rtol=1e-12)
            assert not down[i, rank:].any()

    @pytest.mark.parametrize("sweeps", [0, 1, 3])
    def test_sweeps_are_those_of_a_fit(self, sweeps):
        factors, weights = members(60, make=decaying(0.05, (N_OUT, N_IN)))
        one, k = pad_factors(factors, N_IN, N_OUT), 6
        first = [crowded.Spectrum.of(rows).vectors[:k] for rows in crowded.weighted(one, weights, "delta")]
        down, up = crowded.swept(one, weights, (first[0], first[1]), sweeps)
        right, left, _, _ = fit_delta([dense(f) for f in factors], weights.tolist(), k, sweeps)
        assert_same_span(down, torch.from_numpy(right.copy()), atol=1e-4)
        assert_same_span(up, torch.from_numpy(left.copy()), atol=1e-4)


@pytest.mark.parametrize("weighting", ["delta", "factors"])
@pytest.mark.parametrize("noise", [0.02, 0.2])
def test_left_out_errors_are_those_of_refits_without_sweeps(noise, weighting):
    factors, weights = members(100, make=decaying(noise, (N_OUT, N_IN)))
    assert crowded.is_crowded(sum(f.down.shape[0] for f in factors))
    one, k = pad_factors(factors, N_IN, N_OUT), 7
    rows = crowded.weighted(one, weights, weighting)
    sides = [crowded.Spectrum.of(each) for each in rows]
    adapters = [from_factors(f"a{i:03d}", {"m": f}, base_model="org/base") for i, f in enumerate(factors)]
    for index in (0, 1, 50):
        bases = [side.without(each[index], k) for side, each in zip(sides, rows, strict=True)]
        share = float(losses.kept(one.select([index]), *bases)) / delta_square(factors[index])
        others = [*adapters[:index], *adapters[index + 1 :]]
        pack = ex.fit(others, n_components=k, dtype="float64", weighting=weighting, sweeps=0)
        assert (1 - share) ** 0.5 == pytest.approx(pack.add(adapters[index]).delta_error, abs=1e-5)


def test_gauge_is_no_matter():
    factors, weights = members(60)
    turned = [gauged({"m": f}, 7 * i, 20.0)["m"] for i, f in enumerate(factors)]
    for one, other in zip(
        crowded.weighted(pad_factors(factors, N_IN, N_OUT), weights, "delta"),
        crowded.weighted(pad_factors(turned, N_IN, N_OUT), weights, "delta"),
        strict=True,
    ):
        torch.testing.assert_close(
            crowded.Spectrum.of(one).values, crowded.Spectrum.of(other).values, rtol=1e-4, atol=0
        )
    assert delta_square(turned[0]) == pytest.approx(delta_square(factors[0]))
