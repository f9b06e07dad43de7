"""Heads and carried tensors of a collection, as a pack stores them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..codec.tensor_codes import References
from ..core.progress import Progress
from ..pack.outside_tensors import MAX_HEAD_ERROR, MIN_HEAD_ERROR, OutsideCoding, OutsideTensors
from .collection import Collection
from .head_references import choose_references

HEAD_ERRORS = (MIN_HEAD_ERROR, 0.14, 0.2, MAX_HEAD_ERROR)
"""Error bounds of heads that are tried for a size."""
HEADS = "encoding heads"
"""Stage that is reported to a progress callback."""


@dataclass(frozen=True, slots=True)
class StoredOutside:
    """Heads and carried tensors of all adapters as they are stored.

    Attributes:
        by_adapter: Heads and carried tensors, by name of the adapter.
        references: Reference tensors that they refer to.
        head_error: Error bound of heads; None if all tensors are stored exactly.
    """

    by_adapter: Mapping[str, OutsideTensors]
    references: References
    head_error: float | None

    @property
    def has_coded_heads(self) -> bool:
        """True if the tensors take other bytes with another error bound."""
        return any(each.error > 0 for each in self.by_adapter.values())

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(each.size for each in self.by_adapter.values()) + len(self.references.data)


def store_exactly(collection: Collection) -> StoredOutside:
    """Return all tensors as they are."""
    exact = {scanned.name: OutsideCoding().encode(scanned) for scanned in collection.scanned}
    return StoredOutside(exact, References(), None)


def encode_outside(collection: Collection, head_error: float, progress: Progress) -> StoredOutside:
    """Encode heads and carried tensors within their error bounds; exactly if `head_error` is 0."""
    if not head_error:
        return store_exactly(collection)
    references = choose_references(collection.scanned, head_error)
    coding, by_adapter = OutsideCoding(head_error, references), {}
    for done, scanned in enumerate(collection.scanned):
        progress(HEADS, done, len(collection.scanned))
        by_adapter[scanned.name] = coding.encode(scanned)
    progress(HEADS, len(collection.scanned), len(collection.scanned))
    return StoredOutside(by_adapter, references, head_error)


def encode_for_size(
    collection: Collection, error_for: Callable[[StoredOutside], float], progress: Progress
) -> StoredOutside:
    """Encode heads and carried tensors with about the error that is left to the updates.

    Args:
        collection: The adapters.
        error_for: Returns the error bound of the updates that is estimated to fit beside these tensors.
        progress: Callback with the arguments (stage, done, total).
    """
    for head_error in HEAD_ERRORS:
        outside = encode_outside(collection, head_error, progress)
        if not outside.has_coded_heads or error_for(outside) <= head_error:
            break
    return outside
