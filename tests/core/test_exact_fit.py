"""The exact fit of a module, against dense float64 decompositions."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_fits import IN, OUT, RANKS, collection, fitted, unit_weights

import reference
from eigenlorax.core import projection, subspace
from eigenlorax.core.adapter import LoRAFactors
from eigenlorax.core.exact_fit import fit_module
from eigenlorax.core.fit_options import WEIGHTINGS, FitOptions
from planted import assert_same_span, factors_in, normal, orthonormal, random_factors


def in_another_gauge(factors, seed):
    """The same update in another gauge: (B·G, G⁻¹·A)."""
    gauge = normal(factors.down.shape[0], factors.down.shape[0], seed=seed)
    return LoRAFactors(torch.linalg.solve(gauge, factors.down), factors.up @ gauge, factors.scaling)


class TestDeltaWeighting:
    @pytest.mark.parametrize("sweeps", [0, 1, 2])
    @pytest.mark.parametrize("k", [1, 4, 9])
    def test_bases_are_those_of_dense_alternating_svds(self, sweeps, k):
        factors = collection()
        weights = [0.3, 1.0, 2.5, 0.7]
        bases = fitted(factors, weights, n_components=k, sweeps=sweeps)
        right, left, right_sigma, left_sigma = reference.fit_delta(
            [reference.dense(f) for f in factors], weights, k, sweeps
        )
        assert_same_span(bases.down.components, torch.from_numpy(right))
        assert_same_span(bases.up.components, torch.from_numpy(left))
        total = sum(RANKS)
        np.testing.assert_allclose(bases.down.singular_values[:total], right_sigma[:total], rtol=1e-5)
        np.testing.assert_allclose(bases.up.singular_values[:total], left_sigma[:total], rtol=1e-5)

    def test_more_rows_than_dimensions_go_the_other_way_to_the_same_bases(self):
        factors = collection(ranks=(9, 12, 11, 8, 13))  # 53 rows against 47 and 31 dimensions
        bases = fitted(factors, n_components=7)
        right, left, _, _ = reference.fit_delta([reference.dense(f) for f in factors], unit_weights(factors), 7, 2)
        assert_same_span(bases.down.components, torch.from_numpy(right))
        assert_same_span(bases.up.components, torch.from_numpy(left))

    def test_before_the_sweeps_a_side_loses_its_discarded_spectrum(self):
        factors, k = collection(), 6
        weights = unit_weights(factors)
        bases = fitted(factors, n_components=k, sweeps=0)
        deltas = [w * reference.dense(f) for w, f in zip(weights, factors, strict=True)]
        for side, stack in (("down", np.concatenate(deltas)), ("up", np.concatenate([d.T for d in deltas]))):
            basis = bases.side(side)
            rows = basis.components.numpy()
            lost = np.square(stack - stack @ rows.T @ rows).sum()
            spectrum = basis.singular_values.double().square()
            assert lost == pytest.approx(float(spectrum[k:].sum()), rel=1e-5)
            assert basis.energy == pytest.approx(1 - lost / np.square(stack).sum(), abs=1e-9)

    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 1000), k=st.integers(1, 12))
    def test_the_objective_never_grows_with_a_sweep(self, seed, k):
        factors = collection(seed)
        deltas, weights = [reference.dense(f) for f in factors], unit_weights(factors)

        def objective(sweeps):
            bases = fitted(factors, n_components=k, sweeps=sweeps)
            return reference.objective(deltas, weights, bases.down.components.numpy(), bases.up.components.numpy())

        values = [objective(sweeps) for sweeps in range(4)]
        assert all(after <= before + 1e-9 for before, after in pairwise(values))

    @settings(max_examples=8, deadline=None)
    @given(seed=st.integers(0, 1000))
    def test_the_objective_never_grows_with_k(self, seed):
        factors = collection(seed)
        deltas, weights = [reference.dense(f) for f in factors], unit_weights(factors)
        values = []
        for k in range(1, 15):
            bases = fitted(factors, n_components=k)
            values.append(
                reference.objective(deltas, weights, bases.down.components.numpy(), bases.up.components.numpy())
            )
        assert all(after <= before + 1e-9 for before, after in pairwise(values))
        assert values[-1] < 1e-9

    def test_the_gauge_of_a_factor_pair_does_not_matter(self):
        factors = collection()
        other = [in_another_gauge(f, seed=900 + i) for i, f in enumerate(factors)]
        one, two = fitted(factors, n_components=5), fitted(other, n_components=5)
        assert_same_span(one.down.components, two.down.components, atol=1e-8)
        assert_same_span(one.up.components, two.up.components, atol=1e-8)

    @pytest.mark.parametrize("size", [1e-6, 1e6])
    def test_a_loud_or_quiet_adapter_counts_like_any_other(self, size):
        factors = collection()
        odd = [*factors[:3], LoRAFactors(factors[3].down * size, factors[3].up, factors[3].scaling)]
        one, two = fitted(factors, n_components=5), fitted(odd, n_components=5)
        assert_same_span(one.down.components, two.down.components, atol=1e-8)
        assert_same_span(one.up.components, two.up.components, atol=1e-8)

    def test_it_is_no_worse_than_the_factors_weighting(self):
        for seed in range(0, 200, 20):
            factors = collection(seed)
            deltas, weights = [reference.dense(f) for f in factors], unit_weights(factors)
            delta, plain = fitted(factors, n_components=4), fitted(factors, n_components=4, weighting="factors")
            assert reference.objective(
                deltas, weights, delta.down.components.numpy(), delta.up.components.numpy()
            ) <= reference.objective(deltas, weights, plain.down.components.numpy(), plain.up.components.numpy())


class TestFactorsWeighting:
    def test_bases_are_svds_of_the_stacked_factors(self):
        factors = collection()
        bases = fitted(factors, n_components=6, weighting="factors")
        right, right_sigma = reference.top_rows(torch.cat([f.down for f in factors]).numpy(), 6)
        left, left_sigma = reference.top_rows(torch.cat([f.up.mT for f in factors]).numpy(), 6)
        assert_same_span(bases.down.components, torch.from_numpy(right))
        assert_same_span(bases.up.components, torch.from_numpy(left))
        np.testing.assert_allclose(bases.down.singular_values, right_sigma, rtol=1e-5)
        np.testing.assert_allclose(bases.up.singular_values, left_sigma, rtol=1e-5)

    def test_a_side_loses_its_discarded_spectrum_on_the_factors(self):
        factors, k = collection(), 6
        basis = fitted(factors, n_components=k, weighting="factors").down
        rows = torch.cat([f.down for f in factors])
        lost = (rows - rows @ basis.components.mT @ basis.components).square().sum()
        assert float(lost) == pytest.approx(float(basis.singular_values[k:].double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
class TestBoth:
    def test_a_number_for_each_side_is_kept(self, weighting):
        factors = collection()
        bases = fit_module(factors, unit_weights(factors), FitOptions(energy=0.5, weighting=weighting), (4, 7))
        assert (bases.down.k, bases.up.k) == (4, 7)

    def test_equal_numbers_give_the_bases_of_n_components(self, weighting):
        factors = collection()
        plain = fitted(factors, n_components=6, weighting=weighting)
        bases = fit_module(factors, unit_weights(factors), FitOptions(energy=0.5, weighting=weighting), (6, 6))
        for side in ("down", "up"):
            assert_same_span(bases.side(side).components, plain.side(side).components)
            assert bases.side(side).energy == pytest.approx(plain.side(side).energy)

    def test_none_on_both_sides_keeps_the_spectrum_alone(self, weighting):
        factors = collection()
        plain = fitted(factors, n_components=6, weighting=weighting)
        bases = fit_module(factors, unit_weights(factors), FitOptions(energy=0.5, weighting=weighting), (0, 0))
        assert bases.shape == (OUT, IN)
        for side in ("down", "up"):
            assert (bases.side(side).k, bases.side(side).energy) == (0, 0.0)
            torch.testing.assert_close(bases.side(side).singular_values, plain.side(side).singular_values)

    def test_a_planted_subspace_is_recovered(self, weighting):
        planted_bases = orthonormal(5, IN, seed=1), orthonormal(6, OUT, seed=2)
        factors = [factors_in(planted_bases, 3, seed=10 * i) for i in range(7)]
        bases = fitted(factors, n_components=20, weighting=weighting)
        assert_same_span(bases.down.components, planted_bases[0])
        assert_same_span(bases.up.components, planted_bases[1])

    def test_one_adapter_alone_comes_back(self, weighting):
        factors = random_factors(4, OUT, IN, seed=3)
        bases = fitted([factors], n_components=32, weighting=weighting)
        assert (bases.down.k, bases.up.k) == (4, 4)
        back = projection.reconstruct(projection.project(factors, bases), bases)
        torch.testing.assert_close(back.up @ back.down, factors.up @ factors.down)

    @pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
    def test_at_full_rank_every_adapter_comes_back(self, weighting, size):
        # mixed ranks, mixed sizes, four decades of decay within each adapter
        decay = [torch.diag(10.0 ** torch.linspace(0, -4, r, dtype=torch.float64)) for r in RANKS]
        factors = [
            LoRAFactors((d @ f.down * size).float(), (f.up @ d).float(), f.scaling)
            for d, f in zip(decay, collection(), strict=True)
        ]
        bases = subspace.round_bases(fitted(factors, energy=1.0, weighting=weighting), torch.float32)
        for f in factors:
            coefficients = projection.project(f, bases, torch.float32)
            back = projection.reconstruct(coefficients, bases, torch.float32)
            lost = np.linalg.norm(reference.dense(f) - reference.dense(back)) / np.linalg.norm(reference.dense(f))
            assert lost < 1e-6

    def test_energy_sets_k_on_the_first_spectrum(self, weighting):
        bases = fitted(collection(), energy=0.8, weighting=weighting)
        for side in ("down", "up"):
            squares = bases.side(side).singular_values.double().square()
            shares = squares.cumsum(0) / squares.sum()
            assert bases.side(side).k == int((shares < 0.8).sum()) + 1
