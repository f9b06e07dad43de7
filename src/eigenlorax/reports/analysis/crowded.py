"""A module with many rows: its spectra are found once, and each adapter's share is taken out of them.

The rows of a thousand adapters are many times as many as their dimensions. Gram matrices of so many rows are summed in
float32, from rows that are scaled to a size that has room there (an error of 1e-7 of the largest eigenvalue, which
turns the directions a little, and changes no figure by more); they are decomposed in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...core.batch import ModuleBatch, gram_matrices, gram_roots
from ...core.linalg import orthonormal_rows, psd_root

MANY = 256
"""Rows up to which a module is fitted again, sweeps and all, for each adapter that is left out."""
_NOTHING = 1e-12
_ROUNDING = 1e-6
_SPARE = 64


def most(k: int) -> int:
    """Directions of all among which the k leading ones without an adapter are looked for."""
    return 2 * k + _SPARE


def is_crowded(rows: int) -> bool:
    """Whether there are too many rows to fit a module again for each adapter."""
    return rows > MANY


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Eigenvalues of a stack's d × d Gram matrix that are not nothing, the largest first, and eigenvectors as rows."""

    values: Float[Tensor, " s"]
    vectors: Float[Tensor, "s d"]

    @classmethod
    def of(cls, rows: Float[Tensor, "n r d"]) -> "Spectrum":
        """That of all rows of a stack, by the smaller of its two Gram matrices."""
        flat = rows.reshape(-1, rows.shape[2])
        if flat.shape[0] > flat.shape[1]:
            return cls.of_total(total(rows))
        values, vectors = _descending(flat @ flat.mT)
        return cls(values, orthonormal_rows((vectors / values.sqrt()).mT @ flat))

    @classmethod
    def of_total(cls, matrix: Float[Tensor, "d d"]) -> "Spectrum":
        """That of a stack with this Gram matrix."""
        values, vectors = _descending(matrix)
        return cls(values, vectors.mT.contiguous())

    @classmethod
    def with_halves(
        cls, rows: Float[Tensor, "n r d"], halves: tuple[Sequence[int], Sequence[int]]
    ) -> tuple["Spectrum", "Spectrum", "Spectrum"]:
        """That of all rows, and those of the rows of two halves of the adapters, none of which is empty."""
        first, second = (rows[list(half)] for half in halves)
        if rows.shape[0] * rows.shape[1] <= rows.shape[2]:
            return cls.of(rows), cls.of(first), cls.of(second)
        one, other = total(first), total(second)
        return cls.of_total(one + other), cls.of_total(one), cls.of_total(other)

    def without(self, rows: Float[Tensor, "r d"], k: int) -> Float[Tensor, "k d"]:
        """The k leading directions, or as many as there are, of the same stack without these of its rows.

        The best there are in the span of twice as many directions of all and of the rows themselves (Rayleigh–Ritz);
        exact where that is everything. What is missed is of second order in the rows' share.
        """
        m = min(len(self.values), most(k))
        basis = self.vectors[:m]
        seen = rows @ basis.mT
        if m < len(self.values):
            beyond = _directions(rows - seen @ basis)
            # the eigenvectors that are left out share nothing with those in front
            inside = (beyond @ self.vectors[m:].mT) * self.values[m:].sqrt()
            small = torch.zeros(m + len(beyond), m + len(beyond), dtype=torch.float64)
            small[:m, :m], small[m:, m:] = torch.diag(self.values[:m]), inside @ inside.mT
            basis, seen = torch.cat([basis, beyond]), torch.cat([seen, rows @ beyond.mT], dim=1)
        else:
            small = torch.diag(self.values)
        values, vectors = torch.linalg.eigh(small - seen.mT @ seen)
        # what only the rows had is nothing now, but for rounding
        left = int((values > _ROUNDING * self.values[0]).sum())
        found: Tensor = vectors.flip(1)[:, : min(k, left)].mT @ basis
        return found


def _descending(matrix: Float[Tensor, "s s"]) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    some = values > _NOTHING * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    return values[some].flip(0), vectors[:, some].flip(1)


def _directions(rows: Float[Tensor, "r d"]) -> Float[Tensor, "s d"]:
    """Orthonormal rows that span these."""
    values, vectors = _descending(rows @ rows.mT)
    return orthonormal_rows(vectors.mT @ rows) if len(values) else rows[:0]


Rows = tuple[Float[Tensor, "n r d"], Float[Tensor, "n r e"]]
"""Rows of every adapter, weighted as a fit weighs them, (down, up)."""


def weighted(one: ModuleBatch, weights: Float[Tensor, " n"], weighting: str) -> Rows:
    """The rows that a fit without sweeps takes the directions of."""
    if weighting == "factors":
        return one.down, one.up / one.applied_scaling[:, None, None]
    each = weights[:, None, None]
    return (each * gram_roots(one.up)) @ one.down, (each * gram_roots(one.down)) @ one.up


def swept(
    one: ModuleBatch, weights: Float[Tensor, " n"], bases: tuple[Tensor, Tensor], sweeps: int
) -> tuple[Tensor, Tensor]:
    """The bases after alternating refinements, (k, n_in) and (j, n_out), each from the other as `fit` makes them."""
    each = weights[:, None, None]
    down, up = bases
    for _ in range(sweeps):
        seen = each * psd_root(gram_matrices(one.up @ up.mT))
        down = Spectrum.of(seen @ one.down).vectors[: len(down)]
        seen = each * psd_root(gram_matrices(one.down @ down.mT))
        up = Spectrum.of(seen @ one.up).vectors[: len(up)]
    return down, up


def total(rows: Float[Tensor, "n r d"]) -> Float[Tensor, "d d"]:
    """The Gram matrix, d × d, of all rows of a stack, some of which is not 0."""
    flat = rows.reshape(-1, rows.shape[2])
    size = flat.abs().amax()
    narrow = torch.empty(flat.shape, dtype=torch.float32)
    torch.mul(flat, 1 / size, out=narrow)
    return (narrow.mT @ narrow).to(torch.float64) * size.square()
