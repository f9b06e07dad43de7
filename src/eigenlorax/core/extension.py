"""Directions that a subspace misses of new adapters: the leading ones of what lies outside its spans.

What is there stays as it is. Nothing here knows of packs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import basis as one
from . import linalg
from . import subspace as spaces
from .adapter import Adapter, LoRAFactors
from .basis import Basis
from .linalg import LeadingVectors, RowBlocks
from .subspace import ModuleBases, Subspace

SWEEPS = 4
"""Alternating refinements; each keeps at least as much of the updates as the one before."""


Progress = Callable[[str, int, int], None]
Append = Callable[[Basis, Tensor], Basis]


@dataclass(frozen=True, slots=True)
class NewAdapter:
    """An adapter that a subspace may grow by.

    delta_squares: ‖delta weight‖² of each of its modules. places: the names that its modules have in the subspace;
    without those that the subspace lacks.
    """

    adapter: Adapter
    delta_squares: Mapping[str, float]
    places: Mapping[str, str]


def extend_for(
    subspace: Subspace,
    newcomers: Sequence[NewAdapter],
    most: int,
    progress: Progress,
    append: Append = one.extend,
) -> Subspace:
    """The subspace with at most `most` more directions a side: those that it misses of the adapters, which count alike;
    itself if it misses none.

    append: adds rows to a basis, rounded as they will be stored.
    """
    members: dict[str, list[tuple[Adapter, str, float]]] = {}
    for new in newcomers:
        square = sum(new.delta_squares[module] for module in new.places)
        for module, place in new.places.items():
            if new.delta_squares[module] > 0:
                members.setdefault(place, []).append((new.adapter, module, square**-0.5))
    rows = {}
    for done, (place, some) in enumerate(sorted(members.items())):
        progress("extending modules", done, len(members))
        factors = [adapter.modules[module] for adapter, module, _ in some]
        rows[place] = missing_components(factors, [weight for _, _, weight in some], subspace.modules[place], most)
    progress("extending modules", len(members), len(members))
    lacking = any(len(side) for pair in rows.values() for side in pair)
    return spaces.extend(subspace, rows, append) if lacking else subspace


def missing_components(
    factors: Sequence[LoRAFactors], weights: Sequence[float], bases: ModuleBases, most: int
) -> tuple[Tensor, Tensor]:
    """Rows (down, up) to append to the bases of a module, float64: orthonormal, orthogonal to those that are there, at
    most `most` a side, and fewer where fewer are missing or the dimension has no more room.

    They are those with which the spans keep most of Σ weight² · ‖update‖², as nearly as alternating sweeps find them:
    each side's are the best ones given the other side's. weights: one positive number an adapter.
    """
    # what is missing of a stack below one unit of the coarsest dtype is rounding, which is 0.3 units in the mean
    eps = max(torch.finfo(t.dtype).eps for f in factors for t in (f.down, f.up, bases.down.components))
    scales = [abs(f.scaling) * weight for f, weight in zip(factors, weights, strict=True)]
    down = _Side([f.down for f in factors], bases.down.components, scales, most, eps)
    up = _Side([f.up.mT for f in factors], bases.up.components, scales, most, eps)
    best: tuple[float, LeadingVectors, LeadingVectors] | None = None
    # sweeps end in the best directions near their start, so there are two: the other side in full, and as it is now
    for whole in (True, False):
        new_down, new_up = down.leading(up.start(whole)), up.leading(down.start(whole))
        for _ in range(SWEEPS):
            new_down = down.leading(up.grams(new_up))
            new_up = up.leading(down.grams(new_down))
        pairs = zip(scales, down.grams(new_down), up.grams(new_up), strict=True)
        kept = sum(scale**2 * float((one * other).sum()) for scale, one, other in pairs)
        if best is None or kept > best[0]:
            best = kept, new_down, new_up
    assert best is not None
    return down.orthonormal(best[1]), up.orthonormal(best[2])


class _Side:
    """One side's rows, an adapter's after the other, in two parts: coordinates in the basis, and what is outside."""

    def __init__(
        self, blocks: Sequence[Tensor], components: Tensor, scales: Sequence[float], most: int, eps: float
    ) -> None:
        k, dimension = components.shape
        clean = components.to(torch.float64)
        if k:
            clean = linalg.orthonormal_rows(clean)
        rows = [block.to(torch.float64) for block in blocks]
        self.inside = [block @ clean.mT for block in rows]
        outside = [block - part @ clean for block, part in zip(rows, self.inside, strict=True)]
        # once more, since what is left of a row may be small beside the row
        self.outside = RowBlocks([block - (block @ clean.mT) @ clean for block in outside])
        self.clean, self.scales = clean, scales
        # and so is what the arithmetic here leaves
        self.eps = max(eps, max(self.outside.rows.shape) * torch.finfo(torch.float64).eps)
        self.most = min(most, dimension - k)

    def start(self, whole: bool) -> list[Tensor]:
        """Gram matrices (r, r) of each adapter's rows, whole or as they are in the basis."""
        return self._grams(self.outside.rows if whole else self.outside.rows[:, :0])

    def grams(self, added: LeadingVectors) -> list[Tensor]:
        """Gram matrices (r, r) of each adapter's rows as they are in the basis and the added directions."""
        return self._grams(added.projection)

    def _grams(self, more: Tensor) -> list[Tensor]:
        pairs = zip(self.inside, self.outside.blocks, strict=True)
        return [inside @ inside.mT + more[block] @ more[block].mT for inside, block in pairs]

    def leading(self, others: Sequence[Tensor]) -> LeadingVectors:
        """The leading directions of what is outside, each row weighted by what the other side keeps of its partner."""
        roots = [scale * linalg.psd_root(gram) for scale, gram in zip(self.scales, others, strict=True)]
        inside = sum(float((root @ part).square().sum()) for root, part in zip(roots, self.inside, strict=True))
        outside = float(self.outside.weighted(roots).square().sum())
        floor = self.eps * (inside + outside) ** 0.5

        def choose(singular_values: Tensor, shape: tuple[int, int]) -> int:
            return min(self.most, int((singular_values > floor).sum()))

        return self.outside.leading(roots, choose)

    def orthonormal(self, added: LeadingVectors) -> Tensor:
        """The added directions, orthogonal to the basis to the last bit that float64 has."""
        if not added.k:
            return self.clean.new_zeros(0, self.clean.shape[1])
        rows = added.components()
        return linalg.orthonormal_rows(rows - (rows @ self.clean.mT) @ self.clean)
