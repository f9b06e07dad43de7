"""Quantise heads and other tensors of a version, each within its own error bound."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...core import dtypes
from ...errors import OptionError
from ..quantised_tensor import MAX_NORM, MIN_NORM
from .blocks import Block, Quantisation, QuantisedBlock
from .decoded import LossyVersion, TensorLayout, TensorRows
from .search import search


@dataclass(frozen=True, slots=True)
class QuantisedTensors:
    """The tensors of a version as integers, and those that are stored exactly.

    Attributes:
        tensors: Rows by key, without classes.
        exact: Tensors that are stored exactly.
        error: Largest relative error of a tensor.
    """

    tensors: Mapping[str, TensorRows]
    exact: Mapping[str, Tensor]
    error: float


def quantise_tensors(
    tensors: Mapping[str, Tensor], bounds: Mapping[str, float], reference: LossyVersion | None
) -> QuantisedTensors:
    """Quantise tensors as coarsely as their error bounds allow.

    Args:
        tensors: Tensors by key.
        bounds: Bound of the relative error of each tensor, in its dtype; 0 for a tensor that is stored exactly.
        reference: Version that may predict them; None for none.
    """
    quantised: dict[str, TensorRows] = {}
    exact: dict[str, Tensor] = {}
    largest = 0.0
    for key in sorted(tensors):
        outcome = _quantise(tensors[key], bounds[key], reference.tensor_rows.get(key) if reference else None)
        if outcome is None:
            exact[key] = tensors[key]
        else:
            quantised[key], error = outcome
            largest = max(largest, error)
    return QuantisedTensors(quantised, exact, largest)


def _quantise(tensor: Tensor, bound: float, reference: TensorRows | None) -> tuple[TensorRows, float] | None:
    """Quantise a tensor, and return its rows and relative error; None if its bound is 0 or cannot be met."""
    if not bound or not tensor.numel() or tensor.dtype not in dtypes.STORED:
        return None
    layout = TensorLayout.of(tensor)
    values = tensor.to(torch.float64).reshape(layout.rows, layout.width).numpy()
    norm = float(np.linalg.norm(values))
    limit = (bound * norm) ** 2
    # the square of a tiny bound is 0 in float64
    if not MIN_NORM < norm < MAX_NORM or not limit:
        return None
    earlier = reference if reference is not None and reference.layout.shape == layout.shape else None
    block = Block(values, np.ones(layout.rows), earlier.rows if earlier else None, has_one_level=True)

    def attempt(quantisation: Quantisation) -> tuple[QuantisedBlock, float]:
        quantised = block.quantise(quantisation)
        decoded = layout.tensor(quantised.rows.values).to(torch.float64).reshape(values.shape).numpy()
        return quantised, float(np.square(decoded - values).sum())

    try:
        coarsest = search([block], limit, earlier.level if earlier is not None else None, attempt)
    except OptionError:
        return None
    return TensorRows(layout, coarsest.rows.rows), math.sqrt(coarsest.square) / norm
