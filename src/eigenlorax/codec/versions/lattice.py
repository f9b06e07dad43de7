"""Rows of numbers on lattices: integers times a power of two per row.

Everything that a decoder computes here is exact or rounded elementwise in IEEE float64, so that all machines agree, and
a version that is encoded again with another reference keeps its numbers.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64, Int, Int8, Int16, Int32, Int64, UInt8

LEVELS_PER_OCTAVE = 8
MAX_LEVEL = 500 * LEVELS_PER_OCTAVE
"""Largest absolute value of a step size's level: step sizes from 2^−500 to 2^500."""
MAX_OCTAVES = 4
"""How many octaves the level of a predicted row is below that of its step size, at most."""
GAIN_UNIT = 64
"""A gain of g multiplies the prediction by (64 + g) / 64, rounded to a multiple of the step size."""
ZERO_CLASS = 255
"""Class of a row whose increments are all 0, and take no bits."""
_FRACTIONS = np.array(
    [
        1.0,
        1.0905077326652577,
        1.189207115002721,
        1.2968395546510096,
        1.4142135623730951,
        1.5422108254079407,
        1.681792830507429,
        1.8340080864093424,
    ]
)
"""2^(i / 8), as the nearest float64."""


@dataclass(frozen=True, slots=True)
class RowLabels:
    """Step sizes, gains and classes of the rows of a block, as a version stores them beside its increments.

    Attributes:
        step_levels: Level of the step size of each row's increments.
        gains: Each row is predicted by (64 + gain) / 64 times the row of the reference.
        classes: Class of each row's increments (`entropy`), or `ZERO_CLASS`.
    """

    step_levels: Int16[np.ndarray, " rows"]
    gains: Int8[np.ndarray, " rows"]
    classes: UInt8[np.ndarray, " rows"]

    @classmethod
    def without_classes(
        cls, step_levels: Int[np.ndarray, " rows"], gains: Int8[np.ndarray, " rows"] | None = None
    ) -> "RowLabels":
        """Return labels of class 0, for rows that are not encoded yet. Gains are 0 by default."""
        count = len(step_levels)
        gains = np.zeros(count, np.int8) if gains is None else gains
        return cls(step_levels.astype(np.int16), gains, np.zeros(count, np.uint8))

    @classmethod
    def zeros(cls, count: int) -> "RowLabels":
        """Return the labels of rows at level 0, of class 0."""
        return cls.without_classes(np.zeros(count, np.int16))

    def reordered(self, order: Int64[np.ndarray, " count"]) -> "RowLabels":
        """Return the labels in another order; −1 stands for a row of zeros at level 0."""
        present = order >= 0
        return RowLabels(
            np.where(present, self.step_levels[order], 0).astype(np.int16),
            np.where(present, self.gains[order], 0).astype(np.int8),
            np.where(present, self.classes[order], ZERO_CLASS).astype(np.uint8),
        )


@dataclass(frozen=True, slots=True)
class LatticeRows:
    """Rows of numbers, each an integer times 2^(level / 8), with the level of its row.

    Attributes:
        integers: The integers.
        levels: Level of each row.
        labels: Labels of the rows in the version that they belong to.
    """

    integers: Int32[np.ndarray, "rows width"]
    levels: Int16[np.ndarray, " rows"]
    labels: RowLabels

    @property
    def values(self) -> Float64[np.ndarray, "rows width"]:
        """The numbers."""
        values: np.ndarray = self.integers * step_sizes(self.levels)[:, None]
        return values

    def with_classes(self, classes: UInt8[np.ndarray, " rows"]) -> "LatticeRows":
        """Return the rows with other classes."""
        return replace(self, labels=replace(self.labels, classes=classes))

    def increments(self, reference: "LatticeRows | None") -> Int64[np.ndarray, "rows width"] | None:
        """Return the increments that lead to exactly these rows; None if no increments with these labels do.

        Args:
            reference: The rows that predict them; None for none.
        """
        prediction = Prediction.of(self.labels, self.integers.shape[1], reference)
        increments: np.ndarray = (self.integers - prediction.integers) >> prediction.octaves[:, None]
        prediction.add(increments)
        is_exact = np.array_equal(prediction.integers, self.integers) and np.array_equal(prediction.levels, self.levels)
        return increments if is_exact else None

    def columns(self, at: Int64[np.ndarray, " count"]) -> "LatticeRows":
        """Return some columns."""
        return LatticeRows(self.integers[:, at], self.levels, self.labels)

    def reordered(self, order: Int64[np.ndarray, " count"]) -> "LatticeRows":
        """Return these rows in another order; −1 stands for a row of zeros at level 0."""
        present = order >= 0
        return LatticeRows(
            np.where(present[:, None], self.integers[order], 0).astype(np.int32),
            np.where(present, self.levels[order], 0).astype(np.int16),
            self.labels.reordered(order),
        )

    def predict(self, labels: RowLabels) -> "Prediction":
        """Return the prediction of rows by these.

        Args:
            labels: Labels of the predicted rows; their classes are not used.
        """
        steps, levels = labels.step_levels.astype(np.int64), self.levels.astype(np.int64)
        # whole octaves apart, all numbers of both rows are on the finer lattice, so that no prediction is rounded
        predicts = self.integers.any(1)
        is_nested = predicts & ((steps - levels) % LEVELS_PER_OCTAVE == 0)
        finest = np.maximum(np.minimum(steps, levels), steps - LEVELS_PER_OCTAVE * MAX_OCTAVES)
        has_gain = predicts & (labels.gains != 0)
        new_levels = np.where(is_nested & ~has_gain, finest, steps)
        integers = self.integers.astype(np.int64)
        changed = has_gain | (predicts & (new_levels != levels))
        factors = step_sizes(levels - new_levels)[changed, None] / GAIN_UNIT
        with np.errstate(over="ignore"):
            exact = integers[changed] * (GAIN_UNIT + labels.gains[changed, None].astype(np.int64)) * factors
        # machines convert numbers beyond 64 bits differently; none of these is within the 32 bits of a valid version
        integers[changed] = np.rint(np.clip(exact, -(2.0**62), 2.0**62)).astype(np.int64)
        return Prediction(integers, new_levels.astype(np.int16), (steps - new_levels) // LEVELS_PER_OCTAVE)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted rows, before increments are added.

    Attributes:
        integers: The integers.
        levels: Level of each row.
        octaves: How many octaves the level of each row is below that of its increments' step size.
    """

    integers: Int64[np.ndarray, "rows width"]
    levels: Int16[np.ndarray, " rows"]
    octaves: Int64[np.ndarray, " rows"]

    @classmethod
    def of(cls, labels: RowLabels, width: int, reference: LatticeRows | None) -> "Prediction":
        """Return the prediction of rows by those of a reference; None for rows that consist of their increments."""
        if reference is not None:
            return reference.predict(labels)
        rows = len(labels.step_levels)
        return cls(np.zeros((rows, width), np.int64), labels.step_levels, np.zeros(rows, np.int64))

    def add(self, increments: Int[np.ndarray, "_ width"], rows: np.ndarray | slice = slice(None)) -> None:
        """Add increments in place, to all rows or to some."""
        self.integers[rows] += increments.astype(np.int64, copy=False) << self.octaves[rows, None]


def step_sizes(levels: Int[np.ndarray, " rows"]) -> Float64[np.ndarray, " rows"]:
    """Return the step size of each level."""
    octaves, eighths = np.divmod(levels.astype(np.int64), LEVELS_PER_OCTAVE)
    sizes: np.ndarray = np.ldexp(_FRACTIONS[eighths], octaves.astype(np.int32))
    return sizes
