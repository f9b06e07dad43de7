"""The updates of several adapters in one module, as singular components."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core import linalg
from ..core.adapter import LoRAFactors

BATCH_NUMBERS = 2**23
"""Numbers of singular vectors that are encoded at a time: each takes some hundred bytes meanwhile."""


@dataclass(frozen=True, slots=True)
class SvdBatch:
    """Updates of one module by their singular components: update i is Σ_j s[i, j] · u[i, j] · v[i, j]ᵀ.

    Attributes:
        u: Left singular vectors, as rows; 0 for components that an update lacks. Their dtype is that of the products
            that updates are encoded with.
        s: Singular values, the largest first, float64.
        v: Right singular vectors, as rows, of the same dtype.
        ranks: Rank of each update's factors, which an encoded update has again when it is decoded.
    """

    u: Float[Tensor, "n r n_out"]
    s: Float[Tensor, "n r"]
    v: Float[Tensor, "n r n_in"]
    ranks: Int[Tensor, " n"]

    @classmethod
    def of(cls, factors: Sequence[LoRAFactors], dtype: torch.dtype = torch.float64) -> "SvdBatch":
        """Decompose updates of one shape and any ranks, scaling included, in float64.

        Args:
            factors: Factors of each update.
            dtype: Dtype of the singular vectors that are returned.
        """
        rank = max(f.down.shape[0] for f in factors)
        n_in, n_out = factors[0].down.shape[1], factors[0].up.shape[0]
        batch = cls(
            torch.zeros(len(factors), rank, n_out, dtype=dtype),
            torch.zeros(len(factors), rank, dtype=torch.float64),
            torch.zeros(len(factors), rank, n_in, dtype=dtype),
            torch.tensor([f.down.shape[0] for f in factors]),
        )
        # updates of one rank are decomposed in one call: most adapters of a collection have the same
        by_rank: dict[int, list[int]] = {}
        for index, f in enumerate(factors):
            by_rank.setdefault(f.down.shape[0], []).append(index)
        for indices in by_rank.values():
            # in float64: the squared error of an encoded update may be 10⁻¹² of its square
            down = torch.stack([factors[i].down.to(torch.float64) for i in indices])
            up = torch.stack([factors[i].up.to(torch.float64) * factors[i].scaling for i in indices])
            # orthonormal rows of both factors leave an SVD of r × r: no out × in matrix is formed
            (right, down_rows), (left, up_rows) = linalg.triangular_rows(down), linalg.triangular_rows(up.mT)
            inner = torch.linalg.svd(left.mT @ right, full_matrices=False)
            count = inner.S.shape[1]
            batch.s[indices, :count] = inner.S
            batch.u[indices, :count] = (inner.U.mT @ up_rows).to(dtype)
            batch.v[indices, :count] = (inner.Vh @ down_rows).to(dtype)
        return batch

    def __len__(self) -> int:
        return len(self.s)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the singular vectors."""
        return self.u.dtype

    @property
    def rank(self) -> int:
        """The number of components of an update, at most."""
        return self.s.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the singular vectors and values."""
        return self.u.nbytes + self.s.nbytes + self.v.nbytes

    def rows(self, side: str) -> Tensor:
        """Return the unit singular vectors of one side, (n, r, d)."""
        return self.v if side == "down" else self.u

    def select(self, indices: Sequence[int]) -> "SvdBatch":
        """Return some of the updates, in this order."""
        at = torch.tensor(list(indices), dtype=torch.int64)
        return SvdBatch(self.u[at], self.s[at], self.v[at], self.ranks[at])

    def trimmed(self) -> "SvdBatch":
        """Return the same updates, with as many components as the largest of their ranks."""
        rank = int(self.ranks.max())
        if rank == self.rank:
            return self
        u, s, v = (tensor[:, :rank].contiguous() for tensor in (self.u, self.s, self.v))
        return SvdBatch(u, s, v, self.ranks)

    def index_batches(self) -> Iterator[list[int]]:
        """Yield the indices of all updates, as many at a time as can be encoded together in bounded memory."""
        size = max(BATCH_NUMBERS // max(self.u[0].numel() + self.v[0].numel(), 1), 1)
        # one update at least, however large it is
        return (list(range(start, min(start + size, len(self)))) for start in range(0, len(self), size))
