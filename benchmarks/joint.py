"""Joint diagonalisation: the updates of many adapters in a module as cores between two shared factors.

As in "Compress then Serve" (Brüel-Gabrielsson et al., arXiv 2407.00066): D_i ≈ upᵀ · core_i · down, Σ w_i²‖D_i − D̂_i‖²
as small as alternation finds it. With full cores, up and down are orthonormal, and what a delta fit has after many
sweeps; with diagonal ones they are free. Everything is deterministic, and float64; no out × in matrix is formed.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from eigenlorax.codec import diagonal_cores
from eigenlorax.core import krylov
from eigenlorax.core.batch import (
    ModuleBatch,
    captured_squares,
    delta_squares,
    difference_squares,
    gram_matrices,
)
from eigenlorax.core.linalg import descending_eigh, orthonormal_rows
from eigenlorax.reports.analysis.per_adapter import singular_rows

ROUNDS = 200
TOLERANCE = 1e-6
"""Alternation ends when a round wins less than this share of what is still lost."""
_WIDE = 1024
"""Width of a side from which on eigenvectors are searched for; below, all of them are found at once."""
_PROXIMAL = 1e-10
_NOTHING = 1e-14
_TRIAL_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class Joint:
    """One module: D_i ≈ upᵀ · core_i · down.

    cores: full, (n, j, k), or diagonal, (n, k) with j = k. lost: ‖D_i − D̂_i‖², without weights.
    """

    down: Float[Tensor, "k n_in"]
    up: Float[Tensor, "j n_out"]
    cores: Tensor
    lost: Float[Tensor, " n"]


Rows = tuple[Tensor, Tensor]
"""Shared factors of a module, (k, n_in) and (j, n_out)."""


def full(one: ModuleBatch, weights: Float[Tensor, " n"], k: int, **search: Any) -> Joint:
    """Orthonormal factors of k rows, or as many as there are directions, and full cores.

    weights: those of the squares' roots; adapters of weight 0 get cores, and have no say. search: start, rounds and
    tolerance of `bases`.
    """
    return in_full(one, bases(one, weights, k, **search))


def in_full(one: ModuleBatch, rows: Rows) -> Joint:
    """The best full cores between given orthonormal factors."""
    down, up = rows
    in_down, in_up = one.down @ down.mT, one.up @ up.mT
    return Joint(down, up, in_up.mT @ in_down, difference_squares(one, in_down @ down, in_up @ up))


def bases(
    one: ModuleBatch,
    weights: Float[Tensor, " n"],
    k: int,
    *,
    start: Rows | None = None,
    rounds: int = ROUNDS,
    tolerance: float = TOLERANCE,
) -> Rows:
    """The factors of `full` alone: each is in turn the k leading eigenvectors of what the other one sees.

    start: orthonormal rows to go on from; the objective is never above theirs.
    """
    small, frames = _narrow(_weighted(one, weights))
    k_down, k_up = (min(k, sum(one.ranks), rows.shape[2]) for rows in (small.down, small.up))
    total = float(delta_squares(small).sum())
    if start is None:
        down = _top(small.down, gram_matrices(small.up), k_down)
        up = _top(small.up, gram_matrices(small.down @ down.mT), k_up)
    else:
        # rows outside the adapters' span keep nothing
        down, up = (_within(rows, frame) for rows, frame in zip(start, frames, strict=True))
    before = float(captured_squares(small.down @ down.mT, small.up @ up.mT).sum())
    for _ in range(rounds):
        down = _top(small.down, gram_matrices(small.up @ up.mT), k_down, down)
        up = _top(small.up, gram_matrices(small.down @ down.mT), k_up, up)
        now = float(captured_squares(small.down @ down.mT, small.up @ up.mT).sum())
        if now - before <= tolerance * (total - now) + _NOTHING * total:
            break
        before = now
    whole = (rows if frame is None else rows @ frame for rows, frame in zip((down, up), frames, strict=True))
    found_down, found_up = (orthonormal_rows(rows) for rows in whole)
    return found_down, found_up


def diagonal(
    one: ModuleBatch,
    weights: Float[Tensor, " n"],
    k: int,
    *,
    start: Rows | None = None,
    rounds: int = ROUNDS,
    tolerance: float = TOLERANCE,
    ridge: float = diagonal_cores.RIDGE,
) -> Joint:
    """Free factors of k rows of length 1, or as many as the adapters' ranks add up to, and diagonal cores.

    By alternating least squares (a canonical polyadic decomposition of the stacked updates), from the start that does
    better in a few rounds: the adapters' own largest singular directions, or what diagonalises the two leading
    combinations of their full cores. start: rows to go on from instead; the objective is never above theirs.
    ridge: as `diagonal_cores.RIDGE`.
    """
    small, frames = _narrow(_weighted(one, weights))
    k = min(k, sum(one.ranks))
    total = float(delta_squares(small).sum())

    def run(state: _Diagonal, rounds: int) -> _Diagonal:
        for _ in range(rounds):
            after = state.improved(small)
            won = state.lost - after.lost
            state = after if won > 0 else state
            if won <= tolerance * after.lost + _NOTHING * total:
                break
        return state

    if start is not None:
        rows = [rows if frame is None else rows @ frame.mT for rows, frame in zip(start, frames, strict=True)]
        best = run(_Diagonal.of(small, rows[0], rows[1], total, ridge), rounds)
    else:
        starts = [_own_directions(small, k)]
        if k <= min(small.down.shape[2], small.up.shape[2]):
            starts.append(_diagonalised(small, k))
        tried = [run(_Diagonal.of(small, *each, total, ridge), min(rounds, _TRIAL_ROUNDS)) for each in starts]
        best = run(min(tried, key=lambda state: state.lost), max(rounds - _TRIAL_ROUNDS, 0))
    down, up = (
        rows if frame is None else rows @ frame for rows, frame in zip((best.down, best.up), frames, strict=True)
    )
    return in_diagonal(one, (down, up), ridge)


def in_diagonal(one: ModuleBatch, rows: Rows, ridge: float = diagonal_cores.RIDGE) -> Joint:
    """The best diagonal cores between given factors."""
    down, up = rows
    cores, seen, both = _best_diagonal(one.down, one.up, rows, ridge)
    lost = delta_squares(one) - 2 * (cores * seen).sum(1) + ((cores @ both) * cores).sum(1)
    return Joint(down, up, cores, lost.clamp_min(0))


def _best_diagonal(down: Tensor, up: Tensor, rows: Rows, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """The diagonal cores between given factors, and the normal equations that they solve."""
    with_terms, between_terms = diagonal_cores.normal_equations(down, up, rows)
    return diagonal_cores.solve(with_terms, between_terms, ridge), with_terms, between_terms


def _weighted(one: ModuleBatch, weights: Float[Tensor, " n"]) -> ModuleBatch:
    return replace(one, up=one.up * weights[:, None, None])


def _narrow(one: ModuleBatch) -> tuple[ModuleBatch, tuple[Tensor | None, Tensor | None]]:
    """The same updates in coordinates of frames, orthonormal rows that span all there is, where those are fewer than
    the dimension; None where not."""
    sides: list[Tensor] = []
    frames: list[Tensor | None] = []
    for rows in (one.down, one.up):
        n, r, d = rows.shape
        if n * r >= d:
            sides.append(rows)
            frames.append(None)
        else:
            frame = torch.linalg.qr(rows.reshape(n * r, d).mT)[0].mT
            sides.append(rows @ frame.mT)
            frames.append(frame)
    return replace(one, down=sides[0], up=sides[1]), (frames[0], frames[1])


def _within(rows: Tensor, frame: Tensor | None) -> Tensor:
    """Orthonormal rows in the coordinates of a frame; shorter where they stick out of it."""
    return rows if frame is None else rows @ frame.mT


def _top(
    rows: Float[Tensor, "n r d"], inner: Float[Tensor, "n r r"], k: int, near: Float[Tensor, "k d"] | None = None
) -> Float[Tensor, "k d"]:
    """The k leading eigenvectors of Σ rowsᵀ · inner · rows. near: rows that are not far from them."""
    n, r, d = rows.shape
    flat = rows.reshape(n * r, d)
    if d <= _WIDE:
        _, vectors = descending_eigh(flat.mT @ (inner @ rows).reshape(n * r, d))
        found: Tensor = vectors[:, :k].mT
        return found

    def multiply(columns: Tensor) -> Tensor:
        image: Tensor = flat.mT @ (inner @ (flat @ columns).reshape(n, r, -1)).reshape(n * r, -1)
        return image

    if near is None:
        near = torch.randn(min(k + 8, d), d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = float((gram_matrices(rows) * inner).sum())
    return krylov.leading_eigenvectors(multiply, near.mT, k, tolerance=1e-9 * total).vectors.mT


@dataclass(frozen=True, slots=True)
class _Diagonal:
    """Factors and cores on the way. total: ‖D‖² of all updates together; lost: of that, what is lost."""

    down: Tensor
    up: Tensor
    cores: Tensor
    total: float
    ridge: float
    lost: float

    @classmethod
    def of(cls, one: ModuleBatch, down: Tensor, up: Tensor, total: float, ridge: float) -> "_Diagonal":
        """With the best cores between these factors."""
        down, up = _of_length_one(down), _of_length_one(up)
        cores, seen, both = _best_diagonal(one.down, one.up, (down, up), ridge)
        return cls(down, up, cores, total, ridge, max(total - float((cores * (2 * seen - cores @ both)).sum()), 0.0))

    def improved(self, one: ModuleBatch) -> "_Diagonal":
        """One factor after the other, and the cores, each the best there is beside the others.

        Where directions nearly coincide, that is decided by nearness to what was there, which keeps the sum from
        growing.
        """
        weights = self.cores.mT @ self.cores
        down = self._side(one.down, one.up @ self.up.mT, weights * (self.up @ self.up.mT), self.down)
        up = self._side(one.up, one.down @ down.mT, weights * (down @ down.mT), self.up)
        return _Diagonal.of(one, down, up, self.total, self.ridge)

    def _side(self, rows: Tensor, other: Tensor, normal: Tensor, before: Tensor) -> Tensor:
        """rows: of the side, (n, r, d); other: those of the other side in its factor, (n, r, k)."""
        seen = (other * self.cores[:, None, :]).flatten(0, 1).mT @ rows.flatten(0, 1)
        # where there is nothing, any will do
        size = _PROXIMAL * float(normal.diagonal().mean()) or 1.0
        identity = torch.eye(len(normal), dtype=torch.float64)
        found: Tensor = torch.linalg.solve(normal + size * identity, seen + size * before)
        return found


def _of_length_one(rows: Tensor) -> Tensor:
    found: Tensor = torch.nn.functional.normalize(rows, dim=1)
    return found


def _own_directions(one: ModuleBatch, k: int) -> tuple[Tensor, Tensor]:
    """The k largest pairs of singular vectors of all adapters."""
    down, up, sigma = singular_rows(one)
    largest = sigma.flatten().argsort(descending=True, stable=True)[:k]
    return down.flatten(0, 1)[largest], up.flatten(0, 1)[largest]


def _diagonalised(one: ModuleBatch, k: int) -> tuple[Tensor, Tensor]:
    """Factors that diagonalise the two leading combinations of the full cores: exact where all cores are diagonal
    between one pair of factors."""
    down, up = bases(one, torch.ones(len(one), dtype=torch.float64), k, rounds=3)
    cores = (one.up @ up.mT).mT @ (one.down @ down.mT)
    size = min(cores.shape[1:])
    cores = cores[:, :size, :size]
    _, combinations = descending_eigh(cores.flatten(1) @ cores.flatten(1).mT)
    two = (combinations[:, :2].mT @ cores.flatten(1)).reshape(-1, size, size)
    if len(two) == 2:
        left = _real(*torch.linalg.eig(two[1] @ torch.linalg.pinv(two[0], rtol=1e-10)))
    else:
        left = torch.linalg.svd(two[0])[0]
    # with U known, rows j of U⁻¹·core of all adapters are multiples of one vector
    back = torch.linalg.pinv(left, rtol=1e-10) @ cores
    right = torch.linalg.svd(back.transpose(0, 1), full_matrices=False)[2][:, 0]
    return right @ down[:size], left.mT @ up[:size]


def _real(values: Tensor, vectors: Tensor) -> Tensor:
    """Real columns with the span of eigenvectors, of which complex ones come in conjugate pairs."""
    return torch.where(values.imag < 0, vectors.imag, vectors.real)
