"""Baselines that keep every adapter of a collection within an error, each tuned to it, and the bytes they take.

Each adapter by itself (`eigenlorax.reports.analysis.per_adapter`): truncated by SVD, rounded to few bits, both. Shared:
one basis per module and side, or one for each cluster of adapters, with coefficients or full cores (`joint.full`), or
diagonal cores between free factors (`joint.diagonal`), in 16, 8 and 4 bits. A collection is a mapping from module names
to stacks, which are read one after the other.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import joint
import torch
from adapter_clusters import clustered
from jaxtyping import Float
from torch import Tensor

from eigenlorax.core.batch import ModuleBatch, delta_squares
from eigenlorax.reports.analysis import per_adapter
from eigenlorax.reports.analysis.bytes import Number
from eigenlorax.reports.analysis.per_adapter import BOTH, CUT, CUT_BY_ENERGY, ROUNDED, Point
from eigenlorax.reports.analysis.shared_basis import (
    SHARED_BASIS,
    Bits,
    coefficient_bytes,
    coefficient_losses,
    coordinates,
    norms,
    rounded_as_one_row,
    rounded_bases,
    rows_bytes,
    squared_tails,
)

COMBINATIONS: tuple[Bits, ...] = ((8, 8), (4, 8), (4, 4), (16, 16))
"""Bits of shared bases, and of each adapter's numbers; the combination that is most often best comes first."""
CLUSTERS = (1, 2, 4, 8)
FULL, DIAGONAL = "joint, full cores", "joint, diagonal cores"
KINDS = (SHARED_BASIS, FULL, DIAGONAL)
MOST_DIAGONAL = 512
"""Maximum number of components with diagonal cores: each of many rounds takes their cube."""
_SAMPLE = 128
"""Adapters from which a lower bound on the error of all is computed."""
_GRID_RATIO = 1.015
"""Ratio between the numbers of components that are tried."""
_CLUSTERING_K = 16


class SharedFactors:
    """A collection in shared factors, by kind and number of components; each combination is measured once.

    groups: the adapters of each cluster. bits: combinations to measure. rounds: maximum rounds of alternation, for full
    cores and for diagonal ones.
    """

    def __init__(
        self,
        modules: Mapping[str, ModuleBatch],
        groups: Sequence[Sequence[int]],
        bits: Sequence[Bits] = COMBINATIONS,
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
            module = modules[name]
            self.shapes[name] = module.up.shape[2], module.down.shape[2]
            self.ranks[name] = list(module.ranks)
            tails += [squared_tails(module.select(group), self.weights[group]) for group in self.groups]
        tail = torch.zeros(2, max((tail.shape[1] for tail in tails), default=1), dtype=torch.float64)
        for module_tail in tails:
            tail[:, : module_tail.shape[1]] += module_tail
        self._lower_bounds = (tail.amax(0) / (self.total > 0).sum().clamp_min(1)).sqrt()
        self._bases: dict[int, dict[tuple[str, int], joint.Rows]] = {}
        self._measured: dict[tuple[str, int], dict[Bits, Point]] = {}
        self._sample_errors: dict[int, float] = {}

    def lower_bound(self, k: int) -> float:
        """Return an error that the worst adapter exceeds with any shared factors of k rows (Eckart–Young)."""
        return float(self._lower_bounds[k]) if k < len(self._lower_bounds) else 0.0

    def max_components(self, kind: str) -> int:
        """Return the number of components beyond which no module gains any."""
        sums = {name: max(sum(ranks[i] for i in group) for group in self.groups) for name, ranks in self.ranks.items()}
        if kind == DIAGONAL:
            return min(max(sums.values()), MOST_DIAGONAL)
        return max(min(sums[name], max(shape)) for name, shape in self.shapes.items())

    def stored_bytes(self, kind: str, k: int, bits: Bits) -> int:
        """Return the bytes of the factors with at most k components and of each adapter's numbers."""
        total = 0
        for name, (n_out, n_in) in self.shapes.items():
            for group in self.groups:
                ranks = [self.ranks[name][i] for i in group if self.ranks[name][i]]
                most = sum(ranks)
                down, up = (min(k, most) if kind == DIAGONAL else min(k, most, width) for width in (n_in, n_out))
                total += rows_bytes(down, n_in, bits[0]) + rows_bytes(up, n_out, bits[0])
                total += sum(_adapter_bytes(kind, min(rank, down, up), (down, up), bits[1]) for rank in ranks)
        return total

    def measure(self, kind: str, k: int) -> Mapping[Bits, Point]:
        """Return size and errors with k components, by bits."""
        if (kind, k) not in self._measured:
            lost = {bits: torch.zeros_like(self.total) for bits in self.bits}
            for name in self.modules:
                module = self.modules[name]
                for cluster, group in enumerate(self.groups):
                    members = module.select(group)
                    if not any(members.ranks):
                        continue
                    rows = self._rows(kind, k, (name, cluster), members)
                    for bits, squared_error in _LOSSES[kind](members, rows, self.bits):
                        lost[bits][group] += squared_error
            settings = {"k": k, "clusters": len(self.groups)}
            self._measured[kind, k] = {
                bits: Point.of(
                    self.stored_bytes(kind, k, bits), lost[bits], self.total, {**settings, "bits": list(bits)}
                )
                for bits in self.bits
            }
        return self._measured[kind, k]

    def _rows(self, kind: str, k: int, key: tuple[str, int], members: ModuleBatch) -> joint.Rows:
        weights = self.weights[self.groups[key[1]]]
        if kind == DIAGONAL:
            fitted = joint.diagonal(members, weights, k, rounds=self.rounds[1], tolerance=1e-4)
            return fitted.down, fitted.up
        # full cores and coefficients share their bases
        bases = self._bases.setdefault(k, {})
        if key not in bases:
            bases[key] = joint.bases(members, weights, k, rounds=self.rounds[0], tolerance=1e-3)
        return bases[key]

    def least(self, kind: str, bits: Bits, error: float, limit: Number) -> Point | None:
        """Return the fewest bytes within the error; None if `limit` bytes are not enough.

        Bisection over the numbers of components, on a grid where there are many.
        """
        grid = [k for k in _grid(self.max_components(kind)) if self.stored_bytes(kind, k, bits) <= limit]
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
        return self.measure(kind, grid[high])[bits]

    def _holds(self, kind: str, k: int, bits: Bits, error: float) -> bool:
        if kind == DIAGONAL and len(self.total) > _SAMPLE and self._sample_error(k) > error:
            return False
        return self.measure(kind, k)[bits].worst <= error

    def _sample_error(self, k: int) -> float:
        """Return the root mean square error of a sample of adapters, with diagonal cores between their own factors.

        In the factors of all adapters, the worst adapter loses at least as much.
        """
        if k not in self._sample_errors:
            lost = 0.0
            groups = [group[:: -(-len(self.total) // _SAMPLE)] for group in self.groups]
            for name in self.modules:
                module = self.modules[name]
                for group in groups:
                    members, weights = module.select(group), self.weights[group]
                    if any(members.ranks):
                        fitted = joint.diagonal(members, weights, k, rounds=self.rounds[1], tolerance=1e-4)
                        lost += float((weights.square() * fitted.lost).sum())
            trained = sum(int((self.total[group] > 0).sum()) for group in groups)
            self._sample_errors[k] = math.sqrt(lost / max(trained, 1))
        return self._sample_errors[k]

    def _too_few(self, error: float) -> int:
        """Return the largest k with which no factors, or no full cores that were measured, reach the error."""
        failed = [
            k
            for (kind, k), points in self._measured.items()
            if kind != DIAGONAL and min(point.worst for point in points.values()) > error
        ]
        return max([int((self._lower_bounds > error).sum()) - 1, *failed])


def _grid(most: int) -> list[int]:
    grid = [1]
    while grid[-1] < most:
        grid.append(min(max(grid[-1] + 1, int(grid[-1] * _GRID_RATIO)), most))
    return grid


def _adapter_bytes(kind: str, rank: int, k: tuple[int, int], bits: int) -> int:
    """Return the bytes of one adapter's numbers in a module; k: components (down, up)."""
    if kind == SHARED_BASIS:
        return coefficient_bytes(rank, *k, bits)
    return rows_bytes(1, k[0] if kind == DIAGONAL else k[0] * k[1], bits)


Losses = Iterator[tuple[Bits, Float[Tensor, " n"]]]
"""‖D − D'‖² of each adapter, by bits."""


def _full_core_losses(module: ModuleBatch, rows: joint.Rows, bits: Sequence[Bits]) -> Losses:
    total = delta_squares(module)
    for combinations, down, up in rounded_bases(rows, bits):
        inside = coordinates(module, down, up)
        cores, seen = inside.up.mT @ inside.down, (module.up @ up.mT).mT @ (module.down @ down.mT)
        for combination in combinations:
            rounded = rounded_as_one_row(cores, combination[1])
            norm = ((rounded @ (down @ down.mT)) * ((up @ up.mT) @ rounded)).sum((1, 2))
            yield combination, total - 2 * (seen * rounded).sum((1, 2)) + norm


def _diagonal_core_losses(module: ModuleBatch, rows: joint.Rows, bits: Sequence[Bits]) -> Losses:
    total = delta_squares(module)
    for combinations, down, up in rounded_bases(rows, bits):
        cores = joint.in_diagonal(module, (down, up)).cores
        seen = ((module.down @ down.mT) * (module.up @ up.mT)).sum(1)
        products = (down @ down.mT) * (up @ up.mT)
        for combination in combinations:
            rounded = rounded_as_one_row(cores[:, None], combination[1])[:, 0]
            yield combination, total - 2 * (rounded * seen).sum(1) + ((rounded @ products) * rounded).sum(1)


_LOSSES: Mapping[str, Callable[[ModuleBatch, joint.Rows, Sequence[Bits]], Losses]] = {
    SHARED_BASIS: coefficient_losses,
    FULL: _full_core_losses,
    DIAGONAL: _diagonal_core_losses,
}


def least(
    modules: Mapping[str, ModuleBatch],
    errors: Sequence[float],
    *,
    clusters: Sequence[int] = CLUSTERS,
    kinds: Sequence[str] = KINDS,
    combinations: Sequence[Bits] = COMBINATIONS,
    beyond: float = 1.0,
) -> dict[str, list[Point | None]]:
    """Return for each baseline the fewest bytes at which no adapter exceeds the error, for each of several errors.

    Shared factors are searched up to `beyond` times the fewest bytes that are already known for the error. None where
    they take more, or where the error is out of reach.
    """
    errors = [float(error) for error in errors]
    tables = per_adapter.tables(modules)
    points: dict[str, list[Point | None]] = {name: [] for name in (ROUNDED, CUT, CUT_BY_ENERGY, BOTH)}
    for error in errors:
        for name, point in per_adapter.at_error(tables, error).items():
            points[name].append(point)
    for count in clusters:
        groups = grouped(modules, count)
        # a smaller number of clusters was measured before
        if len(groups) < count:
            continue
        shared = SharedFactors(modules, groups)
        for kind in kinds:
            name = kind if count == 1 else f"{kind}, {count} clusters"
            points[name] = [None] * len(errors)
            # large errors first: a size that fails there fails for smaller errors too
            for index in sorted(range(len(errors)), key=lambda at: -errors[at]):
                for bits in combinations:
                    best = fewest(points, index)
                    limit = beyond * best.stored_bytes if best is not None else math.inf
                    known = points[name][index]
                    point = shared.least(kind, bits, errors[index], known.stored_bytes if known is not None else limit)
                    points[name][index] = point or known
    return points


def grouped(modules: Mapping[str, ModuleBatch], count: int) -> list[list[int]]:
    """Divide the adapters into at most `count` clusters, by what bases of a few components keep of each."""
    total, weights = norms(modules)
    if count == 1:
        return [list(range(len(total)))]
    if len(total) < 2 * count:
        return []
    clusters = clustered(modules, weights, _CLUSTERING_K, count, rounds=8, tolerance=1e-2)
    return [list(members) for members in clusters.members]


def fewest(points: Mapping[str, Sequence[Point | None]], index: int) -> Point | None:
    """Return the smallest of all baselines for one of the errors."""
    reached = [point for by_error in points.values() if (point := by_error[index]) is not None]
    return min(reached, key=lambda point: point.stored_bytes, default=None)
