"""Components and coefficients as integers of 8 or 4 bits, with a scale for each group of a row (`group_integers`)."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core import basis as basis_rows
from ...core import keys, linalg, projection
from ...core.basis import Basis
from ...core.batch import ModuleBatch, svd_balanced
from ...core.coefficients import CoefficientBatch, Coefficients
from ...core.projection import DualComponents
from ...core.subspace import ModuleBases, Subspace
from .. import group_integers
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
class IntegerStorage(Storage):
    """Integers with a scale for each group of a row. bits: of one integer, 8 or 4.

    A row is a component, or the coefficients of one rank-1 term of an update, up[:, i] · down[i], on one side.
    """

    bits: int

    @property
    def number_bytes(self) -> float:
        return self.bits / 8 + torch.float16.itemsize / group_integers.GROUP

    @property
    def keeps_factors(self) -> bool:
        return False

    @property
    def default_coefficient_storage(self) -> "IntegerStorage":
        # coefficients are a small part of most packs, and their rounding error hits one adapter alone
        return INT8

    def round_bases(self, bases: ModuleBases) -> ModuleBases:
        return ModuleBases(down=self._round_basis(bases.down), up=self._round_basis(bases.up))

    def _round_basis(self, basis: Basis) -> Basis:
        assert not basis.growth
        rows, payload = self._encode_rows(basis.components)
        # a whole spectrum, in float32, would take as many bytes as the codes
        leading = basis.singular_values[: basis.k].clone()
        truncated = replace(basis, components=rows, payload=payload, singular_values=leading, tail=0.0)
        return replace(truncated, tail=max(basis.square - truncated.square, 0.0))

    def extend_basis(self, basis: Basis, rows: Tensor) -> Basis:
        return basis_rows.extend(basis, *self._encode_rows(rows))

    def _encode_rows(self, rows: Tensor) -> tuple[Tensor, Payload]:
        """Round rows; return them as they will be read again, and their payload."""
        payload = group_integers.drop_zero_exponent(group_integers.encode(rows.cpu(), self.bits))
        # an empty payload of 4 bits does not tell an odd width from an even one
        return group_integers.decode(payload) if len(rows) else rows.to(self.dtype), payload

    def subspace_tensors(self, subspace: Subspace) -> dict[str, Tensor]:
        return separate_tensors(subspace, _row_tensors)

    def read_components(
        self, tensors: Mapping[str, Tensor], key: str, n_fitted: int, grown: Mapping[int, int], dimension: int
    ) -> list[StoredRows]:
        empty = torch.zeros(0, dimension, dtype=self.dtype), None
        fitted = self._read_rows(tensors, key, (n_fitted, dimension))
        extensions = [
            self._read_rows(tensors, f"{key}.{index}", (n, dimension)) if n else empty for index, n in grown.items()
        ]
        return [fitted, *extensions]

    def _read_rows(self, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> StoredRows:
        """Decode rows of a shape (n, d); `ValueError` where the payload has others."""
        n, dimension = shape
        payload = payload_of(tensors, name)
        rows = self._decode(payload, name)
        # an empty payload of 4 bits does not tell an odd width from an even one
        rows = rows if n else rows[:, :dimension]
        check_rows(name, rows, shape, self.dtype)
        return rows, payload

    def _decode(self, payload: Payload, name: str) -> Tensor:
        """Decode a payload of this storage's bits; `ValueError`, with the name of the matrix, for any other."""
        codes_dtype = torch.int8 if self.bits == 8 else torch.uint8
        if payload[group_integers.CODES].dtype != codes_dtype:
            raise ValueError(
                f"{name}.{group_integers.CODES} is {payload[group_integers.CODES].dtype}, and should be {codes_dtype}"
            )
        try:
            return group_integers.decode(payload)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def prepare(self, batch: ModuleBatch, products: torch.dtype = torch.float64) -> ModuleBatch:
        # a row's scale follows its largest number, so both factors of a rank-1 term should be equally long; in float64,
        # since the SVD mixes rows of different norms
        return svd_balanced(projection.balance_batch(batch, self.dtype, torch.float64))

    def project(self, batch: ModuleBatch, bases: ModuleBases, dual: DualComponents | None = None) -> CoefficientBatch:
        exact = projection.project_batch(batch, bases, torch.float64, dual)
        rows = dict(zip(keys.SIDES, _spread_rows(exact.down.cpu(), exact.up.mT.cpu()), strict=True))
        payloads = {side: group_integers.encode(rows[side], self.bits) for side in keys.SIDES}
        # the coefficients in memory are those that a reader of the file gets, not the exact ones
        down, up = (group_integers.decode(payloads[side]) for side in keys.SIDES)
        rounded = CoefficientBatch(
            down,
            up.mT.contiguous(),
            exact.scaling,
            {f"{side}.{field}": t for side, payload in payloads.items() for field, t in payload.items()},
        )
        # spread rows: their norms may differ from those of the factors that they stand for
        spread = CoefficientBatch(rows["down"], rows["up"].mT, exact.scaling)
        projection.check_rounded_batch(spread, rounded)
        return rounded.to(exact.down.device)

    def adapter_tensors(self, coefficients: Mapping[str, Coefficients]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for module, c in coefficients.items():
            for side, rows in zip(keys.SIDES, (c.down, c.up.mT), strict=True):
                key = keys.coefficients_key(module, side)
                payload = group_integers.drop_zero_exponent(group_integers.encode(rows, self.bits))
                tensors |= {f"{key}.{field}": tensor for field, tensor in payload.items()}
        return tensors | residual_tensors(coefficients)

    def read_adapter(
        self, tensors: MutableMapping[str, Tensor], slots: Mapping[str, ModuleSlot], subspace: Callable[[], Subspace]
    ) -> tuple[Mapping[str, Coefficients], Payload | None]:
        coefficients: dict[str, Coefficients] = {}
        adapter_payload: dict[str, Tensor] = {}
        for module, slot in slots.items():
            rows = {}
            for side in keys.SIDES:
                key = keys.coefficients_key(module, side)
                payload = payload_of(tensors, key)
                rows[side] = self._decode(payload, key)
                adapter_payload |= {f"{key}.{field}": tensors.pop(f"{key}.{field}") for field in payload}
            residuals = pop_residuals(tensors, module)
            # a file with a payload is written from it alone
            adapter_payload |= {keys.residual_key(module, s): t for s, t in residuals.items() if t is not None}
            up = rows["up"].mT.contiguous()
            coefficients[module] = slot.check(
                module,
                Coefficients(rows["down"], up, slot.scaling, slot.kernel, residuals["down"], residuals["up"]),
            )
        check_finite(coefficients)
        return coefficients, adapter_payload


INT8 = IntegerStorage("int8", torch.float32, 8)
INT4 = IntegerStorage("int4", torch.float32, 4)


def _row_tensors(basis: Basis, key: str) -> dict[str, Tensor]:
    """Return the payloads of a basis's fitted rows and of those of each extension, by their names in the file."""
    extensions = [
        (f"{key}.{index}", extension.payload)
        for index, extension in enumerate(basis.growth)
        if extension.seed is None and extension.n
    ]
    return {
        f"{name}.{field}": tensor
        for name, payload in [(key, basis.payload), *extensions]
        for field, tensor in (payload or {}).items()
    }


def _spread_rows(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return coefficients (…, r, k_down) and (…, r, k_up) of the same updates, as factors that lose least by rounding.

    The error of a row is in proportion to its norm (docs/concepts/codec.md). So the total is least if all rows have the
    same norm, and if none lies along few components, as singular vectors do: an orthogonal matrix mixes the rows.
    """
    mixing = linalg.mixing_matrix(down.shape[-2])
    even_down, even_up = linalg.svd_factors(down, up)
    return mixing @ even_down, mixing @ even_up


def payload_of(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the payload of the matrix called `name` among the tensors of a file; `KeyError` where it is incomplete."""
    return {
        field: tensors[f"{name}.{field}"]
        for field in group_integers.PARTS
        if field != group_integers.EXPONENT or f"{name}.{field}" in tensors
    }


def integer_matrices(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """Yield name, side and payload of each matrix of coefficients among an adapter's tensors."""
    for key in tensors:
        name, _, field = key.rpartition(".")
        side = next((side for side, suffix in keys.COEFFICIENTS.items() if name.endswith(f".{suffix}")), None)
        if field == group_integers.CODES and side is not None:
            yield name, side, payload_of(tensors, name)
