"""One choice of each menu, as cheap as can be, with no total beyond a bound: a multiple-choice knapsack.

Pure numbers, deterministic. Nothing here knows what a choice stands for; `sizes` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 80
SHORTLIST = 64
PAIRS = 2_000_000
"""How many exchanges of two choices `good` looks at in one round of all pairs of menus, at most."""
MOST_PARTIAL = 400_000
"""How many unfinished selections `cheapest` keeps in sight before it gives up."""


@dataclass(frozen=True, slots=True)
class Menu:
    """What may be chosen: each choice's price, (c,), and what it adds to each of the n totals, (c, n), 0 or more."""

    prices: np.ndarray
    losses: np.ndarray


def loads(menus: Sequence[Menu], picks: Sequence[int]) -> np.ndarray:
    """The totals of a selection, (n,)."""
    found: np.ndarray = np.sum([menu.losses[pick] for menu, pick in zip(menus, picks, strict=True)], axis=0)
    return found


def price(menus: Sequence[Menu], picks: Sequence[int]) -> float:
    """What a selection costs."""
    return float(sum(menu.prices[pick] for menu, pick in zip(menus, picks, strict=True)))


def multipliers(menus: Sequence[Menu], bound: float) -> np.ndarray:
    """What a unit of each total is worth, (n,), positive: nearly the best of the Lagrangian dual.

    For any such numbers w, the price of a selection within the bound is at least
    Σ min(prices + losses @ w) − bound · Σ w.
    """
    n = menus[0].losses.shape[1]
    worth = np.full(n, sum(float(menu.prices.max()) for menu in menus) / (n * bound))
    best, found = -np.inf, worth
    for turn in range(ROUNDS):
        scores = [menu.prices + menu.losses @ worth for menu in menus]
        picks = [int(score.argmin()) for score in scores]
        value = sum(float(score[pick]) for score, pick in zip(scores, picks, strict=True)) - bound * worth.sum()
        if value > best:
            best, found = value, worth
        step = np.clip(loads(menus, picks) / bound - 1, -1, 1) / (1 + turn / 8)
        worth = worth * np.exp(step)
    # a total that never binds is worth nothing; but not so little that it is lost in rounding
    floored: np.ndarray = np.maximum(found, 1e-6 * found.max())
    return floored


def good(menus: Sequence[Menu], bound: float, worth: np.ndarray, start: Sequence[int]) -> list[int]:
    """A selection within the bound that no exchange of one or two choices improves.

    start: one that is within the bound, taken where the multipliers lead to none.
    """
    starts = [list(start)]
    for scale in (1.0, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0):
        picks = [int((menu.prices + menu.losses @ (scale * worth)).argmin()) for menu in menus]
        if bool((loads(menus, picks) <= bound).all()):
            starts.append(picks)
            break
    pairs = max(len(menus) * (len(menus) - 1) // 2, 1)
    most = max(8, min(SHORTLIST, int((PAIRS / pairs) ** 0.5)))
    shortlists = [Shortlist.of(menu, worth, most) for menu in menus]
    finished = [_improved(menus, bound, picks, shortlists) for picks in starts]
    return min(finished, key=lambda picks: (price(menus, picks), picks))


@dataclass(frozen=True, slots=True)
class Shortlist:
    """The choices of a menu that are worth most, (s,), and their weighted losses, (s,)."""

    choices: np.ndarray
    weighted: np.ndarray
    worth: np.ndarray

    @classmethod
    def of(cls, menu: Menu, worth: np.ndarray, most: int) -> "Shortlist":
        """At most so many."""
        weighted = menu.losses @ worth
        choices = np.argsort(menu.prices + weighted, kind="stable")[:most]
        return cls(choices, weighted[choices], worth)


def _improved(menus: Sequence[Menu], bound: float, picks: Sequence[int], shortlists: Sequence[Shortlist]) -> list[int]:
    """Exchanges of one choice, each time the one that gains most, then of two, until none of either gains."""
    picks = list(picks)
    _exchange_ones(menus, bound, picks)
    improved = True
    while improved:
        improved = False
        for first in range(len(menus)):
            for second in range(first + 1, len(menus)):
                found = _exchange(menus, bound, loads(menus, picks), picks, (first, second), shortlists)
                if found is not None:
                    picks[first], picks[second] = found
                    _exchange_ones(menus, bound, picks)
                    improved = True
    return picks


def _exchange_ones(menus: Sequence[Menu], bound: float, picks: list[int]) -> None:
    """Change `picks` until no single exchange gains."""
    while True:
        load = loads(menus, picks)
        best: tuple[float, int, int] | None = None
        for index, menu in enumerate(menus):
            pick = _cheapest_within(menu, bound - load + menu.losses[picks[index]], menu.prices[picks[index]])
            if pick is not None:
                gain = float(menu.prices[picks[index]] - menu.prices[pick])
                best = max(best or (0.0, 0, 0), (gain, index, pick), key=lambda move: move[0])
        if best is None:
            return
        picks[best[1]] = best[2]


def _cheapest_within(menu: Menu, room: np.ndarray, below: float) -> int | None:
    """The cheapest choice that costs less than `below` and adds no more than there is room for."""
    cheaper = np.flatnonzero(menu.prices < below)
    fits = cheaper[(menu.losses[cheaper] <= room).all(axis=1)]
    return int(fits[menu.prices[fits].argmin()]) if len(fits) else None


def _exchange(
    menus: Sequence[Menu],
    bound: float,
    load: np.ndarray,
    picks: Sequence[int],
    pair: tuple[int, int],
    shortlists: Sequence[Shortlist],
) -> tuple[int, int] | None:
    """The cheapest change of two choices at once, within their shortlists; None where none is cheaper than now."""
    one, two = (menus[index] for index in pair)
    rows, columns = (shortlists[index] for index in pair)
    now = float(one.prices[picks[pair[0]]] + two.prices[picks[pair[1]]])
    room = bound - load + one.losses[picks[pair[0]]] + two.losses[picks[pair[1]]]
    prices = one.prices[rows.choices][:, None] + two.prices[columns.choices][None]
    weighted = rows.weighted[:, None] + columns.weighted[None]
    # one sum instead of n: what is beyond it is beyond one of the n; rounding must not cut off what is just within
    near = (prices < now) & (weighted <= float(room @ rows.worth) * (1 + 1e-9))
    at = np.flatnonzero(near.ravel())
    at = at[np.argsort(prices.ravel()[at], kind="stable")]
    first, second = rows.choices[at // len(columns.choices)], columns.choices[at % len(columns.choices)]
    fits = np.flatnonzero((one.losses[first] + two.losses[second] <= room).all(axis=1))
    return (int(first[fits[0]]), int(second[fits[0]])) if len(fits) else None


@dataclass(frozen=True, slots=True)
class Stairs:
    """The least price for each weighted loss: losses ascending, prices descending."""

    losses: np.ndarray
    prices: np.ndarray

    @classmethod
    def of(cls, losses: np.ndarray, prices: np.ndarray) -> "Stairs":
        """Of a cloud of (loss, price): those that no other one beats in both."""
        order = np.lexsort((prices, losses))
        losses, prices = losses[order], prices[order]
        first = np.concatenate([[True], prices[1:] < np.minimum.accumulate(prices)[:-1]])
        return cls(losses[first], prices[first])

    def plus(self, other: "Stairs") -> "Stairs":
        """That of a selection from both."""
        return Stairs.of(
            (self.losses[:, None] + other.losses[None]).ravel(), (self.prices[:, None] + other.prices[None]).ravel()
        )

    def price(self, room: np.ndarray) -> np.ndarray:
        """The least price with a loss of at most `room`; infinite where there is none."""
        at = np.searchsorted(self.losses, room, side="right") - 1
        found: np.ndarray = np.where(at >= 0, self.prices[np.maximum(at, 0)], np.inf)
        return found


EMPTY = Stairs(np.zeros(1), np.zeros(1))


def promising(
    prices: Sequence[np.ndarray], losses: Sequence[np.ndarray], room: float, below: float
) -> list[np.ndarray]:
    """Of each menu, which choices may be part of a selection that costs less than `below`, (c,) of truth values.

    losses: a lower bound of each choice's weighted loss; room: the most that a whole selection may have of it.
    """
    stairs = [Stairs.of(one, cost) for one, cost in zip(losses, prices, strict=True)]
    found = []
    for index, (one, cost) in enumerate(zip(losses, prices, strict=True)):
        others = EMPTY
        for other in stairs[:index] + stairs[index + 1 :]:
            others = others.plus(other)
        found.append(cost + others.price(room - one) < below)
    return found


def cheapest(menus: Sequence[Menu], bound: float, worth: np.ndarray, below: float) -> list[int] | None:
    """The cheapest selection within the bound that costs less than `below`; None where there is none.

    Also None where the search would be too large (`MOST_PARTIAL`): then nothing is known.
    """
    order = sorted(range(len(menus)), key=lambda index: (len(menus[index].prices), index))
    weighted = [menus[index].losses @ worth for index in order]
    suffixes = [EMPTY]
    for index, losses in zip(reversed(order), reversed(weighted), strict=True):
        suffixes.insert(0, suffixes[0].plus(Stairs.of(losses, menus[index].prices)))
    # rounding must not cut off what is just within the bound
    room = bound * float(worth.sum()) * (1 + 1e-9)
    totals = np.zeros((1, menus[0].losses.shape[1]))
    spent, used, paths = np.zeros(1), np.zeros(1), np.zeros((1, 0), dtype=np.int64)
    for depth, index in enumerate(order):
        menu = menus[index]
        rows, columns = [], []
        for start in range(0, len(spent), 2000):
            chunk = slice(start, start + 2000)
            cost = spent[chunk, None] + menu.prices[None]
            left = room - used[chunk, None] - weighted[depth][None]
            row, column = np.nonzero(cost + suffixes[depth + 1].price(left) < below)
            fits = (totals[row + start] + menu.losses[column] <= bound).all(axis=1)
            rows.append(row[fits] + start)
            columns.append(column[fits])
            if sum(map(len, rows)) > MOST_PARTIAL:
                return None
        if not sum(map(len, rows)):
            return None
        row, column = np.concatenate(rows), np.concatenate(columns)
        totals = totals[row] + menu.losses[column]
        spent, used = spent[row] + menu.prices[column], used[row] + weighted[depth][column]
        paths = np.concatenate([paths[row], column[:, None]], axis=1)
    # ties go to the smaller worst total
    best = np.lexsort((totals.max(axis=1), spent))[0]
    picks = [0] * len(menus)
    for depth, index in enumerate(order):
        picks[index] = int(paths[best, depth])
    return picks
