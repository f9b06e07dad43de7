"""Statistics of the null model over modules: what is kept of it, and how that scatters between random collections."""

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
"""Share of squared norm beyond chance from which on an adapter counts as sharing the subspace of the others."""
SIGMAS = 4.0
"""Standard deviations of the null model from which on a figure is significant."""
_ROUNDING = 1e-4
"""Differences of errors or shares up to this size may be rounding."""
_NOTHING = 1e-12
"""Shares and deviations up to this size are rounding of zero."""
_TOGETHER = 1.75
"""Ratio between the scatter of the mean over adapters left out and that of independent ones.

Two adapters that share directions by chance each keep more in the directions of the other. The ratio was 1.3 to 1.7 in
random collections of many kinds.
"""


@dataclass(slots=True)
class NullSums:
    """Sums over modules of squared norms that are kept of the null model, a row for each random collection.

    draws: of each module. fitted, by_k: of the adapters of the fit, and by size. left_out, left_out_by_k: of those that
    are left out. energies: shares in the first directions, (down, up). modules: number of modules added.
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
        """Return sums without any module."""

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

    def add(self, kept: NullKept, members: Sequence[int], rows: Sequence[int], generator: torch.Generator) -> None:
        """Add one module. members: its adapters in the fit. rows: those of them that were left out."""
        dealt = null.dealt(self.draws, generator)
        self.fitted[:, list(members)] += kept.fitted[dealt]
        self.by_k[:, list(members)] += kept.by_k[dealt]
        self.left_out[:, list(rows)] += kept.left_out[dealt]
        self.left_out_by_k[:, list(rows)] += kept.left_out_by_k[dealt]
        self.energies += kept.energies[dealt]
        self.modules += 1

    def spread(self, values: Tensor) -> float:
        """Return the standard deviation of a figure between random collections. values: one per collection."""
        deviation = float(null.spread(values, self.draws))
        return deviation if deviation > _NOTHING else 0.0


def figures(sums: NullSums, total: dict[str, float], sides: tuple[Sequence[Basis], Sequence[Basis]], seed: int) -> Null:
    """Return the figures of the null model.

    total: ‖D‖² of each adapter of the fit, by name. sides: the bases (down, up) of all trained modules.
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
    """Return the share of energy in as many first singular directions as the basis has components."""
    return float(basis.singular_values[: basis.n_fitted].double().square().sum()) / basis.square


def is_above(value: float, by_chance: float, spread: float) -> bool:
    """Return whether a figure exceeds chance by more than its scatter and rounding explain."""
    return value > by_chance + max(SIGMAS * spread, _ROUNDING)


def relative(kept: Tensor, total: Tensor) -> Tensor:
    """Return √(1 − kept / total) of each adapter in each random collection."""
    lost = 1 - kept / total
    return lost.where(lost > _NOTHING, torch.zeros_like(lost)).sqrt()


def kept_by_strangers(sums: NullSums, rows: Sequence[int], expected: Tensor, total: Tensor) -> float:
    """Return the standard deviation by chance of `LeftOut.kept`.

    rows: adapters that were left out. expected: squared norm of each that is kept by chance. total: their ‖D‖².
    """
    share = (sums.left_out[:, list(rows)] / total).mean(1)
    room = float((1 - expected / total).mean())
    return _TOGETHER * sums.spread(share) / room if room > _NOTHING else 0.0


def sharing(kept: Tensor, expected: Tensor, by_chance: Tensor, total: Tensor, sums: NullSums) -> list[bool]:
    """Return for each adapter whether it keeps at least half of its squared norm beyond chance, and significantly so.

    kept: squared norm that the directions of the others keep; NaN where that was not measured. expected: what as many
    random directions keep. by_chance: the latter in random collections, a row for each.
    """
    share = (kept - expected) / (total - expected).clamp_min(torch.finfo(total.dtype).tiny)
    scatter = null.spread(by_chance, sums.draws)
    shares_subspace: list[bool] = ((share >= HALF) & (kept - expected > SIGMAS * scatter)).tolist()
    return shares_subspace
