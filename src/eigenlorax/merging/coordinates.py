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
from ..core.linalg import descending_eigh, svd_factors

ROUNDING = 1e-6
"""Singular value, as a share of the largest, up to which it is a rounding error of factors in float32."""


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
        return significant(self.values)

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
    factors = [(update.down.to(torch.float64), update.up.to(torch.float64).mT * update.scaling) for update in present]
    components = [svd_factors(down, up) for down, up in factors]
    down = _span([rows for rows, _ in components])
    up = _span([rows for _, rows in components])
    cores = torch.zeros(len(updates), len(up), len(down), dtype=torch.float64)
    places = [place for place, update in enumerate(updates) if update is not None]
    for place, (down_factor, up_factor) in zip(places, factors, strict=True):
        cores[place] = (up @ up_factor.mT) @ (down_factor @ down.mT)
    # singular vectors of the updates side by side and one above the other, in the two spans
    _, rotation_up = descending_eigh((cores @ cores.mT).sum(0))
    _, rotation_down = descending_eigh((cores.mT @ cores).sum(0))
    return CommonCoordinates(rotation_down.mT @ down, rotation_up.mT @ up, rotation_up.mT @ cores @ rotation_down)


def _span(components: Sequence[Tensor]) -> Tensor:
    """Return orthonormal rows that span the singular vectors of all updates, but for rounding errors of the factors.

    Args:
        components: Singular vectors of each update as rows, (r, d), each with the norm √σ.
    """
    # row j of an update gets the norm σⱼ / σ₁: where spans are shared, factors in float32 leave directions of rounding
    # errors, and padded factors rows of zeros; methods that make directions equally large would take them for updates
    rows = []
    for each in components:
        norms = each.norm(dim=1, keepdim=True)
        rows.append(each * (norms / norms.max().square().clamp_min(torch.finfo(torch.float64).tiny)))
    q, r = torch.linalg.qr(torch.cat(rows).mT)
    left, values, _ = torch.linalg.svd(r)
    basis: Tensor = q @ left[:, : significant(values)]
    return basis.mT


def significant(values: Tensor) -> int:
    """Return the number of singular values that are more than rounding errors of factors in float32."""
    return int((values > ROUNDING * values.max()).sum()) if len(values) else 0


def merged_factors(components: SingularComponents, rank: int, updates: Sequence[LoRAFactors | None]) -> LoRAFactors:
    """Return a merged update, cut to a rank, in float32, with the scaling 1 and the kernel of its sources.

    Args:
        components: Its singular components.
        rank: Rank of the factors.
        updates: The updates that were merged, of which at least one is not None.
    """
    down, up = components.cut(rank)
    kernel = next(update.kernel for update in updates if update is not None)
    return LoRAFactors(down.float(), up.float(), 1.0, kernel)


def from_core(core: Tensor, coordinates: CommonCoordinates) -> SingularComponents:
    """Return the singular components of a matrix (q, p) in common coordinates, in descending order."""
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    return SingularComponents(coordinates.up.mT @ left, values, right @ coordinates.down)
