"""The fit of a module whose stack is too large for a whole spectrum: rounds over chunks of adapters.

A side's directions are the leading eigenvectors of Σ rowsᵀ · inner · rows, a sum over adapters that is never formed:
a round multiplies it with a few columns, chunk by chunk, and adds up. The first fit is a Krylov search (`krylov`); in a
sweep each side takes a step of subspace iteration from where it was, which never lowers what is kept, or where that
brings much, searches on from there (docs/method.md).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from hashlib import sha256
from operator import add
from typing import Any

import torch
from torch import Tensor

from . import chunks, krylov, linalg
from .basis import Basis
from .chunks import Chunk
from .engine import here
from .subspace import FitOptions, ModuleBases

LARGEST_SIDE = 384
"""Rows, or dimensions, up to which whole spectra are found."""
LARGEST_STACK = 2**25
"""The same for the numbers in the rows of one side."""
BLOCK = 32
"""Columns that a round multiplies: as many as components are wanted, where so many eigenvalues are alike."""
ALIKE = 1e-3
"""Eigenvalues are alike if they differ by less than this share."""
TOLERANCE = 5e-5
"""The share of energy that a first fit may lack, as it is estimated, when its search ends."""
WORTH = 1e-3
"""The share of energy above which what a sweep's step has brought is taken for a sign that more is to be had."""
RESOLUTION = {torch.float32: 1e-6, torch.float64: 1e-14}
"""Eigenvalues below this share of the largest one are rounding, by the dtype of the products."""

Held = Callable[[], Chunk]
"""A chunk, at hand or read anew."""
Run = Callable[[Iterable[Callable[[], Any]]], Iterable[Any]]
"""Makes calls, here or elsewhere, and gives their results in order."""


def is_due(rows: int, n_in: int, n_out: int, options: FitOptions) -> bool:
    """Whether a module with so many rows on each side is fitted in this way.

    It finds a given number of components that is small beside the stack. Where a whole spectrum is cheap, or asked
    for, `subspace.fit_module` finds it.
    """
    if options.n_components is None:
        return False
    widest = max(min(rows, n_in), min(rows, n_out))
    small = widest <= LARGEST_SIDE and rows * max(n_in, n_out) <= LARGEST_STACK
    narrow = 4 * (options.n_components + BLOCK) <= min(rows, n_in, n_out)
    return narrow and not small


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of a module, as its chunks."""

    side: str
    held: Sequence[Held]
    run: Run

    def multiply(self, inner: Sequence[Tensor], columns: Tensor) -> Tensor:
        """Σ rowsᵀ · inner · rows · columns."""
        calls = (partial(_multiply, held, self.side, i, columns) for held, i in zip(self.held, inner, strict=True))
        return _sum(self.run(calls))

    def gather(self, inner: Sequence[Tensor], projected: Sequence[Tensor]) -> Tensor:
        """Σ rowsᵀ · inner · projected."""
        each = zip(self.held, inner, projected, strict=True)
        return _sum(self.run(partial(_gather, held, self.side, i, p) for held, i, p in each))

    def project(self, columns: Tensor) -> list[Tensor]:
        """Each chunk's rows in the directions of the columns."""
        return list(self.run(partial(_project, held, self.side, columns) for held in self.held))


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return reduce(add, parts)


def _multiply(held: Held, side: str, inner: Tensor, columns: Tensor) -> Tensor:
    return chunks.multiply(held(), side, inner, columns)


def _gather(held: Held, side: str, inner: Tensor, projected: Tensor) -> Tensor:
    return chunks.gather(held(), side, inner, projected)


def _project(held: Held, side: str, columns: Tensor) -> Tensor:
    return chunks.project(held(), side, columns)


@dataclass(frozen=True, slots=True)
class _Weights:
    """What the adapters of a chunk count for in a first fit, float64.

    inner: of each side, what stands between the rows of each adapter, (n, r, r). scale: of `Chunk`. square: of each
    side, the squared norm of the weighted rows. narrow: whether the norms of all rows are far from float32's ends.
    """

    inner: dict[str, Tensor]
    scale: Tensor
    square: dict[str, float]
    narrow: bool


def _weights(held: Held, weighting: str, dtype: torch.dtype) -> _Weights:
    """dtype: of the products. Where its room is too little for some row's square, they are float64 all the same."""
    one = held()
    own = chunks.grams(one, dtype)
    lengths = torch.stack([gram.diagonal(dim1=1, dim2=2) for gram in own])
    inside = (lengths > 1e-20) & (lengths < 1e20)
    if dtype != torch.float64 and not bool(inside.all()):
        return _weights(held, weighting, torch.float64)
    grams = dict(zip(("down", "up"), own, strict=True))
    if weighting == "factors":
        identity = torch.eye(one.down.shape[1], dtype=torch.float64, device=one.down.device)
        taken = (one.scale > 0).to(torch.float64)[:, None, None] * identity
        inner = {"down": taken, "up": taken}
    else:
        square = one.scale.square()[:, None, None]
        inner = {"down": square * grams["up"], "up": square * grams["down"]}
    return _Weights(
        inner=inner,
        scale=one.scale,
        square={side: float((inner[side] * grams[side]).sum()) for side in grams},
        narrow=bool((inside | (lengths == 0)).all()),
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """Directions of one side: orthonormal columns, the rows in them, and the leading eigenvalues of the first fit."""

    columns: Tensor
    projected: list[Tensor]
    squares: Tensor
    shortfall: float


def fit(held: Sequence[Held], options: FitOptions, label: str, *, dtype: torch.dtype, run: Run = here) -> ModuleBases:
    """The bases of one module, float64, on the CPU.

    label: names the module, so that each has random columns of its own, always the same ones.
    dtype: of the products in the last sweep: float32 where the factors are narrower than that, else float64. What comes
        before is in float32, unless that cannot tell as many directions as are wanted.
    The result is the same, but for rounding, however the adapters are split into chunks and whoever makes the calls.
    """
    assert options.n_components is not None
    k = options.n_components
    weights: list[_Weights] = list(run(partial(_weights, one, options.weighting, dtype) for one in held))
    sides = {side: _Side(side, held, run) for side in ("down", "up")}
    total = {side: sum(one.square[side] for one in weights) for side in sides}
    # shares of the whole: float32 has room for them, whatever the sizes of the factors are
    inner = {side: [one.inner[side] / total[side] for one in weights] for side in sides}
    searched = torch.float32 if all(one.narrow for one in weights) else torch.float64
    first = {side: _search(sides[side], inner[side], k, f"{label}.{side}", searched, BLOCK) for side in sides}
    last = dict(first)
    sweeps = options.sweeps if options.weighting == "delta" else 0
    for sweep in range(sweeps):
        if sweep == sweeps - 1:
            last = {side: _in(found, dtype) for side, found in last.items()}
        for side, other in (("down", "up"), ("up", "down")):
            last[side] = _swept(sides[side], _seen(last[other], weights, total[side]), last[side])
    if sweeps == 0 and dtype == torch.float64:
        last = {side: _step(sides[side], inner[side], _in(found, dtype)) for side, found in last.items()}
    down, up = (_basis(first[side], last[side], inner[side], total[side]) for side in ("down", "up"))
    return ModuleBases(down, up)


def _search(side: _Side, inner: list[Tensor], k: int, label: str, dtype: torch.dtype, block: int) -> _Found:
    """The leading directions of one side by itself. block: columns of a round."""
    one = side.held[0]()
    dimension, device = one.rows(side.side).shape[2], one.down.device
    start = _random(dimension, block, label).to(device, dtype)
    ritz = krylov.leading(partial(side.multiply, inner), start, k, tolerance=TOLERANCE, trace=1.0)
    if block < k and _alike(ritz.values[:k], block):
        # there may be more of them than columns, of which a search finds no more than that
        return _search(side, inner, k, label, dtype, k)
    kept = int((ritz.values[:k] > RESOLUTION[dtype] * ritz.values[0]).sum())
    if kept < k and dtype != torch.float64:
        return _search(side, inner, k, label, torch.float64, block)
    columns = ritz.vectors[:, :kept]
    return _Found(columns, side.project(columns), ritz.values[:kept], ritz.shortfall)


def _alike(values: Tensor, n: int) -> bool:
    """Whether n of some descending values are alike."""
    return bool((values[n - 1 :] > (1 - ALIKE) * values[: len(values) - n + 1]).any())


def _random(dimension: int, columns: int, label: str) -> Tensor:
    """Random columns, the same ones for a label each time."""
    seed = int.from_bytes(sha256(label.encode()).digest()[:7], "big")
    return torch.randn(dimension, columns, generator=torch.Generator().manual_seed(seed))


def _in(found: _Found, dtype: torch.dtype) -> _Found:
    return replace(found, columns=found.columns.to(dtype), projected=[p.to(dtype) for p in found.projected])


def _seen(other: _Found, weights: Sequence[_Weights], total: float) -> list[Tensor]:
    """What stands between the rows of each adapter as the basis of the other side sees the update."""
    projected = (p.to(torch.float64) for p in other.projected)
    return [one.scale.square()[:, None, None] * (p @ p.mT) / total for one, p in zip(weights, projected, strict=True)]


def _swept(side: _Side, inner: list[Tensor], before: _Found) -> _Found:
    """The side after one sweep: a step, and a search from there where that step has brought much."""
    found = _step(side, inner, before)
    gained = float((_kept(inner, found.projected) - _kept(inner, before.projected)).trace())
    if gained < WORTH:
        return found
    ritz = krylov.leading(partial(side.multiply, inner), found.columns, found.columns.shape[1], tolerance=TOLERANCE)
    return replace(before, columns=ritz.vectors, projected=side.project(ritz.vectors))


def _step(side: _Side, inner: list[Tensor], before: _Found) -> _Found:
    """One step of subspace iteration: it keeps at least what the columns before kept of the stack so weighted."""
    columns = krylov.orthonormal_columns(side.gather(inner, before.projected))
    projected = side.project(columns)
    _, turn = torch.linalg.eigh(_kept(inner, projected))
    turn = turn.flip(1)
    projected = [p @ turn.to(p.dtype) for p in projected]
    return replace(before, columns=columns @ turn.to(columns.dtype), projected=projected)


def _kept(inner: Sequence[Tensor], projected: Sequence[Tensor]) -> Tensor:
    """What the columns keep of the weighted stack, as a (k, k) matrix, float64."""
    small = (p.to(torch.float64) for p in projected)
    return _sum((p.mT @ i @ p).sum(0) for i, p in zip(inner, small, strict=True))


def _basis(first: _Found, last: _Found, inner: list[Tensor], total: float) -> Basis:
    """The last columns as a basis, with what they keep of the first stack."""
    listed = first.squares * total
    return Basis(
        components=linalg.orthonormal_rows(last.columns.to(torch.float64).mT).cpu(),
        singular_values=listed.sqrt().float().cpu(),
        energy=min(float(_kept(inner, last.projected).trace()), 1.0),
        shortfall=first.shortfall,
        tail=max(total - float(listed.sum()), 0.0),
    )
