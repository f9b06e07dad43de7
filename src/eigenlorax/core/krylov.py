"""Leading eigenvectors of a symmetric matrix that is only available as a product with columns.

Randomised block Krylov iteration (Musco and Musco, arXiv 1504.05477), as block Lanczos with full reorthogonalisation:
the search space is spanned by X, G·X, G²·X, …, and Ritz pairs of G in that space approximate its eigenpairs.
`torch.svd_lowrank` has no stopping rule, which is what this module adds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from .linalg import descending_eigh

Multiply = Callable[[Tensor], Tensor]
"""Function that returns the matrix times some columns, (d, b) → (d, b)."""

BLOCK = 32
"""Columns per step of `search`; as many as eigenvectors where that many eigenvalues are nearly equal."""
EQUAL_WITHIN = 1e-3
"""Relative difference below which eigenvalues count as equal."""
TOLERANCE = 5e-5
"""Fraction of the trace that `search` may be estimated to lack when it ends."""

# The part of a block outside the search space is rounding noise below this fraction of the largest eigenvalue.
_NEGLIGIBLE = {torch.float32: 1e-6, torch.float64: 1e-14}
# Lower bound of the ratio by which gains are assumed to shrink from one step to the next: gains that happened to
# collapse in one step do not mean that the search has converged.
_MIN_GAIN_RATIO = 0.5


@dataclass(frozen=True, slots=True)
class RitzPairs:
    """Approximate eigenpairs of a positive semi-definite matrix.

    Attributes:
        values: All Ritz values of the search space, descending, float64, (m,) with m ≥ k. Each is at most the
            eigenvalue of the same position.
        vectors: The first k Ritz vectors as orthonormal columns, (d, k).
        shortfall: Estimate of how much the first k Ritz values sum to less than the k largest eigenvalues; 0 where the
            search space is invariant, so that the pairs are exact.
    """

    values: Tensor
    vectors: Tensor
    shortfall: float


def search(multiply: Multiply, start: Callable[[int], Tensor], k: int) -> RitzPairs:
    """Search for the k leading eigenvectors of a positive semi-definite matrix of trace 1.

    Args:
        multiply: The matrix, as a function.
        start: Function that returns a number of random columns.
        k: Number of eigenvectors.
    """

    def search_by(block: int) -> RitzPairs:
        return leading_eigenvectors(multiply, start(block), k, tolerance=TOLERANCE, trace=1.0)

    ritz = search_by(BLOCK)
    # a search finds at most `BLOCK` of several equal eigenvalues, and there may be more of them
    return search_by(k) if k > BLOCK and _has_equal_values(ritz.values[:k], BLOCK) else ritz


def _has_equal_values(values: Tensor, n: int) -> bool:
    """Return whether `n` consecutive ones of the descending values are equal within `EQUAL_WITHIN`."""
    return bool((values[n - 1 :] > (1 - EQUAL_WITHIN) * values[: len(values) - n + 1]).any())


def seeded_columns(dimension: int, n: int, label: str) -> Tensor:
    """Return random columns, (dimension, n) float32, that depend on the label and the shape alone."""
    # a cryptographic hash, because `hash()` differs from one process to the next; 7 bytes fit a torch seed
    seed = int.from_bytes(sha256(label.encode()).digest()[:7], "big")
    return torch.randn(dimension, n, generator=torch.Generator().manual_seed(seed))


def leading_eigenvectors(
    multiply: Multiply, start: Tensor, k: int, *, tolerance: float, trace: float = float("inf")
) -> RitzPairs:
    """Search for the k leading eigenvectors of a positive semi-definite matrix.

    The space grows by b columns per step until `shortfall` is at most `tolerance`, or until no further block fits.

    Args:
        multiply: The matrix, as a function.
        start: Random columns, (d, b). At most b of several equal eigenvalues are found, so b should be k where
            eigenvalues may be equal.
        k: Number of eigenvectors.
        tolerance: Bound on `shortfall`, in units of the eigenvalues.
        trace: Trace of the matrix, if known. Where the space is invariant but more than `tolerance` of the trace is
            outside of it, new random columns restart the search in the complement.
    """
    basis = orthonormal_columns(start)
    block = start.shape[1]
    projected = torch.zeros(0, 0, dtype=torch.float64, device=start.device)
    sums: list[float] = []
    while True:
        # only the newest block is multiplied: the images of the others are known to be in the span of the basis
        image = multiply(basis[:, -block:])
        projected = _append_border(projected, basis.mT @ image)
        # Rayleigh–Ritz: eigenpairs of the matrix, projected on the search space
        values, combination = descending_eigh(projected)
        sums.append(float(values[:k].clamp_min(0).sum()))
        # twice against the whole basis: without full reorthogonalisation, Lanczos finds converged vectors again
        outside = _orthogonal_part(image, basis)
        negligible = _NEGLIGIBLE[start.dtype] * float(values[0])
        is_invariant = float(torch.linalg.matrix_norm(outside)) <= negligible
        missing_trace = max(trace - float(values.clamp_min(0).sum()), 0.0)
        if is_invariant and trace < float("inf") and missing_trace > tolerance:
            # the columns so far have no part in the remaining eigenvectors, so multiplying by G cannot reach those
            is_invariant, sums = False, []
            outside = _orthogonal_part(_random_like(start, seed=len(values)), basis)
        # the trace bounds the estimate, because no eigenvalue is negative
        shortfall = 0.0 if is_invariant else min(estimate_missing(sums), missing_trace)
        has_converged = len(values) >= k and shortfall <= tolerance
        # the last case: no further block fits into d dimensions
        if is_invariant or has_converged or len(values) + block > len(start):
            vectors = orthonormal_columns(basis @ combination[:, :k].to(basis.dtype))
            return RitzPairs(values.clamp_min(0), vectors, shortfall)
        # QR leaves the block less orthogonal to the basis where `outside` is small, so it is orthogonalised once more
        block_columns = orthonormal_columns(_orthogonal_part(orthonormal_columns(outside), basis, passes=1))
        basis = torch.cat([basis, block_columns], dim=1)


def estimate_missing(sums: list[float]) -> float:
    """Estimate the remaining distance to the limit by geometric extrapolation.

    Args:
        sums: Partial sums, increasing.

    Returns:
        The sum of the geometric series that continues the last two gains, with a ratio of at least ½. Infinity for
        fewer than two gains, and for gains that do not shrink.
    """
    if len(sums) < 3:
        return float("inf")
    previous_gain, gain = sums[-2] - sums[-3], max(sums[-1] - sums[-2], 0.0)
    if gain == 0.0:
        return 0.0
    ratio = max(gain / previous_gain, _MIN_GAIN_RATIO) if previous_gain > 0 else 1.0
    return gain * ratio / (1 - ratio) if ratio < 1 else float("inf")


def _random_like(start: Tensor, seed: int) -> Tensor:
    # on the CPU, so that the numbers do not depend on the device
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(start.shape, generator=generator, dtype=start.dtype).to(start.device)


def orthonormal_columns(columns: Tensor) -> Tensor:
    """Return orthonormal columns of the same span."""
    q: Tensor = torch.linalg.qr(columns)[0]
    return q


def _orthogonal_part(columns: Tensor, basis: Tensor, passes: int = 2) -> Tensor:
    """Return the part of the columns that is orthogonal to the basis, by Gram–Schmidt."""
    for _ in range(passes):
        columns = columns - basis @ (basis.mT @ columns)
    return columns


def _append_border(symmetric: Tensor, border: Tensor) -> Tensor:
    """Return the symmetric matrix with `border` as further columns, and as further rows."""
    size, width = symmetric.shape[0], border.shape[1]
    extended = torch.zeros(size + width, size + width, dtype=torch.float64, device=border.device)
    extended[:size, :size] = symmetric
    extended[:, size:] = border
    extended[size:, :size] = extended[:size, size:].mT
    corner = extended[size:, size:]
    # rounding leaves the new corner slightly asymmetric
    extended[size:, size:] = (corner + corner.mT) / 2
    return extended
