"""Relative errors from squared norms, and their statistics over several adapters."""

import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from ..codec.storage.table import storage_by_name
from ..core import linalg
from ..core.basis import Basis
from ..pack.pack import Pack
from .comparison_data import Spread


def summarise(errors: Mapping[str, float]) -> Spread | None:
    """Summarise errors by adapter name; None if there are none."""
    if not errors:
        return None
    values = list(errors.values())
    worst = max(errors, key=lambda name: (errors[name], name))
    rms = math.sqrt(math.fsum(value**2 for value in values) / len(values))
    return Spread(len(values), statistics.fmean(values), rms, errors[worst], worst)


def relative(lost: Tensor, total: Tensor) -> list[float]:
    """Return √(lost / total) of each adapter."""
    tiny = torch.finfo(total.dtype).tiny
    errors: list[float] = (lost.clamp_min(0) / total.clamp_min(tiny)).sqrt().tolist()
    return errors


def beyond_chance(lost: float, chance: float) -> float:
    """Return the share of squared norm that is kept, of what random bases of equal size do not keep.

    lost, chance: relative errors in the bases and in random ones.
    """
    return 1 - lost**2 / chance**2 if chance > 0 else 0.0


def width(pack: Pack) -> int:
    """Return the bytes per number of the LoRAs that ratios refer to: the pack's narrower dtype, 2 for integers."""
    return min(storage_by_name(name).lora_itemsize for name in (pack.storage, pack.coefficient_storage))


def rank(basis: Basis) -> int:
    """Return the numerical rank of the stack that was fitted, from its stored float32 spectrum.

    If the spectrum is cut off, this is a lower bound.
    """
    values = basis.singular_values
    if basis.tail:
        return len(values)
    return linalg.numerical_rank(values, (basis.dimension, basis.dimension)) if len(values) else 0
