"""Encoding of adapters for a pack: coefficients in the bases of a subspace, projected or entropy-coded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from ..codec.adapter_codes import AdapterCodes, ModuleLayout
from ..codec.group_integers import Payload
from ..codec.storage import coded
from ..codec.storage.base import ModuleSlot, Storage
from ..codec.storage.coded import CodedCoefficients, coefficient_metadata
from ..codec.storage.table import adapter_payload
from ..core import keys, metrics, projection
from ..core.adapter import Adapter, LoRAFactors
from ..core.batch import stack_factors
from ..core.coefficients import CoefficientBatch, Coefficients
from ..core.metrics import AdapterError, ModuleError
from ..core.projection import DualComponents
from ..core.subspace import ModuleBases
from ..errors import NonFiniteError
from ..formats import lora_config
from .outside_tensors import OutsideTensors
from .packed_adapter import PackedAdapter, coefficient_bytes
from .record import Record
from .scanned_adapter import ScannedAdapter

FLOAT32_RANGE = 1e-36, 1e37
"""Range of factors whose products and norms float32 can represent, with a margin for smaller and larger rows."""


@dataclass(frozen=True, slots=True)
class EncodedModule:
    """One encoded module of an adapter.

    Attributes:
        coefficients: The coefficients.
        payload: Tensors of the file by key, for storages that do not store coefficients as floats.
        error: Error of the module.
    """

    coefficients: Coefficients
    payload: Payload
    error: ModuleError


@dataclass(frozen=True, slots=True)
class EncodedAdapter:
    """All encoded modules of an adapter.

    Attributes:
        coefficients: Coefficients, by the adapter's own module names.
        payload: Tensors of the file by key, for storages that do not store coefficients as floats; else None.
        error: Error over all modules.
    """

    coefficients: Mapping[str, Coefficients]
    payload: Payload | None
    error: AdapterError

    @classmethod
    def of(cls, modules: Mapping[str, EncodedModule]) -> "EncodedAdapter":
        """Join modules that were encoded separately."""
        payload: dict[str, Tensor] = {}
        for module in modules.values():
            payload |= module.payload
        return cls(
            coefficients={name: module.coefficients for name, module in sorted(modules.items())},
            payload=payload or None,
            error=metrics.adapter_error(module.error for module in modules.values()),
        )


def project_module(
    module: str, factors: LoRAFactors, bases: ModuleBases, storage: Storage, dual: DualComponents | None = None
) -> EncodedModule:
    """Project one update on its bases, round the coefficients, and measure the error.

    Args:
        module: The adapter's own name of the module.
        factors: Factors of the update.
        bases: Bases of the module.
        storage: Storage of the coefficients.
        dual: `projection.dual_components` of the bases, if they were computed before.
    """
    prepared = storage.prepare(stack_factors([factors], [0.0]))
    projected = storage.project(prepared, bases, dual)
    (error,) = metrics.module_errors(prepared, projected, bases, None, storage.exact_coefficients(prepared, bases))
    return encoded_row(module, projected, 0, factors.kernel, error)


def project_with_residual(module: str, factors: LoRAFactors, bases: ModuleBases, storage: Storage) -> EncodedModule:
    """Project one update on its bases, and store what the bases do not represent of its factors as it is.

    Args:
        module: The adapter's own name of the module.
        factors: Factors of the update.
        bases: Bases of the module.
        storage: Storage of the coefficients, which stores both factors as floats.

    Raises:
        NonFiniteError: The dtype of the storage cannot represent the factors.
    """
    balanced = storage.prepare(stack_factors([factors], [0.0]))
    down, up = balanced.down[0].double(), balanced.up[0].mT.double()
    # coefficients may vanish in the storage's dtype, since the residual holds what they lack
    exact = projection.project(replace(factors, down=down, up=up), bases)
    rounded = replace(exact, down=exact.down.to(storage.dtype), up=exact.up.to(storage.dtype))
    inside = projection.reconstruct(rounded, bases)
    residuals = [(down - inside.down).to(storage.dtype), (up - inside.up).to(storage.dtype).contiguous()]
    if not all(bool(tensor.isfinite().all()) for tensor in (rounded.down, rounded.up, *residuals)):
        raise NonFiniteError(
            f"Module {module} has factors that {storage.name} cannot represent. Fit a pack with "
            "dtype='float32' (--dtype float32)."
        )
    coefficients = replace(rounded, down_residual=residuals[0], up_residual=residuals[1])
    return EncodedModule(coefficients, {}, metrics.module_error(factors, coefficients, bases))


def encoded_row(
    module: str, batch: CoefficientBatch, row: int, kernel: tuple[int, ...], error: ModuleError
) -> EncodedModule:
    """Return one row of a batch of projected adapters as an encoded module."""
    coefficients = Coefficients(batch.down[row], batch.up[row], float(batch.scaling[row]), kernel)
    return EncodedModule(coefficients, adapter_payload(batch, row, module), error)


def encoded_by_codes(
    scanned: ScannedAdapter, codes: AdapterCodes, layouts: Mapping[str, ModuleLayout], data: bytes, error: float
) -> EncodedAdapter:
    """Return an entropy-coded adapter, whose coefficients are decoded when they are used.

    Args:
        scanned: The adapter.
        codes: Its integers.
        layouts: Layout of the integers of each module, by name in the subspace.
        data: `codes` as bytes.
        error: Relative error over all modules.

    Raises:
        NonFiniteError: The decoded factors would be outside the range of float32.
    """
    specs, squares, names = scanned.adapter.specs, scanned.scan.delta_squares, scanned.subspace_names
    # factors of equal norms have the fourth root of the update's squared norm each
    size = sum(squares[module] for module in names) ** 0.25
    smallest, largest = FLOAT32_RANGE
    for module in sorted(names):
        scaling = abs(specs[module].scaling)
        if squares[module] and not (size / max(1.0, scaling) > smallest and size / min(1.0, scaling) < largest):
            raise NonFiniteError(
                f"Adapter {scanned.name!r}, module {module}: decoded factors would be outside the range of float32. "
                "Leave the adapter out, or fit with max_error and dtype float64."
            )
    slots = {
        module: ModuleSlot(name, specs[module].rank, specs[module].scaling, specs[module].kernel)
        for module, name in names.items()
    }
    return EncodedAdapter(
        coefficients=CodedCoefficients(codes, layouts, slots),
        payload={keys.CODED: coded.blob(data)},
        # residuals are encoded too, so rounding is the only cause of an error
        error=AdapterError(delta_error=error, rounding_error=error),
    )


def pack_adapter(
    scanned: ScannedAdapter, encoded: EncodedAdapter, outside: OutsideTensors, *, in_fit: bool
) -> PackedAdapter:
    """Return an encoded adapter with its record.

    Args:
        scanned: The adapter.
        encoded: Its coefficients.
        outside: Its heads and carried tensors.
        in_fit: True if the subspace was fitted to it.
    """
    adapter, coefficients = scanned.adapter, encoded.coefficients
    record = Record(
        delta_error=encoded.error.delta_error,
        rounding_error=encoded.error.rounding_error,
        in_fit=in_fit,
        untrained=scanned.is_untrained,
        ranks=list(adapter.ranks),
        modules=len(coefficients),
        lora_numbers=sum(adapter.specs[module].numbers for module in coefficients),
        coefficient_bytes=coefficient_bytes(coefficients, encoded.payload),
        carried_bytes=outside.carried.size,
        head_bytes=outside.heads.size,
        source_sha256=scanned.scan.content_hash,
        source_file_bytes=adapter.file_bytes,
        head_error=outside.error,
        source_head_bytes=outside.heads.source_bytes,
        source_carried_bytes=outside.carried.source_bytes,
        head_numbers=outside.heads.numbers,
        carried_numbers=outside.carried.numbers,
    )
    return PackedAdapter(
        name=adapter.name,
        coefficients=coefficients,
        subspace_names={module: scanned.subspace_names[module] for module in sorted(coefficients)},
        heads=outside.heads.tensors,
        carried=outside.carried.tensors,
        source_config=_source_config(adapter, coefficients),
        record=record,
        origin=adapter.origin,
        payload=encoded.payload,
        source_dtype=_widest_dtype([adapter.specs[module].dtype for module in coefficients]),
        license=adapter.license,
    )


def _widest_dtype(factor_dtypes: Sequence[torch.dtype]) -> torch.dtype | None:
    """Return the narrowest dtype that can represent all numbers of these dtypes, so that an export keeps them."""
    return reduce(torch.promote_types, factor_dtypes) if factor_dtypes else None


def _source_config(adapter: Adapter, coefficients: Mapping[str, Coefficients]) -> str:
    """Return the adapter's config, with the ranks of its coefficients if they differ from the adapter's ranks."""
    config = adapter.source_config if adapter.source_config is not None else lora_config.make(adapter)
    ranks = {module: metadata.rank for module, metadata in coefficient_metadata(coefficients).items()}
    if any(rank != adapter.specs[module].rank for module, rank in ranks.items()):
        return lora_config.with_ranks(config, adapter, ranks)
    return config
