"""The null model: the adapters of a module in random directions, so that they share nothing.

An update D = U·S·Vᵀ keeps S, and with it its norm and rank; U and V are drawn uniformly (Haar), for every adapter and
module by itself. The factors are turned, A·R and Q·B with random rotations R and Q, so that inner products of an
adapter's own rows stay as they are too, and a fit weighs them as it weighs those of the real adapter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...core.adapter import LoRAFactors
from ...core.batch import ModuleBatch, scaled_batch
from ...core.linalg import triangular_factor

COLLECTIONS = 48
"""Random collections that a figure's spread is taken over."""
_DRAWS = (2, 3, 4, 6, 8, 12, 16, 24)
"""Numbers of draws of which every one is in equally many of the collections."""
_ENOUGH, _OF_EACH = 24, 4
"""Draws of all modules together from which on a standard deviation is known well enough; and draws of each with which a
mean is."""
_DEGREES = 3
"""Degrees of freedom that it has at least, however much work a draw is."""


def draws(modules: int, affordable: float) -> int:
    """How often each module is drawn: as often as is enough, or as is affordable."""
    least = next(n for n in _DRAWS if max(modules, 1) * (n - 1) >= _DEGREES)
    wanted = next(n for n in _DRAWS if n >= _OF_EACH and max(modules, 1) * n >= _ENOUGH)
    return max(least, *(n for n in _DRAWS if n <= max(_DRAWS[0], min(wanted, affordable))))


def dealt(draws: int, generator: torch.Generator) -> list[int]:
    """Which of a module's draws each of the collections has: all equally often, in random order.

    Modules are independent of one another. So a few draws of each make many random collections, and the spread of a
    figure over these is known from all modules together.
    """
    found: list[int] = (torch.randperm(COLLECTIONS, generator=generator) % draws).tolist()
    return found


def spread(figures: Float[Tensor, "c ..."], draws: int) -> Float[Tensor, "..."]:
    """Standard deviation of a figure from one random collection to the next, from its values in `COLLECTIONS`."""
    # the draws' own mean, about which they scatter, has a part of their variance
    return figures.std(0, correction=0) * math.sqrt(draws / (draws - 1))


def turned(triangles: Float[Tensor, "n r k"], d: int, generator: torch.Generator) -> Float[Tensor, "n r d"]:
    """Each matrix times k orthonormal rows of d numbers, which are drawn uniformly for it."""
    n, _, k = triangles.shape
    # their precision is not that of what is measured in them
    drawn = torch.randn(n, k, d, generator=generator).to(torch.float64)
    if 2 * k <= d:
        # drawn = lower triangle · uniform rows, and a Gram matrix is far from singular here
        lower = torch.linalg.cholesky(drawn @ drawn.mT)
        mixing: Tensor = torch.linalg.solve_triangular(lower, triangles, upper=False, left=False)
        return mixing @ drawn
    columns, upper = torch.linalg.qr(drawn.mT)
    # uniform only where the diagonal is positive (Mezzadri, arXiv math-ph/0609050)
    signs = torch.where(upper.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)
    uniform: Tensor = columns * signs[:, None, :]
    return triangles @ uniform.mT


@dataclass(frozen=True, slots=True)
class NullModel:
    """All that the adapters of a module have without their directions.

    down, up: triangular factors of their rows, (n, r, min(r, d)): rows = triangular factor · orthonormal rows.
    """

    down: Float[Tensor, "n r s"]
    up: Float[Tensor, "n r t"]
    dimensions: tuple[int, int]
    scaling: Float[Tensor, " n"]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, one: ModuleBatch) -> "NullModel":
        """That of a stack of adapters."""
        down, up = (triangular_factor(rows.mT).mT for rows in (one.down, one.up))
        return cls(down, up, (one.down.shape[2], one.up.shape[2]), one.applied_scaling, one.ranks)

    def draw(self, generator: torch.Generator) -> ModuleBatch:
        """As many adapters, each in random directions."""
        down, up = (turned(own, d, generator) for own, d in zip((self.down, self.up), self.dimensions, strict=True))
        return scaled_batch(down, up, self.scaling, self.ranks)


def factors(one: ModuleBatch) -> list[LoRAFactors]:
    """The factors of a stack in which everyone has the module."""
    return [
        LoRAFactors(one.down[place, :rank], (one.up[place, :rank] / scaling).mT, scaling)
        for place, (rank, scaling) in enumerate(zip(one.ranks, one.applied_scaling.tolist(), strict=True))
    ]


def expected(square: Float[Tensor, " n"], sizes: Sequence[tuple[int, int]], dimensions: tuple[int, int]) -> Tensor:
    """‖U D Vᵀ‖² to be expected of each update of squared norm ‖D‖² in so many random directions (down, up)."""
    shares = [math.prod(min(k, d) / d for k, d in zip(pair, dimensions, strict=True)) for pair in sizes]
    return square * torch.tensor(shares, dtype=torch.float64)


def cosines(k: int, j: int, d: int, generator: torch.Generator) -> Float[Tensor, " s"]:
    """Cosines of the principal angles, descending, between random subspaces of k and j of d dimensions."""
    k, j = sorted((min(k, d), min(j, d)))
    if k == 0:
        return torch.zeros(0, dtype=torch.float64)
    # one may as well be spanned by the first coordinates
    rows = turned(torch.eye(k, dtype=torch.float64)[None], d, generator)[0]
    found: Tensor = torch.linalg.svdvals(rows[:, :j])
    return found.clamp(0, 1)
