"""The updates of all adapters in one module, before they are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.adapter import LoRAFactors


@dataclass(frozen=True, slots=True)
class UpdateSource:
    """The update of one adapter in a module, not read yet.

    Attributes:
        index: Index of the adapter in the collection.
        read: Returns the factors of the update.
    """

    index: int
    read: Callable[[], LoRAFactors]


@dataclass(frozen=True, slots=True)
class ModuleUpdates:
    """Nonzero updates of one module, optionally restricted to one cluster of adapters.

    Attributes:
        name: Name of the module in the subspace.
        shape: Shape of the updates, (out, in).
        sources: The updates, by adapter.
        cluster: Cluster of the adapters.
    """

    name: str
    shape: tuple[int, int]
    sources: tuple[UpdateSource, ...]
    cluster: int = 0

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.cluster

    @property
    def indices(self) -> Tensor:
        """The indices of the adapters in the collection, int64."""
        return torch.tensor([source.index for source in self.sources], dtype=torch.int64)

    def split(self, groups: Sequence[int]) -> "list[ModuleUpdates]":
        """Divide the updates by the clusters of their adapters."""
        by_cluster = []
        for cluster in range(max(groups) + 1):
            sources = tuple(source for source in self.sources if groups[source.index] == cluster)
            if sources:
                by_cluster.append(replace(self, sources=sources, cluster=cluster))
        return by_cluster
