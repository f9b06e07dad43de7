"""Which bytes an adapter's error is worth: components of every side of every module, and the step of every adapter.

For steps of many sizes, each module says, before anything is coded, about how many bits it takes with the number of
directions that is best then, and what it loses of each adapter. The step of an adapter is the same in all its modules:
so a bit more buys the same there as anywhere, in coefficients, rests and directions alike. docs/method.md, "Bytes".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..core import krylov, linalg
from . import dead_zone
from .singular_codes import OVERHEAD, Components

MOST = 512
"""Directions of a side that are considered, at most."""
LARGE = 2048
"""Rows, or their width, up to which all directions are found at once."""
WIDEST_CORE = 3
"""Directions up to which cores are considered, in ranks."""
BINS = 4
"""Sizes of rows that are told apart, to an octave."""


@dataclass(frozen=True, slots=True)
class SideView:
    """The rows of one side of a module in their leading common directions.

    directions: (k, d) orthonormal. energies: squared coordinates of the unit rows, (rows, k). dimension: d.
    """

    directions: Float[Tensor, "k d"]
    energies: np.ndarray
    dimension: int


@dataclass(frozen=True, slots=True)
class View:
    """A module as the choice of sizes sees it. weights: of its adapters, 1 / ‖update‖ over all modules.

    lengths: of all components, relative to their adapter's update, (n · r,); owners: their adapters.
    """

    down: SideView
    up: SideView
    lengths: np.ndarray
    owners: np.ndarray
    n: int

    @property
    def rank(self) -> int:
        """Components of an adapter, at most."""
        return len(self.lengths) // self.n


def view(wide: Components, weights: Float[Tensor, " n"]) -> View:
    """Of the updates of a module."""
    lengths = wide.s * weights[:, None]
    n, rank = lengths.shape
    sides = [_side_view(wide.rows(side), lengths) for side in ("down", "up")]
    return View(sides[0], sides[1], lengths.flatten().numpy(), np.repeat(np.arange(n), rank), n)


def _side_view(rows: Tensor, lengths: Tensor) -> SideView:
    flat = rows.flatten(0, 1)
    directions = _leading(flat * lengths.flatten()[:, None])
    return SideView(directions, (flat @ directions.mT).square().numpy(), rows.shape[2])


def _leading(rows: Tensor) -> Tensor:
    """The leading directions of rows, searched for where finding all of them would take long."""
    if min(rows.shape) <= LARGE:
        return linalg.leading_right_vectors(rows, MOST)
    start = torch.randn(rows.shape[1], MOST, generator=torch.Generator().manual_seed(0), dtype=rows.dtype)
    square = float(rows.square().sum())
    found = krylov.leading_eigenvectors(
        lambda columns: rows.mT @ (rows @ columns), start, MOST, tolerance=1e-3 * square
    )
    return linalg.orthonormal_rows(found.vectors.mT)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a module takes at one step: directions of both sides, bits of the bases and of each adapter, and what is
    lost of each adapter, relative to its squared norm."""

    k: tuple[int, int]
    basis_bits: float
    bits: np.ndarray
    lost: np.ndarray


def grid(most: int) -> list[int]:
    """Numbers of directions that are compared."""
    steps = [
        0,
        1,
        2,
        3,
        4,
        6,
        8,
        10,
        12,
        14,
        16,
        20,
        24,
        28,
        32,
        40,
        48,
        56,
        64,
        80,
        96,
        112,
        128,
        160,
        192,
        256,
        320,
        384,
        448,
    ]
    return [*(k for k in steps if k < most), most]


def estimate(one: View, step: float) -> Estimate:
    """About what a module takes if the step of each adapter is this share of its norm."""
    lengths = one.lengths / step
    whole = dead_zone.BITS_PER_SQUARED_ERROR * lengths**2
    sides = [_Side(side, lengths) for side in (one.down, one.up)]
    chosen = [0, 0]
    for turn in (0, 1, 0):
        other = sides[1 - turn]
        prices = np.minimum(sides[turn].prices + other.prices[:, [chosen[1 - turn]]] + OVERHEAD, whole[:, None]).sum(0)
        chosen[turn] = int((prices + sides[turn].basis_bits).argmin())
    price = sum(side.prices[:, at] for side, at in zip(sides, chosen, strict=True)) + OVERHEAD
    alive = price < whole
    bits = sum(side.bits[:, at] for side, at in zip(sides, chosen, strict=True)) + OVERHEAD
    lost = sum(side.lost[:, at] for side, at in zip(sides, chosen, strict=True))
    basis = sum(side.basis_bits[at] for side, at in zip(sides, chosen, strict=True))
    by_adapter = [
        np.bincount(one.owners, np.where(alive, bits, 0.0), one.n),
        np.bincount(one.owners, np.where(alive, lost, lengths**2), one.n),
    ]
    best = (0.0, (sides[0].grid[chosen[0]], sides[1].grid[chosen[1]]), basis, *by_adapter)
    best = (_price(best), *best[1:])
    for down, k in enumerate(sides[0].grid):
        if k and k in sides[1].grid and k <= WIDEST_CORE * one.rank:
            found = _with_cores(one, sides, (down, sides[1].grid.index(k)), lengths, by_adapter)
            if found[0] < best[0]:
                best = found
    _, k_both, basis, bits, lost = best
    return Estimate(k_both, basis, bits, lost * step**2)


Guess = tuple[float, tuple[int, int], float, np.ndarray, np.ndarray]


def _price(one: Guess) -> float:
    return one[2] + float((one[3] + dead_zone.BITS_PER_SQUARED_ERROR * one[4]).sum())


def _with_cores(
    one: View, sides: "Sequence[_Side]", at: tuple[int, int], lengths: np.ndarray, others: Sequence[np.ndarray]
) -> Guess:
    """The same where each adapter for which that is better has a core between the bases, and no components."""
    kept = lengths**2
    for side, place in zip(sides, at, strict=True):
        kept = kept * side.inside[:, place]
    inside = np.bincount(one.owners, kept, one.n)
    shares = [
        side.share[: side.grid[place]] / max(float(side.share[: side.grid[place]].sum()), 1e-300)
        for side, place in zip(sides, at, strict=True)
    ]
    spread = np.sqrt(np.outer(*shares)).flatten()
    bits, lost = (each.sum(1) for each in dead_zone.gaussian_cost(np.sqrt(inside)[:, None] * spread[None]))
    bits, lost = bits + OVERHEAD, lost + np.bincount(one.owners, lengths**2, one.n) - inside
    factored = _both(one, sides, at, lengths)
    better = (
        bits + dead_zone.BITS_PER_SQUARED_ERROR * lost < factored[0] + dead_zone.BITS_PER_SQUARED_ERROR * factored[1]
    )
    found = (
        0.0,
        (sides[0].grid[at[0]], sides[1].grid[at[1]]),
        sum(side.basis_bits[place] for side, place in zip(sides, at, strict=True)),
        np.where(better, bits, factored[0]),
        np.where(better, lost, factored[1]),
    )
    return (_price(found), *found[1:])


def _both(one: View, sides: "Sequence[_Side]", at: Sequence[int], lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bits and loss of each adapter by components."""
    bits = sum(side.bits[:, place] for side, place in zip(sides, at, strict=True)) + OVERHEAD
    lost = sum(side.lost[:, place] for side, place in zip(sides, at, strict=True))
    alive = bits + dead_zone.BITS_PER_SQUARED_ERROR * lost < dead_zone.BITS_PER_SQUARED_ERROR * lengths**2
    return (
        np.bincount(one.owners, np.where(alive, bits, 0.0), one.n),
        np.bincount(one.owners, np.where(alive, lost, lengths**2), one.n),
    )


class _Side:
    """Prices of one side's rows for every number of directions on the grid."""

    def __init__(self, one: SideView, lengths: np.ndarray) -> None:
        self.grid = grid(one.energies.shape[1])
        squares = lengths**2
        weighted = one.energies * squares[:, None]
        importance = np.sqrt(weighted.sum(0))
        basis_bits, basis_lost = dead_zone.gaussian_cost(importance / one.dimension**0.5)
        self.basis_bits = one.dimension * np.concatenate([[0.0], basis_bits.cumsum()])[self.grid]
        self.share = weighted.mean(0)
        # what rounding the directions takes from a row is missed by its coefficients
        noise = np.minimum(one.dimension * basis_lost / np.maximum(importance**2, 1e-300), 1.0)
        known_bits, known_lost = self._coefficients(weighted, self.share)
        inside = np.concatenate([np.zeros((len(lengths), 1)), (one.energies * (1 - noise)).cumsum(1)], axis=1)
        self.inside = inside[:, self.grid]
        left = squares[:, None] * np.maximum(1 - self.inside, 0.0)
        rest_bits, rest_lost = dead_zone.gaussian_cost(np.sqrt(left / one.dimension))
        rest_bits, rest_lost = rest_bits * one.dimension, rest_lost * one.dimension
        used = rest_bits + dead_zone.BITS_PER_SQUARED_ERROR * rest_lost < dead_zone.BITS_PER_SQUARED_ERROR * left
        self.bits = known_bits + np.where(used, rest_bits, 0.0)
        self.lost = known_lost + np.where(used, rest_lost, left)
        self.prices = self.bits + dead_zone.BITS_PER_SQUARED_ERROR * self.lost

    def _coefficients(self, weighted: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bits and error of the coefficients of each row, (rows, grid): rows of about one size are taken as one."""
        if not len(share):
            return np.zeros((len(weighted), 1)), np.zeros((len(weighted), 1))
        level = np.sqrt(weighted.sum(1) / share.sum())
        bins, which = np.unique(np.round(BINS * np.log2(np.maximum(level, 1e-6))), return_inverse=True)
        bits, lost = dead_zone.gaussian_cost(2.0 ** (bins / BINS)[:, None] * np.sqrt(share)[None])
        found = []
        for one in (bits, lost):
            summed = np.concatenate([np.zeros((len(bins), 1)), one.cumsum(1)], axis=1)
            found.append(summed[:, self.grid][which])
        return found[0], found[1]


@dataclass(frozen=True, slots=True)
class Plan:
    """What was chosen: each adapter's step, relative to its norm, (n,), and each module's directions (down, up), with
    those of the next larger and smaller steps beside them. bits: about how many all of it takes."""

    steps: np.ndarray
    k: list[list[tuple[int, int]]]
    bits: float


class Survey:
    """Estimates of all modules at steps that are half an octave apart.

    Each module is given once. members: its adapters' places.
    """

    def __init__(self, n: int, steps: Sequence[float]) -> None:
        self.steps = np.array(sorted(steps))
        self._bits, self._lost = np.zeros((len(steps), n)), np.zeros((len(steps), n))
        self._basis = np.zeros(len(steps))
        self._k: list[list[tuple[int, int]]] = []
        self._members: list[list[int]] = []

    def add(self, one: View, members: Sequence[int]) -> None:
        """Take a module in."""
        found = [estimate(one, float(step)) for step in self.steps]
        for row, guess in enumerate(found):
            self._bits[row, list(members)] += guess.bits
            self._lost[row, list(members)] += guess.lost
            self._basis[row] += guess.basis_bits
        self._k.append([guess.k for guess in found])
        self._members.append(list(members))

    def plan(self, error: float) -> Plan:
        """For a delta error of every adapter."""
        logs = np.log2(self.steps)
        lost = np.maximum.accumulate(np.log2(np.maximum(self._lost, 1e-300)), axis=0)
        at = np.array([np.interp(2 * np.log2(error), column, logs) for column in lost.T])
        bits = sum(float(np.interp(x, logs, column)) for x, column in zip(at, self._bits.T, strict=True))
        basis = float(np.interp(float(at.mean()), logs, self._basis))
        nearest = [int(np.abs(logs - at[members].mean()).argmin()) for members in self._members]
        k = [row[max(place - 1, 0) : place + 2] for row, place in zip(self._k, nearest, strict=True)]
        return Plan(2.0**at, k, bits + basis)
