"""Reference tensors of coded heads: means of tensors that resemble each other."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..codec import tensor_codes
from ..codec.quantised_tensor import quantise_tensor
from ..codec.tensor_codes import CodedTensor, References
from ..pack.outside_tensors import DecodedTensors, carried_tensors, error_bound, sample_elements
from ..pack.scanned_adapter import ScannedAdapter

MIN_REFERENCE_NUMBERS = 256
"""Number of elements of a tensor below which no reference is made for it."""
REFERENCE_SHARE = 0.7
"""Error of a reference, relative to the smallest error that a tensor which refers to it may have."""


@dataclass(frozen=True, slots=True)
class _Member:
    """A tensor of a collection, read at each access.

    Attributes:
        tensors: Tensors of its adapter.
        key: Key of the tensor.
        is_head: False for a carried tensor.
    """

    tensors: Mapping[str, Tensor]
    key: str
    is_head: bool

    @property
    def tensor(self) -> Tensor:
        return self.tensors[self.key]


def choose_references(collection: Sequence[ScannedAdapter], head_error: float) -> References:
    """Return reference tensors for tensors of a collection that resemble each other, where they save bytes.

    Tensors are alike if their difference is smaller than they are, as after training from the same start. The reference
    of a group is its mean.

    Args:
        collection: The adapters, in an order that does not depend on that of the arguments.
        head_error: Error bound of heads.
    """
    references: list[CodedTensor] = []
    members: dict[tuple[str, tuple[int, ...]], list[_Member]] = {}
    for scanned in collection:
        carried = carried_tensors(scanned.adapter, scanned.subspace_names)
        for is_head, tensors in ((True, scanned.adapter.heads), (False, carried)):
            for key in tensors:
                if isinstance(tensors, DecodedTensors) and key in tensors.codes:
                    known = tensors.reference(key)
                    if known is not None and known not in references:
                        references.append(known)
                    continue
                member = _Member(tensors, key, is_head)
                tensor = member.tensor
                if tensor.is_floating_point() and tensor.numel() >= MIN_REFERENCE_NUMBERS:
                    members.setdefault((key, tuple(tensor.shape)), []).append(member)
    for _, candidates in sorted(members.items()):
        for group in _groups(candidates):
            reference = _reference(group, head_error)
            if reference is not None and tensor_codes.can_be_read([*references, reference]):
                references.append(reference)
    return References(references)


def _groups(members: Sequence[_Member]) -> Iterator[list[_Member]]:
    """Yield groups of at least two tensors that resemble the first one of their group."""
    groups: list[tuple[Tensor, list[_Member]]] = []
    for member in members:
        sample = sample_elements(member.tensor)
        square = float(sample.square().sum())
        for first, group in groups:
            if float((sample - first).square().sum()) < 0.5 * min(square, float(first.square().sum())):
                group.append(member)
                break
        else:
            groups.append((sample, [member]))
    return (group for _, group in groups if len(group) > 1)


def _reference(group: Sequence[_Member], head_error: float) -> CodedTensor | None:
    """Return the mean of a group as a reference; None if it takes more bytes than it saves."""
    mean = group[0].tensor.double()
    for member in group[1:]:
        mean = mean + member.tensor.double()
    mean = mean / len(group)
    saved_bits, allowed = 0.0, math.inf
    for member in group:
        exact = member.tensor.double()
        square = float(exact.square().sum())
        error = error_bound(member.key, exact, head_error, is_head=member.is_head) ** 2 * square
        if not error:
            # below the smallest number: no tensor of the group can be coded
            return None
        difference = max(float((exact - mean).square().sum()), error)
        # half a bit per number for every factor of 2 in the mean square
        saved_bits += 0.5 * math.log2(square / difference)
        allowed = min(allowed, REFERENCE_SHARE**2 * error)
    square = float(mean.square().sum())
    if not 0 < allowed < square or saved_bits <= 0.5 * math.log2(square / allowed):
        return None
    quantised = quantise_tensor(mean.float(), math.sqrt(allowed / square))
    return tensor_codes.encode_tensors([quantised])[0] if quantised is not None else None
