"""Spectra of a module's stack, and how two halves of a collection agree."""

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
"""Factors of one module, none of them a zero update, and their weights in the fit."""


def shares(singular_values: Float[Tensor, " n"], most: int) -> list[float]:
    """σ²/Σσ², the first `most`."""
    squares = singular_values.double().square()
    total = squares.sum()
    found: list[float] = (squares[:most] / total if total > 0 else squares[:most]).tolist()
    return found


@dataclass(frozen=True, slots=True)
class Halves:
    """One side of two halves. cosines: of the principal angles between their subspaces, descending. sizes: of these."""

    cosines: Float[Tensor, " s"]
    sizes: tuple[int, int]

    @classmethod
    def of(cls, rows: Float[Tensor, "k d"], other: Float[Tensor, "j d"]) -> "Halves":
        """Those of the spans of orthonormal rows."""
        return cls(cosines(rows, other), (len(rows), len(other)))


def halves(members: Weighted, first: Sequence[int], second: Sequence[int], k: tuple[int, int]) -> tuple[Halves, Halves]:
    """The subspaces of two halves, (down, up): bases without sweeps, of k components each or as many as there are; of
    none where a half has no member."""
    options = FitOptions(n_components=max(*k, 1), weighting="delta", sweeps=0)
    found = []
    for chosen in (first, second):
        if not chosen:
            return Halves(torch.zeros(0), (0, 0)), Halves(torch.zeros(0), (0, 0))
        factors, weights = [members[0][i] for i in chosen], [members[1][i] for i in chosen]
        leading = ExactFit(factors, weights, options).leading(component_rule(options.n_components, None))
        found.append([side.components()[:size] for side, size in zip(leading, k, strict=True)])
    (down, up), (other_down, other_up) = found
    return Halves.of(down, other_down), Halves.of(up, other_up)


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


def energy(one: ModuleBatch, weights: Float[Tensor, " n"], k: tuple[int, int], weighting: str) -> tuple[float, float]:
    """Share of the stack's squared norm in its first k directions, (down, up): of the updates, or, with "factors", of A
    and of B apart, each at equal norm."""
    sides = weighted(one, weights, weighting)
    if weighting == "factors":
        sides = tuple(rows / torch.linalg.vector_norm(rows, dim=(1, 2), keepdim=True) for rows in sides)
    found = []
    for rows, size in zip(sides, k, strict=True):
        flat = rows.reshape(-1, rows.shape[2])
        squares = torch.linalg.eigvalsh(flat @ flat.mT if flat.shape[0] <= flat.shape[1] else flat.mT @ flat)
        found.append(min(float(squares.flip(0)[:size].sum() / squares.sum()), 1.0))
    return found[0], found[1]
