"""Rows of exactly the same numbers, labelled to be predicted by another reference."""

import numpy as np
from jaxtyping import Int8, Int64

from .gains import choose_gains
from .lattice import LEVELS_PER_OCTAVE, MAX_LEVEL, MAX_OCTAVES, LatticeRows, RowLabels, step_sizes

_MAX_BITS = 62
"""Bits of an absolute value in this module."""


def relabel(rows: LatticeRows, reference: LatticeRows | None, *, has_one_level: bool) -> LatticeRows | None:
    """Return the same numbers, with the coarsest step sizes that lead to them from another prediction.

    The class of each row is 0.

    Args:
        rows: The rows.
        reference: The rows that predict them; None for none.
        has_one_level: True if all rows have one step size.

    Returns:
        The rows; None if their differences to the reference are beyond 32 bits.
    """
    count = len(rows.levels)
    if reference is None:
        reference = LatticeRows(np.zeros_like(rows.integers), np.zeros_like(rows.levels), RowLabels.zeros(count))
    levels, earlier = rows.levels.astype(np.int64), reference.levels.astype(np.int64)
    gains = np.zeros(count, np.int8)
    if not has_one_level:
        gains = choose_gains(rows.values, reference, np.square(step_sizes(levels)) / 12)
    predicts = reference.integers.any(1)
    is_nested = predicts & (gains == 0) & ((levels - earlier) % LEVELS_PER_OCTAVE == 0)
    # nested rows are on the finer lattice of the two
    steps = np.where(is_nested, np.minimum(levels, earlier), levels)
    differences = _differences(rows, reference, steps, gains)
    if differences is None:
        return None
    any_bit = np.bitwise_or.reduce(differences, axis=1, initial=0)
    # the lowest bit that is set in any of them
    common = np.log2(np.maximum(any_bit & -any_bit, 1)).astype(np.int64)
    unchanged = np.maximum((rows.labels.step_levels - steps) // LEVELS_PER_OCTAVE, 0)
    steps = steps + LEVELS_PER_OCTAVE * np.where(any_bit == 0, unchanged, common)
    # coarser steps would round the prediction, or round it otherwise
    coarsest = np.where(is_nested, earlier + LEVELS_PER_OCTAVE * MAX_OCTAVES, np.where(predicts, levels, MAX_LEVEL))
    steps -= LEVELS_PER_OCTAVE * np.maximum(-(-(steps - coarsest) // LEVELS_PER_OCTAVE), 0)
    if has_one_level:
        steps[:] = steps.min(initial=MAX_LEVEL)
    if np.abs(steps).max(initial=0) > MAX_LEVEL:
        return None
    labels = RowLabels.without_classes(steps, gains)
    prediction = reference.predict(labels)
    integers = _at_levels(rows, prediction.levels.astype(np.int64))
    if integers is None or np.abs(integers).max(initial=0) >= 2**31:
        return None
    return LatticeRows(integers.astype(np.int32), prediction.levels, labels)


def _differences(
    rows: LatticeRows, reference: LatticeRows, levels: Int64[np.ndarray, " rows"], gains: Int8[np.ndarray, " rows"]
) -> Int64[np.ndarray, "rows width"] | None:
    """Return the differences of rows to their prediction at these levels; None if they are too large."""
    predicted = reference.predict(RowLabels.without_classes(levels, gains)).integers
    integers = _at_levels(rows, levels)
    if integers is None or np.abs(predicted).max(initial=0) >= 2**_MAX_BITS:
        return None
    differences: np.ndarray = integers - predicted
    return differences


def _at_levels(rows: LatticeRows, levels: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, "rows width"] | None:
    """Return the integers of rows at other levels, whole octaves away; None if they are too large."""
    octaves = (rows.levels - levels) // LEVELS_PER_OCTAVE
    octaves[~rows.integers.any(1)] = 0
    if octaves.max(initial=0) > _MAX_BITS - 32:
        return None
    integers: np.ndarray = rows.integers.astype(np.int64) << np.maximum(octaves, 0)[:, None]
    integers >>= np.maximum(-octaves, 0)[:, None]
    return integers
