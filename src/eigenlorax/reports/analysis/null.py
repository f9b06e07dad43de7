"""The null model: the adapters of a module with random singular vectors, so that they share nothing.

An update D = U·S·Vᵀ keeps S, and therefore its norm and rank. U and V are drawn uniformly (Haar), independently for
every adapter and module. The factors become A·R and Q·B with random rotations R and Q. This preserves the inner
products of an adapter's own rows, so a fit weights them as it weights the rows of the real adapter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...core.batch import ModuleBatch, scaled_batch
from ...core.linalg import triangular_factor

COLLECTIONS = 48
"""Number of random collections from which the standard deviation of a figure is estimated."""
_DRAWS = (2, 3, 4, 6, 8, 12, 16, 24)
"""Possible numbers of draws: divisors of `COLLECTIONS`, so that each draw is in equally many collections."""
_ENOUGH, _OF_EACH = 24, 4
"""Sufficient number of draws of all modules together, for a standard deviation, and of each module, for a mean."""
_DEGREES = 3
"""Minimum degrees of freedom of the standard deviation, however long a draw takes."""


def draws(modules: int, affordable: float) -> int:
    """Return how often to draw each module: as often as suffices, or as is affordable.

    Args:
        modules: Number of modules.
        affordable: Number of draws for which there is time.
    """
    minimum = next(n for n in _DRAWS if max(modules, 1) * (n - 1) >= _DEGREES)
    sufficient = next(n for n in _DRAWS if n >= _OF_EACH and max(modules, 1) * n >= _ENOUGH)
    return max(minimum, *(n for n in _DRAWS if n <= max(_DRAWS[0], min(sufficient, affordable))))


def shuffled_draws(draws: int, generator: torch.Generator) -> list[int]:
    """Return the index of a module's draw in each random collection. All draws are used equally often.

    Modules are independent. Therefore a few draws of each module combine to many random collections.
    """
    draw_of_collection: list[int] = (torch.randperm(COLLECTIONS, generator=generator) % draws).tolist()
    return draw_of_collection


def spread(figures: Float[Tensor, "c ..."], draws: int) -> Float[Tensor, "..."]:
    """Return the standard deviation of a figure between random collections, from one value per collection."""
    # Bessel's correction for the number of draws: collections repeat them
    return figures.std(0, correction=0) * math.sqrt(draws / (draws - 1))


def rotate(triangles: Float[Tensor, "n r k"], d: int, generator: torch.Generator) -> Float[Tensor, "n r d"]:
    """Multiply each matrix by k orthonormal rows of length d, drawn uniformly for it."""
    n, _, k = triangles.shape
    # float32 draws are precise enough: only their distribution matters
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
    """The adapters of a module without their singular vectors.

    Attributes:
        down, up: Triangular factors of the rows, (n, r, min(r, d)): rows = triangular factor · orthonormal rows.
        dimensions: Dimensions of the sides (down, up).
        scaling: Scaling of each adapter.
        ranks: Rank of each adapter.
    """

    down: Float[Tensor, "n r s"]
    up: Float[Tensor, "n r t"]
    dimensions: tuple[int, int]
    scaling: Float[Tensor, " n"]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, batch: ModuleBatch) -> "NullModel":
        """Return the null model of a batch of adapters."""
        down, up = (triangular_factor(rows.mT).mT for rows in (batch.down, batch.up))
        return cls(down, up, (batch.down.shape[2], batch.up.shape[2]), batch.applied_scaling, batch.ranks)

    def draw(self, generator: torch.Generator) -> ModuleBatch:
        """Draw one random adapter for each adapter of the module."""
        down, up = (rotate(own, d, generator) for own, d in zip((self.down, self.up), self.dimensions, strict=True))
        return scaled_batch(down, up, self.scaling, self.ranks)


def expected(square: Float[Tensor, " n"], sizes: Sequence[tuple[int, int]], dimensions: tuple[int, int]) -> Tensor:
    """Return the expected squared norm ‖U D Vᵀ‖² of each update in random components U and V.

    Args:
        square: ‖D‖² of each update.
        sizes: Numbers of components (down, up) for each update.
        dimensions: Dimensions of the sides (down, up).
    """
    shares = [math.prod(min(k, d) / d for k, d in zip(pair, dimensions, strict=True)) for pair in sizes]
    return square * torch.tensor(shares, dtype=torch.float64)


def cosines(k: int, j: int, d: int, generator: torch.Generator) -> Float[Tensor, " s"]:
    """Return the cosines of the principal angles, descending, between random k- and j-dimensional subspaces."""
    k, j = sorted((min(k, d), min(j, d)))
    if k == 0:
        return torch.zeros(0, dtype=torch.float64)
    # without loss of generality, one of the subspaces is spanned by the first coordinate axes
    rows = rotate(torch.eye(k, dtype=torch.float64)[None], d, generator)[0]
    sigmas: Tensor = torch.linalg.svdvals(rows[:, :j])
    return sigmas.clamp(0, 1)
