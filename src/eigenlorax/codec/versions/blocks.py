"""Rows of numbers that are quantised together, beside the rows of an earlier version that predict them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64, Int8, Int16, Int32

from .lattice import LEVELS_PER_OCTAVE, MAX_LEVEL, LatticeRows, Prediction, RowLabels, step_sizes
from .rate_rounding import classes_and_bits, round_by_rate

_MAX_INTEGER = 2**30


@dataclass(frozen=True, slots=True)
class Quantisation:
    """Step size and rounding of the rows of a version.

    Attributes:
        level: Level of rows of weight 1: a step size of 2^(level / 8).
        multiplier: Lagrange multiplier of `round_by_rate`.
        is_nested: True if step sizes are whole octaves apart from those of the reference, so that no prediction is
            rounded; False if they are those of the level.
    """

    level: int
    multiplier: float
    is_nested: bool = False


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one width.

    Attributes:
        values: The numbers.
        weights: Weight of each row: an error of the row counts with its square.
        reference: Rows that predict them; None for none.
        gains: Gain of each row's prediction (`RowLabels`); None for gains of 0.
        shares: For each row of a sample, the fraction of its columns that are here; None for whole rows.
        has_one_level: True if all rows have one level, as those of a tensor. Their weights are equal, and so are the
            levels of the reference.
    """

    values: Float64[np.ndarray, "rows width"]
    weights: Float64[np.ndarray, " rows"]
    reference: LatticeRows | None
    gains: Int8[np.ndarray, " rows"] | None = None
    shares: Float64[np.ndarray, " rows"] | None = None
    has_one_level: bool = False

    @property
    def all_gains(self) -> Int8[np.ndarray, " rows"]:
        """Gain of each row's prediction, 0 where none is given."""
        return np.zeros(len(self.weights), np.int8) if self.gains is None else self.gains

    def columns(self, count: int) -> "Block":
        """Return this number of columns, evenly spaced; all if there are no more."""
        width = self.values.shape[1]
        at = np.arange(count) * width // count if count < width else np.arange(width)
        reference = self.reference.columns(at) if self.reference is not None else None
        shares = np.full(len(self.weights), len(at) / max(width, 1))
        return replace(self, values=self.values[:, at], reference=reference, shares=shares)

    def per_column(self, figures: Float64[np.ndarray, " rows"]) -> Float64[np.ndarray, " rows"]:
        """Return figures of the sampled columns of each row, extrapolated to all columns."""
        extrapolated: np.ndarray = figures if self.shares is None else figures / self.shares
        return extrapolated

    def step_levels(self, level: int, is_nested: bool) -> Int16[np.ndarray, " rows"]:
        """Return the level of each row's step size, for steps of 2^(level / 8) at weight 1 (`Quantisation`)."""
        octaves = np.log2(np.maximum(self.weights, 1e-150))
        levels: np.ndarray = np.clip(np.rint(level - LEVELS_PER_OCTAVE * octaves), -MAX_LEVEL, MAX_LEVEL)
        levels = levels.astype(np.int16)
        # rows without weight are not coded at all
        levels[self.weights == 0] = 0
        if self.reference is None:
            return levels
        earlier = self.reference.labels.step_levels
        if is_nested:
            # rows of zeros predict nothing, so that any level does for them
            predicts = self.reference.integers.any(1) | (self.has_one_level and self.reference.integers.any())
            octaves = np.rint((levels.astype(np.int64) - earlier) / LEVELS_PER_OCTAVE)
            nested = earlier + LEVELS_PER_OCTAVE * octaves
            changed = predicts & (np.abs(nested) <= MAX_LEVEL)
            levels[changed] = nested[changed].astype(np.int16)
        levels[self.weights == 0] = earlier[self.weights == 0]
        return levels

    def quantise(self, quantisation: Quantisation) -> "QuantisedBlock":
        """Quantise all rows."""
        steps = self.step_levels(quantisation.level, quantisation.is_nested)
        labels = RowLabels.without_classes(steps, self.gains)
        prediction = Prediction.of(labels, self.values.shape[1], self.reference)
        # no increments lead from the reference to these rows then, and they are encoded without it
        prediction.integers[np.abs(prediction.integers) >= _MAX_INTEGER] = 0
        exact = self.values - prediction.integers * step_sizes(prediction.levels)[:, None]
        scaled = np.clip(exact / step_sizes(steps)[:, None], -_MAX_INTEGER, _MAX_INTEGER)
        increments = round_by_rate(scaled, quantisation.multiplier)
        increments[self.weights == 0] = 0
        prediction.add(increments)
        integers = np.clip(prediction.integers, -_MAX_INTEGER, _MAX_INTEGER)
        rows = LatticeRows(integers.astype(np.int32), prediction.levels, labels)
        return QuantisedBlock(self, rows, increments.astype(np.int32))


@dataclass(frozen=True, slots=True)
class QuantisedBlock:
    """A block as integers.

    Attributes:
        block: The block.
        rows: The rows, without classes.
        increments: What is added to their prediction, which is entropy-coded.
    """

    block: Block
    rows: LatticeRows
    increments: Int32[np.ndarray, "rows width"]

    @property
    def square(self) -> float:
        """Weighted squared error of the whole block, estimated if this is a sample."""
        errors = self.rows.values - self.block.values
        return float(np.square(errors).sum(1) @ self.block.per_column(np.square(self.block.weights)))

    @property
    def bits(self) -> float:
        """About how many bits the increments of the whole block take."""
        bits = classes_and_bits(self.increments)[1]
        return float(self.block.per_column(bits).sum())


def join(blocks: Sequence[Block]) -> Block:
    """Return blocks of one width as one. Rows of zeros stand for missing references."""
    references = [block.reference or _zeros(block.values.shape) for block in blocks]
    labels = [rows.labels for rows in references]
    return Block(
        np.concatenate([block.values for block in blocks]),
        np.concatenate([block.weights for block in blocks]),
        LatticeRows(
            np.concatenate([rows.integers for rows in references]),
            np.concatenate([rows.levels for rows in references]),
            RowLabels(
                np.concatenate([each.step_levels for each in labels]),
                np.concatenate([each.gains for each in labels]),
                np.concatenate([each.classes for each in labels]),
            ),
        ),
        np.concatenate([block.all_gains for block in blocks]),
        np.concatenate([block.shares if block.shares is not None else np.ones(len(block.weights)) for block in blocks]),
        all(block.has_one_level for block in blocks),
    )


def _zeros(shape: tuple[int, ...]) -> LatticeRows:
    """Return rows of zeros."""
    rows, _ = shape
    return LatticeRows(np.zeros(shape, np.int32), np.zeros(rows, np.int16), RowLabels.zeros(rows))
