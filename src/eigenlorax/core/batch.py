"""The updates of several adapters in one module as two batches of rows, and the products of these that a fit needs.

Everything that a fit computes from a batch is a sum over adapters, so that the results of several batches may be added
in any order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from .adapter import LoRAFactors
from .coefficients import Coefficients
from .linalg import difference_square, psd_root, svd_factors, triangular_factor

BATCH_SIZE = 64
"""Largest number of adapters that a fit holds in one batch."""
LARGEST_ROUNDING = 1e-5
"""Rounding of an energy, as a fraction of it, up to which it counts as exact enough for a search."""
# Squared norms whose products float32 represents
_SAFE_SQUARES = (1e-16, 1e16)


@dataclass(frozen=True, slots=True)
class ModuleBatch:
    """Updates of several adapters in one module: delta_weight[i] = scaling[i] · up[i].mT @ down[i], (out, in).

    Ranks may differ: rows beyond an adapter's own rank are zero.

    Attributes:
        down: Rows of the down factors.
        up: Columns of the up factors, as rows.
        scaling: Factor by which the product of the rows is still to be multiplied.
        weights: Weight of each adapter in a fit; 0 for an adapter that takes no part.
        ranks: Rank of each adapter; 0 where it lacks the module.
        applied_scaling: Scaling of the adapter that `up` contains already: 1 for factors as they are stored, 0 where
            the adapter lacks the module.
    """

    down: Float[Tensor, "n r n_in"]
    up: Float[Tensor, "n r n_out"]
    scaling: Float[Tensor, " n"]
    weights: Float[Tensor, " n"]
    ranks: tuple[int, ...]
    applied_scaling: Float[Tensor, " n"]

    def __len__(self) -> int:
        return self.down.shape[0]

    @property
    def row_scale(self) -> Float[Tensor, " n"]:
        """Factor of each adapter's rows in the stack that a fit decomposes: |scaling| · weight."""
        return self.scaling.abs() * self.weights

    def rows(self, side: str) -> Tensor:
        """Return the rows of one side, (n, r, d)."""
        return self.down if side == "down" else self.up

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "ModuleBatch":
        """Return the batch with its rows in `dtype`, and all of it on `device`."""
        return ModuleBatch(
            down=self.down.to(device, dtype),
            up=self.up.to(device, dtype),
            scaling=self.scaling.to(device),
            weights=self.weights.to(device),
            ranks=self.ranks,
            applied_scaling=self.applied_scaling.to(device),
        )

    def select(self, indices: Sequence[int]) -> "ModuleBatch":
        """Return a batch of the adapters at `indices`, which are copied."""
        return ModuleBatch(
            down=self.down[indices],
            up=self.up[indices],
            scaling=self.scaling[indices],
            weights=self.weights[indices],
            ranks=tuple(self.ranks[index] for index in indices),
            applied_scaling=self.applied_scaling[indices],
        )

    def span(self, start: int, stop: int) -> "ModuleBatch":
        """Return a batch of the adapters from `start` up to `stop`, as a view."""
        return ModuleBatch(
            down=self.down[start:stop],
            up=self.up[start:stop],
            scaling=self.scaling[start:stop],
            weights=self.weights[start:stop],
            ranks=self.ranks[start:stop],
            applied_scaling=self.applied_scaling[start:stop],
        )

    def factors(self, index: int) -> LoRAFactors:
        """Return the factors of one adapter, padded to the largest rank of the batch."""
        return LoRAFactors(self.down[index], self.up[index].mT, float(self.scaling[index]))


def stack_factors(factors: Sequence[LoRAFactors], weights: Sequence[float]) -> ModuleBatch:
    """Return factors of one rank as a batch, in the widest of their dtypes.

    Args:
        factors: At least one module update; all have the same rank and shape.
        weights: Weight of each adapter in the fit; 0 for one that takes no part.
    """
    first = factors[0]
    dtype = first.spec.dtype
    for update in factors[1:]:
        dtype = torch.promote_types(dtype, update.spec.dtype)
    rank, n = first.down.shape[0], len(factors)
    down = torch.empty(n, rank, first.down.shape[1], dtype=dtype)
    up = torch.empty(n, rank, first.up.shape[0], dtype=dtype)
    for index, update in enumerate(factors):
        down[index] = update.down
        # transposed here, one matrix at a time: torch does that by blocks, and a stack of them ten times slower
        up[index] = update.up.mT
    return ModuleBatch(
        down=down,
        up=up,
        scaling=torch.tensor([update.scaling for update in factors], dtype=torch.float64),
        weights=torch.tensor(weights, dtype=torch.float64),
        ranks=(rank,) * n,
        applied_scaling=torch.ones(n, dtype=torch.float64),
    )


def pad_factors(factors: Sequence[LoRAFactors | None], n_in: int, n_out: int) -> ModuleBatch:
    """Return factors of any ranks as a float64 batch, padded with zero rows, the scaling multiplied into `up`.

    Args:
        factors: One module update per adapter; None where an adapter lacks the module.
        n_in: Input width of the module, for the case that no adapter has it.
        n_out: Output width of the module.
    """
    pairs = [None if update is None else (update.down, update.up.mT, update.scaling) for update in factors]
    return _pad(pairs, n_in, n_out)


def coefficients_as_batch(coefficients: Sequence[Coefficients | None], k_down: int, k_up: int) -> ModuleBatch:
    """Return coefficients as a float64 batch: the reconstructed updates in the coordinates of their bases.

    The batch has the norms and inner products of the updates as long as the bases are orthonormal.

    Args:
        coefficients: Coefficients of one module per adapter; None where an adapter lacks the module.
        k_down: Number of components of the down basis.
        k_up: Number of components of the up basis.
    """
    return _pad([None if c is None else (c.down, c.up.mT, c.scaling) for c in coefficients], k_down, k_up)


def _pad(pairs: Sequence[tuple[Tensor, Tensor, float] | None], n_in: int, n_out: int) -> ModuleBatch:
    # rank 0 marks an adapter without the module; its rows stay zero and add nothing to any sum
    ranks = tuple(0 if pair is None else pair[0].shape[0] for pair in pairs)
    n, largest_rank = len(ranks), max(ranks, default=0)
    down = torch.zeros(n, largest_rank, n_in, dtype=torch.float64)
    up = torch.zeros(n, largest_rank, n_out, dtype=torch.float64)
    applied_scaling = torch.zeros(n, dtype=torch.float64)
    for index, pair in enumerate(pairs):
        if pair is not None:
            down[index, : ranks[index]], up[index, : ranks[index]], scaling = pair
            up[index] *= scaling
            applied_scaling[index] = scaling
    return scaled_batch(down, up, applied_scaling, ranks)


def scaled_batch(
    down: Float[Tensor, "n r n_in"],
    up: Float[Tensor, "n r n_out"],
    applied_scaling: Float[Tensor, " n"],
    ranks: tuple[int, ...],
) -> ModuleBatch:
    """Return a batch of updates whose scaling is part of `up`: delta_weight[i] = up[i].mT @ down[i]."""
    unit = torch.ones(len(down), dtype=torch.float64)
    return ModuleBatch(down, up, scaling=unit, weights=unit, ranks=ranks, applied_scaling=applied_scaling)


def unpadded(batch: ModuleBatch) -> list[LoRAFactors]:
    """Return the factors of each adapter of a batch, at its own rank.

    Args:
        batch: Batch in which every adapter has the module, with the scaling multiplied into `up`.
    """
    return [
        LoRAFactors(batch.down[index, :rank], (batch.up[index, :rank] / scaling).mT, scaling)
        for index, (rank, scaling) in enumerate(zip(batch.ranks, batch.applied_scaling.tolist(), strict=True))
    ]


def in_row_spaces(batch: ModuleBatch) -> ModuleBatch:
    """Return the batch in orthonormal coordinates of the span of all its rows, where that is narrower than the side.

    Inner products of rows are unchanged, and with them norms, spectra and the energies in fitted bases.
    """
    return replace(batch, down=_in_span(batch.down), up=_in_span(batch.up))


def _in_span(rows: Float[Tensor, "n r d"]) -> Float[Tensor, "n r s"]:
    flat = rows.flatten(0, 1)
    if flat.shape[0] >= flat.shape[1]:
        return rows
    # a QR decomposition, because a Gram matrix would square the condition number
    return triangular_factor(flat.mT).mT.reshape(*rows.shape[:2], -1)


def svd_balanced(batch: ModuleBatch) -> ModuleBatch:
    """Return the same updates in factors made of their singular vectors, float64 (`linalg.svd_factors`)."""
    # the scaling stays outside: it is part of neither factor
    down, up = svd_factors(batch.down.to(torch.float64), batch.up.to(torch.float64))
    return ModuleBatch(down, up, batch.scaling, batch.weights, batch.ranks, batch.applied_scaling)


def gram_matrices(rows: Float[Tensor, "n r d"]) -> Float[Tensor, "n r r"]:
    """Return the matrix of inner products of each adapter's rows."""
    return rows @ rows.mT


def has_safe_squares(squares: Tensor) -> bool:
    """Return whether float32 represents products of squared norms; zeros count as safe."""
    low, high = _SAFE_SQUARES
    return bool(((squares == 0) | ((squares > low) & (squares < high))).all())


def has_exact_energies(weights: Float[Tensor, "n r r"], grams: Float[Tensor, "n r r"], dtype: torch.dtype) -> bool:
    """Return whether products in a dtype are exact enough for Σ weights · grams, the energy of weighted rows.

    They are not where the products of an adapter's rows and columns nearly cancel.

    Args:
        weights: Matrix between the rows of each adapter, float64.
        grams: Inner products of the rows, float64.
        dtype: Dtype in which inner products are computed.
    """
    norms = grams.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    # an inner product is off in proportion to the norms of its two rows, independently of others
    rounding = torch.linalg.matrix_norm(weights * norms[:, :, None] * norms[:, None, :]).sum()
    return bool(torch.finfo(dtype).eps * rounding <= LARGEST_ROUNDING * (weights * grams).sum())


def gram_roots(rows: Float[Tensor, "n r d"]) -> Float[Tensor, "n r r"]:
    """Return the symmetric square root of each adapter's Gram matrix."""
    return psd_root(gram_matrices(rows))


def factor_norms(batch: ModuleBatch, side: str) -> Float[Tensor, " n"]:
    """Return the Frobenius norm of each adapter's factor on one side, float64; Inf where its square overflows that."""
    norms: Tensor = torch.linalg.vector_norm(batch.rows(side), dim=(1, 2), dtype=torch.float64)
    return norms


def delta_squares(batch: ModuleBatch) -> Float[Tensor, " n"]:
    """Return ‖delta_weight‖²_F of each adapter, through r × r Gram matrices."""
    return captured_squares(batch.down, batch.up) * batch.scaling.square()


def captured_squares(down: Float[Tensor, "n r k"], up: Float[Tensor, "n r j"]) -> Float[Tensor, " n"]:
    """Return ‖up[i].mT @ down[i]‖²_F of each adapter.

    For coordinates in orthonormal bases, A·Vᵀ and (U·B)ᵀ, this is ‖P_U D P_V‖²: the squared norm that the two bases
    capture of the update.
    """
    # ‖BA‖² = tr(BᵀB · AAᵀ), the sum of the products of the entries; rounding may leave it slightly negative
    return (gram_matrices(down) * gram_matrices(up)).sum((1, 2)).clamp_min(0)


def difference_squares(batch: ModuleBatch, down: Tensor, up: Tensor) -> Float[Tensor, " n"]:
    """Return ‖D − D'‖²_F of each adapter, with D' = scaling · up.mT @ down.

    The rows of D' correspond one to one to the rows of the batch, as after rounding (`linalg.difference_square`).
    """
    return difference_square(batch.up.mT, batch.down, up.mT, down) * batch.scaling.square()


def multiply_gram(
    batch: ModuleBatch, side: str, inner: Float[Tensor, "n r r"], columns: Float[Tensor, "d b"]
) -> Float[Tensor, "d b"]:
    """Return Σ rows[i]ᵀ · inner[i] · rows[i] · columns, in the dtype of the columns, without a d × d matrix."""
    return gather_rows(batch, side, inner, project_rows(batch, side, columns))


def project_rows(batch: ModuleBatch, side: str, columns: Float[Tensor, "d b"]) -> Float[Tensor, "n r b"]:
    """Return the product of the rows of one side with `columns`, in the dtype of the columns."""
    rows = batch.rows(side).to(columns.dtype)
    # one product for all adapters
    return (rows.flatten(0, 1) @ columns).reshape(*rows.shape[:2], -1)


def gather_rows(
    batch: ModuleBatch, side: str, inner: Float[Tensor, "n r r"], projected: Float[Tensor, "n r b"]
) -> Float[Tensor, "d b"]:
    """Return Σ rows[i]ᵀ · inner[i] · projected[i]: the second half of `multiply_gram`."""
    flat = batch.rows(side).to(projected.dtype).flatten(0, 1)
    # r × r products first: they are much smaller than those with the rows
    weighted = (inner.to(projected.dtype) @ projected).flatten(0, 1)
    # BLAS is faster if its large operand is not transposed
    return (weighted.mT @ flat).mT
