"""A uniform quantiser with a dead zone, and what it costs in bits and in squared error.

All numbers are in units of the quantisation step size, so that the squared error of a number that is not small is 1/12.
The costs of Gaussian numbers are tabulated by their standard deviation, for decisions that are made before anything is
encoded.
"""

import math
from functools import cache

import numpy as np
from torch import Tensor

from .class_tables import PRECISION

DEAD_ZONE = 0.1
"""A number is rounded away from zero only from 1/2 + DEAD_ZONE on. The smaller integer takes fewer bits, and among
numbers whose density falls away from zero it is also more often the nearer one."""
BITS_PER_SQUARED_ERROR = 1 / (2 * math.log(2) * (1 / 12 + DEAD_ZONE**2))
"""The Lagrange multiplier of the rate allocation: bits that a unit of squared error is worth.

Where numbers are large, half the step size costs one bit more and leaves a quarter of the squared error 1/12 +
DEAD_ZONE²: this is the slope of bits against squared error there, at which everything else is decided.
"""
_LOG_MIN_SPREAD, _PER_OCTAVE, _LOG_MAX_SPREAD = -6.0, 16, 6.0


def quantise(numbers: Tensor) -> Tensor:
    """Quantise to integers with a dead zone of ±(1/2 + `DEAD_ZONE`) around zero.

    Args:
        numbers: Numbers in units of the step size, of any shape.

    Returns:
        Integers of the same shape and float dtype.
    """
    return quantise_magnitudes(numbers.abs()).copysign_(numbers)


def quantise_magnitudes(magnitudes: Tensor) -> Tensor:
    """Quantise absolute values as `quantise` does, in place."""
    return magnitudes.add_(0.5 - DEAD_ZONE).floor_()


@cache
def _gaussian_table() -> tuple[np.ndarray, np.ndarray]:
    """Return bits and squared error of Gaussian numbers, by the logarithm of their standard deviation."""
    bits, errors = [], []
    for spread in 2.0 ** np.arange(_LOG_MIN_SPREAD, _LOG_MAX_SPREAD, 1 / _PER_OCTAVE):
        # a sum over a fine grid, up to 8 standard deviations, in place of the integrals
        numbers = np.linspace(-8, 8, 16001) * spread
        weights = np.exp(-0.5 * (numbers / spread) ** 2)
        weights /= weights.sum()
        codes = np.sign(numbers) * np.floor(np.abs(numbers) + 0.5 - DEAD_ZONE)
        errors.append(float((weights * (numbers - codes) ** 2).sum()))
        probabilities = np.bincount((codes - codes.min()).astype(int), weights=weights)
        probabilities = probabilities[probabilities > 0]
        # the coder takes a hundredth more than the entropy, for its tables and lanes, and never nothing
        bits.append(1.01 * float(-(probabilities * np.log2(probabilities)).sum()) + 2.0 ** (1 - PRECISION))
    return np.array(bits), np.array(errors)


def gaussian_cost(spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the expected bits and squared error of a quantised Gaussian number.

    Args:
        spread: Standard deviations in step sizes, of any shape.

    Returns:
        Bits per number, and squared error in squared step sizes, of the same shape.
    """
    bits, errors = _gaussian_table()
    last = _LOG_MIN_SPREAD + (len(bits) - 1) / _PER_OCTAVE
    logs = np.log2(np.maximum(spread, 2.0**_LOG_MIN_SPREAD))
    # linear in the logarithm, in which both curves are smooth
    position = (np.minimum(logs, last) - _LOG_MIN_SPREAD) * _PER_OCTAVE
    below = np.minimum(position.astype(np.int64), len(bits) - 2)
    share = position - below
    # beyond the table, each doubling takes one bit more, and the error stays
    beyond = np.maximum(logs - last, 0.0)
    rate = bits[below] * (1 - share) + bits[below + 1] * share + beyond
    error = errors[below] * (1 - share) + errors[below + 1] * share
    # numbers far below the step size become 0: their squared error is their square
    return rate, np.where(spread < 2.0**_LOG_MIN_SPREAD, np.square(spread), error)
