"""The null model beside a collection: what is kept of it, summed over modules, and how that scatters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.basis import Basis
from . import spreads
from .analysis import null
from .analysis.null import COLLECTIONS
from .data import Null, SideEnergy
from .refits import NullKept

HALF = 0.5
"""The share that an adapter keeps in the subspace of the others, beyond chance, if it is one of those that share it."""
SIGMAS = 4.0
"""Standard deviations of the null model from which on a figure is not its."""
_ROUNDING = 1e-4
"""A difference of errors, or of shares, that is none."""
_NOTHING = 1e-12
"""A share, or a deviation, that is but rounding."""
_TOGETHER = 1.75
"""By how much more the mean of adapters left out scatters than that of as many which know nothing of one another: what
two of them share by chance counts in the directions of either. It was 1.3 to 1.7 in random collections of many kinds.
"""


@dataclass(slots=True)
class NullSums:
    """Sums over modules of what is kept of the null model in random collections, one row each; filled by `add`.

    draws: of each module. fitted, by_k: of the adapters of the fit, and by size. left_out, left_out_by_k: of those that
    were left out. energies: shares in the first directions, (down, up), of all `modules` modules.
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
        """Nothing added yet."""

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
        """Add a module that these members have trained, `rows` of those that were left out among them."""
        dealt = null.dealt(self.draws, generator)
        self.fitted[:, list(members)] += kept.fitted[dealt]
        self.by_k[:, list(members)] += kept.by_k[dealt]
        self.left_out[:, list(rows)] += kept.left_out[dealt]
        self.left_out_by_k[:, list(rows)] += kept.left_out_by_k[dealt]
        self.energies += kept.energies[dealt]
        self.modules += 1

    def spread(self, values: Tensor) -> float:
        """Standard deviation of a figure from one random collection to the next, from those of all of them."""
        found = float(null.spread(values, self.draws))
        return found if found > _NOTHING else 0.0


def figures(sums: NullSums, total: dict[str, float], sides: tuple[Sequence[Basis], Sequence[Basis]], seed: int) -> Null:
    """The null model's figures beside those of the collection.

    total: ‖D‖² of each adapter of the fit, by name. sides: the bases (down, up) of all trained modules.
    """
    errors = relative(sums.fitted, torch.tensor(list(total.values()), dtype=torch.float64))
    spread = spreads.of(dict(zip(total, errors.mean(0).tolist(), strict=True)))
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
    """The share of a stack's squared norm in its first directions, as many as the basis has."""
    return float(basis.singular_values[: basis.n_fitted].double().square().sum()) / basis.square


def is_above(value: float, by_chance: float, spread: float) -> bool:
    """Whether a figure is higher than it is by chance, by more than chance scatters and rounding makes."""
    return value > by_chance + max(SIGMAS * spread, _ROUNDING)


def relative(kept: Tensor, total: Tensor) -> Tensor:
    """√(1 − kept / total) of adapters, collection by collection."""
    lost = 1 - kept / total
    return lost.where(lost > _NOTHING, torch.zeros_like(lost)).sqrt()


def kept_by_strangers(sums: NullSums, rows: Sequence[int], expected: Tensor, total: Tensor) -> float:
    """Standard deviation by chance of the share of squared norm that is kept beyond chance of some of the adapters that
    were left out. expected: what is kept by chance of each; total: their ‖D‖²."""
    share = (sums.left_out[:, list(rows)] / total).mean(1)
    room = float((1 - expected / total).mean())
    return _TOGETHER * sums.spread(share) / room if room > _NOTHING else 0.0


def sharing(kept: Tensor, expected: Tensor, by_chance: Tensor, total: Tensor, sums: NullSums) -> list[bool]:
    """Which adapters keep half of their squared norm and more beyond chance, and more than chance scatters.

    kept, expected: of each adapter that was left out, what the others' directions keep, and as many random ones in
    expectation; NaN where that was not measured. by_chance: the latter in random collections, one row each.
    """
    share = (kept - expected) / (total - expected).clamp_min(torch.finfo(total.dtype).tiny)
    scatter = null.spread(by_chance, sums.draws)
    found: list[bool] = ((share >= HALF) & (kept - expected > SIGMAS * scatter)).tolist()
    return found
