"""Leading eigenvectors of a symmetric matrix that can be multiplied with and is never formed.

Randomised block Krylov iteration (Musco and Musco, arXiv 1504.05477) in the form of block Lanczos with full
reorthogonalisation. Nothing here knows where the matrix comes from.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .linalg import descending_eigh

Multiply = Callable[[Tensor], Tensor]
"""From columns (d, b) to the matrix times them, (d, b)."""

# A block whose part outside the space so far is below this share of the largest eigenvalue holds rounding alone.
_NEGLIGIBLE = {torch.float32: 1e-6, torch.float64: 1e-14}
# The share of a step's gain that the next one brings, at least, in what is taken for missing.
_LEAST_RATIO = 0.5


@dataclass(frozen=True, slots=True)
class Ritz:
    """What was found of a positive semi-definite matrix.

    values: Ritz values, descending, float64, all that the search came by, (m,) with m ≥ k; each is at most the
        eigenvalue of its place. vectors: the first k Ritz vectors as orthonormal columns, (d, k).
    shortfall: what the sum of the k largest eigenvalues is above that of the first k Ritz values: an estimate from how
        fast the latter grew, 0 where the search came to its end.
    """

    values: Tensor
    vectors: Tensor
    shortfall: float


def leading(multiply: Multiply, start: Tensor, k: int, *, tolerance: float, trace: float = float("inf")) -> Ritz:
    """The k leading eigenvectors, from the columns `start`, (d, b), which any random ones may be.

    Of equal eigenvalues, no more are found at once than there are columns: b should be k at least. The search goes on
    until `shortfall` is at most `tolerance`; at the latest until its space has no room left. Where the space is closed
    under the matrix and yet lacks more than that of its `trace`, further random columns are taken in.
    """
    basis = orthonormal_columns(start)
    size = start.shape[1]
    small = torch.zeros(0, 0, dtype=torch.float64, device=start.device)
    sums: list[float] = []
    while True:
        image = multiply(basis[:, -size:])
        small = _bordered(small, basis.mT @ image)
        squares, mixing = descending_eigh(small)
        sums.append(float(squares[:k].clamp_min(0).sum()))
        outside = _outside(image, basis)
        negligible = _NEGLIGIBLE[start.dtype] * float(squares[0])
        closed = float(torch.linalg.matrix_norm(outside)) <= negligible
        left = max(trace - float(squares.clamp_min(0).sum()), 0.0)
        if closed and trace < float("inf") and left > tolerance:
            # what is left has no part in the columns so far
            closed, sums = False, []
            outside = _outside(_like(start, len(squares)), basis)
        shortfall = 0.0 if closed else min(missing(sums), left)
        enough = len(squares) >= k and shortfall <= tolerance
        if closed or enough or len(squares) + size > len(start):
            vectors = orthonormal_columns(basis @ mixing[:, :k].to(basis.dtype))
            return Ritz(squares.clamp_min(0), vectors, shortfall)
        basis = torch.cat([basis, _outside(orthonormal_columns(outside), basis, normed=True)], dim=1)


def missing(sums: list[float]) -> float:
    """What a growing sequence still lacks of its limit, by the ratio of its last two steps; inf where it has fewer."""
    if len(sums) < 3:
        return float("inf")
    before, last = sums[-2] - sums[-3], max(sums[-1] - sums[-2], 0.0)
    if last == 0.0:
        return 0.0
    ratio = max(last / before, _LEAST_RATIO) if before > 0 else 1.0
    return last * ratio / (1 - ratio) if ratio < 1 else float("inf")


def _like(start: Tensor, seed: int) -> Tensor:
    """Other random columns, the same ones for a seed each time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(start.shape, generator=generator, dtype=start.dtype).to(start.device)


def orthonormal_columns(columns: Tensor) -> Tensor:
    """The same span with orthonormal columns."""
    q: Tensor = torch.linalg.qr(columns)[0]
    return q


def _outside(columns: Tensor, basis: Tensor, normed: bool = False) -> Tensor:
    """The part of the columns that is orthogonal to the basis; orthonormal again where they were."""
    for _ in range(1 if normed else 2):
        columns = columns - basis @ (basis.mT @ columns)
    return orthonormal_columns(columns) if normed else columns


def _bordered(small: Tensor, border: Tensor) -> Tensor:
    """The symmetric matrix with further columns, and the same as rows."""
    size, width = small.shape[0], border.shape[1]
    whole = torch.zeros(size + width, size + width, dtype=torch.float64, device=border.device)
    whole[:size, :size] = small
    whole[:, size:] = border
    whole[size:, :size] = whole[:size, size:].mT
    corner = whole[size:, size:]
    whole[size:, size:] = (corner + corner.mT) / 2
    return whole
