"""Rows of numbers that are quantised together, beside the rows of an earlier version that predict them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int16, Int32

from .lattice import LEVELS_PER_OCTAVE, MAX_LEVEL, LatticeRows, step_sizes
from .rate_rounding import classes_and_bits, round_by_rate

HYSTERESIS = LEVELS_PER_OCTAVE // 2
"""A row keeps the level of its reference if the wanted one differs by less: another lattice rounds the prediction."""
_MAX_INTEGER = 2**30


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one width.

    Attributes:
        values: The numbers.
        weights: Weight of each row: an error of the row counts with its square.
        reference: Rows that predict them; None for none.
        shares: For each row of a sample, the fraction of its columns that are here; None for whole rows.
        has_one_level: True if all rows have one level, as those of a tensor. Their weights are equal, and so are the
            levels of the reference.
    """

    values: Float64[np.ndarray, "rows width"]
    weights: Float64[np.ndarray, " rows"]
    reference: LatticeRows | None
    shares: Float64[np.ndarray, " rows"] | None = None
    has_one_level: bool = False

    def columns(self, count: int) -> "Block":
        """Return this number of columns, evenly spaced; all if there are no more."""
        width = self.values.shape[1]
        at = np.arange(count) * width // count if count < width else np.arange(width)
        reference = self.reference
        if reference is not None:
            reference = LatticeRows(reference.integers[:, at], reference.levels, reference.classes)
        shares = np.full(len(self.weights), len(at) / max(width, 1))
        return Block(self.values[:, at], self.weights, reference, shares, self.has_one_level)

    def per_column(self, figures: Float64[np.ndarray, " rows"]) -> Float64[np.ndarray, " rows"]:
        """Return figures of the sampled columns of each row, extrapolated to all columns."""
        extrapolated: np.ndarray = figures if self.shares is None else figures / self.shares
        return extrapolated

    def levels(self, level: int) -> Int16[np.ndarray, " rows"]:
        """Return the level of each row, for steps of 2^(level / 8) at weight 1."""
        octaves = np.log2(np.maximum(self.weights, 1e-150))
        levels: np.ndarray = np.clip(np.rint(level - LEVELS_PER_OCTAVE * octaves), -MAX_LEVEL, MAX_LEVEL)
        levels = levels.astype(np.int16)
        # rows without weight are not coded at all
        levels[self.weights == 0] = 0
        if self.reference is None:
            return levels
        earlier = self.reference.levels
        # rows of zeros predict nothing, so that any level does for them
        predicts = self.reference.integers.any(1) | (self.has_one_level and self.reference.integers.any())
        is_near = (np.abs(levels.astype(np.int64) - earlier) < HYSTERESIS) & predicts
        nearby: np.ndarray = np.where(is_near | (self.weights == 0), earlier, levels).astype(np.int16)
        return nearby

    def quantise(self, level: int, multiplier: float) -> "QuantisedBlock":
        """Quantise all rows.

        Args:
            level: Level at weight 1.
            multiplier: Lagrange multiplier of `round_by_rate`.
        """
        levels = self.levels(level)
        scaled = self.values / step_sizes(levels)[:, None]
        predicted = self.reference.predict(levels) if self.reference is not None else np.zeros((1, 1), np.int64)
        # a version with such differences to its reference is coded without it
        predicted[np.abs(predicted) >= _MAX_INTEGER] = 0
        increments = round_by_rate(np.clip(scaled - predicted, -_MAX_INTEGER, _MAX_INTEGER), multiplier)
        increments[self.weights == 0] = 0
        return QuantisedBlock(self, levels, (predicted + increments).astype(np.int32), increments.astype(np.int32))


@dataclass(frozen=True, slots=True)
class QuantisedBlock:
    """A block as integers.

    Attributes:
        block: The block.
        levels: Level of each row.
        integers: The integers.
        increments: The integers without their prediction, which are entropy-coded.
    """

    block: Block
    levels: Int16[np.ndarray, " rows"]
    integers: Int32[np.ndarray, "rows width"]
    increments: Int32[np.ndarray, "rows width"]

    @property
    def values(self) -> Float64[np.ndarray, "rows width"]:
        """The numbers that the integers represent."""
        values: np.ndarray = self.integers * step_sizes(self.levels)[:, None]
        return values

    @property
    def square(self) -> float:
        """Weighted squared error of the whole block, estimated if this is a sample."""
        errors = self.values - self.block.values
        return float(np.square(errors).sum(1) @ self.block.per_column(np.square(self.block.weights)))

    @property
    def bits(self) -> float:
        """About how many bits the increments of the whole block take."""
        bits = classes_and_bits(self.increments)[1]
        return float(self.block.per_column(bits).sum())

    @property
    def rows(self) -> LatticeRows:
        """The rows, without classes."""
        return LatticeRows(self.integers, self.levels, np.zeros(len(self.levels), np.uint8))


def join(blocks: Sequence[Block]) -> Block:
    """Return blocks of one width as one. Rows of zeros stand for missing references."""
    references = [
        block.reference
        if block.reference is not None
        else LatticeRows(
            np.zeros(block.values.shape, np.int32),
            np.zeros(len(block.weights), np.int16),
            np.zeros(len(block.weights), np.uint8),
        )
        for block in blocks
    ]
    return Block(
        np.concatenate([block.values for block in blocks]),
        np.concatenate([block.weights for block in blocks]),
        LatticeRows(
            np.concatenate([rows.integers for rows in references]),
            np.concatenate([rows.levels for rows in references]),
            np.concatenate([rows.classes for rows in references]),
        ),
        np.concatenate([block.shares if block.shares is not None else np.ones(len(block.weights)) for block in blocks]),
        all(block.has_one_level for block in blocks),
    )
