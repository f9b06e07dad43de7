"""One trained LoRA adapter in memory, as frozen data. `formats` reads and writes the files."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import FormatError, ShapeError
from . import dtypes
from .license import License
from .linalg import append_zeros
from .options import to_float
from .origin import Origin

T = TypeVar("T")


class LazyMapping(Mapping[str, T], Generic[T]):
    """A mapping with known keys whose values are read at each access, so that it keeps none of them alive.

    Args:
        keys: A mapping with the same keys.
        read: Returns the value of a key.
    """

    __slots__ = ("_keys", "_read")

    def __init__(self, keys: Mapping[str, Any], read: Callable[[str], T]) -> None:
        self._keys = keys
        self._read = read

    def __getitem__(self, key: str) -> T:
        if key not in self._keys:
            raise KeyError(key)
        return self._read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass(frozen=True, slots=True)
class LoRAFactors:
    """The update of one module: delta_weight = scaling · up @ down, (out, in).

    Attributes:
        down: The factor A.
        up: The factor B.
        scaling: LoRA scaling, alpha / r or alpha / √r.
        kernel: Kernel size of a convolution, whose `in` is channels · height · width; empty for a linear module.

    Raises:
        FormatError: A factor is not a tensor, or its dtype is not in `dtypes.STORED`.
        ShapeError: The factors do not share a rank, or the kernel does not divide `in`.

    Example:
        >>> factors = eigenlorax.LoRAFactors(torch.zeros(4, 32), torch.zeros(16, 4), scaling=2.0)
        >>> factors.spec.rank
        4
    """

    down: Float[Tensor, "r n_in"]
    up: Float[Tensor, "n_out r"]
    scaling: float
    kernel: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for side, tensor in (("down", self.down), ("up", self.up)):
            if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes.STORED:
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise FormatError(f"{side} is {kind}; expected a float64, float32, float16 or bfloat16 tensor.")
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        if len(down) != 2 or len(up) != 2 or down[0] != up[1] or down[0] < 1:
            raise ShapeError(
                f"down is {down} and up is {up}: (rank, in) and (out, rank) must share one rank of at least 1."
            )
        if not is_valid_kernel(self.kernel, down[1]):
            raise ShapeError(
                f"the kernel size {self.kernel} does not fit down of shape {down}: its rows are channels · kernel wide."
            )
        # frozen dataclass: `object` sets the field; also accepts NumPy's and torch's numbers
        object.__setattr__(self, "scaling", to_float("scaling", self.scaling))

    @property
    def spec(self) -> "ModuleSpec":
        """Shape, scaling and dtype of the factors."""
        return ModuleSpec(
            rank=self.down.shape[0],
            in_features=self.down.shape[1],
            out_features=self.up.shape[0],
            scaling=self.scaling,
            dtype=torch.promote_types(self.down.dtype, self.up.dtype),
            kernel=self.kernel,
        )

    @classmethod
    def from_weights(cls, down: Tensor, up: Tensor, scaling: float) -> "LoRAFactors":
        """Return factors from the weights of the two LoRA layers.

        Args:
            down: Weight of the down layer, (r, in), or (r, channels, height, width) of a convolution.
            up: Weight of the up layer, (out, r), or (out, r, 1, 1).
            scaling: LoRA scaling.

        Raises:
            FormatError: A weight is not a tensor of a float dtype.
            ShapeError: The weights do not fit each other.

        Example:
            >>> conv = eigenlorax.LoRAFactors.from_weights(torch.zeros(4, 8, 3, 3), torch.zeros(16, 4, 1, 1), 2.0)
            >>> conv.kernel
            (3, 3)
        """
        return cls(down.flatten(1), up.flatten(1), scaling, tuple(down.shape[2:]))

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """Weights of the two LoRA layers (down, up): the inverse of `from_weights`."""
        up_kernel = [1] * len(self.kernel)
        return self.down.reshape(len(self.down), -1, *self.kernel), self.up.reshape(*self.up.shape, *up_kernel)


def is_valid_kernel(kernel: Any, in_features: int) -> bool:
    """Return whether `kernel` is a tuple of sizes whose product divides `in_features`; () is a linear module."""
    return (
        isinstance(kernel, tuple)
        and all(type(size) is int and size > 0 for size in kernel)
        and in_features % math.prod(kernel) == 0
    )


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """Shape, scaling and dtype of one module's factors, known from the file header before tensors are read.

    Attributes:
        rank: LoRA rank r.
        in_features: Width of the down factor.
        out_features: Height of the up factor.
        scaling: LoRA scaling.
        dtype: Widest dtype of the two factors.
        kernel: Kernel size of a convolution; empty for a linear module.
        shared: Number of modules that share this `down` in the file, as query, key and value of a fused layer do.
    """

    rank: int
    in_features: int
    out_features: int
    scaling: float
    dtype: torch.dtype
    kernel: tuple[int, ...] = ()
    shared: int = field(default=1, compare=False)

    @property
    def channels(self) -> int:
        """Number of input channels of a convolution; the input width of a linear module."""
        return self.in_features // math.prod(self.kernel)

    @property
    def numbers(self) -> int:
        """Number of entries in the two factors. A shared `down` counts in equal parts for its modules."""
        return self.rank * self.in_features // self.shared + self.rank * self.out_features


@dataclass(frozen=True, slots=True)
class Adapter:
    """One trained LoRA adapter.

    Attributes:
        name: Name of the adapter.
        specs: Shape, scaling and dtype by module name, without the prefix `base_model.model.`.
        modules: Factors by module name, with the same keys; usually read at each access (`LazyMapping`).
        base_model: Name or path of the base model.
        revision: Revision of the base model.
        heads: Task heads, trained biases and resized embeddings, by PEFT's tensor names.
        carried: Tensors that a subspace cannot represent (DoRA magnitudes, embedding LoRA), by PEFT's tensor names.
        source_config: Text of `adapter_config.json`, verbatim.
        file_bytes: Size of the adapter's file.
        subspace: Fingerprint of the subspace that the adapter was trained in, if any.
        origin: The file that the adapter was read from, if that is not a PEFT file or has metadata to write again.
        license: Licence that its source states, if any.

    Example:
        >>> eigenlorax.read_adapter("adapters/a")
        Adapter('a', base_model='org/base', modules=3, ranks=[3])
    """

    name: str
    specs: Mapping[str, ModuleSpec]
    modules: Mapping[str, LoRAFactors]
    base_model: str | None = None
    revision: str | None = None
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    source_config: str | None = None
    file_bytes: int = 0
    subspace: str | None = None
    origin: Origin | None = None
    license: License | None = None

    def __repr__(self) -> str:
        parts = [f"{self.name!r}", f"base_model={self.base_model!r}", f"modules={len(self.specs)}"]
        parts.append(f"ranks={list(self.ranks)}")
        parts += [f"{group}={len(getattr(self, group))}" for group in ("heads", "carried") if getattr(self, group)]
        return f"Adapter({', '.join(parts)})"

    @property
    def config(self) -> dict[str, Any]:
        """Parsed `adapter_config.json`; empty for an adapter that was made in memory."""
        return json.loads(self.source_config) if self.source_config else {}

    @property
    def ranks(self) -> tuple[int, ...]:
        """Distinct ranks of the modules, ascending."""
        return tuple(sorted({spec.rank for spec in self.specs.values()}))


def from_factors(name: str, modules: Mapping[str, LoRAFactors], **fields: Any) -> Adapter:
    """Return an adapter from tensors in memory.

    Args:
        name: Name of the adapter.
        modules: Factors by module name.
        fields: Other fields of `Adapter`.

    Raises:
        ShapeError: The factors of a module do not share a rank.

    Example:
        >>> import torch
        >>> from eigenlorax import LoRAFactors, from_factors
        >>> update = LoRAFactors(down=torch.ones(4, 16), up=torch.ones(8, 4), scaling=2.0)
        >>> from_factors("a", {"layer.0.query": update}).ranks
        (4,)
    """
    specs = {module: factors.spec for module, factors in modules.items()}
    return Adapter(name=name, specs=specs, modules=modules, **fields)


def padded(factors: LoRAFactors, rank: int) -> LoRAFactors:
    """Return the same update with a larger rank: its further components are zeros."""
    missing = rank - len(factors.down)
    if missing <= 0:
        return factors
    return replace(factors, down=append_zeros(factors.down, missing), up=append_zeros(factors.up, missing, dim=-1))


def factor_grams(factors: LoRAFactors) -> tuple[Tensor, Tensor]:
    """Return down @ downᵀ and upᵀ @ up, (r, r) float64. The norm of the update depends on nothing else."""
    down, up = factors.down.to(torch.float64), factors.up.to(torch.float64)
    return down @ down.mT, up.mT @ up


def delta_square(factors: LoRAFactors) -> float:
    """Return ‖scaling · up @ down‖²_F without forming the out × in matrix."""
    down_gram, up_gram = factor_grams(factors)
    # ‖BA‖² = tr(BᵀB · AAᵀ), the sum of the products of the entries; rounding may leave it slightly negative
    # Python's `**` would raise OverflowError where the product is infinite
    return max(factors.scaling * factors.scaling * float((down_gram * up_gram).sum()), 0.0)
