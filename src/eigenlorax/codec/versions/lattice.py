"""Rows of numbers on lattices: integers times a step size per row.

Everything that a decoder computes here is exact or rounded elementwise in IEEE float64, so that all machines agree, and
a version that is encoded again with another reference keeps its numbers.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int, Int16, Int32, Int64, UInt8

LEVELS_PER_OCTAVE = 8
MAX_LEVEL = 500 * LEVELS_PER_OCTAVE
"""Largest absolute value of a level: step sizes from 2^−500 to 2^500."""
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
class LatticeRows:
    """Rows of numbers, each an integer times the step size 2^(level / 8) of its row.

    Attributes:
        integers: The integers.
        levels: Level of each row.
        classes: Class of each row's increments in the version that it belongs to (`entropy`), or `ZERO_CLASS`.
    """

    integers: Int32[np.ndarray, "rows width"]
    levels: Int16[np.ndarray, " rows"]
    classes: UInt8[np.ndarray, " rows"]

    @property
    def values(self) -> Float64[np.ndarray, "rows width"]:
        """The numbers."""
        values: np.ndarray = self.integers * step_sizes(self.levels)[:, None]
        return values

    def reordered(self, order: Int64[np.ndarray, " count"]) -> "LatticeRows":
        """Return these rows in another order; −1 stands for a row of zeros at level 0."""
        present = order >= 0
        return LatticeRows(
            np.where(present[:, None], self.integers[order], 0).astype(np.int32),
            np.where(present, self.levels[order], 0).astype(np.int16),
            np.where(present, self.classes[order], ZERO_CLASS).astype(np.uint8),
        )

    def predict(self, levels: Int16[np.ndarray, " rows"]) -> Int64[np.ndarray, "rows width"]:
        """Return the closest integers to these numbers at other levels."""
        if np.array_equal(levels, self.levels):
            return self.integers.astype(np.int64)
        ratios = step_sizes(self.levels.astype(np.int64) - levels)
        # machines convert numbers beyond 64 bits differently; none of these is within the 32 bits of a valid version
        exact = np.clip(self.integers * ratios[:, None], -(2.0**62), 2.0**62)
        predicted: np.ndarray = np.rint(exact).astype(np.int64)
        return predicted


def step_sizes(levels: Int[np.ndarray, " rows"]) -> Float64[np.ndarray, " rows"]:
    """Return the step size of each level."""
    octaves, eighths = np.divmod(levels.astype(np.int64), LEVELS_PER_OCTAVE)
    sizes: np.ndarray = np.ldexp(_FRACTIONS[eighths], octaves.astype(np.int32))
    return sizes
