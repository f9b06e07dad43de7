"""Error bounds of a version: relative to its own numbers, or to its change from a version that it refers to."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..codec.versions.version import DecodedVersion
from ..core import metrics
from ..core.adapter import Adapter
from ..errors import OptionError
from .history import VersionRecord
from .outside_tensors import MAX_HEAD_ERROR, MIN_HEAD_ERROR, error_bound

MAX_BOUND = 0.99
"""Largest error bound relative to a version's own numbers, where its change from another version exceeds them."""
_MIN_CHANGE_ERROR = 1e-3
"""Smallest error relative to the change that a byte limit leads to. LoRAs in 16 bits have no smaller one."""
_START = 0.2
"""Error relative to the change that is tried first for a byte limit."""
_CLOSE = 0.97
"""Share of a byte limit that ends the search."""
_MAX_TURNS = 12


@dataclass(frozen=True, slots=True)
class VersionBounds:
    """Error bounds of a version, relative to its own numbers.

    Attributes:
        max_error: Bound of the update, over all modules.
        head_error: Largest bound of a task head.
        tensors: Bound of each tensor beside the LoRA factors, by key; 0 for one that is stored exactly.
    """

    max_error: float
    head_error: float
    tensors: Mapping[str, float]


def default_head_error(max_error: float) -> float:
    """Return the error bound of task heads beside an error bound of the update."""
    return min(max(max_error, MIN_HEAD_ERROR), MAX_HEAD_ERROR)


def own_bounds(adapter: Adapter, max_error: float, head_error: float) -> VersionBounds:
    """Return error bounds that are relative to an adapter itself."""
    tensors = {**adapter.heads, **adapter.carried}
    bounds = {
        key: error_bound(key, tensor, head_error, is_head=key in adapter.heads) if tensor.is_floating_point() else 0.0
        for key, tensor in tensors.items()
    }
    return VersionBounds(max_error, head_error, bounds)


def change_bounds(
    adapter: Adapter, record: VersionRecord, reference: DecodedVersion, max_error: float, head_error: float
) -> VersionBounds:
    """Return error bounds that are relative to the change of an adapter from another version, as that is decoded.

    What differs from that version by less than its own error bound has this bound: it may not have changed at all.

    Args:
        adapter: The adapter.
        record: The other version, which is not lossless.
        reference: The same version, decoded.
        max_error: Bound of the error of the update, relative to its change.
        head_error: Bound of the error of each task head, relative to its change.
    """
    assert record.max_error is not None
    assert record.head_error is not None
    earlier = own_bounds(adapter, record.max_error, record.head_error)
    change = metrics.relative_distance(adapter.modules, reference.modules)
    heads = {}
    for key, tensor in {**adapter.heads, **adapter.carried}.items():
        bound = earlier.tensors[key]
        heads[key] = _bound(_distance(tensor, reference.tensors[key]), bound, head_error) if bound else 0.0
    largest = max((heads[key] for key in adapter.heads if heads[key]), default=head_error)
    # tensors that are close to those of the base model are kept closer than heads
    limits = own_bounds(adapter, max_error, largest).tensors
    return VersionBounds(
        max_error if change is None else _bound(change, record.max_error, max_error),
        largest,
        {key: min(bound, limits[key]) for key, bound in heads.items()},
    )


def _bound(change: float, earlier: float, error: float) -> float:
    """Return an error bound relative to numbers themselves.

    Args:
        change: Change of the numbers, relative to them.
        earlier: Error bound of the version from which they changed.
        error: Bound of their error, relative to the change.
    """
    return earlier if change <= earlier else min(error * change, MAX_BOUND)


def _distance(tensor: Tensor, reference: Tensor) -> float:
    """Return ‖T − T'‖ / ‖T‖; 0 if T is zero."""
    wide = tensor.double()
    norm = float(wide.norm())
    return float((wide - reference.double()).norm()) / norm if norm else 0.0


def search_error(max_bytes: int, count_bytes: Callable[[float], int]) -> float:
    """Return the smallest error relative to the change at which a version fits into some bytes, or one close to it.

    Args:
        max_bytes: Maximum number of bytes.
        count_bytes: Function from an error to the bytes of the version.

    Raises:
        OptionError: The version does not fit at any error below 1.
    """
    error, fitting, too_small = _START, None, None
    for _ in range(_MAX_TURNS):
        size = count_bytes(error)
        if size <= max_bytes:
            fitting = error
            if size >= _CLOSE * max_bytes or error <= _MIN_CHANGE_ERROR:
                break
        elif error >= MAX_BOUND:
            raise OptionError(
                f"the version takes {size:,} bytes even at an error of {error:g} of its change, which exceeds "
                f"{max_bytes:,} bytes (max_bytes=; of fit, max_bytes_per_adapter=, --max-bytes-per-adapter). "
                "Pass more bytes."
            )
        else:
            too_small = error
        # each halving of the error takes about one bit more for each number
        if fitting is None or too_small is None:
            error = min(max(error * (2.0 if fitting is None else 0.5), _MIN_CHANGE_ERROR), MAX_BOUND)
        else:
            error = math.sqrt(fitting * too_small)
    assert fitting is not None
    return fitting
