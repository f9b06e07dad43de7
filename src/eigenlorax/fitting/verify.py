"""The errors of a pack, measured again from its files and the originals, in float64 and without code of the fit."""

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
"""Relative difference from a recorded error that rounding of sums explains."""
ABSOLUTE_TOLERANCE = 2e-7
"""Error that rounding to float32 alone explains."""


@dataclass(frozen=True, slots=True)
class Verified:
    """One adapter.

    delta_error: as measured now, against the original. recorded: as the pack has it. bound: the error bound that it was
    encoded for; None if there was none.
    """

    delta_error: float
    recorded: float
    bound: float | None

    @property
    def holds(self) -> bool:
        """True if the error exceeds neither the recorded error nor the error bound."""
        most = min(self.recorded, self.bound if self.bound is not None else self.recorded)
        return self.delta_error <= most * (1 + RELATIVE_TOLERANCE) + ABSOLUTE_TOLERANCE


@dataclass(frozen=True, slots=True)
class Verification:
    """Measured errors by name. unknown: adapters whose originals were not passed."""

    adapters: Mapping[str, Verified]
    unknown: list[str]

    @property
    def holds(self) -> bool:
        """True if no adapter exceeds its recorded error or the error bound."""
        return all(adapter.holds for adapter in self.adapters.values())


def verify(pack: Pack, adapters: Sources, *, progress: Progress | None = None, **options: Any) -> Verification:
    """Measure the errors of a pack's adapters again, from its bytes on disk and the originals.

    Updates are computed from what the pack reconstructs, and subtracted; nothing of the fit is used.

    Args:
        pack: A pack on disk or in memory.
        adapters: Originals, in any form that `fit` takes, matched by content.
        progress: Called as (stage, done, total).
        options: Those of `read_adapter`.

    Raises:
        FormatError: None of the adapters is in the pack.
        PackDamagedError: A file of the pack was changed.
    """
    report = progress or (lambda stage, done, total: None)
    pack.verify()
    originals = match_adapters(pack, adapters, report, options, 3).adapters
    if not originals:
        raise FormatError(
            "none of the adapters given is in the pack, by its content. Give the files that the pack was fitted from."
        )
    verified = {}
    for done, (name, original) in enumerate(sorted(originals.items())):
        report("measuring adapters", done, len(originals))
        record = pack.records[name]
        # a refit without the original bounds the error to what was refitted, not to the original
        is_bound = (record.in_fit or pack.is_coded) and not record.bound
        error = _measure(original, pack.adapter(name, torch.float64), list(pack.packed(name).subspace_names))
        verified[name] = Verified(error, record.delta_error, pack.fit_info.max_error if is_bound else None)
    report("measuring adapters", len(originals), len(originals))
    return Verification(verified, sorted(set(pack.names) - set(originals)))


def _measure(original: Adapter, reconstructed: Adapter, modules: list[str]) -> float:
    """Return √(Σ‖D − D̂‖² / Σ‖D‖²) over some modules."""
    lost = total = 0.0
    for module in modules:
        total += _square(original.modules[module])
        lost += _square_of_difference(original.modules[module], reconstructed.modules[module])
    return (lost / total) ** 0.5 if total else 0.0


def _square(factors: LoRAFactors) -> float:
    return _product_square(factors.scaling * factors.up.double(), factors.down.double())


def _square_of_difference(first: LoRAFactors, second: LoRAFactors) -> float:
    up = torch.cat([first.scaling * first.up.double(), -second.scaling * second.up.double()], dim=1)
    return _product_square(up, torch.cat([first.down.double(), second.down.double()]))


def _product_square(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return ‖left · right‖² from triangular factors, so that no two large numbers are subtracted."""
    return float((linalg.triangular_factor(left) @ linalg.triangular_factor(right.mT).mT).square().sum())
