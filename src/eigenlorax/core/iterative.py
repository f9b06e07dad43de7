"""The fit of a module whose stack of rows is too large for a full spectrum: repeated passes over batches of adapters.

The components of a side are the leading eigenvectors of G = Σ rowsᵀ · inner · rows, a sum over adapters that is never
formed: a pass multiplies it by a few columns, batch by batch, and adds up (docs/method.md, "Large stacks"). Of few
rows, `gram_search` finds the same components in less time. The first fit is a Krylov search. In a sweep each side
takes one step of subspace iteration from its current basis, which never lowers the kept energy, and continues with a
search where that step has gained much.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from . import gram_search, krylov, linalg, side_search
from .basis import Basis
from .batch import (
    ModuleBatch,
    gather_rows,
    gram_matrices,
    has_exact_energies,
    has_safe_squares,
    multiply_gram,
    project_rows,
)
from .engine import run_serially
from .fit_options import FitOptions
from .side_search import SIDES
from .subspace import ModuleBases

LARGEST_SIDE = 384
"""Number of rows, or of dimensions, up to which the full spectrum is computed."""
LARGEST_STACK = 2**25
"""Number of entries in the rows of one side up to which the full spectrum is computed."""
RESOLUTION = {torch.float32: 1e-6, torch.float64: 1e-14}
"""Eigenvalues below this fraction of the largest one are rounding noise, by dtype of the products."""

LoadBatch = Callable[[], ModuleBatch]
"""Function that returns a batch, from memory or read again."""
RunCalls = Callable[[Iterable[Callable[[], Any]]], Iterable[Any]]
"""Function that runs calls, in this process or in others, and returns their results in order (`engine`)."""


def is_suitable(rows: int, n_in: int, n_out: int, options: FitOptions) -> bool:
    """Return whether a module is better fitted here than by `exact_fit`.

    That is so if the number of components is given, and small relative to a large stack.

    Args:
        rows: Number of rows on each side: the sum of the adapters' ranks.
        n_in: Width of the down side.
        n_out: Width of the up side.
        options: Options of the fit.
    """
    if options.n_components is None:
        return False
    spectrum_size = max(min(rows, n_in), min(rows, n_out))
    is_small = spectrum_size <= LARGEST_SIDE and rows * max(n_in, n_out) <= LARGEST_STACK
    # a search pays only if its space is a small part of the stack
    is_narrow = 4 * (options.n_components + krylov.BLOCK) <= min(rows, n_in, n_out)
    return is_narrow and not is_small


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of a module as batches of rows. Each product with the rows is one pass over the batches."""

    name: str
    loaders: Sequence[LoadBatch]
    run: RunCalls

    def multiply(self, inner: Sequence[Tensor], columns: Tensor) -> Tensor:
        """Return Σ rowsᵀ · inner · rows · columns."""
        calls = (
            partial(_multiply, load, self.name, matrices, columns)
            for load, matrices in zip(self.loaders, inner, strict=True)
        )
        return _sum(self.run(calls))

    def gather(self, inner: Sequence[Tensor], projected: Sequence[Tensor]) -> Tensor:
        """Return Σ rowsᵀ · inner · projected."""
        calls = (
            partial(_gather, load, self.name, matrices, rows)
            for load, matrices, rows in zip(self.loaders, inner, projected, strict=True)
        )
        return _sum(self.run(calls))

    def project(self, columns: Tensor) -> list[Tensor]:
        """Return the rows of each batch times the columns."""
        return list(self.run(partial(_project, load, self.name, columns) for load in self.loaders))


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return reduce(add, terms)


# functions of the module, because calls are pickled for worker processes


def _multiply(load: LoadBatch, side: str, inner: Tensor, columns: Tensor) -> Tensor:
    return multiply_gram(load(), side, inner, columns)


def _gather(load: LoadBatch, side: str, inner: Tensor, projected: Tensor) -> Tensor:
    return gather_rows(load(), side, inner, projected)


def _project(load: LoadBatch, side: str, columns: Tensor) -> Tensor:
    return project_rows(load(), side, columns)


@dataclass(frozen=True, slots=True)
class _BatchWeights:
    """Weights of the adapters of one batch in the first fit, float64.

    Attributes:
        inner: By side, the matrix between the rows of each adapter in G, (n, r, r).
        row_scale: `ModuleBatch.row_scale`.
        square: By side, the squared norm of the weighted rows.
        fits_float32: True if squares of all rows' norms are far from the limits of float32, which is exact enough.
    """

    inner: dict[str, Tensor]
    row_scale: Tensor
    square: dict[str, float]
    fits_float32: bool


def _batch_weights(load: LoadBatch, weighting: str, dtype: torch.dtype) -> _BatchWeights:
    """Compute the weights of one batch, with products in `dtype`, or in float64 where that is too inexact."""
    batch = load()
    grams = {side: gram_matrices(batch.rows(side).to(dtype)).to(torch.float64) for side in SIDES}
    inner = side_search.first_weights(batch.row_scale, grams, weighting)
    fits_float32 = all(
        has_safe_squares(gram.diagonal(dim1=1, dim2=2)) and has_exact_energies(inner[side], gram, torch.float32)
        for side, gram in grams.items()
    )
    if dtype != torch.float64 and not fits_float32:
        return _batch_weights(load, weighting, torch.float64)
    square = {side: float((inner[side] * gram).sum()) for side, gram in grams.items()}
    return _BatchWeights(inner, batch.row_scale, square, fits_float32)


@dataclass(frozen=True, slots=True)
class _Components:
    """Components of one side during a fit.

    Attributes:
        columns: Orthonormal columns, (d, k).
        projected: The rows of each batch times the columns, (n, r, k).
        first_values: The k leading eigenvalues of the first fit, as fractions of the total energy.
        shortfall: Estimated fraction of energy that the first search missed.
    """

    columns: Tensor
    projected: list[Tensor]
    first_values: Tensor
    shortfall: float

    def to(self, dtype: torch.dtype) -> "_Components":
        return replace(self, columns=self.columns.to(dtype), projected=[rows.to(dtype) for rows in self.projected])


def fit(
    loaders: Sequence[LoadBatch],
    options: FitOptions,
    label: str,
    *,
    dtype: torch.dtype,
    run: RunCalls = run_serially,
) -> ModuleBases:
    """Fit the bases of one module; float64, on the CPU.

    Except for rounding, the result depends neither on how the adapters are split into batches nor on the process that
    runs a call.

    Args:
        loaders: One loader per batch of adapters.
        options: Options with `n_components`.
        label: Name of the module, from which its random columns are seeded.
        dtype: Dtype of the products in the last sweep: float32 where the factors are narrower, else float64. Earlier
            products are float32 unless that cannot resolve `n_components` components.
        run: Runs the calls of each pass.
    """
    assert options.n_components is not None
    k = options.n_components
    batches = gram_search.load_few_rows(loaders)
    bases = gram_search.fit(batches, options, label, dtype) if batches is not None else None
    if bases is not None:
        return bases
    weights: list[_BatchWeights] = list(
        run(partial(_batch_weights, load, options.weighting, dtype) for load in loaders)
    )
    sides = {name: _Side(name, loaders, run) for name in SIDES}
    total = {name: sum(batch.square[name] for batch in weights) for name in sides}
    # relative to the total energy, the matrices are in the range of float32 whatever the norms of the factors are
    inner = {name: [batch.inner[name] / total[name] for batch in weights] for name in sides}
    search_dtype = torch.float32 if all(batch.fits_float32 for batch in weights) else torch.float64
    dtype = torch.promote_types(dtype, search_dtype)
    # each side alone, as the first step of the exact fit
    first = {name: _search(side, inner[name], k, f"{label}.{name}", search_dtype) for name, side in sides.items()}

    def step(name: str, opposite: _Components, current: _Components) -> _Components:
        return _sweep(sides[name], _projected_inner(opposite, weights, total[name]), current)

    last = first
    sweeps = options.sweeps if options.weighting == "delta" else 0
    for sweep in range(sweeps):
        if sweep == sweeps - 1:
            # only the last sweep decides how exact the result is
            last = {name: components.to(dtype) for name, components in last.items()}
        last = side_search.sweep(last, step)
    # without sweeps, one step in float64 corrects the rounding of the search in float32
    if sweeps == 0 and dtype == torch.float64:
        last = {name: _iterate(sides[name], inner[name], components.to(dtype)) for name, components in last.items()}
    down, up = (_as_basis(first[name], last[name], inner[name], total[name]) for name in SIDES)
    return ModuleBases(down, up)


def _search(side: _Side, inner: list[Tensor], k: int, label: str, dtype: torch.dtype) -> _Components:
    """Search for the leading components of one side alone."""
    batch = side.loaders[0]()
    dimension, device = batch.rows(side.name).shape[2], batch.down.device
    # `inner` is relative to the total energy, so that the trace of G is 1
    ritz = krylov.search(
        partial(side.multiply, inner), lambda n: krylov.seeded_columns(dimension, n, label).to(device, dtype), k
    )
    n_resolved = int((ritz.values[:k] > RESOLUTION[dtype] * ritz.values[0]).sum())
    if n_resolved < k and dtype != torch.float64:
        return _search(side, inner, k, label, torch.float64)
    columns = ritz.vectors[:, :n_resolved]
    return _Components(columns, side.project(columns), ritz.values[:n_resolved], ritz.shortfall)


def _projected_inner(opposite: _Components, weights: Sequence[_BatchWeights], total: float) -> list[Tensor]:
    """Return the matrices between one side's rows, given the opposite side's basis: w²s²·CᵀC, relative to the total.

    C is the opposite factor projected on that basis, in place of the whole factor in `_batch_weights`.
    """
    projected = (rows.to(torch.float64) for rows in opposite.projected)
    return [
        batch.row_scale.square()[:, None, None] * (rows @ rows.mT) / total
        for batch, rows in zip(weights, projected, strict=True)
    ]


def _sweep(side: _Side, inner: list[Tensor], current: _Components) -> _Components:
    """Return the components of a side after one sweep: a step of subspace iteration, and a search if it gained much."""
    stepped = _iterate(side, inner, current)
    gain = float((_kept_energy(inner, stepped.projected) - _kept_energy(inner, current.projected)).trace())
    ritz = side_search.search_on(partial(side.multiply, inner), stepped.columns, gain)
    if ritz is None:
        return stepped
    return replace(current, columns=ritz.vectors, projected=side.project(ritz.vectors))


def _iterate(side: _Side, inner: list[Tensor], current: _Components) -> _Components:
    """Take one step of subspace iteration, V ← orth(G·V), which keeps at least as much energy as before."""
    # G·V from the projections that are known: half of a multiplication
    columns = krylov.orthonormal_columns(side.gather(inner, current.projected))
    projected = side.project(columns)
    # rotate to the Ritz vectors, so that columns are sorted by their energy
    _, rotation = torch.linalg.eigh(_kept_energy(inner, projected))
    rotation = rotation.flip(1)
    projected = [rows @ rotation.to(rows.dtype) for rows in projected]
    return replace(current, columns=columns @ rotation.to(columns.dtype), projected=projected)


def _kept_energy(inner: Sequence[Tensor], projected: Sequence[Tensor]) -> Tensor:
    """Return Vᵀ·G·V for the columns V, (k, k) float64; its trace is the fraction of energy that they keep."""
    wide = (rows.to(torch.float64) for rows in projected)
    return _sum((rows.mT @ matrices @ rows).sum(0) for matrices, rows in zip(inner, wide, strict=True))


def _as_basis(first: _Components, last: _Components, inner: list[Tensor], total: float) -> Basis:
    """Return the last columns as a basis, with the spectrum of the first stack and the energy they keep of it."""
    rows = linalg.orthonormal_rows(last.columns.to(torch.float64).mT)
    # a sum over all adapters, not an estimate
    energy = float(_kept_energy(inner, last.projected).trace())
    return side_search.to_basis(rows, first.first_values, total, energy, first.shortfall)
