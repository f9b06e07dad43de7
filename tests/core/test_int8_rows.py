"""Rows in 8 bits: the nearest of 255 levels of each row, and exact where a row has no more."""

import pytest
import torch

from eigenlorax.core import int8_rows
from eigenlorax.errors import OptionError
from planted import normal, orthonormal


def test_each_entry_is_the_nearest_level():
    rows = normal(7, 53, seed=1).float() * torch.logspace(-6, 4, 7)[:, None]
    found = int8_rows.quantise_rows(rows)
    scales = rows.abs().amax(dim=1, keepdim=True) / 127
    torch.testing.assert_close(found.scales, scales)
    off = (found.dequantise(torch.float64) - rows.double()).abs() / scales
    assert off.max() <= 0.5 + 1e-5
    assert found.codes.abs().amax(dim=1).tolist() == [127] * 7


def test_the_error_of_orthonormal_rows():
    """That of uniform levels: a step, over √12."""
    rows = orthonormal(9, 601, seed=2).float()
    found = int8_rows.quantise_rows(rows)
    error = torch.linalg.norm(found.dequantise(torch.float64) - rows.double())
    assert float(error) == pytest.approx(float((found.scales.square() * 601 / 12).sum().sqrt()), rel=0.05)


@pytest.mark.parametrize("levels", [1, 2, 3, 31, 63, 64, 65, 100, 126, 127])
@pytest.mark.parametrize("width", [5, 64, 301])
def test_rows_of_few_levels_are_kept(levels, width):
    generator = torch.Generator().manual_seed(levels)
    codes = torch.randint(-levels, levels + 1, (11, width), generator=generator)
    codes[:, 2] = levels
    scales = torch.logspace(-9, 5, 11)[:, None]
    rows = codes * scales
    got = int8_rows.quantise_rows(rows).dequantise(torch.float32)
    torch.testing.assert_close(got, rows, atol=0, rtol=3e-7)


def test_a_few_entries_may_say_what_the_others_do_not():
    rows = torch.zeros(1, 1000)
    rows[0, ::2] = 4.0
    rows[0, 999] = 1.3
    got = int8_rows.quantise_rows(rows).dequantise(torch.float32)
    assert (got - rows).abs().max() <= 4.0 / 127 / 2 + 1e-6


def test_what_is_zero_stays_zero():
    rows = torch.zeros(3, 17)
    rows[1, 4] = -1e-3
    got = int8_rows.quantise_rows(rows).dequantise(torch.float32)
    torch.testing.assert_close(got, rows)
    assert torch.equal(
        int8_rows.quantise_rows(torch.full((1, 5), 1e-45)).dequantise(torch.float32).isfinite(), torch.ones(1, 5) > 0
    )


def test_of_no_rows():
    found = int8_rows.quantise_rows(torch.zeros(0, 13))
    assert found.dequantise(torch.float16).shape == found.shape == (0, 13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_is_made_wide_in_any_dtype(dtype):
    rows = orthonormal(5, 29, seed=3)
    found = int8_rows.quantise_rows(rows)
    assert int8_rows.as_float(found, dtype).dtype == dtype
    assert torch.equal(found.dequantise(dtype), found.dequantise(torch.float32).to(dtype))
    assert torch.equal(int8_rows.as_float(rows, dtype), rows.to(dtype))


def test_bytes():
    found = int8_rows.quantise_rows(orthonormal(5, 29, seed=3))
    assert sum(tensor.nbytes for tensor in int8_rows.stored_tensors(found)) == 5 * 29 + 5 * 4


def test_what_may_be_asked_for():
    assert int8_rows.is_int8("basis_dtype", "int8")
    assert int8_rows.is_int8("basis_dtype", torch.int8)
    assert not int8_rows.is_int8("basis_dtype", None)
    with pytest.raises(OptionError, match="basis_dtype must be 'int8' or None"):
        int8_rows.is_int8("basis_dtype", "int4")
