"""Clusters of adapters, each with shared factors of its own. Everything is deterministic, and float64."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from joint import Joint, Rows, bases, diagonal, full, in_diagonal, in_full
from torch import Tensor

from eigenlorax.core.batch import ModuleBatch, captured_squares, delta_squares
from eigenlorax.core.linalg import descending_eigh, orthonormal_rows

_RELATIVE_ZERO = 1e-14
_TINY = torch.finfo(torch.float64).tiny

Fit = Callable[..., Joint]
"""`joint.full` or `joint.diagonal`."""


@dataclass(frozen=True, slots=True)
class Clusters:
    """A division of the adapters.

    members: ascending indices of the adapters of each cluster. modules: for each cluster its factors by module, with
    the cores of its members. lost: Σ over modules of ‖D_i − D̂_i‖² of all adapters, without weights.
    """

    members: tuple[tuple[int, ...], ...]
    modules: tuple[Mapping[str, Joint], ...]
    lost: Float[Tensor, " n"]


def clustered(
    modules: Mapping[str, ModuleBatch],
    weights: Float[Tensor, " n"],
    k: int,
    clusters: int,
    fit: Fit = full,
    *,
    rounds: int = 20,
    **options: float,
) -> Clusters:
    """Divide the adapters into at most `clusters` clusters, over all modules at once.

    Alternates between the choice of a cluster for each adapter and the factors of each cluster, which start from those
    of the round before, so that the weighted squared error never grows. The first division is by the directions of
    adapters that are far from each other. options: of `fit`.
    """
    n = len(weights)
    labels = _first_labels(modules, weights, k, clusters)
    factors: list[dict[str, Rows]] = [{} for _ in range(clusters)]
    for _ in range(rounds):
        lost = torch.zeros(n, clusters, dtype=torch.float64)
        for name in modules:
            # each access may read the module from files
            module = modules[name]
            for cluster in range(clusters):
                members = _members(labels, cluster)
                if members:
                    start = factors[cluster].get(name)
                    fitted = fit(module.select(members), weights[members], k, start=start, **options)
                    factors[cluster][name] = fitted.down, fitted.up
                if factors[cluster]:
                    lost[:, cluster] += _lost(module, factors[cluster][name], fit)
                else:
                    lost[:, cluster] = torch.inf
        # an adapter moves only if it gains, so that rounding cannot make the rounds cycle
        lost_here = lost.gather(1, labels[:, None])[:, 0]
        best, nearest = lost.min(1)
        moved = torch.where(best < lost_here * (1 - 1e-9), nearest, labels)
        if torch.equal(moved, labels):
            break
        labels = moved
    return _finished(modules, labels, factors, fit)


def _finished(modules: Mapping[str, ModuleBatch], labels: Tensor, factors: list[dict[str, Rows]], fit: Fit) -> Clusters:
    nonempty = [(members, rows) for cluster, rows in enumerate(factors) if (members := _members(labels, cluster))]
    nonempty.sort(key=lambda cluster: cluster[0])
    by_cluster: list[dict[str, Joint]] = [{} for _ in nonempty]
    lost = torch.zeros(len(labels), dtype=torch.float64)
    for name in modules:
        module = modules[name]
        for fitted, (members, rows) in zip(by_cluster, nonempty, strict=True):
            selected = module.select(members)
            fitted[name] = in_diagonal(selected, rows[name]) if fit is diagonal else in_full(selected, rows[name])
            lost[members] += fitted[name].lost
    return Clusters(tuple(tuple(members) for members, _ in nonempty), tuple(by_cluster), lost)


def _lost(module: ModuleBatch, rows: Rows, fit: Fit) -> Float[Tensor, " n"]:
    if fit is diagonal:
        return in_diagonal(module, rows).lost
    return delta_squares(module) - captured_squares(module.down @ rows[0].mT, module.up @ rows[1].mT)


def _members(labels: Tensor, cluster: int) -> list[int]:
    members: list[int] = (labels == cluster).nonzero().flatten().tolist()
    return members


def _first_labels(modules: Mapping[str, ModuleBatch], weights: Tensor, k: int, clusters: int) -> Tensor:
    """Label each adapter with the nearest of `clusters` seed adapters, by what the seed's directions keep of it.

    The first seed is the adapter that the directions of all keep best, each next one is farthest from those before.
    """
    n = len(weights)
    if clusters == 1:
        return torch.zeros(n, dtype=torch.long)
    total, kept = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for name in modules:
        module = modules[name]
        down, up = bases(module, weights, k, rounds=0)
        kept += captured_squares(module.down @ down.mT, module.up @ up.mT)
        total += delta_squares(module)
    norms = total.clamp_min(_TINY)
    seeds = [int((kept / norms).argmax())]
    shares = torch.zeros(n, 0, dtype=torch.float64)
    while True:
        kept_by_seed = torch.zeros(n, dtype=torch.float64)
        for name in modules:
            module = modules[name]
            down, up = (orthonormal_rows(_row_span(rows[seeds[-1]])) for rows in (module.down, module.up))
            kept_by_seed += captured_squares(module.down @ down.mT, module.up @ up.mT)
        shares = torch.cat([shares, (kept_by_seed / norms)[:, None]], dim=1)
        if len(seeds) == min(clusters, n):
            return shares.argmax(1)
        # an update of zero is no seed
        seeds.append(int(shares.amax(1).masked_fill(total == 0, torch.inf).argmin()))


def _row_span(rows: Float[Tensor, "r d"]) -> Float[Tensor, "s d"]:
    """Return orthogonal rows with the span of these."""
    values, vectors = descending_eigh(rows @ rows.mT)
    nonzero = values > _RELATIVE_ZERO * values[:1].clamp_min(_TINY)
    spanning: Tensor = (vectors[:, nonzero] / values[nonzero].sqrt()).mT @ rows
    return spanning
