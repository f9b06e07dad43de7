"""Spectra of a module's stack, what chance would give, and how two halves of a collection agree."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..adapter import LoRAFactors
from ..basis import chooser
from ..subspace import FitOptions, ModuleStack, delta_square

Weighted = tuple[Sequence[LoRAFactors], Sequence[float]]
"""Factors of one module, none of them a zero update, and their weights in the fit."""


def gaussian_like(factors: Sequence[LoRAFactors], generator: torch.Generator) -> list[LoRAFactors]:
    """Adapters of Gaussian factors with the same ranks, shapes and norms of the update: what chance would give."""
    found = []
    for one in factors:
        rank, n_in = one.down.shape
        down = torch.randn(rank, n_in, generator=generator, dtype=torch.float64)
        up = torch.randn(one.up.shape[0], rank, generator=generator, dtype=torch.float64)
        drawn = LoRAFactors(down, up, 1.0)
        found.append(LoRAFactors(down, up, (delta_square(one) / delta_square(drawn)) ** 0.5))
    return found


def shares(singular_values: Float[Tensor, " n"], most: int) -> list[float]:
    """σ²/Σσ², the first `most`."""
    squares = singular_values.double().square()
    total = squares.sum()
    found: list[float] = (squares[:most] / total if total > 0 else squares[:most]).tolist()
    return found


def halves(members: Weighted, first: Sequence[int], second: Sequence[int], k: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cosines of the principal angles, descending, between the subspaces of two halves, (down, up): bases without
    sweeps, of k components each or as many as there are. Empty where a half has no member."""
    options = FitOptions(n_components=max(*k, 1), weighting="delta", sweeps=0)
    found = []
    for chosen in (first, second):
        if not chosen:
            return torch.zeros(0), torch.zeros(0)
        factors, weights = [members[0][i] for i in chosen], [members[1][i] for i in chosen]
        leading = ModuleStack(factors, weights, options).first(chooser(options.n_components, None))
        found.append([side.components()[:size] for side, size in zip(leading, k, strict=True)])
    (down, up), (other_down, other_up) = found
    return cosines(down, other_down), cosines(up, other_up)


def cosines(rows: Float[Tensor, "k d"], other: Float[Tensor, "j d"]) -> Tensor:
    """Cosines of the principal angles, descending, between the spans of orthonormal rows."""
    if 0 in (rows.shape[0], other.shape[0]):
        return torch.zeros(0)
    found: Tensor = torch.linalg.svdvals(rows @ other.mT)
    return found.clamp(0, 1)


def degrees(descending: Float[Tensor, " n"]) -> list[float]:
    """Angles, ascending, of cosines."""
    found: list[float] = torch.rad2deg(torch.arccos(descending.double().clamp(-1, 1))).tolist()
    return found


def energy(members: Weighted, k: tuple[int, int], weighting: str) -> tuple[float, float]:
    """Share of the stack's squared norm in its first k directions, (down, up): of the updates, or, with "factors", of A
    and of B apart, each at equal norm."""
    factors, weights = members
    if weighting == "factors":
        factors = [
            LoRAFactors(_unit(one.down.to(torch.float64)), _unit(one.up.to(torch.float64)), 1.0) for one in factors
        ]
    found = ModuleStack(factors, weights, FitOptions(n_components=1, weighting=weighting, sweeps=0)).first(
        chooser(1, None)
    )
    down, up = (
        float(side.singular_values[:size].square().sum() / side.singular_values.square().sum())
        for side, size in zip(found, k, strict=True)
    )
    return down, up


def _unit(tensor: Tensor) -> Tensor:
    unit: Tensor = tensor / torch.linalg.vector_norm(tensor)
    return unit
