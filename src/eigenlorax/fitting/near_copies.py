"""Adapters that differ by less than the error bound of a pack: it need not tell them apart, which a note says.

Distances of updates are estimated from a random projection of each, without an out × in matrix.
"""

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.adapter import LoRAFactors
from .collection import Collection

PROJECTIONS = 256
"""Numbers per adapter, with which a distance is estimated to about 6 %."""
ROUNDING = 1e-4
"""Relative distance up to which two updates are equal but for the rounding of their factors."""
BLOCK, NEIGHBOURS = 1024, 8192
"""Number of adapters that are compared at once, and with how many of similar norm on either side, at most."""


@dataclass(frozen=True, slots=True)
class _Nearest:
    """The nearest other adapter of each adapter.

    Attributes:
        distances: Norm of the difference over the larger of both norms, (n,).
        indices: Index of the nearest adapter, (n,).
    """

    distances: Tensor
    indices: Tensor


def near_copies_note(collection: Collection, bound: float) -> str | None:
    """Return a note on adapters that differ from another one by less than an error bound; None if there are none.

    Args:
        collection: Adapters without copies of others, which have a warning of their own.
        bound: Error bound of the pack; for a fit to a size, its largest error.
    """
    names = list(collection.weights)
    if len(names) < 2:
        return None
    norms = torch.tensor([1 / weight for weight in collection.weights.values()], dtype=torch.float64)
    # norms of modules differ by less than the updates do, and are known without reading a tensor
    candidates = (_nearest(_module_norms(collection), norms).distances < bound).nonzero().flatten()
    if not len(candidates):
        return None
    nearest = _nearest(_project(collection, [names[index] for index in candidates]), norms[candidates])
    near = ((nearest.distances > ROUNDING) & (nearest.distances < bound)).nonzero().flatten()
    if not len(near):
        return None
    closest = near[nearest.distances[near].argmin()]
    pair = sorted(names[candidates[index]] for index in (closest, nearest.indices[closest]))
    return _note(len(near), pair, bound, statistics.median(nearest.distances[near].tolist()))


def _note(count: int, pair: list[str], bound: float, distance: float) -> str:
    subject = f"{pair[0]} and {pair[1]} differ"
    if count > 2:
        subject = f"{count:,} adapters, such as {pair[0]} and {pair[1]}, differ from another one"
    smaller = float(f"{distance / 3:.1g}")
    return (
        f"{subject} by less than {bound:.3g}, the error that the pack allows, and may be nearly the same in it. "
        f"max_error={smaller:g} (--max-error {smaller:g}) tells them apart."
    )


def _module_norms(collection: Collection) -> Tensor:
    """Return the norm of each adapter's update in each module, (adapters, modules)."""
    index = {name: row for row, name in enumerate(collection.weights)}
    squares = torch.zeros(len(index), len(collection.modules), dtype=torch.float64)
    for column, members in enumerate(collection.modules.values()):
        for member in members:
            if member.name in index:
                squares[index[member.name], column] = member.scanned.scan.delta_squares[member.module]
    return squares.sqrt()


def _project(collection: Collection, names: list[str]) -> Tensor:
    """Return random projections of the updates of some adapters, (adapters, `PROJECTIONS`).

    Each number is a sum of uᵀ·D·w over the modules, with random u and w. Its expected square is the squared norm of the
    update.
    """
    index = {name: row for row, name in enumerate(names)}
    projections = torch.zeros(len(names), PROJECTIONS, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for members in collection.modules.values():
        spec = members[0].spec
        left = torch.randn(PROJECTIONS, spec.out_features, generator=generator)
        right = torch.randn(spec.in_features, PROJECTIONS, generator=generator)
        for member in members:
            if member.is_trained and member.name in index:
                projections[index[member.name]] += _project_update(member.read(), left, right)
    return projections / math.sqrt(PROJECTIONS)


def _project_update(factors: LoRAFactors, left: Tensor, right: Tensor) -> Tensor:
    """Return `diag(left @ update @ right)`, (`PROJECTIONS`,) in float64."""
    products = (left @ factors.up.float()).double() * (factors.down.float() @ right).T.double()
    return factors.scaling * products.sum(1)


def _nearest(vectors: Tensor, norms: Tensor) -> _Nearest:
    """Return the nearest neighbour of each vector among those of similar norm.

    Vectors are compared in the order of their norms, because nearly equal updates have nearly equal norms. This bounds
    the time for very many adapters.

    Args:
        vectors: Numbers of each adapter whose distances are estimates or lower bounds, (n, d).
        norms: Norms of the updates, (n,).
    """
    order = norms.argsort()
    ordered, sizes = vectors[order], norms[order]
    squares = ordered.square().sum(1)
    distances, indices = torch.empty_like(sizes), torch.empty_like(order)
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        first, last = max(start - NEIGHBOURS, 0), min(stop + NEIGHBOURS, len(order))
        products = ordered[start:stop] @ ordered[first:last].T
        between = (squares[start:stop, None] + squares[first:last] - 2 * products).clamp(min=0).sqrt()
        between /= torch.maximum(sizes[start:stop, None], sizes[first:last])
        # no adapter is its own neighbour
        between.diagonal(start - first).fill_(torch.inf)
        distances[start:stop], nearest = between.min(1)
        indices[start:stop] = nearest + first
    restored = order.argsort()
    return _Nearest(distances[restored], order[indices[restored]])
