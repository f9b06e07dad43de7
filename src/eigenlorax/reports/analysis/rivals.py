"""What else keeps every adapter of a collection within an error, and at how many bytes: each way as a careful engineer
would have it, tuned to that error.

Alone, adapter by adapter: cut by SVD, rounded to few bits, both. Together: one basis a side of each module, or one for
each cluster of adapters, with coefficients or full cores (`joint.full`), or diagonal cores between free factors
(`joint.diagonal`), in 16, 8 and 4 bits. A collection is its modules' stacks by name, which are gone through one after
the other. Bytes are those of tensors; an adapter whose update is zero costs nothing alone.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...codec import joint
from ...core.adapter import LoRAFactors
from ...core.linalg import dual_rows
from ...core.stack import Stack, roots, squares, stack
from .bytes import Number
from .clustered import clustered
from .losses import BLOCK, SCALE_BYTES, pair_bytes, rounded_rows

BITS = (16, 8, 6, 5, 4, 3, 2)
"""Of factors of one adapter alone."""
TOGETHER = ((8, 8), (4, 8), (4, 4), (16, 16))
"""Of shared bases, and of what each adapter has in them; the one that is most often best first."""
CLUSTERS = (1, 2, 4, 8)
ROUNDED, CUT, CUT_BY_ENERGY, BOTH = "rounded", "truncated", "truncated by energy", "truncated and rounded"
COEFFICIENTS, FULL, DIAGONAL = "shared basis", "joint, full cores", "joint, diagonal cores"
KINDS = (COEFFICIENTS, FULL, DIAGONAL)
MOST_DIAGONAL = 512
"""Components with diagonal cores that are tried at most: each of many rounds takes their cube."""
_MANY = 128
"""Adapters that stand for all where that tells enough."""
_STEP = 1.015
"""How much larger the next number of components that is tried is."""
_LABELS_K = 16
_HALVINGS = 40
_NEARLY = 0.998
"""Of the bytes that are allowed, a share that is as good as all."""
_CHUNK = 2**18
"""Numbers of adapters that are looked at together: more would not stay in a cache."""


@dataclass(frozen=True, slots=True)
class Point:
    """One way of storing a collection. worst, mean: delta errors of its adapters. settings: by what it was tuned."""

    stored_bytes: int
    worst: float
    mean: float
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tables:
    """Every adapter alone, cut and rounded: the same for all errors.

    lost: by bits, of each module ‖D − D'‖² of each adapter by how many directions are kept, (n, r + 1). costs: by bits,
    bytes of one direction in each module. ranks: of each module, (n,). total: ‖D‖² over all modules, (n,).
    """

    lost: Mapping[int, list[Float[Tensor, "n _"]]]
    costs: Mapping[int, list[int]]
    ranks: list[Tensor]
    total: Float[Tensor, " n"]


def tables(modules: Mapping[str, Stack], bits: Sequence[int] = BITS) -> Tables:
    """Singular directions of each adapter, of which each factor has the root of the singular value, in so many bits."""
    lost: dict[int, list[Tensor]] = {each: [] for each in bits}
    costs: dict[int, list[int]] = {each: [] for each in bits}
    ranks, totals = [], []
    for name in modules:
        one = modules[name]
        n_out, n_in = one.up.shape[2], one.down.shape[2]
        step = max(1, _CHUNK // max(1, one.down.shape[1] * (n_in + n_out)))
        parts = [one.of(range(start, min(start + step, len(one)))) for start in range(0, len(one), step)]
        found = [_by_rank(part, bits) for part in parts]
        totals.append(torch.cat([total for total, _, _ in found]))
        ranks.append(torch.cat([rank for _, rank, _ in found]))
        for each in bits:
            lost[each].append(torch.cat([table[each] for _, _, table in found]))
            costs[each].append(pair_bytes(n_out, n_in, each))
    return Tables(lost, costs, ranks, torch.stack(totals).sum(0))


def balanced(one: Stack) -> Stack:
    """The same updates by their singular directions, largest first, the roots of singular values on either side: what
    rounding should see, and what is cut where a row is left out."""
    down, up, sigma = joint.singular(one)
    root = sigma.sqrt()[:, :, None]
    return Stack(root * down, root * up, one.scaling, one.ranks)


def _by_rank(one: Stack, bits: Sequence[int]) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Of each adapter ‖D‖², its rank, and, by bits, ‖D − D'‖² with its first 0, 1, … directions."""
    own, total, found = balanced(one), squares(one), {}
    for each in bits:
        down, up = rounded_rows(own.down, each), rounded_rows(own.up, each)
        alike = ((one.down @ down.mT) * (one.up @ up.mT)).sum(1)
        # of the first s directions with one another
        among = ((down @ down.mT) * (up @ up.mT)).cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2)
        lost = total[:, None] - 2 * alike.cumsum(1) + among
        found[each] = torch.cat([total[:, None], lost.clamp_min(0)], dim=1)
    return total, (own.down.abs().amax(2) > 0).sum(1), found


def alone(found: Tables, error: float) -> dict[str, Point | None]:
    """The ways that keep each adapter by itself; None where all of it is not enough.

    Each adapter is tuned to the error on its own: its bits, and its rank, or its rank in each module.
    """
    by_bits = {bits: _cheapest(found, bits, error) for bits in found.lost}
    return {
        ROUNDED: _of_all([_fixed(found, bits, error) for bits in found.lost], found.total),
        CUT: _of_all([_uniform(found, 16, error)], found.total),
        CUT_BY_ENERGY: _of_all([by_bits[16]], found.total),
        BOTH: _of_all(list(by_bits.values()), found.total),
    }


Choice = tuple[Float[Tensor, " n"], Float[Tensor, " n"]]
"""Bytes of each adapter, inf where the error is out of reach, and what is lost of it."""


def _bound(found: Tables, error: float) -> Tensor:
    # a hair above, for a total that rounding leaves of nothing
    return error**2 * found.total * (1 + 1e-12)


def _costs(found: Tables, bits: int) -> Tensor:
    """Bytes by how many directions all modules keep, as far as an adapter has so many, (n, r + 1)."""
    steps = torch.arange(max(table.shape[1] for table in found.lost[bits]))
    each = [
        torch.minimum(steps, rank[:, None]) * cost for rank, cost in zip(found.ranks, found.costs[bits], strict=True)
    ]
    return torch.stack(each).sum(0).to(torch.float64)


def _fixed(found: Tables, bits: int, error: float) -> Choice:
    """All directions."""
    lost = torch.stack([table[:, -1] for table in found.lost[bits]]).sum(0)
    cost = _costs(found, bits)[:, -1]
    return cost.masked_fill(lost > _bound(found, error), math.inf), lost


def _uniform(found: Tables, bits: int, error: float) -> Choice:
    """One rank for all modules of an adapter."""
    most = max(table.shape[1] for table in found.lost[bits])
    lost = torch.stack([torch.cat([t, t[:, -1:].expand(-1, most - t.shape[1])], dim=1) for t in found.lost[bits]]).sum(
        0
    )
    costs = _costs(found, bits).masked_fill(lost > _bound(found, error)[:, None], math.inf)
    cost, rank = costs.min(1)
    return cost, lost.gather(1, rank[:, None])[:, 0]


def _cheapest(found: Tables, bits: int, error: float) -> Choice:
    """A rank for each module of each adapter: directions that win most for a byte first; the last of them is the
    cheapest that is enough."""
    cost, lost, _ = _directions(found, bits, error)
    return cost, lost


def _directions(found: Tables, bits: int, error: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and which directions are kept, (n, d): of all modules in their order, the largest of each first."""
    gains, costs, priorities, firsts = [], [], [], []
    for table, one in zip(found.lost[bits], found.costs[bits], strict=True):
        own = table[:, :-1] - table[:, 1:]
        gains.append(own)
        costs.append(torch.full((own.shape[1],), float(one), dtype=torch.float64))
        # no direction goes before a larger one of its module
        priorities.append(own.cummin(1)[0] / one)
        firsts.append(torch.arange(own.shape[1]) == 0)
    gain, cost, first = torch.cat(gains, dim=1), torch.cat(costs), torch.cat(firsts)
    order = torch.cat(priorities, dim=1).argsort(dim=1, descending=True, stable=True)
    left = found.total[:, None] - gain.gather(1, order).cumsum(1)
    bound = _bound(found, error)
    enough = left <= bound[:, None]
    last = torch.where(enough.any(1), enough.int().argmax(1), gain.shape[1])[:, None]
    before = torch.where(last > 0, left.gather(1, (last - 1).clamp(0)), found.total[:, None])
    # in place of the last one, any that is enough and whose larger ones are there
    place = order.argsort(dim=1)
    larger = torch.where(first, -1, place.roll(1, dims=1))
    fits = (place >= last) & (larger < last) & (before - gain <= bound[:, None])
    swap, at = cost.masked_fill(~fits, math.inf).min(1)
    spent = (cost * (place < last)).sum(1) + swap
    lost = (before - gain.gather(1, at[:, None]))[:, 0]
    nothing = found.total <= bound
    kept = ((place < last) | (torch.arange(len(cost)) == at[:, None])) & ~nothing[:, None]
    return torch.where(nothing, 0.0, spent), torch.where(nothing, found.total, lost), kept


@dataclass(frozen=True, slots=True)
class Cut:
    """Every adapter alone, cut and rounded: what comes of it, and how. bits: of each adapter, (n,). ranks: the
    directions that each module keeps of each adapter, (modules, n)."""

    point: Point
    bits: Tensor
    ranks: Tensor


def within(found: Tables, limit: Number) -> Cut:
    """The least error that every adapter can have if it is cut and rounded alone, in so many bytes of all together.

    Any number of bytes is enough: with none, all is lost. By halves over errors, until nearly all bytes are used.
    """
    low, high, best = 0.0, 1.0, _cut(found, 1.0)
    assert best is not None
    for _ in range(_HALVINGS):
        if best.point.stored_bytes >= _NEARLY * limit:
            break
        middle = (low + high) / 2
        tried = _cut(found, middle)
        if tried is not None and tried.point.stored_bytes <= limit:
            high, best = middle, tried
        else:
            low = middle
    return best


def _cut(found: Tables, error: float) -> Cut | None:
    """`BOTH`, with what was chosen; None where all of it is not enough."""
    several = [_directions(found, bits, error) for bits in found.lost]
    point = _of_all([(cost, lost) for cost, lost, _ in several], found.total)
    if point is None:
        return None
    chosen = torch.stack([cost for cost, _, _ in several]).argmin(0)
    kept = torch.stack([mask for _, _, mask in several])[chosen, torch.arange(len(chosen))]
    widths = [table.shape[1] - 1 for table in next(iter(found.lost.values()))]
    ranks = torch.stack([part.sum(1) for part in torch.split(kept, widths, dim=1)])
    return Cut(point, torch.tensor(list(found.lost))[chosen], ranks)


def cut(factors: LoRAFactors, rank: int, bits: int) -> LoRAFactors:
    """The leading directions of an update, its factors in so many bits, as a LoRA of the rank and scaling it had: rows
    of zeros fill it up. In float32, which holds what was rounded."""
    if factors.scaling == 0:
        return factors
    one = balanced(stack([factors], factors.down.shape[1], factors.up.shape[0]))
    down, up = (rounded_rows(rows, bits)[0] for rows in (one.down, one.up))
    down[rank:], up[rank:] = 0, 0
    return replace(factors, down=down.float(), up=(up / factors.scaling).mT.float().contiguous())


def _of_all(choices: Sequence[Choice], total: Tensor) -> Point | None:
    """Each adapter by its cheapest choice."""
    costs, lost = (torch.stack(each) for each in zip(*choices, strict=True))
    cost, chosen = costs.min(0)
    cost = torch.where(total > 0, cost, 0.0)
    if torch.isinf(cost).any():
        return None
    return _point(int(cost.sum()), lost.gather(0, chosen[None])[0], total, {})


def _point(stored_bytes: int, lost: Tensor, total: Tensor, settings: Mapping[str, Any]) -> Point:
    trained = total > 0
    errors = (lost[trained].clamp_min(0) / total[trained]).sqrt()
    worst, mean = (float(errors.max()), float(errors.mean())) if len(errors) else (0.0, 0.0)
    return Point(stored_bytes, worst, mean, settings)


class Together:
    """A collection in shared bases: what is known of it, and the ways that were tried, each once.

    groups: the adapters of each cluster. bits: of bases, and of what each adapter has in them, that are tried. rounds:
    of alternation at most, for full cores and for diagonal ones.
    """

    def __init__(
        self,
        modules: Mapping[str, Stack],
        groups: Sequence[Sequence[int]],
        bits: Sequence[tuple[int, int]] = TOGETHER,
        rounds: tuple[int, int] = (4, 60),
    ) -> None:
        self.modules = modules
        self.bits = bits
        self.rounds = rounds
        self.groups = [list(group) for group in groups]
        self.shapes: dict[str, tuple[int, int]] = {}
        self.ranks: dict[str, list[int]] = {}
        self.total, self.weights = norms(modules)
        tails: list[Tensor] = []
        for name in modules:
            one = modules[name]
            self.shapes[name] = one.up.shape[2], one.down.shape[2]
            self.ranks[name] = list(one.ranks)
            tails += [_tails(one.of(group), self.weights[group]) for group in self.groups]
        wide = torch.zeros(2, max((tail.shape[1] for tail in tails), default=1), dtype=torch.float64)
        for tail in tails:
            wide[:, : tail.shape[1]] += tail
        self._floor = (wide.amax(0) / (self.total > 0).sum().clamp_min(1)).sqrt()
        self._bases: dict[int, dict[tuple[str, int], joint.Rows]] = {}
        self._tried: dict[tuple[str, int], dict[tuple[int, int], Point]] = {}
        self._some: dict[int, float] = {}

    def floor(self, k: int) -> float:
        """What the worst adapter loses at least, whatever factors of k rows are shared (Eckart and Young)."""
        return float(self._floor[k]) if k < len(self._floor) else 0.0

    def most(self, kind: str) -> int:
        """The most components that a module can have."""
        sums = {name: max(sum(ranks[i] for i in group) for group in self.groups) for name, ranks in self.ranks.items()}
        if kind == DIAGONAL:
            return min(max(sums.values()), MOST_DIAGONAL)
        return max(min(sums[name], max(shape)) for name, shape in self.shapes.items())

    def stored_bytes(self, kind: str, k: int, bits: tuple[int, int]) -> int:
        """Bytes of bases and of what all adapters have in them, with k components at most."""
        found = 0
        for name, (n_out, n_in) in self.shapes.items():
            ranks = self.ranks[name]
            for group in self.groups:
                there = [ranks[i] for i in group if ranks[i]]
                some = sum(there)
                down, up = (min(k, some) if kind == DIAGONAL else min(k, some, d) for d in (n_in, n_out))
                found += _rows_bytes(down, n_in, bits[0]) + _rows_bytes(up, n_out, bits[0])
                found += sum(_own_bytes(kind, min(rank, down, up), down, up, bits[1]) for rank in there)
        return found

    def tried(self, kind: str, k: int) -> Mapping[tuple[int, int], Point]:
        """Of so many components, by bits of bases and of the rest."""
        if (kind, k) not in self._tried:
            lost = {bits: torch.zeros_like(self.total) for bits in self.bits}
            for name in self.modules:
                one = self.modules[name]
                for place, group in enumerate(self.groups):
                    part = one.of(group)
                    if not any(part.ranks):
                        continue
                    rows = self._rows(kind, k, name, place, part)
                    for bits, value in _LOSSES[kind](part, rows, self.bits):
                        lost[bits][group] += value
            self._tried[kind, k] = {
                bits: _point(
                    self.stored_bytes(kind, k, bits),
                    lost[bits],
                    self.total,
                    {"k": k, "bits": list(bits), "clusters": len(self.groups)},
                )
                for bits in self.bits
            }
        return self._tried[kind, k]

    def _rows(self, kind: str, k: int, name: str, place: int, part: Stack) -> joint.Rows:
        weights = self.weights[self.groups[place]]
        if kind == DIAGONAL:
            found = joint.diagonal(part, weights, k, rounds=self.rounds[1], tolerance=1e-4)
            return found.down, found.up
        known = self._bases.setdefault(k, {})
        if (name, place) not in known:
            known[name, place] = joint.bases(part, weights, k, rounds=self.rounds[0], tolerance=1e-3)
        return known[name, place]

    def least(self, kind: str, bits: tuple[int, int], error: float, limit: Number) -> Point | None:
        """The fewest bytes within the error; None if none of `limit` bytes at most is known.

        By halves over numbers of components, on a grid of them where they are many.
        """
        grid = [k for k in _grid(self.most(kind)) if self.stored_bytes(kind, k, bits) <= limit]
        grid = [k for k in grid if k > self._too_few(error)]
        if not grid or not self._holds(kind, grid[-1], bits, error):
            return None
        low, high = -1, len(grid) - 1
        while high - low > 1:
            middle = (low + high) // 2
            if self._holds(kind, grid[middle], bits, error):
                high = middle
            else:
                low = middle
        return self.tried(kind, grid[high])[bits]

    def _holds(self, kind: str, k: int, bits: tuple[int, int], error: float) -> bool:
        if kind == DIAGONAL and len(self.total) > _MANY and self._lost_by_some(k) > error:
            return False
        return self.tried(kind, k)[bits].worst <= error

    def _lost_by_some(self, k: int) -> float:
        """√ of the mean square error of some of the adapters, with diagonal cores between factors of their own: what
        the worst of all loses at least, in the factors of all."""
        if k not in self._some:
            lost = 0.0
            groups = [group[:: -(-len(self.total) // _MANY)] for group in self.groups]
            for name in self.modules:
                one = self.modules[name]
                for group in groups:
                    part, weights = one.of(group), self.weights[group]
                    if any(part.ranks):
                        found = joint.diagonal(part, weights, k, rounds=self.rounds[1], tolerance=1e-4)
                        lost += float((weights.square() * found.lost).sum())
            trained = sum(int((self.total[group] > 0).sum()) for group in groups)
            self._some[k] = math.sqrt(lost / max(trained, 1))
        return self._some[k]

    def _too_few(self, error: float) -> int:
        """Components with which the error is out of reach: what no factors can, and what full cores did not."""
        floor = int((self._floor > error).sum()) - 1
        return max(
            [floor]
            + [
                k
                for (kind, k), by in self._tried.items()
                if kind != DIAGONAL and min(point.worst for point in by.values()) > error
            ]
        )


def norms(modules: Mapping[str, Stack]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """‖D‖² over all modules, and 1 / ‖D‖, 0 for an update of zero."""
    total = torch.stack([squares(modules[name]) for name in modules]).sum(0)
    return total, torch.where(total > 0, total, torch.inf).rsqrt()


def _tails(one: Stack, weights: Tensor) -> Float[Tensor, "2 k"]:
    """Squared norm that the leading 0, 1, … directions of one side leave out, of down and of up."""
    found = []
    for rows, other in ((one.down, one.up), (one.up, one.down)):
        flat = (weights[:, None, None] * roots(other) @ rows).flatten(0, 1)
        small = flat @ flat.mT if flat.shape[0] <= flat.shape[1] else flat.mT @ flat
        found.append(torch.linalg.eigvalsh(small).clamp_min(0).cumsum(0).flip(0))
    length = max(len(tail) for tail in found) + 1
    return torch.stack([torch.nn.functional.pad(tail, (0, length - len(tail))) for tail in found])


def _grid(most: int) -> list[int]:
    found = [1]
    while found[-1] < most:
        found.append(min(max(found[-1] + 1, int(found[-1] * _STEP)), most))
    return found


def _rows_bytes(rows: int, width: int, bits: int) -> int:
    scales = 0 if bits == 16 else SCALE_BYTES * rows * -(-width // BLOCK)
    return (bits * rows * width + 7) // 8 + scales


def _own_bytes(kind: str, rank: int, down: int, up: int, bits: int) -> int:
    """Of one adapter in a module."""
    if kind == COEFFICIENTS:
        return sum(_rows_bytes(rank, k, bits) if k >= BLOCK else _rows_bytes(1, rank * k, bits) for k in (down, up))
    return _rows_bytes(1, down if kind == DIAGONAL else down * up, bits)


Losses = Iterator[tuple[tuple[int, int], Float[Tensor, " n"]]]
"""‖D − D'‖² of each adapter, by bits."""


def _rounded_rows(
    rows: joint.Rows, tried: Sequence[tuple[int, int]]
) -> Iterator[tuple[list[tuple[int, int]], Tensor, Tensor]]:
    """Bases rounded to each number of bits, and what is to be tried with them."""
    for first in dict.fromkeys(bits for bits, _ in tried):
        down, up = (rounded_rows(each[None], first)[0] for each in rows)
        yield [bits for bits in tried if bits[0] == first], down, up


def _inside(one: Stack, down: Tensor, up: Tensor) -> Stack:
    """Coordinates by least squares, for rows that rounding leaves a little off orthonormal."""
    return Stack(one.down @ dual_rows(down).mT, one.up @ dual_rows(up).mT, one.scaling, one.ranks)


def _of_coefficients(one: Stack, rows: joint.Rows, tried: Sequence[tuple[int, int]]) -> Losses:
    total = squares(one)
    for several, down, up in _rounded_rows(rows, tried):
        own = balanced(_inside(one, down, up))
        in_down, in_up, down_gram, up_gram = one.down @ down.mT, one.up @ up.mT, down @ down.mT, up @ up.mT
        for bits in several:
            a, b = (_rounded_own(each, bits[1]) for each in (own.down, own.up))
            cross = ((in_down @ a.mT).mT @ (in_up @ b.mT)).diagonal(dim1=1, dim2=2).sum(1)
            norm = ((a @ down_gram @ a.mT) * (b @ up_gram @ b.mT)).sum((1, 2))
            yield bits, total - 2 * cross + norm


def _of_full_cores(one: Stack, rows: joint.Rows, tried: Sequence[tuple[int, int]]) -> Losses:
    total = squares(one)
    for several, down, up in _rounded_rows(rows, tried):
        inside = _inside(one, down, up)
        cores, seen = inside.up.mT @ inside.down, (one.up @ up.mT).mT @ (one.down @ down.mT)
        for bits in several:
            rounded = _flat(cores, bits[1])
            norm = ((rounded @ (down @ down.mT)) * ((up @ up.mT) @ rounded)).sum((1, 2))
            yield bits, total - 2 * (seen * rounded).sum((1, 2)) + norm


def _of_diagonal_cores(one: Stack, rows: joint.Rows, tried: Sequence[tuple[int, int]]) -> Losses:
    total = squares(one)
    for several, down, up in _rounded_rows(rows, tried):
        cores = joint.in_diagonal(one, (down, up)).cores
        seen = ((one.down @ down.mT) * (one.up @ up.mT)).sum(1)
        among = (down @ down.mT) * (up @ up.mT)
        for bits in several:
            rounded = _flat(cores[:, None], bits[1])[:, 0]
            yield bits, total - 2 * (rounded * seen).sum(1) + ((rounded @ among) * rounded).sum(1)


_LOSSES: Mapping[str, Callable[[Stack, joint.Rows, Sequence[tuple[int, int]]], Losses]] = {
    COEFFICIENTS: _of_coefficients,
    FULL: _of_full_cores,
    DIAGONAL: _of_diagonal_cores,
}


def _rounded_own(rows: Float[Tensor, "n r k"], bits: int) -> Float[Tensor, "n r k"]:
    """An adapter's coefficients, row by row, or, where those are short, all of them in one."""
    return rounded_rows(rows, bits) if rows.shape[2] >= BLOCK else _flat(rows, bits)


def _flat(matrices: Float[Tensor, "n j k"], bits: int) -> Float[Tensor, "n j k"]:
    """Rounded as one row each."""
    return rounded_rows(matrices.flatten(1)[:, None], bits)[:, 0].reshape(matrices.shape)


def least(
    modules: Mapping[str, Stack],
    errors: Sequence[float],
    *,
    clusters: Sequence[int] = CLUSTERS,
    kinds: Sequence[str] = KINDS,
    together: Sequence[tuple[int, int]] = TOGETHER,
    beyond: float = 1.0,
) -> dict[str, list[Point | None]]:
    """Of every way, the fewest bytes with which no adapter loses more, for each of several errors.

    together: bits of what is shared, and of what each adapter has in it. What is shared is looked for up to `beyond`
    times the fewest bytes that are known for the error already; None where it takes more, or where the error is out of
    reach.
    """
    errors = [float(error) for error in errors]
    one_by_one = tables(modules)
    found: dict[str, list[Point | None]] = {name: [] for name in (ROUNDED, CUT, CUT_BY_ENERGY, BOTH)}
    for error in errors:
        for name, point in alone(one_by_one, error).items():
            found[name].append(point)
    for count in clusters:
        groups = grouped(modules, count)
        # fewer that are worth it were there before
        if len(groups) < count:
            continue
        shared = Together(modules, groups)
        for kind in kinds:
            name = kind if count == 1 else f"{kind}, {count} clusters"
            found[name] = [None] * len(errors)
            # large errors first: what fails there fails for smaller ones
            for place in sorted(range(len(errors)), key=lambda at: -errors[at]):
                for bits in together:
                    best = fewest(found, place)
                    limit = beyond * best.stored_bytes if best is not None else math.inf
                    own = found[name][place]
                    point = shared.least(kind, bits, errors[place], own.stored_bytes if own is not None else limit)
                    found[name][place] = point or own
    return found


def grouped(modules: Mapping[str, Stack], count: int) -> list[list[int]]:
    """The adapters in so many clusters at most, by what bases of a few components each keep of them."""
    total, weights = norms(modules)
    if count == 1:
        return [list(range(len(total)))]
    if len(total) < 2 * count:
        return []
    found = clustered(modules, weights, _LABELS_K, count, rounds=8, tolerance=1e-2)
    return [list(members) for members in found.members]


def fewest(found: Mapping[str, Sequence[Point | None]], place: int) -> Point | None:
    """The cheapest of all ways for one of the errors."""
    there = [point for points in found.values() if (point := points[place]) is not None]
    return min(there, key=lambda point: point.stored_bytes, default=None)
