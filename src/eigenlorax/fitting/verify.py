"""What a pack has really lost: every adapter from the files on disk beside its original, in float64."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..core import linalg
from ..core.adapter import Adapter, LoRAFactors
from ..errors import FormatError
from ..formats.sources import Sources
from ..pack.pack import Pack
from .match_sources import recognise

TOLERANCE = 1e-4
"""How far a figure may be off, as a share of itself: rounding of sums."""
FLOOR = 2e-7
"""And at least: what float32 rounds off."""


@dataclass(frozen=True, slots=True)
class Verified:
    """One adapter. delta_error: as measured now, against the original; recorded: as the pack has it, and bound: what it
    may be at most, where the pack was fitted for an error."""

    delta_error: float
    recorded: float
    bound: float | None

    @property
    def holds(self) -> bool:
        """Whether no more is lost than the pack says, and than was asked for."""
        most = min(self.recorded, self.bound if self.bound is not None else self.recorded)
        return self.delta_error <= most * (1 + TOLERANCE) + FLOOR


@dataclass(frozen=True, slots=True)
class Verification:
    """All adapters whose originals were given, by name; and those whose were not."""

    adapters: Mapping[str, Verified]
    unknown: list[str]

    @property
    def holds(self) -> bool:
        """Whether every adapter that was looked at loses no more than it should."""
        return all(one.holds for one in self.adapters.values())


def verify(
    pack: Pack,
    adapters: Sources,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Verification:
    """Measure each adapter of a pack again, from its bytes on disk and its original, which is recognised by content.

    adapters: as `fit` takes them. options: those of `read_adapter`. Nothing of the fit is used: updates are formed from
    what the pack gives back, and subtracted.
    """
    report = progress or (lambda stage, done, total: None)
    pack.verify()
    originals = recognise(pack, adapters, report, options, 3).adapters
    if not originals:
        raise FormatError(
            "none of the adapters given is in the pack, by its content. Give the files that the pack was fitted from."
        )
    bound, found = pack.fit_info.max_error, {}
    for done, (name, original) in enumerate(sorted(originals.items())):
        report("measuring adapters", done, len(originals))
        record = pack.records[name]
        # what was fitted again without its original was given the error beside what it was by then
        asked = bound if (record.in_fit or pack.is_coded) and not record.bound else None
        found[name] = Verified(
            _error(original, pack.adapter(name, torch.float64), pack, name), record.delta_error, asked
        )
    report("measuring adapters", len(originals), len(originals))
    return Verification(found, sorted(set(pack.names) - set(originals)))


def _error(original: Adapter, kept: Adapter, pack: Pack, name: str) -> float:
    """√(Σ‖D − D̂‖² / Σ‖D‖²) over the modules that the subspace holds."""
    lost = total = 0.0
    for module in pack.packed(name).places:
        one, other = original.modules[module], kept.modules[module]
        total += _square(one)
        lost += _square_of_difference(one, other)
    return (lost / total) ** 0.5 if total else 0.0


def _square(one: LoRAFactors) -> float:
    return _product_square(one.scaling * one.up.double(), one.down.double())


def _square_of_difference(one: LoRAFactors, other: LoRAFactors) -> float:
    left = torch.cat([one.scaling * one.up.double(), -other.scaling * other.up.double()], dim=1)
    return _product_square(left, torch.cat([one.down.double(), other.down.double()]))


def _product_square(left: torch.Tensor, right: torch.Tensor) -> float:
    """‖left · right‖² by triangular factors: no two large numbers are subtracted."""
    return float((linalg.triangular_factor(left) @ linalg.triangular_factor(right.mT).mT).square().sum())
