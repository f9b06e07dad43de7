"""Relations between adapters: nearest neighbours, shared random starts, clusters and outliers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.adapter import LoRAFactors
from ..core.batch import ModuleBatch, delta_squares, pad_factors
from ..core.progress import Progress
from ..pack.pack import Pack
from ..pack.packed_adapter import PackedAdapter
from . import measure
from .analysis import groups, spectra
from .analysis.null import NullModel
from .analysis.pairs import Pairs, beyond_chance, cosines, overlap, overlap_by_chance
from .data import Cluster, Similarity, StartEnergy, StartGroup, Starts
from .measured import Measured
from .originals import Originals


def neighbours(names: Sequence[str], cosine: Tensor, shared: Tensor) -> dict[str, dict[str, Any]]:
    """Return the fields of `AdapterFigures` on the nearest adapter and the mean overlap, by adapter.

    Args:
        names: Names of the n adapters.
        cosine: Cosines of their updates, (n, n).
        shared: Overlaps, (n, n).
    """
    n = len(names)
    if n < 2:
        return {name: {} for name in names}
    others = cosine.clone().fill_diagonal_(0.0)
    # −1 on the diagonal: an adapter is not its own neighbour, even if it has nothing in common with any other
    nearest = others.abs().fill_diagonal_(-1.0).argmax(1).tolist()
    overlaps = ((shared.sum(1) - shared.diagonal()) / (n - 1)).tolist()
    return {
        name: {"nearest": names[near], "nearest_cosine": float(others[index, near]), "overlap": overlaps[index]}
        for index, (name, near) in enumerate(zip(names, nearest, strict=True))
    }


def starts(
    pack: Pack,
    packed: Mapping[str, PackedAdapter],
    originals: Originals | None,
    measured: Measured | None,
    seed: int,
    progress: Progress,
) -> Starts | None:
    """Return groups of adapters that share a random start, and the energy of components with and without them."""
    if originals is None or measured is None:
        return None
    names, pairs = measured.names, measured.pairs
    members = groups.same_start(pairs)
    if not members:
        return Starts([], [])
    down, up = cosines(pairs.down), cosines(pairs.up)
    start_groups = [
        StartGroup([names[i] for i in group], groups.within(down, group), groups.within(up, group)) for group in members
    ]
    grouped = {name for group in start_groups for name in group.adapters}
    sets = {f"group {number}": group.adapters for number, group in enumerate(start_groups, 1)}
    remaining = [name for name in names if name not in grouped]
    if remaining:
        sets = {"all": names, **sets, "others": remaining}
    # the rank of one random start
    k = max(max(packed[name].record.ranks) for name in names)
    modules = {module: bases for module, bases in pack.subspace.modules.items() if module in measured.sides}
    progress("comparing shared starts", 0, len(modules))
    sums: dict[str, list[list[float]]] = {who: [] for who in sets}
    for done, (module, bases) in enumerate(modules.items(), start=1):
        factors = _trained_factors(packed, originals, module)
        generator = torch.Generator().manual_seed(seed + done)
        for who, members_of in sets.items():
            trained = [factors[name] for name in members_of if name in factors]
            if trained:
                batch = pad_factors(trained, *reversed(bases.shape))
                sums[who].append(_start_energies(batch, k, generator))
        progress("comparing shared starts", done, len(modules))
    means = {who: [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)] for who, rows in sums.items()}
    return Starts(start_groups, [StartEnergy(who, len(sets[who]), k, *values) for who, values in means.items()])


def _trained_factors(packed: Mapping[str, PackedAdapter], originals: Originals, module: str) -> dict[str, LoRAFactors]:
    """Return the original factors of the adapters that trained a module of the subspace, by adapter."""
    factors = {}
    for name in sorted(originals.adapters):
        own = measure.own_name(packed[name], module)
        if own is not None and originals.scans[name].delta_squares[own] > 0:
            factors[name] = originals.adapters[name].modules[own]
    return factors


def _start_energies(batch: ModuleBatch, k: int, generator: torch.Generator) -> list[float]:
    """Return the energies of `StartEnergy` in one module, in the order of its fields."""
    weights = delta_squares(batch).rsqrt()
    drawn = NullModel.of(batch).draw(generator)
    return [
        *spectra.energy(batch, weights, (k, k), "factors"),
        *spectra.energy(drawn, weights, (k, k), "factors"),
        *spectra.energy(batch, weights, (k, k), "delta"),
    ]


def similarity(
    measured: Measured | None, pairs: Pairs, names: list[str], copies: list[list[int]], map_share: float
) -> tuple[Similarity, list[str], Tensor, Tensor]:
    """Return the similarity between adapters, the outliers, and the matrices of cosines and overlaps.

    Args:
        measured: Measurements with the original adapters; None if `pairs` are of reconstructed ones.
        pairs: Inner products of all pairs.
        names: Names of the n adapters.
        copies: Groups of indices with equal updates. Each group counts once in clusters, outliers and the mean.
        map_share: Share of the squared distances that the map shows.

    Returns:
        The similarity, in the order of the dendrogram; names of outliers; cosines and overlaps, (n, n), in the order of
        `names`.
    """
    cosine, shared = cosines(pairs.delta), overlap(pairs)
    beyond, deviation = beyond_chance(pairs)
    of_all = groups.clustering(beyond, deviation)
    first_copy = {index: group[0] for group in copies for index in group}
    distinct = without_copies(len(names), copies)
    distinct_shared, distinct_beyond = (matrix[distinct][:, distinct] for matrix in (shared, beyond))
    divided = groups.clustering(distinct_beyond, deviation[distinct][:, distinct]) if copies else of_all
    outliers = groups.outliers(distinct_beyond, [index for cluster in divided.clusters for index in cluster])

    def with_copies(indices: Sequence[int]) -> list[str]:
        """Return the names of distinct adapters and of their copies."""
        chosen = {distinct[index] for index in indices}
        return [name for index, name in enumerate(names) if first_copy.get(index, index) in chosen]

    order = of_all.order
    pairs_count = len(names) * (len(names) - 1)
    return (
        Similarity(
            of="originals" if measured is not None else "pack",
            names=[names[leaf] for leaf in order],
            cosine=cosine[order][:, order].tolist(),
            overlap=shared[order][:, order].tolist(),
            tree=_in_order(of_all.tree, order),
            clusters=[
                Cluster(
                    with_copies(cluster),
                    groups.within(distinct_shared, cluster),
                    groups.between(distinct_shared, cluster),
                )
                for cluster in divided.clusters
            ],
            silhouette=divided.silhouette,
            map_share=map_share if len(names) > 1 else None,
            chance_overlap=float(overlap_by_chance(pairs)[0].sum()) / pairs_count if pairs_count else None,
            mean_cosine=mean_cosine(cosine),
            mean_energy=mean_energy(pairs, distinct),
        ),
        with_copies(outliers),
        cosine,
        shared,
    )


def without_copies(n: int, copies: Sequence[Sequence[int]]) -> list[int]:
    """Return the indices of n adapters with only the first one of each group of copies."""
    later = {index for group in copies for index in group[1:]}
    return [index for index in range(n) if index not in later]


def mean_cosine(cosine: Tensor) -> float | None:
    """Return the mean over pairs of the cosines of n adapters, (n, n); None for a single adapter."""
    n = len(cosine)
    return float((cosine.sum() - n) / (n * (n - 1))) if n > 1 else None


def mean_energy(pairs: Pairs, distinct: Sequence[int]) -> float | None:
    """Return the mean share of an update that the mean of the others explains, of the adapters at these indices."""
    return float(groups.mean_errors(pairs.subset(distinct))[2].mean()) if len(distinct) > 1 else None


def _in_order(tree: np.ndarray, order: Sequence[int]) -> list[list[float]]:
    """Return SciPy's linkage with leaves numbered by their position in `order`."""
    position = {leaf: index for index, leaf in enumerate(order)}
    return [
        [*(float(position.get(int(node), int(node))) for node in row[:2]), float(row[2]), float(row[3])] for row in tree
    ]
