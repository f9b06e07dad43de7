"""Gains: factors of the rows of a reference, for rows that grow or shrink as a whole, as those of AdaLoRA do."""

import numpy as np
from jaxtyping import Float64, Int8

from .lattice import GAIN_UNIT, LatticeRows

GAIN_BITS = 0.1
"""Bits per number that a gain saves, at least."""


def choose_gains(
    values: Float64[np.ndarray, "rows width"], reference: LatticeRows, noise: Float64[np.ndarray, " rows"]
) -> Int8[np.ndarray, " rows"]:
    """Return the gain that brings the prediction of each row closest to it, or 0 where that saves few bits.

    Args:
        values: The rows.
        reference: Rows that predict them.
        noise: Mean square of the quantisation error of each row.
    """
    predicting = reference.values
    squares = np.maximum(np.square(predicting).sum(1), 1e-300)
    wanted = GAIN_UNIT * ((values * predicting).sum(1) / squares - 1)
    gains = np.clip(np.rint(wanted), 1 - GAIN_UNIT, np.iinfo(np.int8).max)
    without = np.square(values - predicting).mean(1) + noise
    # a prediction with a gain is rounded, which is as much noise again
    remaining = np.square(values - (1 + gains / GAIN_UNIT)[:, None] * predicting).mean(1) + 2 * noise
    saved = 0.5 * np.log2(np.maximum(without, 1e-300) / np.maximum(remaining, 1e-300))
    chosen: np.ndarray = np.where(saved > GAIN_BITS, gains, 0).astype(np.int8)
    return chosen
