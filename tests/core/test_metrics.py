"""Errors of reconstructed updates, against dense matrices."""

import numpy as np
import pytest
import torch
from small_fits import collection, fitted

import reference
from eigenlorax.core import metrics, projection, subspace


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

    def test_an_adapters_error_is_over_all_its_modules(self):
        modules = [metrics.ModuleError(4.0, 1.0, 0.25), metrics.ModuleError(5.0, 0.0, 0.0)]
        found = metrics.adapter_error(modules)
        assert found.delta_error == pytest.approx(np.sqrt(1 / 9))
        assert found.rounding_error == pytest.approx(np.sqrt(0.25 / 9))

    def test_a_zero_adapter_loses_nothing(self):
        assert metrics.adapter_error([metrics.ModuleError(0.0, 0.0, 0.0)]) == metrics.AdapterError(0.0, 0.0)
