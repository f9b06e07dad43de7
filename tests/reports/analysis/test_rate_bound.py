"""The Gaussian rate–distortion bound: closed forms, and the codec above it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eigenlorax as ex
from eigenlorax.core.batch import pad_factors
from eigenlorax.reports.analysis import losses, rate_bound
from planted import random_collection


def spectrum(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_one_component_has_a_closed_form():
    # out + in coordinates share the squared error: θ = ε² / (out + in), as long as both sides are above it
    out, n_in, error = 300, 200, 0.05
    level = error**2 / (out + n_in)
    bits = sum(d / 2 * math.log2(7.0 / (d * 7.0 * level)) for d in (out, n_in))
    (found,) = rate_bound.least_bytes([(spectrum([7.0]), (out, n_in))], [error])
    assert found == pytest.approx(bits / 8, rel=1e-9)


def test_a_component_is_dropped_where_that_is_cheaper():
    # the small component is a hundredth of the squared norm: without it, the error is 0.1
    values = spectrum([0.99, 0.01])
    large = rate_bound.least_bytes([(values[:, :1], (50, 50))], [math.sqrt((0.04 - 0.01) / 0.99)])
    assert rate_bound.least_bytes([(values, (50, 50))], [0.2]) == pytest.approx(large, rel=1e-9)
    # in between, time sharing: fewer bits than with both, more than the convex hull's ends
    errors = [0.19, 0.2, 0.21]
    bits = rate_bound.least_bytes([(values, (50, 50))], errors)
    assert bits == sorted(bits, reverse=True)
    assert rate_bound.least_bytes([(values, (50, 50))], [1.0]) == pytest.approx([0.0], abs=1e-9)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5), st.floats(1e-3, 0.9), st.floats(1e-9, 1e9))
def test_scale_and_order_do_not_matter_and_adapters_add_up(values, error, factor):
    shapes = [(17, 11)] * len(values)
    spectra = [(spectrum([value], [2 * value]), shape) for value, shape in zip(values, shapes, strict=True)]
    (found,) = rate_bound.least_bytes(spectra, [error])
    scaled = [(factor * each, shape) for each, shape in spectra[::-1]]
    assert rate_bound.least_bytes(scaled, [error])[0] == pytest.approx(found, rel=1e-6, abs=1e-6)
    alone = sum(rate_bound.least_bytes([(each[[row]], s) for each, s in spectra], [error])[0] for row in range(2))
    assert alone == pytest.approx(found, rel=1e-9, abs=1e-9)


def test_adapters_without_an_update_take_nothing():
    assert rate_bound.least_bytes([(torch.zeros(3, 2, dtype=torch.float64), (7, 5))], [0.1, 0.5]) == [0.0, 0.0]


@pytest.mark.parametrize("error", [0.05, 0.3])
def test_a_pack_of_strangers_takes_little_more(error):
    adapters = [ex.from_factors("a", dict(random_collection(1, modules={"layer": (1024, 768)})[0].modules))]
    factors = adapters[0].modules["layer"]
    spectra = [(losses.singular_squares(pad_factors([factors], 768, 1024)), (1024, 768))]
    (bound,) = rate_bound.least_bytes(spectra, [error])
    assert 1 < ex.fit(adapters, max_error=error).summary.bytes.coefficients / bound < 1.25
