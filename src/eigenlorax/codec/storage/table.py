"""All storages by the names that users and manifests write."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...core import dtypes, keys
from ...core.coefficients import CoefficientBatch
from ...core.limits import PARSE_FAILURES
from ...core.subspace import Subspace
from ...errors import FormatError, reason
from .. import group_integers
from . import traits
from .base import ModuleSlot, Storage
from .coded import CodedStorage
from .cores import DiagonalCoreStorage, FullCoreStorage
from .floats import FloatStorage
from .integers import INT4, INT8, integer_matrices

CODED = CodedStorage(traits.CODED, torch.float32)
FLOAT_STORAGES: dict[str, Storage] = {
    dtypes.name(dtype): FloatStorage(dtypes.name(dtype), dtype) for dtype in dtypes.STORED
}
STORAGES: dict[str, Storage] = {
    **FLOAT_STORAGES,
    INT8.name: INT8,
    INT4.name: INT4,
    CODED.name: CODED,
    **{
        f"{kind}-{dtypes.name(dtype)}": cls(
            f"{kind}-{dtypes.name(dtype)}", torch.promote_types(dtype, torch.float32), kind, dtype
        )
        for kind, cls in (("full", FullCoreStorage), ("diagonal", DiagonalCoreStorage))
        for dtype in dtypes.STORED
    },
}


def storage_by_name(name: str) -> Storage:
    """Return the storage of this name; `OptionError` if there is none."""
    return STORAGES[traits.check_storage(name)]


def parse_storage(dtype: str | torch.dtype | None) -> Storage | None:
    """Return the storage of a name or a float dtype, and None for None; `OptionError` for anything else."""
    if dtype is None:
        return None
    return storage_by_name(dtype if isinstance(dtype, str) else dtypes.name(dtype))


def adapter_payload(batch: CoefficientBatch, row: int, module: str) -> dict[str, Tensor]:
    """Return the payload of one adapter of a batch, by the names in the adapter's file; empty where there is none."""
    payload = {}
    for name, tensor in (batch.payload or {}).items():
        side, _, field = name.partition(".")
        if name in keys.CORES.values():
            payload[f"{keys.MODEL_PREFIX}{module}.{name}"] = tensor[row]
        # as `drop_zero_exponent` does for a single matrix
        elif field != group_integers.EXPONENT or int(tensor[row]):
            payload[f"{keys.coefficients_key(module, side)}.{field}"] = tensor[row]
    return payload


def as_float_tensors(
    tensors: Mapping[str, Tensor], slots: Callable[[], Mapping[str, ModuleSlot]], subspace: Callable[[], Subspace]
) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file as a float storage has them.

    Args:
        tensors: Tensors of the file.
        slots: Returns the metadata of the adapter's modules. Called only where the adapter's storage needs it.
        subspace: Returns the adapter's subspace. Called only where the adapter's storage needs it.

    Raises:
        FormatError: If the coefficients cannot be decoded.
    """
    try:
        kind = next((kind for kind, name in keys.CORES.items() if any(k.endswith(f".{name}") for k in tensors)), None)
        if kind is not None:
            modules = slots()
            # a file has cores of one dtype; `read_adapter` refuses any other
            stored = {tensors[key].dtype for key in (keys.core_key(module, kind) for module in modules)}
            storage = STORAGES[f"{kind}-{dtypes.name(stored.pop())}"]
            return _decode(storage, tensors, modules, subspace)
        if keys.CODED in tensors:
            return _decode(CODED, tensors, slots(), subspace)
        floats = dict(tensors)
        for name, side, payload in integer_matrices(tensors):
            rows = group_integers.decode(payload)
            for field in payload:
                del floats[f"{name}.{field}"]
            floats[name] = rows if side == "down" else rows.mT.contiguous()
    except PARSE_FAILURES as error:
        raise FormatError(f"the adapter's coefficients cannot be read: {reason(error)}.") from error
    return floats


def _decode(
    storage: Storage, tensors: Mapping[str, Tensor], slots: Mapping[str, ModuleSlot], subspace: Callable[[], Subspace]
) -> dict[str, Tensor]:
    """Read an adapter and write it as float32; tensors that are no coefficients stay."""
    remaining = dict(tensors)
    coefficients, _ = storage.read_adapter(remaining, slots, subspace)
    return remaining | FLOAT_STORAGES["float32"].adapter_tensors(coefficients)
