"""Bits of integers in their classes, against the logistic distribution in NumPy."""

import numpy as np
import pytest
import torch

from eigenlorax.codec import logistic
from eigenlorax.codec.class_tables import CLASSES, PRECISION


def expected_bits(codes: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return −log₂ of the probability of each integer, with one count of a table added."""
    scale = 2.0 ** (classes / 4 - 4)
    # on the negative side, where the distribution function keeps its digits
    upper, lower = (1 / (1 + np.exp((np.abs(codes) + edge) / scale)) for edge in (-0.5, 0.5))
    return -np.log2(upper - lower + 2.0**-PRECISION)


@pytest.mark.parametrize("spread", [0.3, 5.0, 60.0, 4000.0])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_bits_in_and_beyond_the_table(spread: float) -> None:
    generator = np.random.default_rng(0)
    codes = np.rint(generator.normal(0, spread, (4, 3, 50)))
    classes = generator.integers(0, CLASSES, (2, 4, 3))
    expected = expected_bits(codes, classes[..., None])
    bits = logistic.code_bits(torch.from_numpy(codes), torch.from_numpy(classes)[..., None])
    np.testing.assert_allclose(bits, expected, rtol=1e-9)
    rows = logistic.row_bits(torch.from_numpy(np.abs(codes)), torch.from_numpy(classes))
    np.testing.assert_allclose(rows, expected.sum(-1), rtol=1e-9)


def test_no_rows_have_no_bits() -> None:
    assert logistic.row_bits(torch.zeros(0, 3, 50), torch.zeros(2, 0, 3, dtype=torch.int64)).shape == (2, 0, 3)
