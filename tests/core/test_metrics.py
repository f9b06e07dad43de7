"""Errors of reconstructed updates, against dense matrices."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_fits import IN, OUT, collection, fitted

import reference
from eigenlorax.core import metrics, projection, subspace
from eigenlorax.core.batch import stack_factors
from eigenlorax.core.coefficients import Coefficients
from planted import normal, random_factors


class TestMetrics:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("k", [3, 14])
    def test_errors_are_those_of_dense_matrices(self, dtype, k):
        factors = collection()
        exact = fitted(factors, n_components=k)
        bases = subspace.round_bases(exact, dtype)
        for f in factors:
            coefficients = projection.project(f, bases, dtype)
            found = metrics.module_error(f, coefficients, bases, metrics.unrounded_bases(exact, bases))
            delta = reference.dense(f)
            ideal = reference.projected(delta, exact.down.components.numpy(), exact.up.components.numpy())
            back = reference.dense(projection.reconstruct(coefficients, bases))
            assert found.square == pytest.approx(np.square(delta).sum(), rel=1e-10)
            assert found.squared_error == pytest.approx(np.square(delta - back).sum(), rel=1e-6, abs=1e-24)
            assert found.squared_rounding == pytest.approx(np.square(ideal - back).sum(), rel=1e-6, abs=1e-24)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("k", [3, 14])
    def test_errors_of_ill_conditioned_updates_are_those_of_dense_matrices(self, dtype, k):
        """All adapters in one batch: decades along the factors and against each other, near copies, and zero."""
        decades = torch.logspace(0, -8, 5, dtype=torch.float64)[:, None]
        first = random_factors(5, OUT, IN, seed=1)
        along = replace(first, down=decades * first.down, up=first.up * decades.mT)
        against = replace(first, down=decades * first.down, up=first.up * decades.mT.flip(1))
        near_copy = replace(first, down=first.down * (1 + 1e-9), up=first.up + 1e-10 * normal(OUT, 5, seed=2))
        zero = replace(first, up=torch.zeros_like(first.up))
        factors = [first, along, against, near_copy, first, zero]
        exact = fitted(factors[:-1], n_components=k)
        bases = subspace.round_bases(exact, dtype)
        batch = projection.balance_batch(stack_factors(factors, [1.0] * len(factors)), dtype)
        coefficients = projection.project_batch(batch, bases, dtype)
        found = metrics.module_errors(batch, coefficients, bases, metrics.unrounded_bases(exact, bases))
        for index, f in enumerate(factors):
            delta = reference.dense(f)
            ideal = reference.projected(delta, exact.down.components.numpy(), exact.up.components.numpy())
            stored = Coefficients(coefficients.down[index], coefficients.up[index], f.scaling)
            back = reference.dense(projection.reconstruct(stored, bases))
            square, lost, rounded = (np.square(dense).sum() for dense in (delta, delta - back, ideal - back))
            assert found[index].square == pytest.approx(square, rel=1e-10)
            assert found[index].squared_error == pytest.approx(lost, rel=1e-7, abs=1e-26 * square)
            assert found[index].squared_rounding == pytest.approx(rounded, rel=1e-6, abs=1e-26 * square)

    def test_errors_in_an_ill_conditioned_gauge_are_those_of_dense_matrices(self):
        """The factors B·G and G⁻¹·A of one update have entries up to 1e8 times those of B and A."""
        factors = random_factors(5, OUT, IN, seed=1)
        rotation, other_rotation = (torch.linalg.qr(normal(5, 5, seed=seed)).Q for seed in (7, 8))
        gauge = rotation * torch.logspace(0, -8, 5, dtype=torch.float64) @ other_rotation
        changed = replace(
            factors, down=torch.linalg.solve(gauge, factors.down.double()), up=factors.up.double() @ gauge
        )
        bases = subspace.round_bases(fitted(collection(), n_components=3), torch.float64)
        coefficients = projection.project(changed, bases, torch.float64)
        found = metrics.module_error(changed, coefficients, bases)
        delta, back = reference.dense(changed), reference.dense(projection.reconstruct(coefficients, bases))
        assert found.square == pytest.approx(np.square(delta).sum(), rel=1e-6)
        assert found.squared_error == pytest.approx(np.square(delta - back).sum(), rel=1e-6)

    def test_products_in_float32_leave_six_digits_of_the_error(self):
        factors = [replace(f, down=f.down.bfloat16(), up=f.up.bfloat16()) for f in collection(ranks=(5,) * 6)]
        bases = subspace.round_bases(fitted(factors, n_components=14), torch.bfloat16)
        batch = projection.balance_batch(stack_factors(factors, [1.0] * 6), torch.bfloat16, torch.float32)
        assert batch.down.dtype == torch.float32
        coefficients = projection.project_batch(batch, bases, torch.bfloat16)
        for index, error in enumerate(metrics.module_errors(batch, coefficients, bases)):
            stored = Coefficients(coefficients.down[index], coefficients.up[index], factors[index].scaling)
            delta = reference.dense(factors[index])
            lost = np.square(delta - reference.dense(projection.reconstruct(stored, bases))).sum()
            assert error.squared_error == pytest.approx(lost, rel=1e-6)

    def test_an_adapters_error_is_over_all_its_modules(self):
        modules = [metrics.ModuleError(4.0, 1.0, 0.25), metrics.ModuleError(5.0, 0.0, 0.0)]
        found = metrics.adapter_error(modules)
        assert found.delta_error == pytest.approx(np.sqrt(1 / 9))
        assert found.rounding_error == pytest.approx(np.sqrt(0.25 / 9))

    def test_a_zero_adapter_loses_nothing(self):
        assert metrics.adapter_error([metrics.ModuleError(0.0, 0.0, 0.0)]) == metrics.AdapterError(0.0, 0.0)
