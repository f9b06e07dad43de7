"""The exact fit of one module's bases: whole spectra of both sides, then alternating sweeps (docs/method.md).

`iterative` fits modules whose stacks are too large for that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .adapter import LoRAFactors, factor_grams
from .basis import Basis, component_rule
from .fit_options import FitOptions
from .linalg import LeadingVectors, RowBlocks, block_multiply, psd_root
from .subspace import ModuleBases

ComponentRule = Callable[[Tensor, tuple[int, int]], int]
"""Number of components to keep, from the singular values of a stack of rows and the shape of that stack."""
SidePair = tuple[LeadingVectors, LeadingVectors]
"""Leading right singular vectors of the two sides (down, up)."""


def fit_module(
    factors: Sequence[LoRAFactors],
    weights: Sequence[float],
    options: FitOptions,
    k: tuple[int, int] | None = None,
) -> ModuleBases:
    """Fit the bases of one module, in float64.

    Args:
        factors: Updates of the adapters that have trained the module. None of them is zero; ranks may differ.
        weights: Positive weight of each adapter, 1 / ‖delta weight over all modules‖ for equal influence.
            The weighting "factors" ignores them.
        options: Weighting, sweeps, and the size where `k` is not given.
        k: Number of components (down, up); (0, 0) drops the module.

    Returns:
        Bases before rounding to the dtype that is stored (`subspace.round_bases`).
    """
    module_fit = ExactFit.stack(factors, weights, options)
    if k is not None:
        return module_fit.fit(module_fit.full_spectrum(), k)
    return module_fit.refine(module_fit.leading(component_rule(options.n_components, options.energy)))


@dataclass(frozen=True, slots=True)
class ExactFit:
    """The stacked, weighted rows of one module, from which fits of several sizes start.

    Row block i of the down side is w·s·(BᵀB)^½ A of adapter i: with that weight, the error of the rows is the error of
    the update. The up side is analogous, with A and B exchanged. Under the weighting "factors" the blocks are
    A and Bᵀ themselves.

    Attributes:
        down: Rows of the factors A, one block per adapter.
        up: Rows of the factors Bᵀ, one block per adapter.
        scales: w·s of each adapter.
        down_roots: Weight of each block of `down`, (r, r).
        up_roots: Weight of each block of `up`, (r, r).
        sweeps: Number of alternating sweeps.
    """

    down: RowBlocks
    up: RowBlocks
    scales: list[float]
    down_roots: list[Tensor]
    up_roots: list[Tensor]
    sweeps: int

    @classmethod
    def stack(cls, factors: Sequence[LoRAFactors], weights: Sequence[float], options: FitOptions) -> "ExactFit":
        """Stack and weight the factors of one module; see `fit_module` for the arguments."""
        down, up = RowBlocks.stack([f.down for f in factors]), RowBlocks.stack([f.up.mT for f in factors])
        scales = [abs(f.scaling) * weight for f, weight in zip(factors, weights, strict=True)]
        if options.weighting == "factors":
            # unit weights: the paper stacks the factors as they are
            identities = [torch.eye(f.down.shape[0], dtype=torch.float64, device=f.down.device) for f in factors]
            # sweeps would weight the rows again
            return cls(down, up, scales, identities, identities, sweeps=0)
        grams = [factor_grams(f) for f in factors]
        # each side is weighted by the root of the *opposite* factor's Gram matrix
        down_roots = [scale * psd_root(up_gram) for scale, (_, up_gram) in zip(scales, grams, strict=True)]
        up_roots = [scale * psd_root(down_gram) for scale, (down_gram, _) in zip(scales, grams, strict=True)]
        return cls(down, up, scales, down_roots, up_roots, options.sweeps)

    def without(self, index: int) -> "ExactFit":
        """Return the fit without one adapter, reusing the Gram matrices of the others."""
        return ExactFit(
            down=self.down.without(index),
            up=self.up.without(index),
            scales=[*self.scales[:index], *self.scales[index + 1 :]],
            down_roots=[*self.down_roots[:index], *self.down_roots[index + 1 :]],
            up_roots=[*self.up_roots[:index], *self.up_roots[index + 1 :]],
            sweeps=self.sweeps,
        )

    def count_components(self, spectrum: SidePair, options: FitOptions) -> tuple[int, int]:
        """Return the number of components (down, up) that the options ask for, given `full_spectrum`."""
        rule = component_rule(options.n_components, options.energy)
        down, up = (
            rule(leading.singular_values, (blocks.rows.shape[0], blocks.rows.shape[1]))
            for leading, blocks in zip(spectrum, (self.down, self.up), strict=True)
        )
        return down, up

    def leading(self, rule: ComponentRule) -> SidePair:
        """Return the leading singular vectors of each side alone; `rule` determines their number."""
        return self.down.leading(self.down_roots, rule), self.up.leading(self.up_roots, rule)

    def full_spectrum(self) -> SidePair:
        """Return the singular vectors of each side alone up to its numerical rank, for several calls of `fit`."""
        return self.leading(component_rule(None, 1.0))

    def fit(self, spectrum: SidePair, k: tuple[int, int]) -> ModuleBases:
        """Return the bases with `k` components (down, up), fewer where the rank is lower.

        Args:
            spectrum: The result of `full_spectrum`.
            k: Number of components; (0, 0) drops the module, so that its bases are empty.
        """
        if k == (0, 0):
            return ModuleBases(down=_empty_basis(spectrum[0], self.down), up=_empty_basis(spectrum[1], self.up))
        return self.refine((_truncate(spectrum[0], k[0]), _truncate(spectrum[1], k[1])))

    def refine(self, first: SidePair) -> ModuleBases:
        """Return the bases after alternating sweeps that start from `first`, with the same numbers of components.

        A sweep replaces each side by the best one for the other side's current basis, so that the kept squared norm
        Σ w²‖U D Vᵀ‖² never decreases (docs/method.md, "Sweeps").
        """
        down, up = first
        # the number of components was chosen on the first spectrum; a sweep may only lower it, where rank is missing
        down_rule, up_rule = component_rule(down.k, None), component_rule(up.k, None)
        for _ in range(self.sweeps):
            # `down` first, then `up` from the new `down`: each half maximises the kept norm in one argument
            down = self.down.leading(_projected_roots(up, self.up.blocks, self.scales), down_rule)
            up = self.up.leading(_projected_roots(down, self.down.blocks, self.scales), up_rule)
        return ModuleBases(
            down=_as_basis(first[0], down, self.down_roots, self.down),
            up=_as_basis(first[1], up, self.up_roots, self.up),
        )


def _truncate(leading: LeadingVectors, k: int) -> LeadingVectors:
    # contiguous copies: a slice would keep the memory of all vectors alive
    return replace(
        leading,
        projection=leading.projection[:, :k].contiguous(),
        components=lambda: leading.components()[:k].clone(),
    )


def _empty_basis(leading: LeadingVectors, blocks: RowBlocks) -> Basis:
    """Return a basis of no component that still records the spectrum, and with it the dropped energy."""
    no_components = torch.zeros(0, blocks.rows.shape[1], dtype=torch.float64)
    return Basis(no_components, leading.singular_values.float().cpu(), energy=0.0)


def _projected_roots(opposite: LeadingVectors, blocks: Sequence[slice], scales: Sequence[float]) -> list[Tensor]:
    """Return the weights of one side's row blocks, given the basis of the opposite side.

    They are s·w·(Cᵀ C)^½ with C the opposite factor projected on its basis. ‖U D Vᵀ‖ depends on the opposite
    factor through C alone.
    """
    if len({block.stop - block.start for block in blocks}) == 1:
        # blocks of equal size in one call: hundreds of calls for small matrices would take most of the time
        projected = opposite.projection.reshape(len(blocks), -1, opposite.projection.shape[1])
        factors = torch.tensor(scales, dtype=torch.float64).to(projected.device)
        return list(factors[:, None, None] * psd_root(projected @ projected.mT))
    by_block = [opposite.projection[block] for block in blocks]
    return [scale * psd_root(rows @ rows.mT) for scale, rows in zip(scales, by_block, strict=True)]


def _as_basis(first: LeadingVectors, last: LeadingVectors, roots: Sequence[Tensor], blocks: RowBlocks) -> Basis:
    """Return the vectors of the last sweep as a basis.

    The spectrum and the energy are taken from the *first* stack, weighted by `roots`. The stack of a sweep depends on
    the other side's basis, so its spectrum says little about the adapters.
    """
    # ‖W·R·Vᵀ‖², from the projections R·Vᵀ that the sweep has computed anyway
    kept_square = float(block_multiply(last.projection, blocks.blocks, roots).square().sum())
    return Basis(
        components=last.components().cpu(),
        singular_values=first.singular_values.float().cpu(),
        energy=min(kept_square / float(first.singular_values.square().sum()), 1.0),
    )
