"""Independent measurement of a pack's errors, from its files and the originals, in float64, without code of the fit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..core import linalg
from ..core.adapter import Adapter, LoRAFactors
from ..core.progress import Progress
from ..formats.sources import Sources
from ..pack.history import VersionRecord
from ..pack.outside_tensors import carried_tensors, error_bound
from ..pack.pack import Pack
from .match_sources import check_any_original, match_adapters

RELATIVE_TOLERANCE = 1e-4
"""Maximum relative difference from a recorded error that is attributed to rounding of sums."""
ABSOLUTE_TOLERANCE = 2e-7
"""Maximum absolute difference that is attributed to rounding to float32."""

_Tensors = tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Verified:
    """Verified error of one adapter or version.

    Attributes:
        delta_error: Error measured now, against the original.
        recorded: Error that the pack records.
        bound: Error bound for which the adapter was encoded; None if there was none.
        head_error: Largest relative error of a head or carried tensor, measured now.
        recorded_head_error: The one that the pack records.
        heads_hold: True if no such tensor exceeds its own error bound.
    """

    delta_error: float
    recorded: float
    bound: float | None
    head_error: float
    recorded_head_error: float
    heads_hold: bool

    @property
    def holds(self) -> bool:
        """True if no error exceeds the recorded error or the error bound."""
        limit = min(self.recorded, self.bound if self.bound is not None else self.recorded)
        return (
            _is_within(self.delta_error, limit)
            and _is_within(self.head_error, self.recorded_head_error)
            and self.heads_hold
        )


@dataclass(frozen=True, slots=True)
class Verification:
    """Result of `verify`.

    Attributes:
        adapters: Verified errors, by name of an adapter or version ("run@1000").
        unknown: Names of adapters and versions whose originals were not passed.
    """

    adapters: Mapping[str, Verified]
    unknown: list[str]

    @property
    def holds(self) -> bool:
        """True if no adapter exceeds its recorded error or the error bound."""
        return all(adapter.holds for adapter in self.adapters.values())


def verify(pack: Pack, adapters: Sources, *, progress: Progress | None = None, **options: Any) -> Verification:
    """Measure the errors of a pack's adapters and versions again, from its bytes on disk and the originals.

    The reconstructed update is subtracted from the original one. No code of the fit is used.

    Args:
        pack: A pack on disk or in memory.
        adapters: Originals, in any form that `fit` takes, matched by content.
        progress: Callback with the arguments (stage, done, total).
        options: Options of `read_adapter`.

    Returns:
        The measured error of each adapter, beside the recorded error and the error bound.

    Raises:
        FormatError: None of the adapters is in the pack.
        PackDamagedError: A file of the pack was changed.

    Example:
        >>> import eigenlorax
        >>> pack = eigenlorax.fit("adapters/", max_error=0.1)
        >>> eigenlorax.verify(pack, "adapters/").holds
        True
    """
    report = progress or (lambda stage, done, total: None)
    pack.verify()
    versions = {history.full_name(record): record for history in pack.histories.values() for record in history.versions}
    hashes = {**pack.source_hashes, **{name: record.source_sha256 for name, record in versions.items()}}
    originals = match_adapters(hashes, adapters, report, options, 3).adapters
    check_any_original(originals)
    verified = {}
    # versions in their order, so that each is decoded once
    known = [name for name in hashes if name in originals]
    for done, name in enumerate(known):
        report("measuring adapters", done, len(known))
        if name in versions:
            verified[name] = _verify_version(originals[name], pack.adapter(name), versions[name])
        else:
            verified[name] = _verify_adapter(originals[name], pack, name)
    report("measuring adapters", len(known), len(known))
    return Verification(verified, [name for name in hashes if name not in originals])


def _verify_adapter(original: Adapter, pack: Pack, name: str) -> Verified:
    record = pack.records[name]
    # after a refit without originals, the bound holds against the reconstruction that was refitted
    is_bound = (record.in_fit or pack.is_coded) and not record.bound
    packed = pack.packed(name)
    error = _measure(original, pack.adapter(name, torch.float64), list(packed.subspace_names))
    head_error, heads_hold = _measure_outside(
        (original.heads, packed.heads),
        (carried_tensors(original, packed.subspace_names), packed.carried),
        None if record.bound else pack.fit_info.head_error,
    )
    bound = pack.fit_info.max_error if is_bound else None
    return Verified(error, record.delta_error, bound, head_error, record.head_error, heads_hold)


def _verify_version(original: Adapter, version: Adapter, record: VersionRecord) -> Verified:
    error = _measure(original, version, list(original.specs))
    head_error, heads_hold = _measure_outside(
        (original.heads, version.heads), (original.carried, version.carried), record.head_error
    )
    return Verified(error, record.delta_error, record.max_error, head_error, record.tensor_error, heads_hold)


def _measure(original: Adapter, reconstructed: Adapter, modules: list[str]) -> float:
    """Return √(Σ‖D − D̂‖² / Σ‖D‖²) over some modules."""
    squared_error = total = 0.0
    for module in modules:
        total += _square(original.modules[module])
        squared_error += _square_of_difference(original.modules[module], reconstructed.modules[module])
    return (squared_error / total) ** 0.5 if total else 0.0


def _measure_outside(heads: _Tensors, carried: _Tensors, head_error: float | None) -> tuple[float, bool]:
    """Return the largest relative error of a head or carried tensor, and whether each is within its bound, if any.

    A tensor that is missing, or of another dtype or shape, has an infinite error.

    Args:
        heads: Heads of the original and of the pack.
        carried: Carried tensors, likewise.
        head_error: Error bound of heads; None for none.
    """
    largest, holds = 0.0, True
    for (expected, stored), is_head in ((heads, True), (carried, False)):
        for key in expected.keys() | stored.keys():
            error = _tensor_error(expected[key], stored[key]) if key in expected and key in stored else math.inf
            largest = max(largest, error)
            if head_error is not None and key in expected:
                bound = error_bound(key, expected[key], head_error, is_head=is_head)
                holds = holds and _is_within(error, bound)
    return largest, holds


def _tensor_error(expected: torch.Tensor, stored: torch.Tensor) -> float:
    if expected.shape != stored.shape or expected.dtype != stored.dtype:
        return math.inf
    error, norm = float((expected.double() - stored.double()).norm()), float(expected.double().norm())
    return error / norm if norm else (0.0 if error == 0 else math.inf)


def _is_within(error: float, limit: float) -> bool:
    return error <= limit * (1 + RELATIVE_TOLERANCE) + ABSOLUTE_TOLERANCE


def _square(factors: LoRAFactors) -> float:
    return _product_square(factors.scaling * factors.up.double(), factors.down.double())


def _square_of_difference(first: LoRAFactors, second: LoRAFactors) -> float:
    up = torch.cat([first.scaling * first.up.double(), -second.scaling * second.up.double()], dim=1)
    return _product_square(up, torch.cat([first.down.double(), second.down.double()]))


def _product_square(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return ‖left · right‖² from triangular factors, so that no two large numbers are subtracted."""
    return float((linalg.triangular_factor(left) @ linalg.triangular_factor(right.mT).mT).square().sum())
