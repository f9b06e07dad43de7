"""An adapter whose tensors were scanned, before it is encoded."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..core.adapter import Adapter
from ..formats.checks import Scan


@dataclass(frozen=True, slots=True)
class ScannedAdapter:
    """Adapter whose tensors were scanned, and its modules that a subspace contains.

    Attributes:
        adapter: The adapter.
        scan: Content hash and norms of its tensors.
        subspace_names: Name in the subspace of each such module, by the adapter's own name. Other modules are stored
            outside it.
    """

    adapter: Adapter
    scan: Scan
    subspace_names: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.adapter.name

    @property
    def is_untrained(self) -> bool:
        """True if the adapter changes no weight: every update is zero, and it carries nothing else."""
        return not any(self.scan.delta_squares.values()) and not self.adapter.carried

    def is_trained(self, module: str) -> bool:
        """Return whether the adapter's update of this module is not zero."""
        return self.scan.delta_squares[module] > 0
