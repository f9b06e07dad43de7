"""The algorithm that the paper's authors released, written anew from its description; nothing of their code is here.

Of each side of each module: the factors as columns, their mean taken off, the covariance of the d features, its
eigenvectors by the solver for matrices that need not be symmetric, and the factors, with their mean again, on the k
leading ones. The mean is kept nowhere, so what of it lies outside of those directions is lost.

The covariance is formed in float32, as one product: in float64, or entry by entry, this would be slower.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]


def principal_directions(columns: Matrix, k: int) -> Matrix:
    """The k leading directions, (d, k), of the columns of a (d, m) matrix about their mean.

    Where k is above m - 1 the last ones are arbitrary.
    """
    centred = columns - columns.mean(axis=1, keepdims=True)
    covariance = centred @ centred.T / max(columns.shape[1] - 1, 1)
    values, vectors = np.linalg.eig(covariance)
    leading = np.argsort(-values.real)[:k]
    return np.ascontiguousarray(vectors.real[:, leading])


def fit_side(factors: Sequence[Matrix], k: int) -> tuple[Matrix, list[Matrix]]:
    """The directions of one side, (d, k), and each factor, (d, r), in them, (k, r)."""
    directions = principal_directions(np.concatenate(factors, axis=1), k)
    return directions, [directions.T @ factor for factor in factors]


def rebuilt(directions: Mapping[str, Matrix], loadings: Mapping[str, Matrix]) -> dict[str, Matrix]:
    """Factors, (d, r), by side, out of directions and loadings."""
    return {side: directions[side] @ loadings[side] for side in directions}
