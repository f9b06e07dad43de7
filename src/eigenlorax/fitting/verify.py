"""Independent measurement of a pack's errors, from its files and the originals, in float64, without code of the fit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..core import linalg
from ..core.adapter import Adapter, LoRAFactors
from ..core.progress import Progress
from ..errors import FormatError
from ..formats.sources import Sources
from ..pack.pack import Pack
from .match_sources import match_adapters

RELATIVE_TOLERANCE = 1e-4
"""Maximum relative difference from a recorded error that is attributed to rounding of sums."""
ABSOLUTE_TOLERANCE = 2e-7
"""Maximum absolute difference that is attributed to rounding to float32."""


@dataclass(frozen=True, slots=True)
class Verified:
    """Verified error of one adapter.

    Attributes:
        delta_error: Error measured now, against the original.
        recorded: Error that the pack records.
        bound: Error bound for which the adapter was encoded; None if there was none.
    """

    delta_error: float
    recorded: float
    bound: float | None

    @property
    def holds(self) -> bool:
        """True if the error exceeds neither the recorded error nor the error bound."""
        limit = min(self.recorded, self.bound if self.bound is not None else self.recorded)
        return self.delta_error <= limit * (1 + RELATIVE_TOLERANCE) + ABSOLUTE_TOLERANCE


@dataclass(frozen=True, slots=True)
class Verification:
    """Result of `verify`.

    Attributes:
        adapters: Verified errors, by adapter.
        unknown: Names of adapters whose originals were not passed.
    """

    adapters: Mapping[str, Verified]
    unknown: list[str]

    @property
    def holds(self) -> bool:
        """True if no adapter exceeds its recorded error or the error bound."""
        return all(adapter.holds for adapter in self.adapters.values())


def verify(pack: Pack, adapters: Sources, *, progress: Progress | None = None, **options: Any) -> Verification:
    """Measure the errors of a pack's adapters again, from its bytes on disk and the originals.

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
    originals = match_adapters(pack, adapters, report, options, 3).adapters
    if not originals:
        raise FormatError(
            "none of the adapters that were passed is in the pack, compared by content. Pass the files that the pack "
            "was fitted from."
        )
    verified = {}
    for done, (name, original) in enumerate(sorted(originals.items())):
        report("measuring adapters", done, len(originals))
        record = pack.records[name]
        # after a refit without originals, the bound holds against the reconstruction that was refitted
        is_bound = (record.in_fit or pack.is_coded) and not record.bound
        error = _measure(original, pack.adapter(name, torch.float64), list(pack.packed(name).subspace_names))
        verified[name] = Verified(error, record.delta_error, pack.fit_info.max_error if is_bound else None)
    report("measuring adapters", len(originals), len(originals))
    return Verification(verified, sorted(set(pack.names) - set(originals)))


def _measure(original: Adapter, reconstructed: Adapter, modules: list[str]) -> float:
    """Return √(Σ‖D − D̂‖² / Σ‖D‖²) over some modules."""
    squared_error = total = 0.0
    for module in modules:
        total += _square(original.modules[module])
        squared_error += _square_of_difference(original.modules[module], reconstructed.modules[module])
    return (squared_error / total) ** 0.5 if total else 0.0


def _square(factors: LoRAFactors) -> float:
    return _product_square(factors.scaling * factors.up.double(), factors.down.double())


def _square_of_difference(first: LoRAFactors, second: LoRAFactors) -> float:
    up = torch.cat([first.scaling * first.up.double(), -second.scaling * second.up.double()], dim=1)
    return _product_square(up, torch.cat([first.down.double(), second.down.double()]))


def _product_square(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return ‖left · right‖² from triangular factors, so that no two large numbers are subtracted."""
    return float((linalg.triangular_factor(left) @ linalg.triangular_factor(right.mT).mT).square().sum())
