"""Groups of adapters, from matrices of all pairs: shared starts, clusters, duplicates, outliers, and a map."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import MissingExtraError
from .pairs import Pairs, cosines

DUPLICATE = 0.9999
"""Minimum cosine of two updates that count as equal."""
_START_COSINE, _START_SIGMAS, _SAME_START = 0.1, 6.0, 0.95
"""Minimum cosine of two A that may share a start, also in standard deviations, and of two that certainly do."""
_MAX_CLUSTERS = 10
_SILHOUETTE = 0.1
_MEDIAN_OVERLAP = 0.1
"""Median overlap beyond chance below which there are no outliers."""
_CLUSTER_SIGMAS = 6.0
_NOTHING = 1e-5
"""Maximum squared norm of a sum of unit vectors that counts as zero."""


def linked(related: Bool[Tensor, "n n"]) -> list[list[int]]:
    """Return the connected components with at least two members, in ascending order."""
    remaining, groups = set(range(len(related))), []
    while remaining:
        component, new = set(), {min(remaining)}
        while new:
            component |= new
            new = set(related[sorted(new)].any(0).nonzero().flatten().tolist()) - component
        remaining -= component
        if len(component) > 1:
            groups.append(sorted(component))
    return groups


def same_start(pairs: Pairs) -> list[list[int]]:
    """Return groups of adapters whose A was initialised with the same random numbers.

    The rows of two such A are similar in the same order: row r to row r, more than chance explains. B starts at zero,
    so the B of two adapters are less similar than their A. If A was trained far, the updates must be less similar than
    A too; otherwise the similarity is a common mean that training found. If A was hardly trained, B must differ at
    least twice as much as A.
    """
    down, up, delta = cosines(pairs.down), cosines(pairs.up).abs(), cosines(pairs.delta).abs()
    norms = pairs.down.diagonal().sqrt()
    chance = pairs.down_cross.sqrt() / (norms[:, None] * norms[None, :]).clamp_min(torch.finfo(torch.float64).tiny)
    similar = ((down >= _START_COSINE) & (down >= _START_SIGMAS * chance)) | (down >= _SAME_START)
    far = (down >= 1.5 * up) & (delta < 0.7 * down)
    hardly = (1 - up >= 2 * (1 - down)) & (up < _SAME_START)
    return linked((similar & pairs.same_ranks & (far | hardly)).fill_diagonal_(False))


def duplicates(pairs: Pairs) -> list[list[int]]:
    """Return groups of adapters with equal updates. Their factors may differ."""
    return linked((cosines(pairs.delta) >= DUPLICATE).fill_diagonal_(False))


@dataclass(frozen=True, slots=True)
class Clustering:
    """Hierarchical clustering of n adapters.

    Attributes:
        tree: SciPy's average linkage of the distances 1 − overlap beyond chance.
        order: Order of the leaves.
        clusters: Groups of at least two adapters, the largest first; empty unless there are two such groups.
        silhouette: Mean silhouette of the best division; None if no division was tried.
    """

    tree: Float[np.ndarray, "m 4"]
    order: list[int]
    clusters: list[list[int]]
    silhouette: float | None


def clustering(beyond: Float[Tensor, "n n"], deviation: Float[Tensor, "n n"]) -> Clustering:
    """Group adapters by their overlaps.

    The number of clusters is the one with the best mean silhouette (Rousseeuw, 1987). Clusters are accepted only if the
    silhouette is above 0.1, and if the adapters of each cluster overlap twice as much with each other as with the
    others, and significantly more. The usual threshold of 0.25 is too strict: even adapters in one subspace of 2r
    components have an overlap of only about 0.25.

    Args:
        beyond: Overlaps beyond chance (`pairs.beyond_chance`).
        deviation: Their standard deviation by chance.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    try:
        from scipy.cluster import hierarchy
        from scipy.spatial.distance import squareform
    except ImportError as error:
        raise MissingExtraError("A report needs SciPy and matplotlib: pip install 'eigenlorax[report]'.") from error
    n = len(beyond)
    if n < 2:
        return Clustering(np.zeros((0, 4)), list(range(n)), [], None)
    distance = (1 - beyond).clamp_min(0).numpy()
    np.fill_diagonal(distance, 0)
    tree = hierarchy.linkage(squareform(distance, checks=False), "average")
    order = hierarchy.leaves_list(tree).tolist()
    best: tuple[float, np.ndarray] | None = None
    for k in range(2, min(_MAX_CLUSTERS, n - 1) + 1):
        labels = hierarchy.fcluster(tree, k, "maxclust")
        if 1 < len(set(labels)) < n:
            score = mean_silhouette(distance, labels)
            if best is None or score > best[0] + 1e-12:
                best = score, labels
    if best is None or best[0] <= _SILHOUETTE:
        return Clustering(tree, order, [], None)
    groups = [np.flatnonzero(best[1] == label).tolist() for label in sorted(set(best[1]))]
    clusters = sorted((group for group in groups if len(group) > 1), key=lambda group: (-len(group), group))
    pairs = [(within(beyond, group), between(beyond, group), _max_by_chance(deviation, group)) for group in clusters]
    apart = all(inside > 2 * outside and inside - outside > by_chance for inside, outside, by_chance in pairs)
    return Clustering(tree, order, clusters if apart and len(clusters) > 1 else [], best[0])


def mean_silhouette(distance: Float[np.ndarray, "n n"], labels: Int[np.ndarray, " n"]) -> float:
    """Return the mean silhouette of a division into clusters (Rousseeuw, 1987); a cluster of one counts as 0.

    Args:
        distance: Distances of all pairs, 0 on the diagonal.
        labels: Cluster of each point, at least two.
    """
    clusters, sizes = np.unique(labels, return_counts=True)
    sums = np.stack([distance[:, labels == cluster].sum(1) for cluster in clusters], axis=1)
    is_own = labels[:, None] == clusters[None, :]
    own_size = (is_own * sizes).sum(1)
    within = (is_own * sums).sum(1) / np.maximum(own_size - 1, 1)
    nearest = np.where(is_own, np.inf, sums / sizes).min(1)
    largest = np.maximum(within, nearest)
    silhouettes = np.divide(nearest - within, largest, out=np.zeros(len(labels)), where=(largest > 0) & (own_size > 1))
    return float(silhouettes.mean())


def _max_by_chance(deviation: Float[Tensor, "n n"], group: Sequence[int]) -> float:
    """Return the largest difference of overlaps that chance explains for a group that was selected for its overlap.

    The best of all groups of m among n adapters exceeds the mean by about 2·√((1 + log n/m) / m) standard deviations of
    a pair.
    """
    return _CLUSTER_SIGMAS * within(deviation, group) / math.sqrt(len(group) - 1)


def within(matrix: Float[Tensor, "n n"], group: Sequence[int]) -> float:
    """Return the mean over the pairs within a group."""
    block = matrix[list(group)][:, list(group)]
    return float((block.sum() - block.diagonal().sum()) / (len(group) * (len(group) - 1)))


def between(matrix: Float[Tensor, "n n"], group: Sequence[int]) -> float:
    """Return the mean over the pairs of one adapter inside and one outside of a group; 0 if none is outside."""
    outside = sorted(set(range(len(matrix))) - set(group))
    return float(matrix[list(group)][:, outside].mean()) if outside else 0.0


def outliers(beyond: Float[Tensor, "n n"], grouped: Sequence[int]) -> list[int]:
    """Return the indices of adapters that overlap with the others far less than the median adapter does.

    The mean overlap of an outlier is less than half of the median, and four robust standard deviations below it on a
    logarithmic scale. There are no outliers among fewer than four adapters, or if the median is below 0.1.

    Args:
        beyond: Overlaps beyond chance.
        grouped: Indices of adapters in a cluster, which are not outliers.
    """
    n = len(beyond)
    if n < 4:
        return []
    mean = (beyond.sum(1) - beyond.diagonal()) / (n - 1)
    median = mean.median()
    if median < _MEDIAN_OVERLAP:
        return []
    below = (median / mean.clamp_min(torch.finfo(mean.dtype).tiny)).log()
    spread = 1.4826 * below.abs().median()
    is_outlier = (mean < median / 2) & (below > 4 * spread)
    return sorted(set(is_outlier.nonzero().flatten().tolist()) - set(grouped))


def on_a_map(cosine: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n 2"], float]:
    """Return positions in the plane, and the share of the squared distances that they show.

    Classical multidimensional scaling of the cosines. Distances approximate those of the updates at equal norms.
    """
    n = len(cosine)
    if n < 2:
        return torch.zeros(n, 2, dtype=torch.float64), 1.0
    centred = cosine - cosine.mean(0) - cosine.mean(1)[:, None] + cosine.mean()
    values, vectors = torch.linalg.eigh(centred)
    total = float(values.clamp_min(0).sum())
    positions = vectors.flip(1)[:, :2] * values.flip(0)[:2].clamp_min(0).sqrt()
    # the sign of an eigenvector is arbitrary: fix it, so that the map is the same on all machines
    largest = positions.gather(0, positions.abs().argmax(0, keepdim=True))
    positions = positions * torch.where(largest < 0, -1.0, 1.0)
    return positions, float(values.flip(0)[:2].clamp_min(0).sum()) / total if total > 0 else 1.0


def mean_errors(pairs: Pairs) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return the errors of each adapter if it is replaced by a mean of all adapters.

    Updates of zero do not count in means at equal norms. Their errors are NaN, and their share is 0.

    Returns:
        The error of the plain mean of the updates; the error of the best multiple of the mean at equal norms; and the
        share of the update's squared norm that the mean of the *other* adapters at equal norms explains, 0 if their
        cosine is negative.
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
