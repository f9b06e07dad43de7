"""The slow oracle: dense float64 NumPy, out × in matrices and full SVDs, written from the paper, not from the code."""

import numpy as np


def dense(factors):
    """scaling · up @ down as a full matrix."""
    return factors.scaling * factors.up.double().numpy() @ factors.down.double().numpy()


def delta_error(original, other):
    """√(Σ‖D − D'‖² / Σ‖D‖²) over modules of two adapters, by name."""
    lost = sum(np.square(dense(original.modules[m]) - dense(other.modules[m])).sum() for m in original.modules)
    total = sum(np.square(dense(original.modules[m])).sum() for m in original.modules)
    return float(np.sqrt(lost / total))


def top_rows(matrix, k):
    """Leading right singular vectors of a dense matrix, (k, d), and all its singular values."""
    _, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    return right[:k], sigma


def fit_delta(deltas, weights, k, sweeps):
    """The delta-weighted bases of one module from dense update matrices, by alternating dense SVDs.

    V: right singular vectors of the stacked w·D; U: of the stacked w·Dᵀ. A sweep sees D through the other basis.
    """
    right, right_sigma = top_rows(np.concatenate([w * d for w, d in zip(weights, deltas, strict=True)]), k)
    left, left_sigma = top_rows(np.concatenate([w * d.T for w, d in zip(weights, deltas, strict=True)]), k)
    for _ in range(sweeps):
        right, _ = top_rows(np.concatenate([w * left @ d for w, d in zip(weights, deltas, strict=True)]), k)
        left, _ = top_rows(np.concatenate([w * right @ d.T for w, d in zip(weights, deltas, strict=True)]), k)
    return right, left, right_sigma, left_sigma


def projected(delta, right, left):
    """Uᵀ U D Vᵀ V: the best approximation of D in the two spans."""
    return left.T @ (left @ delta @ right.T) @ right


def objective(deltas, weights, right, left):
    """Σ w²‖D − UᵀU D VᵀV‖²."""
    return sum(w**2 * np.square(d - projected(d, right, left)).sum() for w, d in zip(weights, deltas, strict=True))
