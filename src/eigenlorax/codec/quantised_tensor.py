"""A tensor as integers, quantised as coarsely as an error bound allows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .logistic import classes_of_spread, code_bits

MANTISSA_BITS = 10
"""Bits of the mantissa of a step size. A step size that is rounded down to them costs 0.001 bit per number at most."""
MAX_TURNS = 16
"""Maximum number of step sizes that are tried for a tensor."""
CLOSE = 0.985
"""Share of the error bound that ends the search for a step size."""
MIN_NORM, MAX_NORM = 1e-140, 1e140
"""Range of norms of coded tensors, apart from 0. Squares of others may be 0 or infinite in float64."""
_LARGEST_INTEGER = 2**31 - 1


@dataclass(frozen=True, slots=True)
class StepSize:
    """A quantisation step size: mantissa · 2^exponent, exact in float64."""

    mantissa: int
    exponent: int

    @classmethod
    def at_most(cls, size: float) -> "StepSize":
        """Return the largest step size with `MANTISSA_BITS` bits that is not above a positive number."""
        fraction, exponent = math.frexp(size)
        return cls(int(math.ldexp(fraction, MANTISSA_BITS)), exponent - MANTISSA_BITS)

    def __float__(self) -> float:
        return math.ldexp(self.mantissa, self.exponent)


@dataclass(frozen=True, slots=True)
class QuantisedTensor:
    """A tensor as integers, before these are entropy-coded.

    Attributes:
        dtype: Dtype of the tensor.
        integers: Integers, int64, in the shape of the tensor.
        step_size: Quantisation step size.
        reference: Number of the reference that the integers are added to; None for none.
        error: Relative error of the tensor.
    """

    dtype: torch.dtype
    integers: Tensor
    step_size: StepSize
    reference: int | None
    error: float

    @property
    def rows(self) -> Tensor:
        """The integers in rows of one class each."""
        return self.integers.reshape(row_count(self.integers.shape), -1)

    @property
    def classes(self) -> np.ndarray:
        """The class of each row of integers, from their root mean square."""
        spread = self.rows.double().square().mean(1).sqrt()
        classes: np.ndarray = classes_of_spread(spread).numpy()
        return classes

    @property
    def bits(self) -> float:
        """About how many bits the integers take."""
        return float(code_bits(self.rows.double(), torch.from_numpy(self.classes)[:, None]).sum())


def quantise_tensor(
    tensor: Tensor, bound: float, reference: tuple[int, Tensor] | None = None
) -> QuantisedTensor | None:
    """Quantise a tensor as coarsely as an error bound allows.

    Args:
        tensor: The tensor.
        bound: Largest relative error ‖decoded − tensor‖ / ‖tensor‖, in its dtype.
        reference: Number and values of a reference of the same shape, which is used if that takes fewer bytes.

    Returns:
        The tensor as integers; None if the bound cannot be met.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    candidates = [_quantise(tensor, bound, None), *([_quantise(tensor, bound, reference)] if reference else [])]
    return min((each for each in candidates if each is not None), key=lambda each: each.bits, default=None)


def _quantise(tensor: Tensor, bound: float, reference: tuple[int, Tensor] | None) -> QuantisedTensor | None:
    number, prediction = (None, None) if reference is None else reference
    quantisation = _search_step_size(tensor, bound, prediction)
    if quantisation is None:
        return None
    step_size, integers, error = quantisation
    return QuantisedTensor(tensor.dtype, integers, step_size, number, error)


def _search_step_size(tensor: Tensor, bound: float, prediction: Tensor | None) -> tuple[StepSize, Tensor, float] | None:
    """Return the largest step size that was found within the bound, its integers (int64), and the relative error."""
    exact = tensor.to(torch.float64)
    norm = float(exact.norm())
    if not MIN_NORM < norm < MAX_NORM and bool(exact.any()):
        return None
    predicted = torch.zeros_like(exact) if prediction is None else prediction.to(torch.float64)
    difference = exact - predicted
    limit = bound * norm

    def error(decoded: Tensor) -> float:
        return float((decoded.to(tensor.dtype).to(torch.float64) - exact).norm())

    unchanged = error(predicted)
    if unchanged <= limit:
        zeros = torch.zeros(tensor.shape, dtype=torch.int64)
        return StepSize.at_most(1.0), zeros, unchanged / norm if norm else 0.0
    largest = float(difference.abs().max())
    # uniform noise of a step size s has the mean square s² / 12; no useful step size is above twice the largest number
    size, too_large = limit * (12 / tensor.numel()) ** 0.5, 2 * largest
    size = min(size, largest)
    best: tuple[StepSize, Tensor, float] | None = None
    for _ in range(MAX_TURNS):
        if not size > 1e-290 or largest / size >= _LARGEST_INTEGER:
            break
        step_size = StepSize.at_most(size)
        integers = (difference / float(step_size)).round()
        deviation = error(predicted + integers * float(step_size))
        if deviation <= limit:
            best = step_size, integers.to(torch.int64), deviation / norm
            if deviation >= CLOSE * limit:
                break
            proposed = size * min(0.9995 * limit / max(deviation, 1e-300), 4.0)
            size = proposed if proposed < too_large else (float(step_size) * too_large) ** 0.5
        else:
            too_large = size
            proposed = size * 0.9995 * limit / deviation
            size = proposed if best is None else max(proposed, (float(best[0]) * too_large) ** 0.5)
    return best


def row_count(shape: Sequence[int]) -> int:
    """Return the number of rows whose integers have a class each: the first dimension of a matrix, 1 for a vector."""
    return shape[0] if len(shape) > 1 else 1
