"""Components to append to a subspace for new adapters: the leading components of their residuals.

The present components stay as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import linalg
from .adapter import LoRAFactors
from .linalg import LeadingVectors, RowBlocks
from .subspace import ModuleBases

SWEEPS = 4
"""Number of alternating sweeps. No sweep lowers the squared norm that the bases keep of the updates."""


def missing_components(
    factors: Sequence[LoRAFactors], weights: Sequence[float], bases: ModuleBases, max_components: int
) -> tuple[Tensor, Tensor]:
    """Find the components to append to a module's bases so that they represent most of Σ weight² · ‖update‖².

    Alternating sweeps, in which each side's components are the best ones given those of the other side.

    Args:
        factors: Updates of the new adapters, none of which is zero.
        weights: Positive weight of each adapter.
        bases: Present bases of the module.
        max_components: Maximum number of new components per side.

    Returns:
        Rows (down, up), float64, orthonormal and orthogonal to the present components. Fewer than
        `max_components` where the residuals have a lower rank, or the basis would exceed its dimension.
    """
    # Factors and components are rounded to their dtypes, so what appears to be missing of a stack below one unit of the
    # coarsest dtype is rounding (0.3 units on average).
    eps = max(torch.finfo(t.dtype).eps for f in factors for t in (f.down, f.up, bases.down.components))
    scales = [abs(f.scaling) * weight for f, weight in zip(factors, weights, strict=True)]
    down = _Side([f.down for f in factors], bases.down.components, scales, max_components, eps)
    up = _Side([f.up.mT for f in factors], bases.up.components, scales, max_components, eps)
    best: tuple[float, LeadingVectors, LeadingVectors] | None = None
    # Sweeps converge to a maximum near their start, so there are two starts: weighted by the other side in full, as if
    # its basis were complete, and by the part that its basis represents now.
    for is_whole in (True, False):
        new_down, new_up = down.leading(up.start_grams(is_whole)), up.leading(down.start_grams(is_whole))
        for _ in range(SWEEPS):
            new_down = down.leading(up.grams(new_up))
            new_up = up.leading(down.grams(new_down))
        grams = zip(scales, down.grams(new_down), up.grams(new_up), strict=True)
        kept_square = sum(scale**2 * float((down_gram * up_gram).sum()) for scale, down_gram, up_gram in grams)
        if best is None or kept_square > best[0]:
            best = kept_square, new_down, new_up
    assert best is not None
    return down.orthonormal_rows(best[1]), up.orthonormal_rows(best[2])


class _Side:
    """The adapters' rows on one side, split into coordinates in the basis and residuals.

    Attributes:
        inside: Coordinates of each adapter's rows in the basis, (r, k).
        outside: Residuals of the rows, one block per adapter.
        components: Rows of the basis, made orthonormal again after rounding, (k, d).
        eps: Fraction of the stack's norm below which a residual is rounding.
        max_components: Maximum number of new components.
    """

    def __init__(
        self, blocks: Sequence[Tensor], components: Tensor, scales: Sequence[float], max_components: int, eps: float
    ) -> None:
        k, dimension = components.shape
        exact = components.to(torch.float64)
        if k:
            exact = linalg.orthonormal_rows(exact)
        rows = [block.to(torch.float64) for block in blocks]
        self.inside = [block @ exact.mT for block in rows]
        residuals = [block - coordinates @ exact for block, coordinates in zip(rows, self.inside, strict=True)]
        # Gram–Schmidt once more: cancellation leaves few correct digits in a residual that is small relative to its row
        self.outside = RowBlocks.stack([block - (block @ exact.mT) @ exact for block in residuals])
        self.components, self.scales = exact, scales
        # float64 arithmetic leaves residuals of its own
        self.eps = max(eps, max(self.outside.rows.shape) * torch.finfo(torch.float64).eps)
        self.max_components = min(max_components, dimension - k)

    def start_grams(self, is_whole: bool) -> list[Tensor]:
        """Return the Gram matrix (r, r) of each adapter's rows: in full, or projected on the basis."""
        return self._grams(self.outside.rows if is_whole else self.outside.rows[:, :0])

    def grams(self, added: LeadingVectors) -> list[Tensor]:
        """Return the Gram matrix (r, r) of each adapter's rows, projected on the basis and the added components."""
        return self._grams(added.projection)

    def _grams(self, outside: Tensor) -> list[Tensor]:
        pairs = zip(self.inside, self.outside.blocks, strict=True)
        return [inside @ inside.mT + outside[block] @ outside[block].mT for inside, block in pairs]

    def leading(self, opposite_grams: Sequence[Tensor]) -> LeadingVectors:
        """Return the leading components of the residuals, weighted by the opposite side's Gram matrices."""
        roots = [scale * linalg.psd_root(gram) for scale, gram in zip(self.scales, opposite_grams, strict=True)]
        inside = sum(float((root @ rows).square().sum()) for root, rows in zip(roots, self.inside, strict=True))
        outside = float(self.outside.weighted(roots).square().sum())
        # relative to the whole stack: the part inside the basis was rounded too
        floor = self.eps * (inside + outside) ** 0.5

        def rule(singular_values: Tensor, shape: tuple[int, int]) -> int:
            return min(self.max_components, int((singular_values > floor).sum()))

        return self.outside.leading(roots, rule)

    def orthonormal_rows(self, added: LeadingVectors) -> Tensor:
        """Return the added components, orthogonal to the basis up to float64 rounding."""
        if not added.k:
            return self.components.new_zeros(0, self.components.shape[1])
        rows = added.components()
        return linalg.orthonormal_rows(rows - (rows @ self.components.mT) @ self.components)
