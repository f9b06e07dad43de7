"""Real numbers to whole steps, and what that costs: a uniform quantiser with a dead zone.

All numbers are in units of the step, so that 1/12 is the squared error of one of them that is not small. What Gaussian
numbers of some size cost in bits and in error is tabulated, for choices that are made before anything is coded.
"""

import math
from functools import cache

import numpy as np
from torch import Tensor

from .entropy import PRECISION

DEAD = 0.1
"""By how much further from zero than half a step a number must be to be rounded up: rounding down saves bits."""
WORTH = 1 / (2 * math.log(2) * (1 / 12 + DEAD**2))
"""Bits that a unit of squared error is worth: the slope of rate against distortion where numbers are large."""
_FINEST, _STEPS, _WIDEST = -6.0, 16, 30.0


def rounded(numbers: Tensor) -> Tensor:
    """Whole numbers of steps."""
    return numbers.sign() * (numbers.abs() + (0.5 - DEAD)).floor()


@cache
def _gaussian() -> tuple[np.ndarray, np.ndarray]:
    """Bits and squared error of Gaussian numbers, by the logarithm of their standard deviation."""
    spreads = 2.0 ** np.arange(_FINEST, 6.0, 1 / _STEPS)
    bits, errors = [], []
    for spread in spreads:
        x = np.linspace(-8, 8, 16001) * spread
        weight = np.exp(-0.5 * (x / spread) ** 2)
        weight /= weight.sum()
        codes = np.sign(x) * np.floor(np.abs(x) + 0.5 - DEAD)
        errors.append(float((weight * (x - codes) ** 2).sum()))
        share = np.bincount((codes - codes.min()).astype(int), weights=weight)
        share = share[share > 0]
        # a hundredth more, for the coder's tables and lanes
        bits.append(1.01 * float(-(share * np.log2(share)).sum()) + 2.0 ** (1 - PRECISION))
    return np.array(bits), np.array(errors)


def cost(spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bits and squared error of a Gaussian number of each standard deviation."""
    bits, errors = _gaussian()
    last = _FINEST + (len(bits) - 1) / _STEPS
    logs = np.log2(np.maximum(spread, 2.0**_FINEST))
    at = (np.minimum(logs, last) - _FINEST) * _STEPS
    below = np.minimum(at.astype(np.int64), len(bits) - 2)
    part = at - below
    more = np.maximum(logs - last, 0.0)
    found = bits[below] * (1 - part) + bits[below + 1] * part + more
    error = errors[below] * (1 - part) + errors[below + 1] * part
    return found, np.where(spread < 2.0**_FINEST, np.square(spread), error)


def price(spread: np.ndarray) -> np.ndarray:
    """Bits of a Gaussian number of each standard deviation, and of its error."""
    bits, errors = cost(spread)
    found: np.ndarray = bits + WORTH * errors
    return found
