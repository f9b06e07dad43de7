"""Multiple-choice knapsack: pick one choice per item, as cheap as possible, with no total above a bound.

In `sizes`, items are modules, choices are numbers of components, prices are bytes, and totals are the squared errors of
adapters. The solver is a deterministic heuristic.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DUAL_ROUNDS = 80
SCALES = (1.0, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0)
"""Factors on the multipliers, tried in this order until the cheapest choices are within the bound."""


@dataclass(frozen=True, slots=True)
class Choices:
    """The c choices of one item.

    Attributes:
        prices: Price of each choice, (c,).
        losses: Non-negative amount that each choice adds to the n totals, (c, n).
    """

    prices: np.ndarray
    losses: np.ndarray


def totals(items: Sequence[Choices], picks: Sequence[int]) -> np.ndarray:
    """Return the totals of a selection, (n,)."""
    summed: np.ndarray = np.sum([item.losses[pick] for item, pick in zip(items, picks, strict=True)], axis=0)
    return summed


def price(items: Sequence[Choices], picks: Sequence[int]) -> float:
    """Return the price of a selection."""
    return float(sum(item.prices[pick] for item, pick in zip(items, picks, strict=True)))


def multipliers(items: Sequence[Choices], bound: float) -> np.ndarray:
    """Return positive Lagrange multipliers of the totals, (n,), that nearly maximise the dual.

    For any multipliers w, a selection within the bound costs at least Σ min(prices + losses @ w) − bound · Σ w.
    """
    n = items[0].losses.shape[1]
    current = np.full(n, sum(float(item.prices.max()) for item in items) / (n * bound))
    best_value, best = -np.inf, current
    for turn in range(DUAL_ROUNDS):
        scores = [item.prices + item.losses @ current for item in items]
        picks = [int(score.argmin()) for score in scores]
        value = sum(float(score[pick]) for score, pick in zip(scores, picks, strict=True)) - bound * current.sum()
        if value > best_value:
            best_value, best = value, current
        # multiplicative steps keep the prices positive, and work for totals of any scale
        step = np.clip(totals(items, picks) / bound - 1, -1, 1) / (1 + turn / 8)
        current = current * np.exp(step)
    # the multiplier of a total that never reaches the bound tends to 0; the floor keeps it relevant in float64 sums
    floored: np.ndarray = np.maximum(best, 1e-6 * best.max())
    return floored


def select(items: Sequence[Choices], bound: float, start: Sequence[int]) -> list[int]:
    """Return a selection within the bound that no exchange of a single choice makes cheaper.

    It is the cheaper one of two: improved from the choices at the dual's prices, and from `start`, which must be
    within the bound.
    """
    dual_prices = multipliers(items, bound)
    starts = [list(start)]
    for scale in SCALES:
        picks = [int((item.prices + item.losses @ (scale * dual_prices)).argmin()) for item in items]
        if bool((totals(items, picks) <= bound).all()):
            starts.append(picks)
            break
    improved = [_exchange(items, bound, picks) for picks in starts]
    return min(improved, key=lambda picks: (price(items, picks), picks))


def _exchange(items: Sequence[Choices], bound: float, picks: list[int]) -> list[int]:
    """Exchange one choice at a time, the one that saves most, until no exchange saves anything."""
    picks = list(picks)
    while True:
        current = totals(items, picks)
        best: tuple[float, int, int] | None = None
        for index, item in enumerate(items):
            pick = _cheapest_within(item, bound - current + item.losses[picks[index]], item.prices[picks[index]])
            if pick is not None:
                saving = float(item.prices[picks[index]] - item.prices[pick])
                best = max(best or (0.0, 0, 0), (saving, index, pick), key=lambda move: move[0])
        if best is None:
            return picks
        picks[best[1]] = best[2]


def _cheapest_within(item: Choices, max_losses: np.ndarray, below: float) -> int | None:
    """Return the cheapest choice with a price less than `below` and losses of at most `max_losses`, (n,), or None."""
    cheaper = np.flatnonzero(item.prices < below)
    fitting = cheaper[(item.losses[cheaper] <= max_losses).all(axis=1)]
    return int(fitting[item.prices[fitting].argmin()]) if len(fitting) else None
