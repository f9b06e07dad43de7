"""Similarity of all pairs of adapters: inner products of updates and of factors, and overlaps of their row spaces.

All quantities are sums over modules, computed from r × r blocks of inner products between the rows of two adapters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from ...core.batch import ModuleBatch, gram_matrices, gram_roots

FLOAT64_ROWS = 2048
"""Maximum number of rows for float64 inner products; else float32, with errors of about 1e-7 of the norms."""
_CHUNK_NUMBERS = 2**22
_MIN_RANGE = 1e-9
"""Minimum of 1 − overlap by chance; below, the overlap beyond chance is set to 0."""


@dataclass(frozen=True, slots=True)
class Evenness:
    """Quantities of one side of a module that determine the overlap by chance.

    Attributes:
        traces: tr DᵀD of each adapter, which is the same on both sides.
        squares: ‖DᵀD‖² of each adapter, which is the same on both sides.
        dimension: Dimension of the side.
    """

    traces: Float[Tensor, " n"]
    squares: Float[Tensor, " n"]
    dimension: int


@dataclass(frozen=True, slots=True)
class Pairs:
    """Sums over modules for all pairs (i, j) of n adapters, (n, n) float64 each.

    Attributes:
        delta: ⟨D_i, D_j⟩.
        down, up: ⟨A_i, A_j⟩ and ⟨B_i, B_j⟩, row r with row r.
        down_cross: ⟨A_i, A_j⟩² expected by chance: from the squared inner products of A's rows r and s ≠ r, or for
            random rows, whichever is larger.
        down_shared, up_shared: ‖D_i D_jᵀ‖² and ‖D_iᵀ D_j‖².
        same_ranks: True if i and j have equal ranks in every module.
        sides: Both sides of every module.
    """

    delta: Tensor
    down: Tensor
    up: Tensor
    down_cross: Tensor
    down_shared: Tensor
    up_shared: Tensor
    same_ranks: Tensor
    sides: list[Evenness]

    @classmethod
    def of(cls, n: int) -> "Pairs":
        """Return sums of zero for n adapters."""
        zeros = {name: torch.zeros(n, n, dtype=torch.float64) for name in cls._sums()}
        return cls(**zeros, same_ranks=torch.ones(n, n, dtype=torch.bool), sides=[])

    @classmethod
    def _sums(cls) -> list[str]:
        return [field.name for field in fields(cls) if field.name not in ("same_ranks", "sides")]

    @classmethod
    def combine(cls, parts: "Sequence[Pairs]") -> "Pairs":
        """Return the sums over the modules of several sums."""
        sums = {name: torch.stack([getattr(part, name) for part in parts]).sum(0) for name in cls._sums()}
        same_ranks = torch.stack([part.same_ranks for part in parts]).all(0)
        return cls(**sums, same_ranks=same_ranks, sides=[side for part in parts for side in part.sides])

    def subset(self, chosen: Sequence[int]) -> "Pairs":
        """Return the pairs of the adapters with these indices."""
        indices = list(chosen)
        sums = {name: getattr(self, name)[indices][:, indices] for name in self._sums()}
        sides = [Evenness(side.traces[indices], side.squares[indices], side.dimension) for side in self.sides]
        return Pairs(**sums, same_ranks=self.same_ranks[indices][:, indices], sides=sides)

    def add(self, batch: ModuleBatch, dimensions: tuple[int, int] | None = None) -> None:
        """Add a module.

        Args:
            batch: Factors of all adapters.
            dimensions: Dimensions (down, up) of the spaces that contain the rows. Default: lengths of the rows.
        """
        n, r = batch.down.shape[:2]
        dimensions = dimensions or (batch.down.shape[2], batch.up.shape[2])
        if 0 in (r, *dimensions):
            return
        ranks = torch.tensor(batch.ranks)
        self.same_ranks.logical_and_(ranks[:, None] == ranks[None, :])
        (down, down_size), (up, up_size) = _of_unit_norm(batch.down), _of_unit_norm(batch.up)
        down_root, up_root = gram_roots(down.double()).to(down.dtype), gram_roots(up.double()).to(up.dtype)
        unscaled = (
            torch.where(batch.applied_scaling == 0, 0.0, batch.applied_scaling.abs().reciprocal())
            * batch.applied_scaling.sign()
        )
        norms = down_size * up_size
        aligned_rows = torch.minimum(ranks[:, None], ranks[None, :]).double()
        crossed_rows = ranks[:, None] * ranks[None, :] - aligned_rows
        share = torch.where(crossed_rows > 0, aligned_rows / crossed_rows, 0.0)
        by_chance = _aligned_by_chance(down, dimensions[0])
        self.sides.extend(
            _evenness(down_root @ gram_matrices(up.double()).to(down.dtype) @ down_root, norms.square(), dimensions)
        )
        step = max(1, _CHUNK_NUMBERS // (n * r * r))
        for start in range(0, n, step):
            stop = min(start + step, n)
            here, later = slice(start, stop), slice(start, n)
            down_blocks, up_blocks = _blocks(down, here, later), _blocks(up, here, later)
            blocks_product = (down_blocks * up_blocks).sum((1, 3)).double()
            self._fill("delta", here, later, blocks_product * norms[here, None] * norms[None, later])
            aligned = torch.diagonal(down_blocks, dim1=1, dim2=3).sum(-1).double()
            crossed = (down_blocks.square().sum((1, 3)) - _diagonal_squares(down_blocks)).double()
            self._fill("down", here, later, aligned * down_size[here, None] * down_size[None, later])
            square = down_size.square()
            # if a few rows are much longer than the others, inner products of different rows underestimate chance
            expected = torch.maximum(crossed * share[here, later], by_chance[here, later])
            self._fill("down_cross", here, later, expected * square[here, None] * square[None, later])
            aligned = torch.diagonal(up_blocks, dim1=1, dim2=3).sum(-1).double()
            scale = up_size * unscaled
            self._fill("up", here, later, aligned * scale[here, None] * scale[None, later])
            fourth = norms.square()
            for name, blocks, root in (("down_shared", down_blocks, up_root), ("up_shared", up_blocks, down_root)):
                shared = _multiply_roots(blocks, root[here], root[later]).square().sum((1, 3)).double()
                self._fill(name, here, later, shared * fourth[here, None] * fourth[None, later])

    def _fill(self, name: str, here: slice, later: slice, values: Tensor) -> None:
        """Add a block of rows on and right of the diagonal, and its mirror image below."""
        target: Tensor = getattr(self, name)
        target[here, later] += values
        beyond = slice(here.stop, later.stop)
        target[beyond, here] += values[:, here.stop - here.start :].mT


def products(batch: ModuleBatch) -> Float[Tensor, "n n"]:
    """Return the inner products of all updates in one module."""
    n, r = batch.down.shape[:2]
    (down, down_size), (up, up_size) = _of_unit_norm(batch.down), _of_unit_norm(batch.up)
    sums = torch.zeros(n, n, dtype=torch.float64)
    step = max(1, _CHUNK_NUMBERS // max(1, n * r * r))
    for start in range(0, n, step):
        here, later = slice(start, start + step), slice(start, n)
        sums[here, later] = (_blocks(down, here, later) * _blocks(up, here, later)).sum((1, 3)).double()
    upper = sums.triu()
    norms = down_size * up_size
    return (upper + upper.triu(1).mT) * norms[:, None] * norms[None, :]


def _of_unit_norm(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each adapter's rows by their norm, so that float32 neither over- nor underflows; also return the norms."""
    size = torch.linalg.vector_norm(rows, dim=(1, 2))
    dtype = torch.float64 if rows.shape[0] * rows.shape[1] <= FLOAT64_ROWS else torch.float32
    return (rows / size.where(size > 0, torch.ones_like(size))[:, None, None]).to(dtype), size


def _blocks(rows: Tensor, here: slice, later: slice) -> Tensor:
    """Return inner products of the rows of two slices of adapters, (here, r, later, r)."""
    r, d = rows.shape[1:]
    left, right = rows[here], rows[later]
    products = left.reshape(len(left) * r, d) @ right.reshape(len(right) * r, d).mT
    return products.reshape(len(left), r, len(right), r)


def _evenness(grams: Float[Tensor, "n r r"], scale: Float[Tensor, " n"], dimensions: tuple[int, int]) -> list[Evenness]:
    """Return `Evenness` of both sides of a module, where gram · scale of each adapter is similar to DᵀD."""
    grams = grams.double()
    traces = grams.diagonal(dim1=1, dim2=2).sum(1) * scale
    squares = grams.square().sum((1, 2)) * scale.square()
    return [Evenness(traces, squares, dimension) for dimension in dimensions]


def _aligned_by_chance(rows: Float[Tensor, "n r d"], dimension: int) -> Float[Tensor, "n n"]:
    """Return the expectation of ⟨A_i, A_j⟩² for randomly rotated rows, ⟨A_iA_iᵀ, A_jA_jᵀ⟩ / dimension."""
    grams = (rows @ rows.mT).double().flatten(1)
    expected: Tensor = grams @ grams.mT / dimension
    return expected


def _diagonal_squares(blocks: Tensor) -> Tensor:
    return torch.diagonal(blocks, dim1=1, dim2=3).square().sum(-1)


def _multiply_roots(blocks: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return left_i @ block_ij @ right_j for all pairs."""
    n, r, m, _ = blocks.shape
    half = (left @ blocks.reshape(n, r, m * r)).reshape(n, r, m, r)
    return (half.permute(2, 0, 1, 3).reshape(m, n * r, r) @ right).reshape(m, n, r, r).permute(1, 2, 0, 3)


def _inverse(norms: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return 1 / norm, and 0 where the norm is 0."""
    return torch.where(norms > 0, norms.reciprocal(), 0.0)


def cosines(products: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return inner products divided by norms: exactly 1 on the diagonal, 0 where a norm is 0."""
    inverse = _inverse(products.diagonal().clamp_min(0).sqrt())
    matrix = (products * inverse[:, None] * inverse[None, :]).clamp(-1, 1)
    matrix.fill_diagonal_(1.0)
    return matrix


def overlap(pairs: Pairs) -> Float[Tensor, "n n"]:
    """Return the overlap of the row and column spaces of two adapters, from 0 to 1.

    It is the mean of two cosines: of D_iᵀD_i and D_jᵀD_j, and of D_iD_iᵀ and D_jD_jᵀ. It is 1 for equal updates, and
    `overlap_by_chance` in expectation for unrelated ones.
    """
    return (cosines(pairs.down_shared) + cosines(pairs.up_shared)) / 2


def overlap_by_chance(pairs: Pairs) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """Return mean and standard deviation of the overlap if the singular vectors were random.

    The mean is rank / dimension if all singular values are equal, and smaller if few are large. It is set to 0 on the
    diagonal.

    For symmetric X, Y and a random rotation R, ⟨X, RYRᵀ⟩ has the mean tr X · tr Y / d, and the variance
    ‖X₀‖²‖Y₀‖² / ((d − 1)(d + 2) / 2), where X₀ and Y₀ are the traceless parts: traceless symmetric matrices are an
    irreducible representation of the rotations, of this dimension.
    """
    inverse = _inverse(pairs.down_shared.diagonal().clamp_min(0).sqrt())
    mean, variance = torch.zeros_like(pairs.delta), torch.zeros_like(pairs.delta)
    for side in pairs.sides:
        traces, d = side.traces * inverse, side.dimension
        mean += torch.outer(traces, traces) / d
        if d > 1:
            uneven = (side.squares * inverse.square() - traces.square() / d).clamp_min(0)
            variance += torch.outer(uneven, uneven) / ((d - 1) * (d + 2) / 2)
    return (mean / 2).fill_diagonal_(0.0).clamp_max(1), (variance.sqrt() / 2).fill_diagonal_(0.0)


def beyond_chance(pairs: Pairs) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """Return the overlap of two adapters beyond chance, and its standard deviation if they are unrelated.

    It is 1 for equal updates and about 0 for unrelated ones. It is set to 0 if the overlap by chance is 1, because the
    updates span the whole space evenly.
    """
    mean, deviation = overlap_by_chance(pairs)
    span = 1 - mean
    is_defined = span > _MIN_RANGE
    divisor = span.where(is_defined, torch.ones_like(span))
    beyond = torch.where(is_defined, (overlap(pairs) - mean) / divisor, 0.0)
    return beyond, torch.where(is_defined, deviation / divisor, 0.0)
