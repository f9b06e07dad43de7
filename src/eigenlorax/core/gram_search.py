"""The search of `iterative` for a module of few rows: in the Gram matrices of the rows, which are formed once.

With M = SᵀS between the rows R of a side, RᵀMR and S·RRᵀ·Sᵀ have the same positive eigenvalues, and q of the second
gives the component RᵀSᵀq/σ. The second one is n × n, so that steps of a search and sweeps never touch the rows
(docs/method.md, "Large stacks").
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import krylov, linalg, side_search
from .basis import Basis
from .batch import ModuleBatch, has_exact_energies, has_safe_squares
from .fit_options import FitOptions
from .krylov import RitzPairs
from .side_search import SIDES
from .subspace import ModuleBases

LARGEST_GRAM = 1024
"""Number of rows up to which forming the Gram matrices takes less time than the passes over the rows of a search."""
RESOLUTION = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Eigenvalues below this fraction of the largest one are too near to the rounding of the Gram matrix, by its dtype.

Rounding in float32 moves the matrix by about 1e-7 of its largest eigenvalue λ. That may exchange parts of components
whose eigenvalues differ by less than this, which loses at most 1e-7 λ of energy per component: far less than a search
leaves (`krylov.TOLERANCE`). The combinations of rows that are components are off by 1e-7 λ/λ_k, so by 1e-3 at most
above this fraction; the rows are then combined, and projected on the result, in the dtype of the products with rows.
"""


def load_few_rows(loaders: Iterable[Callable[[], ModuleBatch]]) -> list[ModuleBatch] | None:
    """Load all batches of a module; return None, and load no more, if their rows are too many for Gram matrices."""
    batches, rows = [], 0
    for load in loaders:
        batch = load()
        rows += batch.down.shape[0] * batch.down.shape[1]
        if rows > min(LARGEST_GRAM, batch.down.shape[2], batch.up.shape[2]):
            return None
        batches.append(batch)
    return batches


def fit(batches: Sequence[ModuleBatch], options: FitOptions, label: str, dtype: torch.dtype) -> ModuleBases | None:
    """Fit the bases of one module; float64, on the CPU.

    Args:
        batches: The adapters, as few as `load_few_rows` returns.
        options: Options with `n_components`.
        label: Name of the module, from which its random columns are seeded.
        dtype: Dtype in which components are made of rows, and the energy is measured.

    Returns:
        The bases; None where Gram matrices do not resolve `n_components` components.
    """
    # float32 takes half the time, and does not resolve components whose eigenvalues are small or nearly zero
    for gram_dtype in (torch.float32, torch.float64):
        try:
            return _fit(batches, options, label, (gram_dtype, dtype))
        except _UnresolvedError:
            continue
    return None


class _UnresolvedError(Exception):
    """A Gram matrix is too inexact in its dtype for the number of components."""


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of a module as batches of rows, and the inner products of all rows.

    Attributes:
        batches: Rows of each batch, (adapters, r, d).
        gram: R·Rᵀ, (n, n) float64.
        gram_dtype: Dtype in which `gram` was computed.
    """

    batches: list[Tensor]
    gram: Tensor
    gram_dtype: torch.dtype

    @classmethod
    def of(cls, batches: list[Tensor], dtype: torch.dtype) -> "_Side":
        """Multiply all rows with each other, in `dtype`."""
        gram = linalg.symmetric_product(_stack(batches, dtype))
        if dtype != torch.float64 and not has_safe_squares(gram.diagonal()):
            raise _UnresolvedError
        return cls(batches, gram.to(torch.float64), dtype)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Number of adapters and rank of each batch."""
        return [(batch.shape[0], batch.shape[1]) for batch in self.batches]

    def split(self, matrix: Tensor) -> list[Tensor]:
        """Return a matrix of n rows as (adapters, r, …) per batch."""
        parts = torch.split(matrix, [adapters * rank for adapters, rank in self.shapes])
        return [part.view(*shape, -1) for part, shape in zip(parts, self.shapes, strict=True)]

    def multiply(self, blocks: Sequence[Tensor], matrix: Tensor) -> Tensor:
        """Return the product of a block-diagonal matrix, blocks (adapters, r, r) per batch, and a matrix of n rows."""
        products = (block @ part for block, part in zip(blocks, self.split(matrix), strict=True))
        return torch.cat([product.flatten(0, 1) for product in products])

    def weighted_gram(self, roots: Sequence[Tensor]) -> Tensor:
        """Return S·R·Rᵀ·Sᵀ for the roots S."""
        return self.multiply(roots, self.multiply(roots, self.gram).mT.contiguous())

    def own_grams(self) -> list[Tensor]:
        """Return the inner products of each adapter's own rows, (adapters, r, r) per batch."""
        grams, start = [], 0
        for (adapters, rank), part in zip(self.shapes, self.split(self.gram), strict=True):
            columns = part[:, :, start : start + adapters * rank].reshape(adapters, rank, adapters, rank)
            # of each adapter's rows, the columns of the same adapter
            grams.append(columns.diagonal(dim1=0, dim2=2).permute(2, 0, 1))
            start += adapters * rank
        return grams


def _stack(batches: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the rows of all batches, (n, d) in `dtype`."""
    if len(batches) == 1:
        return batches[0].to(dtype).flatten(0, 1)
    rows = batches[0].new_empty(sum(len(batch) * batch.shape[1] for batch in batches), batches[0].shape[2], dtype=dtype)
    # converted while they are copied: a conversion before `cat` would write them twice
    torch.cat([batch.flatten(0, 1) for batch in batches], out=rows)
    return rows


@dataclass(frozen=True, slots=True)
class _Components:
    """Components V of one side during a fit.

    Attributes:
        values: Eigenvalues that belong to them, descending, (k,).
        vectors: Eigenvectors of the weighted Gram matrix as columns, (n, k).
        combination: Weights of the rows in each component, (n, k).
        projected: The unweighted rows projected on the components, (n, k).
        shortfall: Estimated fraction of energy that the search missed.
    """

    values: Tensor
    vectors: Tensor
    combination: Tensor
    projected: Tensor
    shortfall: float

    @classmethod
    def of(cls, side: _Side, roots: Sequence[Tensor], pairs: RitzPairs, k: int) -> "_Components":
        """Compute components from eigenpairs of the weighted Gram matrix, k in number."""
        values = pairs.values[:k]
        if pairs.vectors.shape[1] < k or not bool(values[-1] > RESOLUTION[side.gram_dtype] * values[0]):
            raise _UnresolvedError
        combination = side.multiply([root.mT for root in roots], pairs.vectors / values.sqrt())
        return cls(values, pairs.vectors, combination, side.gram @ combination, pairs.shortfall)

    def kept_energy(self, side: _Side, roots: Sequence[Tensor]) -> float:
        """Return the squared norm of the weighted rows in the span of the components."""
        return float(side.multiply(roots, self.projected).square().sum())


def _fit(
    batches: Sequence[ModuleBatch], options: FitOptions, label: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> ModuleBases:
    assert options.n_components is not None
    gram_dtype, dtype = dtypes
    sides = {name: _Side.of([batch.rows(name) for batch in batches], gram_dtype) for name in SIDES}
    weights = _first_weights(sides, batches, options.weighting)
    totals = {name: _total_energy(side, weights[name]) for name, side in sides.items()}
    # relative to the total energy, so that the trace of a weighted Gram matrix is 1
    roots = {name: [linalg.graded_root(weight / totals[name]) for weight in weights[name]] for name in sides}
    # each side alone, as the first step of the exact fit
    first = {name: _search(side, roots[name], options.n_components, f"{label}.{name}") for name, side in sides.items()}
    scale_squares = [batch.row_scale.square()[:, None, None] for batch in batches]

    def step(name: str, opposite: _Components, current: _Components) -> _Components:
        projected = sides[SIDES[name]].split(opposite.projected)
        swept_roots = [
            linalg.graded_root(square / totals[name] * (rows @ rows.mT))
            for square, rows in zip(scale_squares, projected, strict=True)
        ]
        return _sweep(sides[name], swept_roots, current)

    last = first
    for _ in range(options.sweeps if options.weighting == "delta" else 0):
        last = side_search.sweep(last, step)
    down, up = (_as_basis(sides[name], roots[name], (first[name], last[name]), totals[name], dtype) for name in sides)
    return ModuleBases(down, up)


def _first_weights(
    sides: Mapping[str, _Side], batches: Sequence[ModuleBatch], weighting: str
) -> dict[str, list[Tensor]]:
    """Return, by side, the matrices of `side_search.first_weights` of each batch."""
    grams = zip(*(side.own_grams() for side in sides.values()), strict=True)
    by_batch = [
        side_search.first_weights(batch.row_scale, dict(zip(sides, own_grams, strict=True)), weighting)
        for batch, own_grams in zip(batches, grams, strict=True)
    ]
    return {name: [weights[name] for weights in by_batch] for name in sides}


def _total_energy(side: _Side, weights: Sequence[Tensor]) -> float:
    """Return the squared norm of the weighted rows of a side."""
    total = 0.0
    for weight, gram in zip(weights, side.own_grams(), strict=True):
        if not has_exact_energies(weight, gram, side.gram_dtype):
            raise _UnresolvedError
        total += float((weight * gram).sum())
    return total


def _search(side: _Side, roots: Sequence[Tensor], k: int, label: str) -> _Components:
    """Search for the leading components of one side alone."""
    matrix, rows = side.weighted_gram(roots), _stack(side.batches, side.gram_dtype)

    def start(n: int) -> Tensor:
        # random columns for the width of the rows, so that neither the order nor the number of rows enters
        columns = krylov.seeded_columns(rows.shape[1], n, label).to(rows.device, rows.dtype)
        return side.multiply(roots, (rows @ columns).to(torch.float64))

    return _Components.of(side, roots, krylov.search(matrix.matmul, start, k), k)


def _sweep(side: _Side, roots: Sequence[Tensor], current: _Components) -> _Components:
    """Return the components of a side after one sweep: a step of subspace iteration, and a search if it gained much."""
    matrix = side.weighted_gram(roots)
    # with q = orth(S·R·Vᵀ) for the current components V, RᵀSᵀq spans G·V: one step of subspace iteration
    start = krylov.orthonormal_columns(side.multiply(roots, current.projected))
    values, rotation = linalg.descending_eigh(start.mT @ (matrix @ start))
    k = len(values)
    stepped = _Components.of(side, roots, RitzPairs(values, start @ rotation, current.shortfall), k)
    gain = stepped.kept_energy(side, roots) - current.kept_energy(side, roots)
    pairs = side_search.search_on(matrix.matmul, stepped.vectors, gain)
    return stepped if pairs is None else _Components.of(side, roots, pairs, k)


def _as_basis(
    side: _Side,
    roots: Sequence[Tensor],
    components: tuple[_Components, _Components],
    total: float,
    dtype: torch.dtype,
) -> Basis:
    """Return the last of the first and last components as a basis.

    Its spectrum and energy are of the first stack, whose weights are `roots`. Products with rows are in `dtype`.
    """
    first, last = components
    rows = _stack(side.batches, dtype)
    rows_of_basis = linalg.orthonormal_rows((last.combination.to(dtype).mT @ rows).to(torch.float64))
    projected = (rows @ rows_of_basis.to(dtype).mT).to(torch.float64)
    energy = float(side.multiply(roots, projected).square().sum())
    return side_search.to_basis(rows_of_basis, first.values, total, energy, first.shortfall)
