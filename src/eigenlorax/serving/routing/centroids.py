"""Centroids of the embedded texts of each adapter, several per adapter: spherical k-means."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Rounds of k-means. It converges in fewer on a few hundred texts; more change the centroids very little.
_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Centroids:
    """Unit centroids of all adapters.

    Attributes:
        centres: The centroids of all adapters, (n, d) float32.
        owners: Index of the adapter of each centroid, (n,).
    """

    centres: Tensor
    owners: Tensor

    def scores(self, embeddings: Tensor) -> Tensor:
        """Return the cosine of each embedding with the closest centroid of each adapter, (rows, adapters).

        Args:
            embeddings: Unit rows, (rows, d).
        """
        cosines = embeddings @ self.centres.mT
        n_adapters = int(self.owners.max()) + 1
        closest = cosines.new_full((len(cosines), n_adapters), -torch.inf)
        return closest.scatter_reduce(1, self.owners.expand_as(cosines), cosines, "amax")


def fit_centroids(embeddings: Sequence[Tensor], per_adapter: int) -> Centroids:
    """Return up to `per_adapter` centroids for each adapter.

    Args:
        embeddings: Unit rows of each adapter's texts, (rows, d) each, at least one row.
        per_adapter: Maximum number of centroids per adapter.
    """
    centres = [_spherical_k_means(rows, per_adapter) for rows in embeddings]
    counts = torch.tensor([len(each) for each in centres])
    return Centroids(torch.cat(centres), torch.arange(len(centres)).repeat_interleave(counts))


def _spherical_k_means(rows: Tensor, k: int) -> Tensor:
    """Return up to k unit centres of unit rows. There is no random number in it.

    It starts from the row closest to the mean; each further centre is the row that is farthest from those before.
    """
    mean = rows.mean(0)
    chosen = [int((rows @ mean).argmax())]
    closest = rows @ rows[chosen[0]]
    # equal rows would become equal centres
    while len(chosen) < k and float(closest.min()) < 1 - 1e-6:
        chosen.append(int(closest.argmin()))
        closest = torch.maximum(closest, rows @ rows[chosen[-1]])
    centres = rows[chosen]
    for _ in range(_ROUNDS):
        nearest = (rows @ centres.mT).argmax(1)
        sums = torch.zeros_like(centres).index_add(0, nearest, rows)
        norms = sums.norm(dim=1, keepdim=True)
        # a centre that lost all its rows, or whose rows cancel, stays where it was
        centres = torch.where(norms > 1e-6, sums / norms.clamp_min(1e-6), centres)
    return centres
