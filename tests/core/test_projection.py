"""Projection of factors on bases, and reconstruction."""

import numpy as np
import pytest
import torch
from small_fits import IN, OUT, collection, fitted

import reference
from eigenlorax.core import metrics, projection, subspace
from eigenlorax.core.adapter import LoRAFactors
from eigenlorax.errors import NonFiniteError
from planted import TOLERANCE, normal, random_factors


class TestCoefficients:
    def test_projection_is_the_best_approximation_in_the_spans(self):
        bases = fitted(collection(), n_components=5)
        new = random_factors(3, OUT, IN, seed=4242)
        back = projection.reconstruct(projection.project(new, bases), bases)
        wanted = reference.projected(reference.dense(new), bases.down.components.numpy(), bases.up.components.numpy())
        np.testing.assert_allclose(reference.dense(back), wanted, atol=1e-10)

    def test_rank_scaling_and_numbers_are_kept(self):
        bases = fitted(collection(), n_components=5)
        coefficients = projection.project(random_factors(3, OUT, IN, seed=1, scaling=0.25), bases, torch.float16)
        assert coefficients.down.shape == (3, 5)
        assert coefficients.up.shape == (5, 3)
        assert coefficients.scaling == 0.25
        assert coefficients.stored_bytes == 2 * 2 * 3 * 5

    @pytest.mark.parametrize("size", [1e-9, 1e-7, 1e7, 1e9])
    def test_numbers_that_a_narrow_dtype_cannot_hold_move_to_the_other_factor(self, size):
        plain = random_factors(3, OUT, IN, seed=5)
        odd = LoRAFactors(plain.down * size, plain.up / size, plain.scaling)
        bases = fitted([plain], n_components=8)
        coefficients = projection.project(odd, bases, torch.float16)
        back = projection.reconstruct(coefficients, bases)
        lost = np.linalg.norm(reference.dense(odd) - reference.dense(back)) / np.linalg.norm(reference.dense(odd))
        assert lost < 2 * TOLERANCE[torch.float16]
        error = metrics.adapter_error([metrics.module_error(odd, coefficients, bases)])
        assert error.delta_error == pytest.approx(lost, rel=1e-6)

    def test_numbers_that_fit_are_left_in_their_gauge(self):
        factors = random_factors(3, OUT, IN, seed=5)
        bases = fitted([factors], n_components=8)
        back = projection.reconstruct(projection.project(factors, bases), bases)
        torch.testing.assert_close(back.down, factors.down)
        torch.testing.assert_close(back.up, factors.up)

    def test_an_update_too_large_for_the_dtype_is_an_error(self):
        factors = random_factors(3, OUT, IN, seed=5, size=1e6)
        with pytest.raises(NonFiniteError, match=r"exceed torch.float16, whose largest number is 6.6e\+04"):
            projection.project(factors, fitted([factors], n_components=8), torch.float16)

    def test_a_zero_update_stays_zero(self):
        factors = random_factors(3, OUT, IN, seed=5)
        zero = LoRAFactors(factors.down, torch.zeros_like(factors.up), 1.0)
        bases = fitted([factors], n_components=8)
        back = projection.reconstruct(projection.project(zero, bases, torch.float16), bases)
        assert not bool(back.up.any())

    def test_bases_of_an_untrained_module_hold_a_zero_update(self):
        bases = subspace.empty_bases(IN, OUT, torch.float32)
        zero = LoRAFactors(normal(3, IN, seed=1), torch.zeros(OUT, 3, dtype=torch.float64), 1.0)
        back = projection.reconstruct(projection.project(zero, bases, torch.float32), bases)
        assert bases.shape == (OUT, IN)
        assert not bool((back.up @ back.down).any())
