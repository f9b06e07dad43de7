"""How the adapters are related: neighbours, random starts, clusters."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.batch import delta_squares, pad_factors
from ..fitting.fit import Progress
from ..pack.pack import Pack
from ..pack.packed_adapter import PackedAdapter
from . import measure
from .analysis import groups, spectra
from .analysis.null import NullModel
from .analysis.pairs import Pairs, beyond_chance, cosines, overlap, overlap_by_chance
from .data import Cluster, Similarity, StartEnergy, StartGroup, Starts
from .measure import Measured
from .originals import Originals


def neighbours(names: Sequence[str], cosine: Tensor, shared: Tensor) -> dict[str, dict[str, Any]]:
    """Of each adapter, who is nearest to it, and how much the others have of its directions."""
    n = len(names)
    if n < 2:
        return {name: {} for name in names}
    others = cosine.clone().fill_diagonal_(0.0)
    # an adapter is not its own neighbour, also where it has nothing in common with anybody
    nearest = others.abs().fill_diagonal_(-1.0).argmax(1).tolist()
    common = ((shared.sum(1) - shared.diagonal()) / (n - 1)).tolist()
    return {
        name: {"nearest": names[near], "nearest_cosine": float(others[place, near]), "overlap": common[place]}
        for place, (name, near) in enumerate(zip(names, nearest, strict=True))
    }


def starts(
    pack: Pack,
    packed: Mapping[str, PackedAdapter],
    found: Originals | None,
    measured: Measured | None,
    seed: int,
    say: Progress,
) -> Starts | None:
    """Groups with one random start, and how much of the energy that makes."""
    if found is None or measured is None:
        return None
    names, pairs = measured.names, measured.pairs
    members = groups.same_start(pairs)
    if not members:
        return Starts([], [])
    down, up = cosines(pairs.down), cosines(pairs.up)
    described = [
        StartGroup([names[i] for i in group], groups.within(down, group), groups.within(up, group)) for group in members
    ]
    inside = {name for group in described for name in group.adapters}
    sets = {f"group {number}": group.adapters for number, group in enumerate(described, 1)}
    others = [name for name in names if name not in inside]
    if others:
        sets = {"all": names, **sets, "others": others}
    k = max(max(packed[name].record.ranks) for name in names)
    rows = energies(pack, packed, found, sets, (k, seed), say)
    return Starts(described, [StartEnergy(who, len(sets[who]), k, *values) for who, values in rows.items()])


def energies(
    pack: Pack,
    packed: Mapping[str, PackedAdapter],
    originals: Originals,
    members: Mapping[str, Sequence[str]],
    asked: tuple[int, int],
    progress: Progress,
) -> dict[str, list[float]]:
    """Energy that k directions keep of some of the adapters: of A and of B, of the same in random directions, and of
    both sides of the updates; means over the modules. asked: k, and the seed of random directions."""
    k, seed = asked
    sums: dict[str, list[list[float]]] = {who: [] for who in members}
    everybody = sorted({name for names in members.values() for name in names})
    for done, (module, bases) in enumerate(pack.subspace.modules.items()):
        progress("weighing shared starts", done, len(pack.info.modules))
        generator = torch.Generator().manual_seed(seed + 1 + done)
        factors = {}
        for name in everybody:
            own = measure.own_name(packed[name], module)
            if own is not None and originals.scans[name].delta_squares[own] > 0:
                factors[name] = originals.adapters[name].modules[own]
        for who, names in members.items():
            there = [factors[name] for name in names if name in factors]
            if there:
                one = pad_factors(there, *reversed(bases.shape))
                weights = delta_squares(one).rsqrt()
                drawn = NullModel.of(one).draw(generator)
                sums[who].append(
                    [
                        *spectra.energy(one, weights, (k, k), "factors"),
                        *spectra.energy(drawn, weights, (k, k), "factors"),
                        *spectra.energy(one, weights, (k, k), "delta"),
                    ]
                )
    progress("weighing shared starts", len(pack.info.modules), len(pack.info.modules))
    return {who: [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)] for who, rows in sums.items()}


def similarity(
    measured: Measured | None, pairs: Pairs, names: list[str], copies: list[list[int]], map_share: float
) -> tuple[Similarity, list[str], Tensor, Tensor]:
    """Similarity in the order of the dendrogram, and outliers; and cosines and overlaps in the order of `names`.

    copies: groups of the same update, each of which counts once where clusters, outliers and the mean are found.
    """
    cosine, shared = cosines(pairs.delta), overlap(pairs)
    beyond, deviation = beyond_chance(pairs)
    found = groups.clustering(beyond, deviation)
    order = found.order
    off = len(names) * (len(names) - 1)
    first = {place: group[0] for group in copies for place in group}
    once = [place for place in range(len(names)) if first.get(place, place) == place]
    apart, apart_beyond = (matrix[once][:, once] for matrix in (shared, beyond))
    divided = groups.clustering(apart_beyond, deviation[once][:, once]) if copies else found
    outlying = groups.outliers(apart_beyond, [place for cluster in divided.clusters for place in cluster])
    explained = groups.mean_losses(pairs.of_some(once))[2]

    def those(places: Sequence[int]) -> list[str]:
        """The adapters of some places in `once`, and their copies."""
        chosen = {once[place] for place in places}
        return [name for place, name in enumerate(names) if first.get(place, place) in chosen]

    # the order of leaves is that of the rows and columns: the tree speaks of places in it
    rank = {leaf: place for place, leaf in enumerate(order)}
    tree = [
        [*(float(rank.get(int(one), int(one))) for one in row[:2]), float(row[2]), float(row[3])] for row in found.tree
    ]
    return (
        Similarity(
            of="originals" if measured is not None else "pack",
            names=[names[leaf] for leaf in order],
            cosine=cosine[order][:, order].tolist(),
            overlap=shared[order][:, order].tolist(),
            tree=tree,
            clusters=[
                Cluster(those(one), groups.within(apart, one), groups.between(apart, one)) for one in divided.clusters
            ],
            silhouette=divided.silhouette,
            map_share=map_share if len(names) > 1 else None,
            chance_overlap=float(overlap_by_chance(pairs)[0].sum()) / off if off else None,
            mean_cosine=float((cosine.sum() - len(names)) / off) if off else None,
            mean_energy=float(explained.mean()) if len(once) > 1 else None,
        ),
        those(outlying),
        cosine,
        shared,
    )
