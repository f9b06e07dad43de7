"""The figures of a collection once more, slowly: dense float64 NumPy, whole out × in matrices, written from the words.

A collection here is a list of adapters, each a mapping from module names to factors, which may lack some.
"""

import numpy as np

from planted import MODULES
from reference import dense


def updates(collection, shapes=MODULES):
    """Every adapter's dense updates by module, zeros where it lacks one."""
    return [{m: dense(one[m]) if m in one else np.zeros(shape) for m, shape in shapes.items()} for one in collection]


def flat(update):
    """All modules of an update as one long vector."""
    return np.concatenate([update[module].ravel() for module in update])


def table(collection, measure):
    """measure(one, other) of every pair."""
    return np.array([[measure(one, other) for other in collection] for one in collection])


def inner(one, other):
    return float(sum((one[m] * other[m]).sum() for m in one))


def shared_down(one, other):
    """⟨DᵀD, D'ᵀD'⟩."""
    return float(sum(((one[m].T @ one[m]) * (other[m].T @ other[m])).sum() for m in one))


def shared_up(one, other):
    """⟨DDᵀ, D'D'ᵀ⟩."""
    return float(sum(((one[m] @ one[m].T) * (other[m] @ other[m].T)).sum() for m in one))


def cosine(one, other, product=inner):
    norms = np.sqrt(product(one, one) * product(other, other))
    return product(one, other) / norms if norms else 0.0


def overlap(one, other):
    return (cosine(one, other, shared_down) + cosine(one, other, shared_up)) / 2


def rows_alike(one, other, side):
    """Σ over modules and r of ⟨row r of one, row r of the other⟩, of A or of B's columns; ranks may differ."""
    total = 0.0
    for module in one.keys() & other.keys():
        a, b = (rows(factors[module], side) for factors in (one, other))
        for row, its in zip(a, b, strict=False):
            total += row @ its
    return total


def rows(factors, side):
    return (factors.down if side == "down" else factors.up.mT).double().numpy()


def kept(update, right, left):
    """‖U D Vᵀ‖² of orthonormal rows V and U."""
    return float(np.square(left @ update @ right.T).sum())


def relative_error(update, other):
    """√(Σ‖D − D'‖² / Σ‖D‖²)."""
    lost = sum(np.square(update[m] - other[m]).sum() for m in update)
    return float(np.sqrt(lost / sum(np.square(update[m]).sum() for m in update)))


def rounded(matrix, bits):
    """Each row in blocks of 64, each to whole steps of its own size: a float16 with a sign, by which the largest number
    takes the lowest code, or the one a shorter largest number would have, whichever loses least."""
    lowest = -(2 ** (bits - 1))
    size = 2.0 ** np.floor(np.log2(max(np.abs(matrix).max(), 1e-300)))
    clips = (1.0, 0.95, 0.9, 0.85, 0.8) if bits in (3, 4, 5) else (1.0,)
    out = np.zeros_like(matrix)
    for i, row in enumerate(matrix / size):
        for start in range(0, len(row), 64):
            block = row[start : start + 64]
            largest = block[np.abs(block).argmax()]
            for clip in clips:
                step = float(np.float16(clip * largest / lowest))
                if step:
                    tried = np.clip(np.round(block / step), lowest, -lowest - 1) * step * size
                    before = np.square(out[i, start : start + 64] - block * size).sum()
                    if np.square(tried - block * size).sum() < before:
                        out[i, start : start + 64] = tried
    return out
