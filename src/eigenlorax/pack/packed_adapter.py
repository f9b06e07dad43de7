"""An adapter as coefficients in a subspace, and its conversion to an ordinary LoRA."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..codec.group_integers import Payload
from ..codec.storage.coded import coefficient_metadata
from ..core import narrowing, projection
from ..core.adapter import Adapter, LazyMapping, LoRAFactors, ModuleSpec
from ..core.coefficients import Coefficients
from ..core.license import License
from ..core.origin import Origin
from ..core.subspace import Subspace
from ..formats import peft
from .record import Record


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """One adapter as coefficients in a subspace.

    Attributes:
        name: Name of the adapter.
        coefficients: Coefficients, by the adapter's own module names.
        subspace_names: Names of these modules in the subspace, by the adapter's own names.
        heads: Trained heads, decoded when they are used if they are coded (`outside_tensors`).
        carried: Other tensors outside the subspace, decoded likewise.
        source_config: The source's `adapter_config.json`.
        record: Bytes and errors.
        subspace: Fingerprint of the subspace in which the coefficients were computed; None for the current one. An
            earlier subspace has fewer components.
        origin: File of the source, for formats other than PEFT's.
        payload: Tensors of the file by key, for storages that do not store coefficients as floats. A copy with other
            coefficients must not keep it.
        source_dtype: Widest dtype of the source's LoRA factors; None if the pack does not record it.
        parent: Adapter of the pack whose file contains the codes of this adapter; None if its own file contains them.
        license: Licence that the source states, if any.
    """

    name: str
    coefficients: Mapping[str, Coefficients]
    subspace_names: Mapping[str, str]
    heads: Mapping[str, Tensor]
    carried: Mapping[str, Tensor]
    source_config: str
    record: Record
    subspace: str | None = None
    origin: Origin | None = None
    payload: Payload | None = None
    source_dtype: torch.dtype | None = None
    parent: str | None = None
    license: License | None = None

    def with_parent(self, parent: str | None) -> "PackedAdapter":
        """Return the adapter with its codes in the file of another one, or in its own again if `parent` is None."""
        size = 0 if parent is not None else coefficient_bytes(self.coefficients, self.payload)
        return replace(self, parent=parent, record=replace(self.record, coefficient_bytes=size))


def coefficient_bytes(coefficients: Mapping[str, Coefficients], payload: Payload | None) -> int:
    """Return the tensor bytes of an adapter's coefficients in its file."""
    if payload is not None:
        return sum(tensor.nbytes for tensor in payload.values())
    return sum(module.stored_bytes for module in coefficients.values())


def unpack(packed: PackedAdapter, subspace: Subspace, dtype: torch.dtype) -> Adapter:
    """Convert an adapter to an ordinary LoRA with factors in `dtype`.

    Factors are computed when they are read. Heads and carried tensors are those of the pack.
    """
    carried = peft.from_tensors(packed.name, packed.source_config, packed.carried, where=packed.name)
    bases = {module: subspace.modules[name] for module, name in packed.subspace_names.items()}

    def factors(module: str) -> LoRAFactors:
        if module not in bases:
            return carried.modules[module]
        # only float16 has a narrower range than float32, which can represent the update of any trained adapter
        if dtype != torch.float16:
            return projection.reconstruct(packed.coefficients[module], bases[module], dtype)
        return narrowing.narrow(projection.reconstruct(packed.coefficients[module], bases[module]), dtype)

    specs = {
        module: ModuleSpec(
            rank=metadata.rank,
            in_features=bases[module].down.dimension,
            out_features=bases[module].up.dimension,
            scaling=metadata.scaling,
            dtype=dtype,
            kernel=metadata.kernel,
        )
        for module, metadata in coefficient_metadata(packed.coefficients).items()
    }
    specs = dict(sorted({**specs, **carried.specs}.items()))
    return Adapter(
        name=packed.name,
        specs=specs,
        modules=LazyMapping(specs, factors),
        base_model=carried.base_model,
        revision=carried.revision,
        heads=packed.heads,
        carried=packed.carried if not carried.specs else carried.carried,
        source_config=packed.source_config,
        origin=packed.origin,
        license=packed.license,
    )
