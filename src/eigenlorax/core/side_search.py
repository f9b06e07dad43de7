"""Steps that both searches for the bases of large stacks share: `iterative` in passes, `gram_search` in Gram matrices.

Each side is searched alone first. In a sweep, each side takes one step of subspace iteration in the basis of the
opposite one, and a search continues from there where the step has gained much.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from . import krylov
from .basis import Basis
from .krylov import Multiply, RitzPairs

SIDES = {"down": "up", "up": "down"}
"""Opposite side, by side, in the order of a sweep."""
MIN_GAIN = 1e-3
"""Fraction of the energy that a sweep's step has to gain for a search to continue from it."""

Components = TypeVar("Components")
"""Components of one side during a fit."""


def first_weights(row_scale: Tensor, grams: Mapping[str, Tensor], weighting: str) -> dict[str, Tensor]:
    """Return, by side, the matrices M between the rows of each adapter of a batch in the first fit, (n, r, r) float64.

    Args:
        row_scale: `ModuleBatch.row_scale`.
        grams: By side, the inner products of each adapter's own rows, (n, r, r) float64.
        weighting: "delta" or "factors".
    """
    if weighting == "factors":
        # unit weights for adapters that take part
        rank, device = grams["down"].shape[1], grams["down"].device
        identity = torch.eye(rank, dtype=torch.float64, device=device)
        takes_part = (row_scale > 0).to(torch.float64)[:, None, None] * identity
        return dict.fromkeys(SIDES, takes_part)
    # M = w²s²·BᵀB between the rows of A: no matrix root is needed, since only Aᵀ·M·A enters
    scale_square = row_scale.square()[:, None, None]
    return {name: scale_square * grams[opposite] for name, opposite in SIDES.items()}


def sweep(
    components: Mapping[str, Components], step: Callable[[str, Components, Components], Components]
) -> dict[str, Components]:
    """Return the components of both sides after one sweep.

    Args:
        components: Components by side.
        step: Returns the next components of a side, from its name, the opposite side's components, and its own.
    """
    swept = dict(components)
    for name, opposite in SIDES.items():
        swept[name] = step(name, swept[opposite], swept[name])
    return swept


def search_on(multiply: Multiply, columns: Tensor, gain: float) -> RitzPairs | None:
    """Search on from the columns after a step of subspace iteration; return None if the step has gained little.

    Where the spectrum is nearly flat, one step improves the columns only a little.

    Args:
        multiply: The matrix whose leading eigenvectors are searched, as a function.
        columns: Orthonormal columns after the step, (d, k).
        gain: Fraction of the energy that the step has gained.
    """
    if gain < MIN_GAIN:
        return None
    return krylov.leading_eigenvectors(multiply, columns, columns.shape[1], tolerance=krylov.TOLERANCE)


def to_basis(rows: Tensor, first_values: Tensor, total: float, energy: float, shortfall: float) -> Basis:
    """Return a basis, with the spectrum of the first stack and the energy that the rows keep of it.

    Args:
        rows: Orthonormal rows, (k, d) float64.
        first_values: Leading eigenvalues of the first stack, as fractions of the total.
        total: Squared norm of the first stack.
        energy: Fraction of the total in the span of the rows; rounding may leave it above 1.
        shortfall: Estimated fraction of energy that the first search missed.
    """
    squares = first_values * total
    return Basis(
        components=rows.cpu(),
        singular_values=squares.sqrt().float().cpu(),
        energy=min(energy, 1.0),
        shortfall=shortfall,
        tail=max(total - float(squares.sum()), 0.0),
    )
