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
    """Return statistics of errors by adapter name; None if there are none."""
    if not errors:
        return None
    values = list(errors.values())
    worst = max(errors, key=lambda name: (errors[name], name))
    rms = math.sqrt(math.fsum(value**2 for value in values) / len(values))
    return Spread(len(values), statistics.fmean(values), rms, errors[worst], worst)


def relative(squared_errors: Tensor, total: Tensor) -> list[float]:
    """Return the relative error of each adapter, √(squared error / squared norm).

    Args:
        squared_errors: Squared error of each adapter, (n,). Negative rounding errors count as 0.
        total: Squared norm of each adapter, (n,).
    """
    tiny = torch.finfo(total.dtype).tiny
    errors: list[float] = (squared_errors.clamp_min(0) / total.clamp_min(tiny)).sqrt().tolist()
    return errors


def beyond_chance(error: float, chance: float) -> float:
    """Return the share of squared norm kept beyond chance: 1 if all is kept, 0 if no more than random bases keep.

    Args:
        error: Relative error in the bases.
        chance: Relative error in random bases of equal size.
    """
    return 1 - error**2 / chance**2 if chance > 0 else 0.0


def width(pack: Pack) -> int:
    """Return the bytes per number of the LoRAs in compression ratios: the pack's narrower dtype, 2 for integers."""
    return min(storage_by_name(name).lora_itemsize for name in (pack.storage, pack.coefficient_storage))


def rank(basis: Basis) -> int:
    """Return the numerical rank of the fitted stack, from its stored spectrum; a lower bound if that is cut off."""
    values = basis.singular_values
    if basis.tail:
        return len(values)
    return linalg.numerical_rank(values, (basis.dimension, basis.dimension)) if len(values) else 0
