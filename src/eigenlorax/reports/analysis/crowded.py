"""Leave-one-out fits for modules with many rows: spectra are computed once, and each adapter is removed from them.

A thousand adapters have many times more rows than dimensions. Their Gram matrices are summed in float32, from rows
scaled to avoid overflow, and decomposed in float64. The rounding error is about 1e-7 of the largest eigenvalue.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...core.batch import ModuleBatch, gram_matrices, gram_roots
from ...core.linalg import orthonormal_rows, psd_root

MANY = 256
"""Maximum number of rows for which a module is refitted, with sweeps, without each adapter."""
MAX_COMPONENTS = 128
"""Maximum number of components at which adapters are left out of a module with many rows."""
PARTIAL_SIZE, PARTIAL_SHARE = 320, 0.25
"""Size of a matrix from which leading eigenvectors are computed alone, if they are at most this share of all."""
_RELATIVE_ZERO = 1e-12
"""Maximum eigenvalue that counts as zero, relative to the largest one."""
_ROUNDING = 1e-6
_SPARE = 64


def required_components(k: int) -> int:
    """Return the number of components of all adapters that suffices to compute k components without one adapter."""
    return 2 * k + _SPARE


def is_crowded(rows: int) -> bool:
    """Return whether there are too many rows to refit a module without each adapter."""
    return rows > MANY


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Spectrum of a stack of rows.

    Attributes:
        values: Nonzero eigenvalues of the stack's d × d Gram matrix, descending.
        vectors: Eigenvectors as rows.
    """

    values: Float[Tensor, " s"]
    vectors: Float[Tensor, "s d"]

    @classmethod
    def of(cls, rows: Float[Tensor, "n r d"]) -> "Spectrum":
        """Decompose the rows of a stack by the smaller of its two Gram matrices."""
        flat = rows.reshape(-1, rows.shape[2])
        if flat.shape[0] > flat.shape[1]:
            return cls.of_gram(gram(rows))
        values, vectors = _descending(flat @ flat.mT)
        return cls(values, orthonormal_rows((vectors / values.sqrt()).mT @ flat))

    @classmethod
    def of_gram(cls, matrix: Float[Tensor, "d d"]) -> "Spectrum":
        """Decompose a stack by its Gram matrix."""
        values, vectors = _descending(matrix)
        return cls(values, vectors.mT.contiguous())

    @classmethod
    def with_halves(
        cls, rows: Float[Tensor, "n r d"], halves: tuple[Sequence[int], Sequence[int]], k: int
    ) -> tuple["Spectrum", Float[Tensor, "_ d"], Float[Tensor, "_ d"]]:
        """Decompose all rows, and return at most k components of each half of the adapters, neither of them empty."""
        first_rows, second_rows = (rows[list(half)] for half in halves)
        if rows.shape[0] * rows.shape[1] <= rows.shape[2]:
            return cls.of(rows), leading_vectors(first_rows, k), leading_vectors(second_rows, k)
        first_gram, second_gram = gram(first_rows), gram(second_rows)
        first, second = (_leading(matrix, k)[1].mT.contiguous() for matrix in (first_gram, second_gram))
        return cls.of_gram(first_gram + second_gram), first, second

    def without(self, rows: Float[Tensor, "r d"], k: int) -> Float[Tensor, "k d"]:
        """Return the at most k leading components of the stack without some of its rows.

        The Rayleigh–Ritz method finds them in the span of the leading 2k + 64 components of the stack and of the
        removed rows. The result is exact if this is the span of the whole stack. Else the error is of second order in
        the share of the removed rows.
        """
        m = min(len(self.values), required_components(k))
        basis = self.vectors[:m]
        projected = rows @ basis.mT
        if m < len(self.values):
            beyond = _orthonormalise(rows - projected @ basis)
            # the remaining eigenvectors are orthogonal to the leading ones
            inside = (beyond @ self.vectors[m:].mT) * self.values[m:].sqrt()
            small = torch.zeros(m + len(beyond), m + len(beyond), dtype=torch.float64)
            small[:m, :m], small[m:, m:] = torch.diag(self.values[:m]), inside @ inside.mT
            basis, projected = torch.cat([basis, beyond]), torch.cat([projected, rows @ beyond.mT], dim=1)
        else:
            small = torch.diag(self.values)
        values, vectors = torch.linalg.eigh(small - projected.mT @ projected)
        # components of the removed rows alone now have an eigenvalue of zero, except for rounding
        n_nonzero = int((values > _ROUNDING * self.values[0]).sum())
        leading: Tensor = vectors.flip(1)[:, : min(k, n_nonzero)].mT @ basis
        return leading


def _descending(matrix: Float[Tensor, "s s"]) -> tuple[Tensor, Tensor]:
    """Return all nonzero eigenvalues, descending, and their eigenvectors as columns."""
    return _without_zeros(*torch.linalg.eigh(matrix))


def _leading(matrix: Float[Tensor, "s s"], k: int) -> tuple[Tensor, Tensor]:
    """Return at most k of the largest nonzero eigenvalues, descending, and their eigenvectors as columns."""
    n = len(matrix)
    if n < PARTIAL_SIZE or not 0 < k <= PARTIAL_SHARE * n:
        values, vectors = _descending(matrix)
        return values[:k], vectors[:, :k]
    from scipy.linalg import eigh

    # torch computes all eigenvectors, which takes twice the time
    values, vectors = eigh(matrix.numpy(), subset_by_index=(n - k, n - 1), driver="evr", check_finite=False)
    return _without_zeros(torch.from_numpy(values), torch.from_numpy(vectors))


def _without_zeros(values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nonzero ones of ascending eigenvalues, descending, and their eigenvectors."""
    nonzero = values > _RELATIVE_ZERO * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    return values[nonzero].flip(0), vectors[:, nonzero].flip(1)


def _orthonormalise(rows: Float[Tensor, "r d"]) -> Float[Tensor, "s d"]:
    """Return orthonormal rows with the same span."""
    values, vectors = _descending(rows @ rows.mT)
    return orthonormal_rows(vectors.mT @ rows) if len(values) else rows[:0]


Rows = tuple[Float[Tensor, "n r d"], Float[Tensor, "n r e"]]
"""Rows of every adapter, weighted as in a fit, (down, up)."""


def weighted(batch: ModuleBatch, weights: Float[Tensor, " n"], weighting: str) -> Rows:
    """Return the weighted rows whose leading singular vectors are the components of a fit without sweeps."""
    if weighting == "factors":
        return batch.down, batch.up / batch.applied_scaling[:, None, None]
    by_adapter = weights[:, None, None]
    return (by_adapter * gram_roots(batch.up)) @ batch.down, (by_adapter * gram_roots(batch.down)) @ batch.up


def swept(
    batch: ModuleBatch, weights: Float[Tensor, " n"], bases: tuple[Tensor, Tensor], sweeps: int
) -> tuple[Tensor, Tensor]:
    """Refine bases, (k, n_in) and (j, n_out), by the alternating sweeps of `fit`."""
    by_adapter = weights[:, None, None]
    down, up = bases
    for _ in range(sweeps):
        roots = by_adapter * psd_root(gram_matrices(batch.up @ up.mT))
        down = leading_vectors(roots @ batch.down, len(down))
        roots = by_adapter * psd_root(gram_matrices(batch.down @ down.mT))
        up = leading_vectors(roots @ batch.up, len(up))
    return down, up


def leading_vectors(rows: Float[Tensor, "n r d"], k: int) -> Float[Tensor, "k d"]:
    """Return at most k leading vectors of `Spectrum.of`, without computing the others."""
    flat = rows.flatten(0, 1)
    if flat.shape[0] > flat.shape[1]:
        return _leading(gram(rows), k)[1].mT.contiguous()
    values, vectors = _leading(flat @ flat.mT, k)
    return orthonormal_rows((vectors / values.sqrt()).mT @ flat)


def gram(rows: Float[Tensor, "n r d"]) -> Float[Tensor, "d d"]:
    """Return the d × d Gram matrix of all rows of a stack. At least one element is nonzero."""
    flat = rows.reshape(-1, rows.shape[2])
    size = flat.abs().amax()
    narrow = torch.empty(flat.shape, dtype=torch.float32)
    torch.mul(flat, 1 / size, out=narrow)
    return (narrow.mT @ narrow).to(torch.float64) * size.square()
