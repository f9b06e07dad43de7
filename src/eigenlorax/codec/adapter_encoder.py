"""Encode one adapter in bases that exist already, as when it is added to a pack."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.adapter import LoRAFactors
from . import singular_codes
from .adapter_codes import AdapterCodes
from .module_stages import BasisPair
from .packed_codes import PackedCodes
from .singular_codes import UpdateCodes
from .step_sizes import MIN_ERROR_BOUND, as_written, search_step_sizes, strict_bound
from .svd_batch import SvdBatch


def encode_adapter(
    updates: Mapping[str, tuple[LoRAFactors, BasisPair]], cluster: int, error: float
) -> tuple[AdapterCodes, float]:
    """Encode one adapter in existing bases.

    Args:
        updates: Factors and the cluster's bases by module, without updates that are 0.
        cluster: Cluster that the bases are of.
        error: Bound on the adapter's relative error.

    Returns:
        The codes, and the relative error of the adapter, at most `error`.
    """
    batches = {name: SvdBatch.of([factors]) for name, (factors, _) in updates.items()}
    norm = math.sqrt(sum(float(batch.s.square().sum()) for batch in batches.values()))
    numbers = sum(factors.spec.numbers for factors, _ in updates.values())
    bound = strict_bound(max(error, MIN_ERROR_BOUND))

    def encode(step_sizes: Tensor) -> dict[str, UpdateCodes]:
        return {name: singular_codes.encode_updates(batches[name], step_sizes, *updates[name][1]) for name in updates}

    # each round encodes the whole adapter; unlike a collection's, its singular components fit in memory
    def measure(step_sizes: Tensor, _: Tensor | None = None) -> Tensor:
        return torch.stack([codes.squared_errors for codes in encode(step_sizes).values()]).sum(0).sqrt() / norm

    # start from the step size at which the rounding errors of all numbers, each about 0.1 of its square, add up
    step_sizes = as_written(torch.tensor([bound * norm / math.sqrt(0.1 * numbers)], dtype=torch.float64))
    step_sizes, errors = search_step_sizes(measure, step_sizes, measure(step_sizes), bound)
    modules = {name: PackedCodes.of(codes).codes(0) for name, codes in encode(step_sizes).items()}
    return AdapterCodes(float(step_sizes[0]), cluster, modules), float(errors[0])
