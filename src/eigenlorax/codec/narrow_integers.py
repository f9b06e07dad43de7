"""Integers in the narrowest dtype, as they are held in memory and sent between processes."""

import numpy as np

_INTEGER_DTYPES = (np.int8, np.int16, np.int32, np.int64)


def narrow(codes: np.ndarray) -> np.ndarray:
    """Return the same integers in the narrowest dtype that holds all of them: most codes fit one byte."""
    low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    return codes.astype(next(t for t in _INTEGER_DTYPES if np.iinfo(t).min <= low and high <= np.iinfo(t).max))
