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
from ..core.linalg import descending_eigh, svd_factors, triangular_rows

ROUNDING = 2.0**-23
"""Singular value, as a share of the largest, up to which it is a rounding error of factors in float32.

Adapters that started from the same factor A have real directions not far above it."""


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
        components: Singular components of each core, the right (r, p) and the left singular vectors (r, q) as rows
            with the norm √σ. Those that are rounding errors are left out.
    """

    down: Float[Tensor, "p n_in"]
    up: Float[Tensor, "q n_out"]
    cores: Float[Tensor, "n q p"]
    components: Sequence[tuple[Tensor, Tensor]]


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
    components = [
        svd_factors(update.down.to(torch.float64), update.up.to(torch.float64).mT * update.scaling)
        for update in updates
        if update is not None
    ]
    down, down_rows = _span([rows for rows, _ in components])
    up, up_rows = _span([rows for _, rows in components])
    # decomposed again, because the spans lack rounding errors of the factors
    in_spans = (_without_rounding(*svd_factors(*rows)) for rows in zip(down_rows, up_rows, strict=True))
    empty = down.new_zeros(0, len(down)), up.new_zeros(0, len(up))
    parts = [empty if update is None else next(in_spans) for update in updates]
    cores = torch.stack([up_part.mT @ down_part for down_part, up_part in parts])
    return CommonCoordinates(down, up, cores, parts)


def _span(components: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return a basis of the span of the singular vectors of all updates, and those vectors in it.

    The basis are the singular vectors of the updates side by side, or one above the other, in descending order. It
    lacks directions that are rounding errors of the factors.

    Args:
        components: Singular vectors of each update as rows, (r, d), each with the norm √σ.

    Returns:
        Orthonormal rows (p, d), and the coordinates (r, p) of the components of each update.
    """
    norms = torch.cat([rows.norm(dim=1) for rows in components])
    largest = torch.cat([rows.norm(dim=1).max().expand(len(rows)) for rows in components])
    tiny = torch.finfo(torch.float64).tiny
    triangle, q = (
        part[0] for part in triangular_rows(torch.cat(list(components))[None] / norms.clamp_min(tiny)[:, None])
    )
    # row j of an update gets the norm σⱼ / σ₁: where spans are shared, factors in float32 leave directions of rounding
    # errors, and padded factors rows of zeros; methods that make directions equally large would take them for updates
    shares = (norms / largest.clamp_min(tiny)).square()
    _, values, right = torch.linalg.svd(shares[:, None] * triangle, full_matrices=False)
    span = right[: significant(values)]
    coordinates = norms[:, None] * (triangle @ span.mT)
    # singular vectors of the updates: each component has the singular value σ, the square of its norm here
    weighted = norms[:, None] * coordinates
    _, rotation = descending_eigh(weighted.mT @ weighted)
    return (rotation.mT @ span) @ q, list(torch.split(coordinates @ rotation, [len(rows) for rows in components]))


def _without_rounding(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return singular components, rows with the norm √σ, without those that are rounding errors."""
    rank = significant(down.square().sum(1))
    return down[:rank], up[:rank]


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
