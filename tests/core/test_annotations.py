"""Shapes in signatures are checked while tests run (pyproject.toml)."""

import jaxtyping
import pytest

import eigenlorax as ex
from eigenlorax.core import metrics, projection
from eigenlorax.core.coefficients import Coefficients
from planted import random_factors


def test_a_shape_that_is_wrong_is_found():
    factors = random_factors(3, 7, 5, seed=1)
    pack = ex.fit([ex.from_factors("a", {"m": factors})], n_components=2)
    bases = pack.subspace.modules["m"]
    one = projection.project(factors, bases)
    assert metrics.module_error(factors, one, bases).squared_error > 0
    with pytest.raises(jaxtyping.TypeCheckError, match="down"):
        Coefficients(one.down[0], one.up, 1.0)
