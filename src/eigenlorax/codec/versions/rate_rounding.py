"""Rounding of numbers to integers by rate and distortion, and the entropy coder's classes for rows of integers."""

import math
from functools import cache

import numpy as np
import torch
from jaxtyping import Float64, Int32, Int64, UInt8

from ..class_tables import CLASSES, GROUP_CLASSES, change_probability
from ..logistic import TABLE_SIZE, bit_table, code_bits
from .lattice import ZERO_CLASS

_MIN_SPREAD = 2.0**-6


@cache
def _bit_increases() -> Float64[np.ndarray, "classes size"]:
    """Return how many more bits the integer k + 1 takes than k, in each class; at least 0."""
    increases: np.ndarray = np.maximum(np.diff(bit_table().numpy(), axis=1), 0)
    return increases


def round_by_rate(scaled: Float64[np.ndarray, "rows width"], multiplier: float) -> Int64[np.ndarray, "rows width"]:
    """Round numbers to integers, those that cost more bits only where the error decreases enough.

    Of the two integers next to a number x, the one with the smaller (x − k)² + multiplier · bits(k) is chosen, with the
    bits of the row's class. A multiplier of 0 rounds to the nearest integer.

    Args:
        scaled: Numbers relative to their step sizes.
        multiplier: Lagrange multiplier of the bits.
    """
    if not multiplier:
        nearest: np.ndarray = np.rint(scaled).astype(np.int64)
        return nearest
    magnitudes = np.abs(scaled)
    spread = np.sqrt(np.square(np.rint(magnitudes)).mean(1))
    increases = _bit_increases()[_class_of_spread(spread)]
    below = np.floor(magnitudes)
    index = np.minimum(below, increases.shape[1] - 1).astype(np.intp)
    threshold = 0.5 + 0.5 * multiplier * np.take_along_axis(increases, index, axis=1)
    rounded: np.ndarray = np.copysign(below + (magnitudes - below > threshold), scaled).astype(np.int64)
    return rounded


def _class_of_spread(spread: Float64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
    """Return the class for integers of each standard deviation, as `logistic.classes_of_spread` does."""
    octaves = np.log2(np.maximum(spread, _MIN_SPREAD) * math.sqrt(3) / math.pi)
    classes: np.ndarray = np.clip(np.rint(4 * octaves) + 16, 0, CLASSES - 1).astype(np.int64)
    return classes


def classes_and_bits(
    integers: Int32[np.ndarray, "rows width"],
) -> tuple[UInt8[np.ndarray, " rows"], Float64[np.ndarray, " rows"]]:
    """Return the class of each row in which it takes the fewest bits, and about how many these are."""
    magnitudes = np.abs(integers)
    largest = magnitudes.max(1, initial=0)
    classes = _class_of_spread(np.sqrt(np.square(magnitudes, dtype=np.float64).mean(1)))
    bits = np.zeros(len(integers))
    narrow = largest < TABLE_SIZE
    if narrow.any():
        rows = np.arange(int(narrow.sum()))[:, None] * TABLE_SIZE
        histogram = np.bincount((magnitudes[narrow] + rows).ravel(), minlength=len(rows) * TABLE_SIZE)
        costs = histogram.reshape(-1, TABLE_SIZE) @ bit_table().numpy().T
        classes[narrow] = costs.argmin(1)
        bits[narrow] = costs.min(1)
    if not narrow.all():
        wide = torch.from_numpy(magnitudes[~narrow]).to(torch.float64)
        bits[~narrow] = code_bits(wide, torch.from_numpy(classes[~narrow])[:, None]).sum(1).numpy()
    # groups take as few bits, and a quarter of the time
    ternary = largest == 1
    if ternary.any():
        changed = magnitudes[ternary].sum(1)[:, None]
        costs = changed * _change_bits() + (integers.shape[1] - changed) * _zero_bits()
        classes[ternary] = CLASSES + costs.argmin(1)
        bits[ternary] = costs.min(1)
    classes[largest == 0] = ZERO_CLASS
    bits[largest == 0] = 0
    return classes.astype(np.uint8), bits


@cache
def _change_bits() -> Float64[np.ndarray, " classes"]:
    """Return the bits of an integer of −1 or 1 in each class of groups."""
    probabilities = np.array([float(change_probability(index)) for index in range(GROUP_CLASSES)])
    bits: np.ndarray = 1 - np.log2(probabilities)
    return bits


@cache
def _zero_bits() -> Float64[np.ndarray, " classes"]:
    """Return the bits of a zero in each class of groups."""
    probabilities = np.array([float(change_probability(index)) for index in range(GROUP_CLASSES)])
    bits: np.ndarray = -np.log2(1 - probabilities)
    return bits
