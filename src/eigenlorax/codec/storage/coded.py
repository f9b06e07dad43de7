"""Components and coefficients as entropy-coded integers: one run of bytes per basis, and one per adapter."""

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core import atomic_files, keys
from ...core.adapter import LazyMapping
from ...core.basis import Basis
from ...core.batch import ModuleBatch
from ...core.coefficients import CoefficientBatch, Coefficients
from ...core.limits import check_coded_count, damaged_on_error
from ...core.projection import DualComponents
from ...core.subspace import ModuleBases, Subspace
from ...errors import OptionError
from .. import basis_bytes, bitstream
from ..adapter_codes import AdapterCodes, ModuleLayout, dequantise_module
from ..group_integers import Payload
from .base import CHANGED_IN_MEMORY, ModuleSlot, Storage, StoredRows, check_finite, check_rows

NEEDS_TARGET = (
    "dtype 'coded' goes with max_error, max_bytes or ratio, which set the precision of its numbers: pass one of these, "
    "or another dtype."
)
NOT_EXTENDED = (
    "the subspace of this pack is not extended: the residual of an adapter is stored beside its coefficients. "
    "Add the adapter without extend (--extend)."
)


@dataclass(frozen=True, slots=True)
class CodedStorage(Storage):
    """Entropy-coded integers (`bitstream`), as `encoder` makes them in fits with an error bound or a size."""

    @property
    def number_bytes(self) -> float:
        # a rough figure, for forecasts: the true one depends on the error bound
        return 1.0

    @property
    def keeps_factors(self) -> bool:
        return False

    @property
    def pads_rank(self) -> bool:
        return True

    @property
    def extension_error(self) -> str | None:
        return NOT_EXTENDED

    def round_bases(self, bases: ModuleBases) -> ModuleBases:
        raise OptionError(NEEDS_TARGET)

    def extend_basis(self, basis: Basis, rows: Tensor) -> Basis:
        raise OptionError(NOT_EXTENDED)

    def subspace_tensors(self, subspace: Subspace) -> dict[str, Tensor]:
        sides = [pair.side(side) for _, pair in sorted(subspace.modules.items()) for side in keys.SIDES]
        # one tensor for all: names and offsets of one per basis would take as many bytes as a small basis
        return {keys.CODED_COMPONENTS: blob(b"".join(stored_basis(basis) for basis in sides if basis.n_fitted))}

    def decode_bases(self, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        # shapes come in the order in which the bases are written
        filled = {key: shape for key, shape in shapes.items() if shape[0]}
        if keys.CODED_COMPONENTS in tensors:
            encoded_bases = basis_bytes.split(tensor_bytes(tensors, keys.CODED_COMPONENTS), len(filled))
        else:
            # up to format 5, each basis had a tensor of its own
            encoded_bases = [
                basis_bytes.with_length(tensor_bytes(tensors, f"{key}.{basis_bytes.PART}")) for key in filled
            ]
        # a small file may claim rows that take all memory: refused before anything is decoded
        numbers = sum(k * dimension for k, dimension in filled.values())
        check_coded_count(numbers, sum(map(len, encoded_bases)), "the rows of the bases")
        # the entropy decoder runs all streams side by side: one basis at a time takes many times as long
        bases = basis_bytes.decode(list(zip(encoded_bases, filled.values(), strict=True)))
        decoded = dict(tensors)
        for key, data, basis in zip(filled, encoded_bases, bases, strict=True):
            decoded |= {key: basis.rows, f"{key}.{basis_bytes.PART}": blob(data)}
        return decoded

    def read_components(
        self, tensors: Mapping[str, Tensor], key: str, n_fitted: int, grown: Mapping[int, int], dimension: int
    ) -> list[StoredRows]:
        if any(grown.values()):
            raise ValueError(f"{key} has rows that were appended after the fit, which no coded basis has")
        # seeds rebuild augmented rows; there are no other ones beside the fitted
        empty: StoredRows = torch.zeros(0, dimension), None
        if not n_fitted:
            return [(torch.zeros(0, dimension), {}), *(empty for _ in grown)]
        check_rows(key, tensors[key], (n_fitted, dimension), self.dtype)
        payload = {basis_bytes.PART: tensors[f"{key}.{basis_bytes.PART}"]}
        return [(tensors[key], payload), *(empty for _ in grown)]

    def prepare(self, batch: ModuleBatch, products: torch.dtype = torch.float64) -> ModuleBatch:
        raise OptionError(NEEDS_TARGET)

    def project(self, batch: ModuleBatch, bases: ModuleBases, dual: DualComponents | None = None) -> CoefficientBatch:
        raise OptionError(NEEDS_TARGET)

    def adapter_tensors(self, coefficients: Mapping[str, Coefficients]) -> dict[str, Tensor]:
        raise OptionError(CHANGED_IN_MEMORY)

    def read_adapter(
        self, tensors: MutableMapping[str, Tensor], slots: Mapping[str, ModuleSlot], subspace: Callable[[], Subspace]
    ) -> tuple[Mapping[str, Coefficients], Payload | None]:
        # codes are by the modules' names in the subspace, which the adapter's own may differ from
        payload = {keys.CODED: tensors.pop(keys.CODED)}
        data, modules = tensor_bytes(payload, keys.CODED), subspace().modules
        layouts = _adapter_layouts(data, {name: modules[name] for name in (s.subspace_module for s in slots.values())})
        codes = bitstream.decode_adapter(data, layouts, {slot.subspace_module: slot.rank for slot in slots.values()})
        return CodedCoefficients(codes, layouts, slots), payload


def _adapter_layouts(data: bytes, modules: Mapping[str, ModuleBases]) -> dict[str, ModuleLayout]:
    """Return the layouts of a coded adapter's modules, by their names in the subspace, from its bytes and the bases."""
    cluster = bitstream.read_cluster(data)
    layouts = {}
    for name, bases in modules.items():
        sides = [(stored_basis(basis), basis.dimension) for basis in (bases.down, bases.up)]
        layouts[name] = with_grown_widths(basis_bytes.read_layout(sides, cluster), bases)
    return layouts


def with_grown_widths(layout: ModuleLayout, bases: ModuleBases) -> ModuleLayout:
    """Return the layout with the widths of bases that have grown since they were encoded.

    A coded adapter has no coefficients on the components that were appended.
    """
    return replace(layout, widths=(bases.down.k, bases.up.k))


def stored_basis(basis: Basis) -> bytes:
    """Return the bytes of a coded basis."""
    stored = (basis.payload or {}).get(basis_bytes.PART)
    return basis_bytes.EMPTY if stored is None else stored.numpy().tobytes()


@dataclass(frozen=True, slots=True)
class CoefficientMetadata:
    """Metadata of one module's coefficients, known without their numbers.

    Attributes:
        rank: Rank of the adapter in this module.
        scaling: Scaling of the adapter in this module.
        kernel: (height, width) of a convolution; empty for a linear module.
        residual_sides: The sides that have a residual.
        stored_rank: Number of the first components, beyond which those of an entropy-coded adapter are zero.
    """

    rank: int
    scaling: float
    kernel: tuple[int, ...]
    residual_sides: tuple[str, ...]
    stored_rank: int


class CodedCoefficients(LazyMapping[Coefficients]):
    """The coefficients of a coded adapter by the adapter's own module names, decoded to floats at each access.

    The floats take many times the memory of the codes.

    Args:
        codes: Codes of the adapter.
        layouts: Layouts of its modules, by their names in the subspace.
        slots: Metadata of its modules, by the adapter's own names.
    """

    __slots__ = ("_codes", "_slots")

    def __init__(
        self,
        codes: AdapterCodes,
        layouts: Mapping[str, ModuleLayout],
        slots: Mapping[str, ModuleSlot],
    ) -> None:
        self._codes, self._slots = codes, slots

        def decode(module: str) -> Coefficients:
            slot = slots[module]
            # decoded on access, long after the file was checked: what is wrong is damage of the pack still
            with damaged_on_error(f"module {module} of a coded adapter"):
                coefficients = dequantise_module(
                    codes.modules[slot.subspace_module],
                    codes.step_size,
                    layouts[slot.subspace_module],
                    rank=slot.rank,
                    scaling=slot.scaling,
                    kernel=slot.kernel,
                )
                check_finite({module: slot.check(module, coefficients)})
                return coefficients

        super().__init__(dict(sorted(slots.items())), decode)

    @property
    def metadata(self) -> dict[str, CoefficientMetadata]:
        """The metadata of all modules, from the levels of their codes."""
        metadata = {}
        for module in self:
            codes, slot = self._codes.modules[self._slots[module].subspace_module], self._slots[module]
            sides = [s for s, rows in (("down", codes.down), ("up", codes.up)) if rows.has_residual]
            stored_rank = min(slot.rank, *codes.core.shape) if codes.core_level else codes.count
            metadata[module] = CoefficientMetadata(slot.rank, slot.scaling, slot.kernel, tuple(sides), stored_rank)
        return metadata


def coefficient_metadata(coefficients: Mapping[str, Coefficients]) -> dict[str, CoefficientMetadata]:
    """Return the metadata of all modules of an adapter; no number of a coded one is decoded for it."""
    if isinstance(coefficients, CodedCoefficients):
        return coefficients.metadata
    return {
        module: CoefficientMetadata(
            c.rank, c.scaling, c.kernel, tuple(s for s in keys.SIDES if c.residual(s) is not None), c.rank
        )
        for module, c in coefficients.items()
    }


def codes_digest(codes: Tensor) -> str:
    """Return the sha256 of an adapter's codes, by which the config of an adapter with equal ones names them."""
    return atomic_files.digest(codes.numpy().tobytes())


def with_parent_codes(
    tensors: Mapping[str, Tensor], codes: Tensor, expected_digest: str | None, parent: str
) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file together with its parent's codes, which are in another file.

    Args:
        tensors: Tensors of the adapter's file.
        codes: `keys.CODED` of the parent's file.
        expected_digest: `codes_digest` by the adapter's config.
        parent: Name of the parent, for messages.

    Raises:
        ValueError: If the adapter has codes of its own, or the parent has other codes than the config says.
    """
    if keys.CODED in tensors:
        raise ValueError(f"the adapter has codes of its own, and those of its parent {parent!r}")
    if codes_digest(codes) != expected_digest:
        raise ValueError(f"the parent {parent!r} has other codes than the adapter's config says")
    return {**tensors, keys.CODED: codes}


def blob(data: bytes) -> Tensor:
    """Return bytes as a uint8 tensor of its own memory."""
    # a bytearray is writable, and torch warns of tensors over memory that is not
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def tensor_bytes(tensors: Mapping[str, Tensor], name: str) -> bytes:
    """Return the bytes that `blob` made a tensor of; `ValueError` for a tensor of another form."""
    tensor = tensors[name]
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, {tensor.dtype}, and should be bytes")
    return tensor.numpy().tobytes()
