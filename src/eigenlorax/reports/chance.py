"""Statistics of the null model over modules: squared norms that are kept, and their deviation between collections."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.basis import Basis
from . import spreads
from .analysis import null
from .analysis.null import COLLECTIONS
from .comparison_data import Null, SideEnergy
from .refits import NullKept

HALF = 0.5
"""Minimum share of squared norm beyond chance for an adapter to count as sharing the subspace of the others."""
SIGMAS = 4.0
"""Minimum difference from chance of a significant figure, in standard deviations of the null model."""
_ROUNDING = 1e-4
"""Maximum difference of errors or shares that is attributed to rounding."""
_NOTHING = 1e-12
"""Maximum share or deviation that counts as zero."""
_TOGETHER = 1.75
"""Ratio of the standard deviation of the mean over adapters left out to that of independent adapters.

Two adapters that overlap by chance both keep more in the components of the other. The ratio was 1.3 to 1.7 in random
collections of many kinds.
"""


@dataclass(slots=True)
class NullSums:
    """Sums over modules of squared norms that are kept of the null model, for c random collections.

    Attributes:
        draws: Number of random draws of each module.
        fitted: Squared norm kept of each adapter of the fit, (c, n).
        by_k: The same for each number of components, (c, n, g).
        left_out: Squared norm kept of each adapter that is left out, (c, s).
        left_out_by_k: The same for each number of components, (c, s, g).
        energies: Share of energy in the first k components (down, up), summed over modules, (c, 2).
        modules: Number of modules that were added.
    """

    draws: int
    fitted: Tensor
    by_k: Tensor
    left_out: Tensor
    left_out_by_k: Tensor
    energies: Tensor
    modules: int = 0

    @classmethod
    def of(cls, draws: int, fitted: int, left_out: int, sizes: int) -> "NullSums":
        """Return sums without any module, for these numbers of adapters and sizes."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        return cls(
            draws=draws,
            fitted=zeros(COLLECTIONS, fitted),
            by_k=zeros(COLLECTIONS, fitted, sizes),
            left_out=zeros(COLLECTIONS, left_out),
            left_out_by_k=zeros(COLLECTIONS, left_out, sizes),
            energies=zeros(COLLECTIONS, 2),
        )

    @classmethod
    def combine(cls, parts: "Sequence[NullSums]") -> "NullSums":
        """Return the sums over the modules of several sums."""
        names = ("fitted", "by_k", "left_out", "left_out_by_k", "energies")
        sums = {name: torch.stack([getattr(part, name) for part in parts]).sum(0) for name in names}
        return cls(draws=parts[0].draws, modules=sum(part.modules for part in parts), **sums)

    def add(self, kept: NullKept, members: Sequence[int], rows: Sequence[int], generator: torch.Generator) -> None:
        """Add one module.

        Args:
            kept: Squared norms that are kept in the module, by draw.
            members: Indices of the module's adapters in `fitted`.
            rows: Indices in `left_out` of the adapters that were left out.
            generator: Generator that assigns draws to collections.
        """
        shuffled = null.shuffled_draws(self.draws, generator)
        self.fitted[:, list(members)] += kept.fitted[shuffled]
        self.by_k[:, list(members)] += kept.by_k[shuffled]
        self.left_out[:, list(rows)] += kept.left_out[shuffled]
        self.left_out_by_k[:, list(rows)] += kept.left_out_by_k[shuffled]
        self.energies += kept.energies[shuffled]
        self.modules += 1

    def spread(self, values: Tensor) -> float:
        """Return the standard deviation of a figure between random collections, from one value per collection, (c,)."""
        deviation = float(null.spread(values, self.draws))
        return deviation if deviation > _NOTHING else 0.0


def figures(sums: NullSums, total: dict[str, float], sides: tuple[Sequence[Basis], Sequence[Basis]], seed: int) -> Null:
    """Return the figures of the null model.

    Args:
        sums: Sums over all modules.
        total: ‖D‖² of each adapter of the fit, by name.
        sides: Bases of all trained modules, (down, up).
        seed: Seed of the random draws.
    """
    errors = relative(sums.fitted, torch.tensor(list(total.values()), dtype=torch.float64))
    spread = spreads.summarise(dict(zip(total, errors.mean(0).tolist(), strict=True)))
    assert spread is not None
    energies = [
        SideEnergy(
            energy=math.fsum(_energy(basis) for basis in bases) / sums.modules,
            null=float(by_chance.mean()),
            spread=sums.spread(by_chance),
        )
        for bases, by_chance in zip(sides, (sums.energies / sums.modules).unbind(1), strict=True)
    ]
    return Null(sums.draws, seed, spread, sums.spread(errors.mean(1)), energies[0], energies[1])


def _energy(basis: Basis) -> float:
    """Return the share of energy in the first k components before sweeps, for a basis of k components."""
    return float(basis.singular_values[: basis.n_fitted].double().square().sum()) / basis.square


def is_above(value: float, by_chance: float, spread: float) -> bool:
    """Return whether a figure exceeds chance by more than `SIGMAS` standard deviations and by more than rounding."""
    return value > by_chance + max(SIGMAS * spread, _ROUNDING)


def relative(kept: Tensor, total: Tensor) -> Tensor:
    """Return the relative error √(1 − kept / total) of each adapter in each random collection."""
    squared_errors = 1 - kept / total
    return squared_errors.where(squared_errors > _NOTHING, torch.zeros_like(squared_errors)).sqrt()


def null_std_of_kept(sums: NullSums, rows: Sequence[int], expected: Tensor, total: Tensor) -> float:
    """Return the standard deviation of `LeftOut.kept` if the adapters share nothing.

    Args:
        sums: Sums over all modules.
        rows: Indices of the adapters that were left out.
        expected: Expected squared norm of each that random components keep, (s,).
        total: Their ‖D‖², (s,).
    """
    share = (sums.left_out[:, list(rows)] / total).mean(1)
    not_by_chance = float((1 - expected / total).mean())
    return _TOGETHER * sums.spread(share) / not_by_chance if not_by_chance > _NOTHING else 0.0


def sharing(kept: Tensor, expected: Tensor, by_chance: Tensor, total: Tensor, sums: NullSums) -> list[bool]:
    """Return for each adapter whether at least half of its squared norm is kept beyond chance, and significantly.

    Args:
        kept: Squared norm that the components of the others keep, (s,); NaN where it was not measured.
        expected: Expected squared norm that equally many random components keep, (s,).
        by_chance: Squared norm that random components keep in each random collection, (c, s).
        total: ‖D‖² of each adapter, (s,).
        sums: Sums of the null model.
    """
    share = (kept - expected) / (total - expected).clamp_min(torch.finfo(total.dtype).tiny)
    deviation = null.spread(by_chance, sums.draws)
    smallest = torch.maximum(SIGMAS * deviation, _ROUNDING * total)
    shares_subspace: list[bool] = ((share >= HALF) & (kept - expected > smallest)).tolist()
    return shares_subspace
