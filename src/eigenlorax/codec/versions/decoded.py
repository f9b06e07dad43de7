"""A version as it is decoded: rows on lattices, which later versions are predicted from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from ...core import dtypes, keys
from ...core.adapter import LazyMapping, LoRAFactors, is_valid_kernel
from ...core.limits import MAX_DIMENSION, MAX_RANK
from ...errors import FormatError
from ..quantised_tensor import row_count
from .lattice import LatticeRows

MIN_WIDTH = 32
"""Smallest width of the rows of a tensor that is not a single row."""


@dataclass(frozen=True, slots=True)
class ModuleLayout:
    """Shape, scaling and dtypes of the factors of a module.

    Attributes:
        rank: Rank.
        in_features: Width of the down factor.
        out_features: Height of the up factor.
        scaling: LoRA scaling.
        down_dtype, up_dtype: Dtypes of the decoded factors.
        kernel: Kernel size of a convolution; empty for a linear module.
    """

    rank: int
    in_features: int
    out_features: int
    scaling: float
    down_dtype: str
    up_dtype: str
    kernel: tuple[int, ...]

    @classmethod
    def of(cls, factors: LoRAFactors) -> "ModuleLayout":
        """Return the layout of a module's factors."""
        spec = factors.spec
        names = dtypes.name(factors.down.dtype), dtypes.name(factors.up.dtype)
        return cls(spec.rank, spec.in_features, spec.out_features, spec.scaling, *names, spec.kernel)

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of the rows of the two blocks."""
        return self.out_features, self.in_features

    def factors(self, up: Float64[np.ndarray, "rank n_out"], down: Float64[np.ndarray, "rank n_in"]) -> LoRAFactors:
        """Return the factors whose rows these are."""
        return LoRAFactors(
            down=torch.from_numpy(down).to(dtypes.by_name(self.down_dtype)),
            up=torch.from_numpy(up.T.copy()).to(dtypes.by_name(self.up_dtype)),
            scaling=self.scaling,
            kernel=self.kernel,
        )

    def check(self) -> None:
        """Raise `ValueError` unless the fields are valid and belong together."""
        widest = max(self.widths)
        if not 0 < min(self.widths) <= widest <= MAX_DIMENSION or not 0 < self.rank <= max(MAX_RANK, sum(self.widths)):
            raise FormatError(f"a module has the shape ({self.out_features}, {self.in_features}) and rank {self.rank}.")
        if not math.isfinite(self.scaling) or not is_valid_kernel(self.kernel, self.in_features):
            raise FormatError(f"a module has the scaling {self.scaling} and the kernel {self.kernel}.")
        dtypes.by_name(self.down_dtype)
        dtypes.by_name(self.up_dtype)


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """Shape and dtype of a tensor beside the LoRA."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorLayout":
        """Return the layout of a tensor."""
        return cls(tuple(tensor.shape), dtypes.name(tensor.dtype))

    @property
    def rows(self) -> int:
        """Number of rows whose increments have a class each; 1 if they would be narrow."""
        count = row_count(self.shape)
        return count if math.prod(self.shape) // count >= MIN_WIDTH else 1

    @property
    def width(self) -> int:
        """Width of a row."""
        return math.prod(self.shape) // self.rows

    def tensor(self, rows: Float64[np.ndarray, "rows width"]) -> Tensor:
        """Return the tensor whose rows these are."""
        return torch.from_numpy(rows).reshape(self.shape).to(dtypes.by_name(self.dtype))

    def check(self) -> None:
        """Raise `ValueError` unless the fields are valid."""
        if not all(size > 0 for size in self.shape):
            raise FormatError(f"a coded tensor has the shape {self.shape}.")
        dtypes.by_name(self.dtype)


@dataclass(frozen=True, slots=True)
class ModuleRows:
    """The factors of a module as rows on lattices.

    Attributes:
        layout: Shape, scaling and dtypes.
        up: Rows of the up factor, transposed: (rank, out).
        down: Rows of the down factor: (rank, in).
    """

    layout: ModuleLayout
    up: LatticeRows
    down: LatticeRows

    @property
    def factors(self) -> LoRAFactors:
        """The factors."""
        return self.layout.factors(self.up.values, self.down.values)


@dataclass(frozen=True, slots=True)
class TensorRows:
    """A tensor as rows on a lattice, all of one level."""

    layout: TensorLayout
    rows: LatticeRows

    @property
    def level(self) -> int:
        """Level of the step size of all rows."""
        return int(self.rows.labels.step_levels[0])

    @property
    def tensor(self) -> Tensor:
        """The tensor."""
        return self.layout.tensor(self.rows.values)


@dataclass(frozen=True, slots=True)
class LossyVersion:
    """A version as it is decoded.

    Attributes:
        level: Level of rows of weight 1.
        module_rows: The modules whose factors are coded, sorted by name.
        tensor_rows: The tensors that are coded, sorted by key.
        exact_modules: Layouts of the modules whose factors are stored exactly.
        exact: The tensors that are stored exactly, factors of `exact_modules` included.
    """

    level: int
    module_rows: Mapping[str, ModuleRows]
    tensor_rows: Mapping[str, TensorRows]
    exact_modules: Mapping[str, ModuleLayout] = field(default_factory=dict)
    exact: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def modules(self) -> Mapping[str, LoRAFactors]:
        """LoRA factors by module name, computed at each access."""
        names = dict.fromkeys(sorted([*self.module_rows, *self.exact_modules]))
        return LazyMapping(names, self._factors)

    def _factors(self, module: str) -> LoRAFactors:
        if module in self.module_rows:
            return self.module_rows[module].factors
        layout = self.exact_modules[module]
        down, up = (self.exact[keys.lora_key(module, side)] for side in keys.SIDES)
        return LoRAFactors(down, up, layout.scaling, layout.kernel)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Heads and other tensors by key, computed at each access."""
        hidden = {keys.lora_key(module, side) for module in self.exact_modules for side in keys.SIDES}
        exact = {key: tensor for key, tensor in self.exact.items() if key not in hidden}
        return LazyMapping(
            dict.fromkeys(sorted([*self.tensor_rows, *exact])),
            lambda key: exact[key] if key in exact else self.tensor_rows[key].tensor,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the version takes."""
        return sum(rows.integers.nbytes for rows in self.all_rows) + sum(each.nbytes for each in self.exact.values())

    @property
    def all_rows(self) -> list[LatticeRows]:
        """All blocks of rows, in the order of their bytes."""
        blocks = [rows for module in self.module_rows.values() for rows in (module.up, module.down)]
        return blocks + [tensor.rows for tensor in self.tensor_rows.values()]

    @property
    def module_layouts(self) -> dict[str, ModuleLayout]:
        """Layouts of `module_rows`."""
        return {name: module.layout for name, module in self.module_rows.items()}

    @property
    def tensor_layouts(self) -> dict[str, TensorLayout]:
        """Layouts of `tensor_rows`."""
        return {key: tensor.layout for key, tensor in self.tensor_rows.items()}

    def with_rows(self, blocks: Sequence[LatticeRows]) -> "LossyVersion":
        """Return the version with other rows, in the order of `all_rows`."""
        return LossyVersion.from_rows(
            self.level, self.module_layouts, self.tensor_layouts, blocks, self.exact_modules, self.exact
        )

    @classmethod
    def from_rows(
        cls,
        level: int,
        modules: Mapping[str, ModuleLayout],
        tensors: Mapping[str, TensorLayout],
        blocks: Sequence[LatticeRows],
        exact_modules: Mapping[str, ModuleLayout],
        exact: Mapping[str, Tensor],
    ) -> "LossyVersion":
        """Return a version whose rows are listed in the order of `all_rows`."""
        module_rows = {
            name: ModuleRows(layout, *blocks[2 * number : 2 * number + 2])
            for number, (name, layout) in enumerate(modules.items())
        }
        tensor_rows = {
            key: TensorRows(layout, rows)
            for (key, layout), rows in zip(tensors.items(), blocks[2 * len(modules) :], strict=True)
        }
        return cls(level, module_rows, tensor_rows, exact_modules, exact)
