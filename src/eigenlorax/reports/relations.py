"""How the adapters are related: neighbours, random starts, clusters."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..analysis import groups
from ..analysis.pairs import Pairs, cosines, overlap
from ..fitting import Progress
from ..pack import Pack
from ..packed import PackedAdapter
from . import measure
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
    rows = measure.energies(pack, packed, found, sets, k, say)
    return Starts(described, [StartEnergy(who, len(sets[who]), k, *values) for who, values in rows.items()])


def similarity(
    measured: Measured | None, pairs: Pairs, names: list[str], map_share: float
) -> tuple[Similarity, Tensor, Tensor]:
    """Similarity in the order of the dendrogram; and cosines and overlaps in the order of `names`."""
    cosine, shared = cosines(pairs.delta), overlap(pairs)
    found = groups.clustering(shared)
    order = found.order
    ordered = cosine[order][:, order]
    off = len(names) * (len(names) - 1)
    explained = groups.mean_losses(pairs)[2]
    # the order of leaves is that of the rows and columns: the tree speaks of places in it
    place = {leaf: rank for rank, leaf in enumerate(order)}
    tree = [
        [*(float(place.get(int(one), int(one))) for one in row[:2]), float(row[2]), float(row[3])] for row in found.tree
    ]
    return (
        Similarity(
            of="originals" if measured is not None else "pack",
            names=[names[leaf] for leaf in order],
            cosine=ordered.tolist(),
            overlap=shared[order][:, order].tolist(),
            tree=tree,
            clusters=[
                Cluster([names[i] for i in one], groups.within(shared, one), groups.between(shared, one))
                for one in found.clusters
            ],
            silhouette=found.silhouette,
            map_share=map_share if len(names) > 1 else None,
            mean_cosine=float((cosine.sum() - len(names)) / off) if off else None,
            mean_energy=float(explained.mean()) if len(names) > 1 else None,
        ),
        cosine,
        shared,
    )
