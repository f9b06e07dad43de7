"""Groups of adapters whose updates span different subspaces: candidates for several bases per module in one pack.

Two updates are similar as far as the rows of one are in the span of the other's, on both sides, weighted by singular
values. Candidates come from spectral clustering of these similarities (Ng, Jordan and Weiss 2001, "On Spectral
Clustering"), and are kept if adapters are more similar within groups than across. One group may hold those that are
similar to none.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .svd_batch import SvdBatch

MAX_SAMPLE = 256
"""Largest number of adapters that all others are compared with."""
GROUP_COUNTS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32)
"""Numbers of groups that are tried."""
MIN_GROUP = 2
"""Smallest number of sampled adapters in a group."""
MIN_CONTRAST = 1.5
"""Mean similarity within a group, relative to that across groups, from which on a grouping is kept."""
MAX_ITERATIONS = 50
_CHUNK = 64


def similarities(updates: SvdBatch, weights: Float[Tensor, " n"], sampled: Sequence[int]) -> Float[Tensor, "n s"]:
    """Return the similarity of every adapter of a module with the sampled ones.

    The similarity of adapters i and j is Σ ‖X_i · X_jᵀ‖² over both sides. The rows of X are singular vectors times
    singular values.

    Args:
        updates: Updates of n adapters in one module.
        weights: 1 / ‖update‖ over all modules, of each adapter.
        sampled: Indices of the s adapters to compare with.
    """
    at = torch.tensor(list(sampled), dtype=torch.int64)
    similarity = torch.zeros(len(updates), len(at), dtype=torch.float64)
    lengths = (updates.s * weights[:, None])[..., None]
    for side in ("down", "up"):
        rows = updates.rows(side) * lengths
        sampled_rows = rows[at].flatten(0, 1)
        # in chunks: the inner products of all rows would take (n · r)² numbers
        for start in range(0, len(updates), _CHUNK):
            inner = rows[start : start + _CHUNK].flatten(0, 1) @ sampled_rows.mT
            blocks = inner.square().reshape(-1, rows.shape[1], len(at), rows.shape[1])
            similarity[start : start + _CHUNK] += blocks.sum((1, 3))
    return similarity


def sample_adapters(n: int) -> list[int]:
    """Return the adapters to compare all others with: evenly spaced ones of n."""
    return sorted({round(position) for position in np.linspace(0, n - 1, min(n, MAX_SAMPLE)).tolist()})


def candidate_groupings(similarity: Float[Tensor, "n s"], sampled: Sequence[int]) -> list[list[int]]:
    """Return groupings of all adapters, for every number of groups that separates them.

    Args:
        similarity: Similarity of n adapters with the s sampled ones.
        sampled: Indices of the sampled adapters among the n.

    Returns:
        For each grouping, the group of every adapter. Groups are numbered by first appearance.
    """
    among_sampled = similarity[list(sampled)]
    # as a cosine: an update with few components is not less similar to others
    norm = among_sampled.diagonal().clamp_min(1e-300).sqrt()
    affinity = (among_sampled / norm[:, None] / norm[None]).clamp(0, 1)
    # without the diagonal, as Ng et al.: an adapter's similarity to itself is no sign of a group
    affinity.fill_diagonal_(0.0)
    # the normalised affinity has an eigenvalue near 1 for each group that is connected to itself alone
    degree = affinity.sum(1).clamp_min(1e-12).rsqrt()
    _, vectors = torch.linalg.eigh(degree[:, None] * affinity * degree[None])
    groupings: list[list[int]] = []
    for count in (count for count in GROUP_COUNTS if count * MIN_GROUP <= len(sampled)):
        leading = vectors[:, -count:]
        rows = leading / torch.linalg.vector_norm(leading, dim=1, keepdim=True).clamp_min(1e-12)
        # in the leading eigenvectors, rows of one group point in nearly the same direction
        groups = _k_means(rows, count)
        members = torch.nn.functional.one_hot(groups, count).to(torch.float64)
        sizes = members.sum(0)
        if float(sizes.min()) < MIN_GROUP or not _are_separate(affinity, groups):
            continue
        # adapters that were not sampled join the group that they are most similar to on average
        nearest = ((similarity / norm[None]) @ members / sizes).argmax(1)
        nearest[list(sampled)] = groups
        labels = _number_by_appearance(nearest.tolist())
        if labels not in groupings:
            groupings.append(labels)
    return groupings


def _k_means(rows: Float[Tensor, "s c"], count: int) -> Int[Tensor, " s"]:
    """Cluster rows by k-means, from centres that are as far apart as can be, so that no random start is needed."""
    # farthest-first start: of two groups, each gets a centre before any gets two
    centres = rows[[0]]
    for _ in range(1, count):
        distance = torch.cdist(rows, centres).amin(1)
        centres = torch.cat([centres, rows[[int(distance.argmax())]]])
    groups = torch.cdist(rows, centres).argmin(1)
    for _ in range(MAX_ITERATIONS):
        members = torch.nn.functional.one_hot(groups, count).to(rows.dtype)
        # a group may lose all its members: no division by 0
        centres = (members.mT @ rows) / members.sum(0).clamp_min(1)[:, None]
        reassigned = torch.cdist(rows, centres).argmin(1)
        if bool((reassigned == groups).all()):
            break
        groups = reassigned
    return groups


def _are_separate(affinity: Float[Tensor, "s s"], groups: Int[Tensor, " s"]) -> bool:
    """Return whether adapters of each group are clearly more similar to each other than to those of other groups.

    One group may be an exception: the adapters that are similar to none.
    """
    same = groups[:, None] == groups[None]
    across = float(affinity[~same].mean())
    n_unrelated = 0
    for number in sorted(set(groups.tolist())):
        in_group = groups == number
        size = int(in_group.sum())
        within = float(affinity[in_group][:, in_group].sum()) / (size * (size - 1))
        n_unrelated += within < MIN_CONTRAST * across
    return n_unrelated <= 1


def _number_by_appearance(labels: Sequence[int]) -> list[int]:
    numbers: dict[int, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels]
