"""Components and coefficients as plain float tensors of one dtype."""

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import basis as basis_rows
from ...core import keys, projection
from ...core import subspace as subspaces
from ...core.basis import Basis
from ...core.batch import ModuleBatch
from ...core.coefficients import CoefficientBatch, Coefficients
from ...core.projection import DualComponents
from ...core.subspace import ModuleBases, Subspace
from ..group_integers import Payload
from .base import (
    ModuleSlot,
    Storage,
    StoredRows,
    check_finite,
    check_rows,
    pop_residuals,
    residual_tensors,
    separate_tensors,
)


@dataclass(frozen=True, slots=True)
class FloatStorage(Storage):
    """Numbers in files as they are in memory."""

    @property
    def number_bytes(self) -> float:
        return float(self.dtype.itemsize)

    @property
    def keeps_factors(self) -> bool:
        return True

    def round_bases(self, bases: ModuleBases) -> ModuleBases:
        return subspaces.round_bases(bases, self.dtype)

    def extend_basis(self, basis: Basis, rows: Tensor) -> Basis:
        return basis_rows.extend(basis, rows)

    def subspace_tensors(self, subspace: Subspace) -> dict[str, Tensor]:
        # safetensors refuses views, and a view would keep all rows alive
        return separate_tensors(subspace, lambda basis, key: {key: basis.stored.clone()})

    def read_components(
        self, tensors: Mapping[str, Tensor], key: str, n_fitted: int, grown: Mapping[int, int], dimension: int
    ) -> list[StoredRows]:
        counts, rows = [n_fitted, *grown.values()], tensors[key]
        check_rows(key, rows, (sum(counts), dimension), self.dtype)
        return [(block, None) for block in torch.split(rows, counts)]

    def prepare(self, batch: ModuleBatch, products: torch.dtype = torch.float64) -> ModuleBatch:
        return projection.balance_batch(batch, self.dtype, products)

    def project(self, batch: ModuleBatch, bases: ModuleBases, dual: DualComponents | None = None) -> CoefficientBatch:
        return projection.project_batch(batch, bases, self.dtype, dual)

    def adapter_tensors(self, coefficients: Mapping[str, Coefficients]) -> dict[str, Tensor]:
        tensors = {}
        for module, c in coefficients.items():
            for side, matrix in (("down", c.down), ("up", c.up)):
                tensors[keys.coefficients_key(module, side)] = matrix
        return tensors | residual_tensors(coefficients)

    def read_adapter(
        self, tensors: MutableMapping[str, Tensor], slots: Mapping[str, ModuleSlot], subspace: Callable[[], Subspace]
    ) -> tuple[Mapping[str, Coefficients], Payload | None]:
        coefficients = {}
        for module, slot in slots.items():
            down, up = (tensors.pop(keys.coefficients_key(module, side)) for side in keys.SIDES)
            residuals = pop_residuals(tensors, module)
            _check_dtypes(module, (down, up), self.dtype)
            coefficients[module] = slot.check(
                module,
                Coefficients(down, up, slot.scaling, slot.kernel, residuals["down"], residuals["up"]),
            )
        check_finite(coefficients)
        return coefficients, None


def _check_dtypes(module: str, matrices: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    for side, matrix in zip(keys.SIDES, matrices, strict=True):
        if matrix.dtype != dtype:
            raise ValueError(f"the {side} coefficients of module {module} are {matrix.dtype}, and should be {dtype}")
