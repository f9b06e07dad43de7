"""Contents of a pack beside bases and coefficients: heads and carried tensors of all adapters, a basis for training."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..codec.tensor_codes import References
from ..core.progress import Progress
from ..pack.outside_tensors import OutsideCoding, OutsideTensors, choose_references
from ..pack.pack import Pack
from .collection import Collection

HEADS = "encoding heads"
"""Stage that is reported to a progress callback."""


@dataclass(frozen=True, slots=True)
class StoredOutside:
    """Heads and carried tensors of all adapters as they are stored.

    Attributes:
        by_adapter: Heads and carried tensors, by name of the adapter.
        references: Reference tensors that they refer to.
    """

    by_adapter: Mapping[str, OutsideTensors]
    references: References

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(each.size for each in self.by_adapter.values()) + len(self.references.data)


@dataclass(frozen=True, slots=True)
class FixedContents:
    """Contents of a pack that are complete before its bases and coefficients are fitted.

    Attributes:
        outside: Heads and carried tensors.
        basis: Basis for training; None if there is none.
    """

    outside: StoredOutside
    basis: Pack | None

    @property
    def size(self) -> int:
        """Bytes of their tensors."""
        return self.outside.size + (self.basis.info.stored_bytes if self.basis is not None else 0)


def encode_outside(collection: Collection, head_error: float | None, progress: Progress) -> StoredOutside:
    """Encode heads and carried tensors within their error bounds; exactly if `head_error` is None."""
    if head_error is None:
        exact = {scanned.name: OutsideCoding().encode(scanned) for scanned in collection.scanned}
        return StoredOutside(exact, References())
    references = choose_references(collection.scanned, head_error)
    coding, by_adapter = OutsideCoding(head_error, references), {}
    for done, scanned in enumerate(collection.scanned):
        progress(HEADS, done, len(collection.scanned))
        by_adapter[scanned.name] = coding.encode(scanned)
    progress(HEADS, len(collection.scanned), len(collection.scanned))
    return StoredOutside(by_adapter, references)
