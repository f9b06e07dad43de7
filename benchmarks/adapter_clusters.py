"""Adapters that have little in common, in joint bases of their own: as many clusters as are asked for.

Everything is deterministic, and float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from joint import Joint, Rows, bases, diagonal, full, in_diagonal, in_full
from torch import Tensor

from eigenlorax.core.batch import ModuleBatch, captured_squares, delta_squares
from eigenlorax.core.linalg import descending_eigh, orthonormal_rows

_NOTHING = 1e-14


@dataclass(frozen=True, slots=True)
class Clusters:
    """members: the adapters of each cluster, ascending; together all of them. modules: of each cluster, its bases by
    module, with the cores of its members. lost: Σ over modules of ‖D_i − D̂_i‖², of all adapters, without weights."""

    members: tuple[tuple[int, ...], ...]
    modules: tuple[Mapping[str, Joint], ...]
    lost: Float[Tensor, " n"]


def clustered(
    modules: Mapping[str, ModuleBatch],
    weights: Float[Tensor, " n"],
    k: int,
    clusters: int,
    fit: Callable[..., Joint] = full,
    *,
    rounds: int = 20,
    **options: float,
) -> Clusters:
    """Adapters in so many clusters at most, over all modules at once, each in the bases that lose least of it.

    Alternates between the adapters' choice of a cluster and the clusters' bases, which go on from where they were, so
    that no round makes the weighted sum of what is lost larger. The first division is by the directions of adapters
    that are far from each other. fit: `full` or `diagonal`; options: theirs.
    """
    n = len(weights)
    labels = _first_labels(modules, weights, k, clusters)
    bases_of: list[dict[str, Rows]] = [{} for _ in range(clusters)]
    for _ in range(rounds):
        lost = torch.zeros(n, clusters, dtype=torch.float64)
        for name in modules:
            one = modules[name]
            for cluster in range(clusters):
                members = _members(labels, cluster)
                if members:
                    found = fit(one.select(members), weights[members], k, start=bases_of[cluster].get(name), **options)
                    bases_of[cluster][name] = found.down, found.up
                if bases_of[cluster]:
                    lost[:, cluster] += _lost_in(one, bases_of[cluster][name], fit)
                else:
                    lost[:, cluster] = torch.inf
        # who loses as little where it is stays there
        own = lost.gather(1, labels[:, None])[:, 0]
        best, chosen = lost.min(1)
        after = torch.where(best < own * (1 - 1e-9), chosen, labels)
        if torch.equal(after, labels):
            break
        labels = after
    return _finished(modules, labels, clusters, bases_of, fit)


def _finished(
    modules: Mapping[str, ModuleBatch],
    labels: Tensor,
    clusters: int,
    bases_of: Sequence[Mapping[str, Rows]],
    fit: Callable[..., Joint],
) -> Clusters:
    groups = [(cluster, _members(labels, cluster)) for cluster in range(clusters)]
    groups = sorted(((cluster, members) for cluster, members in groups if members), key=lambda group: group[1])
    found: list[dict[str, Joint]] = [{} for _ in groups]
    lost = torch.zeros(len(labels), dtype=torch.float64)
    for name in modules:
        one = modules[name]
        for place, (cluster, members) in enumerate(groups):
            found[place][name] = _in(one.select(members), bases_of[cluster][name], fit)
            lost[members] += found[place][name].lost
    return Clusters(tuple(tuple(members) for _, members in groups), tuple(found), lost)


def _in(one: ModuleBatch, rows: Rows, fit: Callable[..., Joint]) -> Joint:
    """The best cores of the kind that `fit` has between given factors."""
    return in_diagonal(one, rows) if fit is diagonal else in_full(one, rows)


def _lost_in(one: ModuleBatch, rows: Rows, fit: Callable[..., Joint]) -> Float[Tensor, " n"]:
    if fit is diagonal:
        return in_diagonal(one, rows).lost
    return delta_squares(one) - captured_squares(one.down @ rows[0].mT, one.up @ rows[1].mT)


def _members(labels: Tensor, cluster: int) -> list[int]:
    members: list[int] = (labels == cluster).nonzero().flatten().tolist()
    return members


def _first_labels(modules: Mapping[str, ModuleBatch], weights: Tensor, k: int, clusters: int) -> Tensor:
    """Each adapter with the nearest of `clusters` adapters, by what it keeps in that one's directions.

    The first of them is the one that is most in the directions of all, each next one the farthest from all before.
    """
    n = len(weights)
    if clusters == 1:
        return torch.zeros(n, dtype=torch.long)
    total, kept = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for name in modules:
        one = modules[name]
        down, up = bases(one, weights, k, rounds=0)
        kept += captured_squares(one.down @ down.mT, one.up @ up.mT)
        total += delta_squares(one)
    norms = total.clamp_min(torch.finfo(torch.float64).tiny)
    seeds = [int((kept / norms).argmax())]
    shares = torch.zeros(n, 0, dtype=torch.float64)
    while True:
        share = torch.zeros(n, dtype=torch.float64)
        for name in modules:
            one = modules[name]
            down, up = (orthonormal_rows(_spanning(rows[seeds[-1]])) for rows in (one.down, one.up))
            share += captured_squares(one.down @ down.mT, one.up @ up.mT)
        shares = torch.cat([shares, (share / norms)[:, None]], dim=1)
        if len(seeds) == min(clusters, n):
            return shares.argmax(1)
        nearest = shares.amax(1).masked_fill(total == 0, torch.inf)
        seeds.append(int(nearest.argmin()))


def _spanning(rows: Float[Tensor, "r d"]) -> Float[Tensor, "s d"]:
    """Rows without those that add nothing, in the directions of their singular vectors."""
    values, vectors = descending_eigh(rows @ rows.mT)
    some = values > _NOTHING * values[:1].clamp_min(torch.finfo(torch.float64).tiny)
    found: Tensor = (vectors[:, some] / values[some].sqrt()).mT @ rows
    return found
