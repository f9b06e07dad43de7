"""Errors from squared norms, and errors of a group of adapters as one line."""

import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from ..codec.storage.table import storage_by_name
from ..core import linalg
from ..core.basis import Basis
from ..pack.pack import Pack
from .data import Spread


def of(errors: Mapping[str, float]) -> Spread | None:
    """Of adapters by name; None of nobody."""
    if not errors:
        return None
    values = list(errors.values())
    worst = max(errors, key=lambda name: (errors[name], name))
    rms = math.sqrt(math.fsum(value**2 for value in values) / len(values))
    return Spread(len(values), statistics.fmean(values), rms, errors[worst], worst)


def relative(lost: Tensor, total: Tensor) -> list[float]:
    """√(lost / total) of each."""
    tiny = torch.finfo(total.dtype).tiny
    found: list[float] = (lost.clamp_min(0) / total.clamp_min(tiny)).sqrt().tolist()
    return found


def beyond_chance(lost: float, chance: float) -> float:
    """The share of squared norm that is kept, of what random bases of equal k do not keep anyway: from their errors."""
    return 1 - lost**2 / chance**2 if chance > 0 else 0.0


def width(pack: Pack) -> int:
    """Bytes of a number of the LoRAs that ratios are taken of: the pack's narrower dtype, 16 bits for integers."""
    return min(storage_by_name(name).lora_itemsize for name in (pack.storage, pack.coefficient_storage))


def rank(basis: Basis) -> int:
    """Directions of the stack that was fitted, whose spectrum is kept in float32; at least so many where it does not go
    on to the end."""
    values = basis.singular_values
    if basis.tail:
        return len(values)
    return linalg.numerical_rank(values, (basis.dimension, basis.dimension)) if len(values) else 0
