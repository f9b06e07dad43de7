"""Adapters as cores: of each module, only the matrix between the components of its two bases, in floats.

Bases beside cores are stored as floats. The update of a module is Uᵀ · core · V.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import dtypes, keys, projection
from ...core.basis import Basis
from ...core.batch import ModuleBatch, svd_balanced
from ...core.coefficients import CoefficientBatch, Coefficients
from ...core.linalg import append_zeros
from ...core.projection import DualComponents
from ...core.subspace import ModuleBases, Subspace
from ...errors import OptionError
from .. import bitstream, diagonal_cores, singular_codes
from ..group_integers import Payload
from .base import CHANGED_IN_MEMORY, ModuleSlot, Storage, StoredRows, describe_tensor
from .floats import FloatStorage
from .sizes import ModuleSizes

NOT_PAIRED = (
    "the subspace of this pack is not extended: its cores are diagonal, and the rows of its sides go in pairs. Add the "
    "adapter without extend (--extend), or fit the pack again with it."
)


@dataclass(frozen=True, slots=True)
class CoreStorage(Storage):
    """Storage that writes one core per module. In memory the core is factored into coefficients.

    Attributes:
        kind: Kind of the cores, a key of `keys.CORES`.
        stored_dtype: Dtype of the cores in the file.
    """

    kind: str
    stored_dtype: torch.dtype

    @property
    def basis_storage(self) -> FloatStorage:
        return FloatStorage(dtypes.name(self.stored_dtype), self.stored_dtype)

    @property
    def number_bytes(self) -> float:
        return float(self.stored_dtype.itemsize)

    @property
    def keeps_factors(self) -> bool:
        return False

    def round_bases(self, bases: ModuleBases) -> ModuleBases:
        raise OptionError(self._not_for_bases)

    def extend_basis(self, basis: Basis, rows: Tensor) -> Basis:
        raise OptionError(self._not_for_bases)

    def subspace_tensors(self, subspace: Subspace) -> dict[str, Tensor]:
        raise OptionError(self._not_for_bases)

    def read_components(
        self, tensors: Mapping[str, Tensor], key: str, n_fitted: int, grown: Mapping[int, int], dimension: int
    ) -> list[StoredRows]:
        raise OptionError(self._not_for_bases)

    @property
    def _not_for_bases(self) -> str:
        return f"{self.name} stores cores, and no components: pass dtype={self.basis_storage.name!r}."

    def prepare(self, batch: ModuleBatch, products: torch.dtype = torch.float64) -> ModuleBatch:
        # as near to the factors of a core as there are any: else the error of an update is a difference of large
        # numbers
        return svd_balanced(projection.balance_batch(batch, self.dtype))

    def project(self, batch: ModuleBatch, bases: ModuleBases, dual: DualComponents | None = None) -> CoefficientBatch:
        exact = self._best_cores(batch, bases, dual)
        cores = exact.to(self.stored_dtype)
        projection.check_rounding(exact.flatten(1)[:, None], cores.flatten(1)[:, None])
        # of the rounded cores, as a reader computes them, on the CPU: devices differ in the last bits of an SVD
        down, up = self._factors(cores.cpu(), batch.down.shape[1])
        device = exact.device
        payload = {keys.CORES[self.kind]: cores.cpu()}
        return CoefficientBatch(down.to(device, self.dtype), up.to(device, self.dtype), batch.scaling, payload)

    def adapter_tensors(self, coefficients: Mapping[str, Coefficients]) -> dict[str, Tensor]:
        if coefficients:
            raise OptionError(CHANGED_IN_MEMORY)
        return {}

    def read_adapter(
        self, tensors: MutableMapping[str, Tensor], slots: Mapping[str, ModuleSlot], subspace: Callable[[], Subspace]
    ) -> tuple[Mapping[str, Coefficients], Payload | None]:
        payload = {key: tensors.pop(key) for key in (keys.core_key(module, self.kind) for module in slots)}
        coefficients = {}
        for (key, core), (module, slot) in zip(payload.items(), slots.items(), strict=True):
            sizes = slot.sizes or ModuleSizes.of(subspace().modules[slot.subspace_module])
            shape = self._shape(sizes.k)
            if core.dtype != self.stored_dtype or tuple(core.shape) != shape:
                raise ValueError(f"{key} is {describe_tensor(core)} and should be {shape}, {self.stored_dtype}")
            # `torch.linalg.svd` raises on NaN and Inf, with a message that names no tensor
            if not bool(core.isfinite().all()):
                raise ValueError(f"{key} is not finite")
            bitstream.check_rank(slot.rank, (sizes.widths[1], sizes.widths[0]))
            down, up = (factor[0].to(self.dtype).contiguous() for factor in self._factors(core[None], slot.rank))
            coefficients[module] = slot.check(module, Coefficients(down, up, slot.scaling, slot.kernel))
        return coefficients, payload

    @abstractmethod
    def _shape(self, k: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of the core of one module, between k = (k_down, k_up) components."""

    @abstractmethod
    def _best_cores(self, batch: ModuleBatch, bases: ModuleBases, dual: DualComponents | None = None) -> Tensor:
        """Return the cores of least squared error, float64, one per adapter of the batch."""

    @abstractmethod
    def _factors(self, cores: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Factor cores into (n, r, k_down) and (n, k_up, r), float64. rank: of the adapters' own factors."""


@dataclass(frozen=True, slots=True)
class FullCoreStorage(CoreStorage):
    """One number per pair of components, (k_up, k_down), between bases of any fit.

    Its factors have the adapter's own rank, beyond which a core has rounding errors alone.
    """

    @property
    def pads_rank(self) -> bool:
        return True

    def _shape(self, k: tuple[int, int]) -> tuple[int, ...]:
        return k[1], k[0]

    def _best_cores(self, batch: ModuleBatch, bases: ModuleBases, dual: DualComponents | None = None) -> Tensor:
        # for orthonormal components, the best core is the product of the best coefficients
        exact = projection.project_batch(batch, bases, torch.float64, dual)
        return exact.up @ exact.down

    def _factors(self, cores: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        n = len(cores)
        up, down = singular_codes.core_factors(cores, torch.ones(n, dtype=torch.float64), torch.full((n,), rank))
        return _pad_rank(down, up, rank - down.shape[1])


@dataclass(frozen=True, slots=True)
class DiagonalCoreStorage(CoreStorage):
    """One number per pair of components, (k,), between bases whose components go in pairs.

    Component j of one side goes with component j of the other alone. Factors have the rank k, or 1 where k is 0.
    """

    @property
    def ridge(self) -> float:
        """The ridge of `diagonal_cores`, whose squared error is below that of rounding."""
        return max(diagonal_cores.RIDGE, torch.finfo(self.stored_dtype).eps / 16)

    @property
    def extension_error(self) -> str | None:
        return NOT_PAIRED

    def _shape(self, k: tuple[int, int]) -> tuple[int, ...]:
        return (k[0],)

    def _best_cores(self, batch: ModuleBatch, bases: ModuleBases, dual: DualComponents | None = None) -> Tensor:
        rows = [bases.side(side).components.to(torch.float64) for side in keys.SIDES]
        down, up = batch.down.to(torch.float64), batch.up.to(torch.float64)
        equations = diagonal_cores.normal_equations(down, up, (rows[0], rows[1]))
        return diagonal_cores.solve(*equations, self.ridge)

    def _factors(self, cores: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        # half of each number on either side, and its sign on one
        exact = cores.to(torch.float64)
        down, up = torch.diag_embed(exact.abs().sqrt()), torch.diag_embed(exact.sign() * exact.abs().sqrt())
        return _pad_rank(down, up, max(1 - exact.shape[1], 0))

    def exact_coefficients(self, batch: ModuleBatch, bases: ModuleBases) -> CoefficientBatch | None:
        down, up = self._factors(self._best_cores(batch, bases), batch.down.shape[1])
        return CoefficientBatch(down, up, batch.scaling)


def _pad_rank(down: Tensor, up: Tensor, n_zeros: int) -> tuple[Tensor, Tensor]:
    """Append zero rows to `down`, (n, r, k), and as many zero columns to `up`, (n, k, r)."""
    return append_zeros(down, n_zeros), append_zeros(up, n_zeros, dim=-1)
