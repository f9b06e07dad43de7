"""Fits without an adapter for modules with many rows: spectra are computed once, and each adapter is taken out of them.

A thousand adapters have many times more rows than dimensions. Their Gram matrices are summed in float32, from rows
scaled to a size that leaves room; the error of 1e-7 of the largest eigenvalue changes no figure by more. They are
decomposed in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...core.batch import ModuleBatch, gram_matrices, gram_roots
from ...core.linalg import orthonormal_rows, psd_root

MANY = 256
"""Rows up to which a module is fitted again, with sweeps, for each adapter that is left out."""
_RELATIVE_ZERO = 1e-12
"""Share of the largest eigenvalue up to which an eigenvalue is rounding of zero."""
_ROUNDING = 1e-6
_SPARE = 64


def most(k: int) -> int:
    """Return the number of directions of all adapters that span the k leading ones without one of them."""
    return 2 * k + _SPARE


def is_crowded(rows: int) -> bool:
    """Return whether there are too many rows to fit a module again for each adapter."""
    return rows > MANY


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Nonzero eigenvalues of a stack's d × d Gram matrix, the largest first, and eigenvectors as rows."""

    values: Float[Tensor, " s"]
    vectors: Float[Tensor, "s d"]

    @classmethod
    def of(cls, rows: Float[Tensor, "n r d"]) -> "Spectrum":
        """Decompose the rows of a stack by the smaller of its two Gram matrices."""
        flat = rows.reshape(-1, rows.shape[2])
        if flat.shape[0] > flat.shape[1]:
            return cls.of_total(total(rows))
        values, vectors = _descending(flat @ flat.mT)
        return cls(values, orthonormal_rows((vectors / values.sqrt()).mT @ flat))

    @classmethod
    def of_total(cls, matrix: Float[Tensor, "d d"]) -> "Spectrum":
        """Decompose a stack by its Gram matrix."""
        values, vectors = _descending(matrix)
        return cls(values, vectors.mT.contiguous())

    @classmethod
    def with_halves(
        cls, rows: Float[Tensor, "n r d"], halves: tuple[Sequence[int], Sequence[int]]
    ) -> tuple["Spectrum", "Spectrum", "Spectrum"]:
        """Decompose all rows, and the rows of two halves of the adapters, neither of which is empty."""
        first_rows, second_rows = (rows[list(half)] for half in halves)
        if rows.shape[0] * rows.shape[1] <= rows.shape[2]:
            return cls.of(rows), cls.of(first_rows), cls.of(second_rows)
        first_gram, second_gram = total(first_rows), total(second_rows)
        return cls.of_total(first_gram + second_gram), cls.of_total(first_gram), cls.of_total(second_gram)

    def without(self, rows: Float[Tensor, "r d"], k: int) -> Float[Tensor, "k d"]:
        """Return the k leading directions of the stack without these rows of it, or as many as there are.

        Rayleigh–Ritz: the best directions in the span of twice as many of all, and of the rows themselves. This is
        exact if that is the whole span; otherwise the error is of second order in the rows' share.
        """
        m = min(len(self.values), most(k))
        basis = self.vectors[:m]
        seen = rows @ basis.mT
        if m < len(self.values):
            beyond = _directions(rows - seen @ basis)
            # the remaining eigenvectors are orthogonal to the leading ones
            inside = (beyond @ self.vectors[m:].mT) * self.values[m:].sqrt()
            small = torch.zeros(m + len(beyond), m + len(beyond), dtype=torch.float64)
            small[:m, :m], small[m:, m:] = torch.diag(self.values[:m]), inside @ inside.mT
            basis, seen = torch.cat([basis, beyond]), torch.cat([seen, rows @ beyond.mT], dim=1)
        else:
            small = torch.diag(self.values)
        values, vectors = torch.linalg.eigh(small - seen.mT @ seen)
        # directions of the removed rows alone have an eigenvalue of zero now, but for rounding
        left = int((values > _ROUNDING * self.values[0]).sum())
        leading: Tensor = vectors.flip(1)[:, : min(k, left)].mT @ basis
        return leading


def _descending(matrix: Float[Tensor, "s s"]) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    some = values > _RELATIVE_ZERO * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    return values[some].flip(0), vectors[:, some].flip(1)


def _directions(rows: Float[Tensor, "r d"]) -> Float[Tensor, "s d"]:
    """Return orthonormal rows with the span of these."""
    values, vectors = _descending(rows @ rows.mT)
    return orthonormal_rows(vectors.mT @ rows) if len(values) else rows[:0]


Rows = tuple[Float[Tensor, "n r d"], Float[Tensor, "n r e"]]
"""Rows of every adapter, weighted as in a fit, (down, up)."""


def weighted(batch: ModuleBatch, weights: Float[Tensor, " n"], weighting: str) -> Rows:
    """Return the rows whose leading directions a fit without sweeps keeps."""
    if weighting == "factors":
        return batch.down, batch.up / batch.applied_scaling[:, None, None]
    each = weights[:, None, None]
    return (each * gram_roots(batch.up)) @ batch.down, (each * gram_roots(batch.down)) @ batch.up


def swept(
    batch: ModuleBatch, weights: Float[Tensor, " n"], bases: tuple[Tensor, Tensor], sweeps: int
) -> tuple[Tensor, Tensor]:
    """Refine bases, (k, n_in) and (j, n_out), by the alternating sweeps of `fit`."""
    each = weights[:, None, None]
    down, up = bases
    for _ in range(sweeps):
        seen = each * psd_root(gram_matrices(batch.up @ up.mT))
        down = Spectrum.of(seen @ batch.down).vectors[: len(down)]
        seen = each * psd_root(gram_matrices(batch.down @ down.mT))
        up = Spectrum.of(seen @ batch.up).vectors[: len(up)]
    return down, up


def total(rows: Float[Tensor, "n r d"]) -> Float[Tensor, "d d"]:
    """Return the d × d Gram matrix of all rows of a stack, which are not all 0."""
    flat = rows.reshape(-1, rows.shape[2])
    size = flat.abs().amax()
    narrow = torch.empty(flat.shape, dtype=torch.float32)
    torch.mul(flat, 1 / size, out=narrow)
    return (narrow.mT @ narrow).to(torch.float64) * size.square()
