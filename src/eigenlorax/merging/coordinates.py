"""Common coordinates of several updates of one module: small matrices that stand for out × in ones.

Updates are low-rank, so that all of them lie in the span of a few rows and a few columns. In orthonormal bases of these
two spans, each update is a small matrix, its core, and nothing is lost: the Core Space of arXiv 2509.17786, section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.adapter import LoRAFactors
from ..core.linalg import descending_eigh, numerical_rank


@dataclass(frozen=True, slots=True)
class CommonCoordinates:
    """Orthonormal bases of the spans of several updates of one module, and the updates in them, in float64.

    The bases are the singular vectors of the updates side by side (`up`) and one above the other (`down`), in
    descending order. So they depend neither on how an update is factored nor on the order of the adapters, except for
    signs, and for rotations among equal singular values.

    Attributes:
        down: Basis of the inputs, orthonormal rows.
        up: Basis of the outputs, orthonormal rows.
        cores: One matrix for each adapter, with update = upᵀ @ core @ down.
    """

    down: Float[Tensor, "p n_in"]
    up: Float[Tensor, "q n_out"]
    cores: Float[Tensor, "n q p"]


@dataclass(frozen=True, slots=True)
class SingularComponents:
    """A merged update of one module, left @ diag(values) @ right, in float64.

    Attributes:
        left: Orthonormal columns.
        values: Singular values, those to keep first.
        right: Orthonormal rows.
    """

    left: Float[Tensor, "n_out m"]
    values: Float[Tensor, " m"]
    right: Float[Tensor, "m n_in"]

    @property
    def rank(self) -> int:
        """Number of singular values that are more than rounding errors."""
        return numerical_rank(self.values, (len(self.values), len(self.values))) if len(self.values) else 0

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the factors down (rank, in) and up (out, rank) of the first components.

        Singular values are divided equally between both factors. Rows and columns beyond the components are zero, so
        that all modules of an adapter can have one rank.
        """
        root = self.values[:rank].sqrt()
        down = self.right.new_zeros(rank, self.right.shape[1])
        up = self.left.new_zeros(self.left.shape[0], rank)
        down[: len(root)] = root[:, None] * self.right[:rank]
        up[:, : len(root)] = self.left[:, :rank] * root
        return down, up


def common_coordinates(updates: Sequence[LoRAFactors | None]) -> CommonCoordinates:
    """Return the common coordinates of the updates of one module.

    Args:
        updates: One for each adapter; None for an adapter without the module, whose update is zero. At least one is
            not None.

    Example:
        >>> from eigenlorax.merging.coordinates import common_coordinates
        >>> updates = [eigenlorax.read_adapter(f"adapters/{name}").modules["layer.0.query"] for name in ("a", "b")]
        >>> common_coordinates(updates).cores.shape
        torch.Size([2, 6, 6])
    """
    present = [update for update in updates if update is not None]
    down, down_parts = _span([update.down.to(torch.float64) for update in present])
    up, up_parts = _span([update.up.to(torch.float64).mT * update.scaling for update in present])
    cores = torch.zeros(len(updates), len(up), len(down), dtype=torch.float64)
    places = [place for place, update in enumerate(updates) if update is not None]
    for place, down_part, up_part in zip(places, down_parts, up_parts, strict=True):
        cores[place] = up_part @ down_part.mT
    # singular vectors of the updates side by side and one above the other, in the two spans
    _, rotation_up = descending_eigh((cores @ cores.mT).sum(0))
    _, rotation_down = descending_eigh((cores.mT @ cores).sum(0))
    return CommonCoordinates(rotation_down.mT @ down, rotation_up.mT @ up, rotation_up.mT @ cores @ rotation_down)


def _span(factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return an orthonormal basis of the rows of all factors, (p, d), and the coordinates of each, (p, r)."""
    # QR leaves each row as exact as it was, however its norm differs from those of the others
    q, r = torch.linalg.qr(torch.cat(list(factors)).mT)
    return q.mT, list(r.split([len(factor) for factor in factors], dim=1))


def from_core(core: Tensor, coordinates: CommonCoordinates) -> SingularComponents:
    """Return the singular components of a matrix (q, p) in common coordinates, in descending order."""
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    return SingularComponents(coordinates.up.mT @ left, values, right @ coordinates.down)
