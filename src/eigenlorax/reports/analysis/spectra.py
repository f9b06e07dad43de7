"""Spectra of a module's stack, and principal angles between the subspaces of two halves of a collection."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...core.adapter import LoRAFactors
from ...core.basis import component_rule
from ...core.batch import ModuleBatch
from ...core.exact_fit import ExactFit
from ...core.fit_options import FitOptions
from .crowded import weighted

Weighted = tuple[Sequence[LoRAFactors], Sequence[float]]
"""Factors of the nonzero updates of one module, and their weights in the fit."""


def explained_ratios(singular_values: Float[Tensor, " n"], max_count: int) -> list[float]:
    """Return the leading explained-variance ratios σ²/Σσ², at most `max_count`."""
    squares = singular_values.double().square()
    total = squares.sum()
    leading: list[float] = (squares[:max_count] / total if total > 0 else squares[:max_count]).tolist()
    return leading


@dataclass(frozen=True, slots=True)
class Halves:
    """Comparison of two subspaces of one side.

    Attributes:
        cosines: Cosines of the principal angles, descending.
        sizes: Dimensions of the subspaces.
    """

    cosines: Float[Tensor, " s"]
    sizes: tuple[int, int]

    @classmethod
    def of(cls, first: Float[Tensor, "k d"], second: Float[Tensor, "j d"]) -> "Halves":
        """Compare the spans of orthonormal rows."""
        return cls(cosines(first, second), (len(first), len(second)))


def halves(members: Weighted, first: Sequence[int], second: Sequence[int], k: tuple[int, int]) -> tuple[Halves, Halves]:
    """Compare the subspaces of two halves of the adapters, (down, up).

    Args:
        members: Factors and weights of the adapters.
        first, second: Indices of the members of each half.
        k: Maximum numbers of components (down, up) of the bases, which are fitted without sweeps.

    Returns:
        The comparison of each side; without cosines if a half is empty.
    """
    options = FitOptions(n_components=max(*k, 1), weighting="delta", sweeps=0)
    sides = []
    for half in (first, second):
        if not half:
            return Halves(torch.zeros(0), (0, 0)), Halves(torch.zeros(0), (0, 0))
        factors, weights = [members[0][i] for i in half], [members[1][i] for i in half]
        leading = ExactFit.stack(factors, weights, options).leading(component_rule(options.n_components, None))
        sides.append([side.components()[:size] for side, size in zip(leading, k, strict=True)])
    (first_down, first_up), (second_down, second_up) = sides
    return Halves.of(first_down, second_down), Halves.of(first_up, second_up)


def cosines(first: Float[Tensor, "k d"], second: Float[Tensor, "j d"]) -> Tensor:
    """Return the cosines of the principal angles, descending, between the spans of orthonormal rows."""
    if 0 in (first.shape[0], second.shape[0]):
        return torch.zeros(0)
    sigmas: Tensor = torch.linalg.svdvals(first @ second.mT)
    return sigmas.clamp(0, 1)


def degrees(descending: Float[Tensor, " n"]) -> list[float]:
    """Convert descending cosines to ascending angles in degrees."""
    angles: list[float] = torch.rad2deg(torch.arccos(descending.double().clamp(-1, 1))).tolist()
    return angles


def energy(batch: ModuleBatch, weights: Float[Tensor, " n"], k: tuple[int, int], weighting: str) -> tuple[float, float]:
    """Return the share of the squared norm in the first k components, (down, up).

    Args:
        batch: Factors of all adapters.
        weights: Weight of each adapter, for weighting "delta".
        k: Numbers of components (down, up).
        weighting: "delta" for the updates, "factors" for A and B separately, with each adapter at equal norm.
    """
    sides = weighted(batch, weights, weighting)
    if weighting == "factors":
        sides = tuple(rows / torch.linalg.vector_norm(rows, dim=(1, 2), keepdim=True) for rows in sides)
    energies = []
    for rows, size in zip(sides, k, strict=True):
        flat = rows.reshape(-1, rows.shape[2])
        squares = torch.linalg.eigvalsh(flat @ flat.mT if flat.shape[0] <= flat.shape[1] else flat.mT @ flat)
        energies.append(min(float(squares.flip(0)[:size].sum() / squares.sum()), 1.0))
    return energies[0], energies[1]
