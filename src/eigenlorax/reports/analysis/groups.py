"""Who belongs together, out of matrices of all pairs: shared starts, clusters, duplicates, outliers, and a map."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import MissingExtraError
from .pairs import Pairs, cosines

DUPLICATE = 0.9999
"""The cosine of two updates from which on they are called the same."""
_START_COSINE, _START_SIGMAS, _SAME_START = 0.1, 6.0, 0.95
_MOST_CLUSTERS = 10
_SILHOUETTE = 0.1
_IN_COMMON = 0.1
_CLUSTER_SIGMAS = 6.0
_NOTHING = 1e-5
"""Squared norm up to which a sum of unit vectors is what rounding leaves where they cancel."""


def linked(related: Bool[Tensor, "n n"]) -> list[list[int]]:
    """Groups of two and more that are related to one another, if need be by others; in order."""
    left, groups = set(range(len(related))), []
    while left:
        found, new = set(), {min(left)}
        while new:
            found |= new
            new = set(related[sorted(new)].any(0).nonzero().flatten().tolist()) - found
        left -= found
        if len(found) > 1:
            groups.append(sorted(found))
    return groups


def same_start(pairs: Pairs) -> list[list[int]]:
    """Groups of adapters whose A began as the same random numbers.

    The rows of two such A are alike one by one, r with r, more than r with s is by chance, and B, which began as zeros,
    is not alike as A is: where A was trained far, neither is the whole update (what training found in both is a common
    mean, and no start); where it was hardly trained, B differs by twice as much as A at least.
    """
    down, up, delta = cosines(pairs.down), cosines(pairs.up).abs(), cosines(pairs.delta).abs()
    norms = pairs.down.diagonal().sqrt()
    chance = pairs.down_cross.sqrt() / (norms[:, None] * norms[None, :]).clamp_min(torch.finfo(torch.float64).tiny)
    alike = ((down >= _START_COSINE) & (down >= _START_SIGMAS * chance)) | (down >= _SAME_START)
    far = (down >= 1.5 * up) & (delta < 0.7 * down)
    hardly = (1 - up >= 2 * (1 - down)) & (up < _SAME_START)
    return linked((alike & pairs.same_ranks & (far | hardly)).fill_diagonal_(False))


def duplicates(pairs: Pairs) -> list[list[int]]:
    """Groups of adapters with the same update, whatever factors it is made of."""
    return linked((cosines(pairs.delta) >= DUPLICATE).fill_diagonal_(False))


@dataclass(frozen=True, slots=True)
class Clustering:
    """tree: scipy's linkage of 1 − overlap beyond chance, by average. order: of its leaves. clusters: of two adapters
    and more, the largest first; none where there are not two of them. silhouette: of that division."""

    tree: Float[np.ndarray, "m 4"]
    order: list[int]
    clusters: list[list[int]]
    silhouette: float | None


def clustering(beyond: Float[Tensor, "n n"], deviation: Float[Tensor, "n n"]) -> Clustering:
    """Adapters grouped by the directions that they share.

    beyond: overlaps beyond chance, and `deviation` their standard deviation by chance (`pairs.beyond_chance`).

    The number of clusters is the one of the best mean silhouette (Rousseeuw, 1987). They count as clusters only if that
    is above 0.1 and the adapters of each share twice as much with each other as with the rest, and more by far than
    chance makes a pair share. A silhouette of 0.25, which is usual, is out of reach: adapters of one subspace of 2r
    directions have an overlap of about 0.25 themselves.
    """
    try:
        from scipy.cluster import hierarchy
        from scipy.spatial.distance import squareform
        from sklearn.metrics import silhouette_score
    except ImportError as error:
        raise MissingExtraError(
            "a report needs scikit-learn and matplotlib: pip install 'eigenlorax[report]'."
        ) from error
    n = len(beyond)
    if n < 2:
        return Clustering(np.zeros((0, 4)), list(range(n)), [], None)
    distance = (1 - beyond).clamp_min(0).numpy()
    np.fill_diagonal(distance, 0)
    tree = hierarchy.linkage(squareform(distance, checks=False), "average")
    order = hierarchy.leaves_list(tree).tolist()
    best: tuple[float, np.ndarray] | None = None
    for k in range(2, min(_MOST_CLUSTERS, n - 1) + 1):
        labels = hierarchy.fcluster(tree, k, "maxclust")
        if 1 < len(set(labels)) < n:
            score = float(silhouette_score(distance, labels, metric="precomputed"))
            if best is None or score > best[0] + 1e-12:
                best = score, labels
    if best is None or best[0] <= _SILHOUETTE:
        return Clustering(tree, order, [], None)
    groups = [np.flatnonzero(best[1] == label).tolist() for label in sorted(set(best[1]))]
    clusters = sorted((group for group in groups if len(group) > 1), key=lambda group: (-len(group), group))
    pairs = [(within(beyond, group), between(beyond, group), _most_by_chance(deviation, group)) for group in clusters]
    apart = all(inside > 2 * outside and inside - outside > by_chance for inside, outside, by_chance in pairs)
    return Clustering(tree, order, clusters if apart and len(clusters) > 1 else [], best[0])


def _most_by_chance(deviation: Float[Tensor, "n n"], group: Sequence[int]) -> float:
    """By how much the pairs of a group may share more than others by chance, though it was chosen for that.

    Of all groups of m among n adapters, the best one has about 2·√((1 + log n/m) / m) standard deviations of a pair.
    """
    return _CLUSTER_SIGMAS * within(deviation, group) / math.sqrt(len(group) - 1)


def within(matrix: Float[Tensor, "n n"], group: Sequence[int]) -> float:
    """Mean over the pairs of a group."""
    block = matrix[list(group)][:, list(group)]
    return float((block.sum() - block.diagonal().sum()) / (len(group) * (len(group) - 1)))


def between(matrix: Float[Tensor, "n n"], group: Sequence[int]) -> float:
    """Mean over the pairs of one in a group and one outside; 0 if nobody is."""
    outside = sorted(set(range(len(matrix))) - set(group))
    return float(matrix[list(group)][:, outside].mean()) if outside else 0.0


def outliers(beyond: Float[Tensor, "n n"], grouped: Sequence[int]) -> list[int]:
    """Adapters that share less than half as much with the others as the median adapter does, and less by far than that
    scatters (four robust standard deviations of its logarithm); of four and more, of which the median has an overlap of
    0.1 at least: where little is shared, nobody stands out.

    beyond: overlaps beyond chance. grouped: those that are in a cluster.
    """
    n = len(beyond)
    if n < 4:
        return []
    mean = (beyond.sum(1) - beyond.diagonal()) / (n - 1)
    median = mean.median()
    if median < _IN_COMMON:
        return []
    below = (median / mean.clamp_min(torch.finfo(mean.dtype).tiny)).log()
    spread = 1.4826 * below.abs().median()
    found = (mean < median / 2) & (below > 4 * spread)
    return sorted(set(found.nonzero().flatten().tolist()) - set(grouped))


def on_a_map(cosine: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n 2"], float]:
    """Places in the plane whose distances are nearest those of the updates at equal norms (principal coordinates:
    classical scaling), and the share of squared distance that they show."""
    n = len(cosine)
    if n < 2:
        return torch.zeros(n, 2, dtype=torch.float64), 1.0
    centred = cosine - cosine.mean(0) - cosine.mean(1)[:, None] + cosine.mean()
    values, vectors = torch.linalg.eigh(centred)
    total = float(values.clamp_min(0).sum())
    places = vectors.flip(1)[:, :2] * values.flip(0)[:2].clamp_min(0).sqrt()
    # as signs of components are fixed, so that a map does not flip from machine to machine
    largest = places.gather(0, places.abs().argmax(0, keepdim=True))
    places = places * torch.where(largest < 0, -1.0, 1.0)
    return places, float(values.flip(0)[:2].clamp_min(0).sum()) / total if total > 0 else 1.0


def mean_losses(pairs: Pairs) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Relative errors of each adapter if the mean stands for it, and what others' mean says of it.

    The mean of the updates as they are; the best multiple of the mean of the updates at equal norms; and the share of
    an update's squared norm that the mean of the *others*, at equal norms, explains; 0 where it points the other way.
    An update that is zero has no part in means at equal norms; its errors are NaN, and its share is 0.
    """
    square = pairs.delta.diagonal()
    trained = (square > 0).double()
    mean, mean_square = pairs.delta.mean(1), pairs.delta.mean()
    plain = torch.where(trained > 0, ((square - 2 * mean + mean_square).clamp_min(0) / square).sqrt(), math.nan)
    cosine = cosines(pairs.delta) * trained
    with_sum, sum_square = cosine.sum(1), cosine.sum()
    explained = torch.where(sum_square > _NOTHING, with_sum.square() / sum_square, 0.0)
    scaled = torch.where(trained > 0, (1 - explained).clamp_min(0).sqrt(), math.nan)
    with_others = (with_sum - trained).clamp_min(0)
    others_square = sum_square - 2 * with_sum + trained
    share = torch.where(others_square > _NOTHING, with_others.square() / others_square, 0.0)
    return plain, scaled, (share * trained).clamp(0, 1)
