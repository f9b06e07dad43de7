"""One trained LoRA in memory: frozen data. Nothing here reads or writes a file."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import FormatError, ShapeError
from . import dtypes
from .options import to_float

T = TypeVar("T")


class LazyMapping(Mapping[str, T], Generic[T]):
    """A mapping whose keys are known and whose values are read anew at each access, so that none is kept alive."""

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

    kernel: that of a convolution, (height, width), whose `in` is channels · height · width; empty for a linear module.
    """

    down: Float[Tensor, "r n_in"]
    up: Float[Tensor, "n_out r"]
    scaling: float
    kernel: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for side, tensor in (("down", self.down), ("up", self.up)):
            if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes.STORED:
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise FormatError(f"{side} is {kind}; a float64, float32, float16 or bfloat16 tensor was expected.")
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        if len(down) != 2 or len(up) != 2 or down[0] != up[1] or down[0] < 1:
            raise ShapeError(
                f"down is {down} and up is {up}: (rank, in) and (out, rank) must share one rank of at least 1."
            )
        if not is_valid_kernel(self.kernel, down[1]):
            raise ShapeError(
                f"a kernel of {self.kernel} does not fit a down of {down}: its rows are channels · kernel."
            )
        # NumPy's and torch's numbers too
        object.__setattr__(self, "scaling", to_float("scaling", self.scaling))

    @property
    def spec(self) -> "ModuleSpec":
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
        """From the weights of the two layers: of linear ones, or of convolutions, down (rank, in, height, width) and
        up (out, rank, 1, 1)."""
        return cls(down.flatten(1), up.flatten(1), scaling, tuple(down.shape[2:]))

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """The inverse of `from_weights`."""
        ones = [1] * len(self.kernel)
        return self.down.reshape(len(self.down), -1, *self.kernel), self.up.reshape(*self.up.shape, *ones)


def is_valid_kernel(kernel: Any, in_features: int) -> bool:
    """Whether rows of `in_features` numbers may be those of a convolution of this kernel, or, where that is empty, of a
    linear module."""
    return (
        isinstance(kernel, tuple)
        and all(type(size) is int and size > 0 for size in kernel)
        and in_features % math.prod(kernel) == 0
    )


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """What is known of a module's factors before its tensors are read.

    shared: how many modules of the file have this `down` in common, as query, key and value of one fused layer have.
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
        """What the module reads at one place: the channels of a convolution, the input of a linear module."""
        return self.in_features // math.prod(self.kernel)

    @property
    def numbers(self) -> int:
        """Numbers in the two LoRA factors, of a shared one this module's part."""
        return self.rank * self.in_features // self.shared + self.rank * self.out_features


@dataclass(frozen=True, slots=True)
class Origin:
    """The single file that an adapter came in: its format, one of `formats.FORMATS`; which of several ways to spell
    names that format has the file took; and its metadata."""

    format: str
    spelling: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Adapter:
    """One trained LoRA, all its modules.

    `specs` and `modules` have the same keys: module names without `base_model.model.`. `modules` reads tensors when it
    is asked for them. `heads` (task heads, trained biases, resized embeddings) and `carried` (what a subspace cannot
    hold: DoRA magnitudes, embedding LoRA) are keyed by the name PEFT writes them under, and are never
    changed. `source_config` is the text of the adapter's `adapter_config.json`, word for word.
    `subspace` is the fingerprint of the one it was trained in, if it was. `origin` is the file it came in, where that
    is not one of PEFT's, or has metadata to give back.
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

    @property
    def config(self) -> dict[str, Any]:
        """The parsed `adapter_config.json`; empty for an adapter that was made in memory."""
        return json.loads(self.source_config) if self.source_config else {}

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks of the modules, ascending."""
        return tuple(sorted({spec.rank for spec in self.specs.values()}))


def from_factors(name: str, modules: Mapping[str, LoRAFactors], **fields: Any) -> Adapter:
    """An adapter from tensors in memory; `fields` are the other fields of `Adapter`."""
    return Adapter(name=name, specs={key: value.spec for key, value in modules.items()}, modules=modules, **fields)


def factor_grams(factors: LoRAFactors) -> tuple[Tensor, Tensor]:
    """Return down @ downᵀ and upᵀ @ up, (r, r) float64: all that norms of the update depend on."""
    down, up = factors.down.to(torch.float64), factors.up.to(torch.float64)
    return down @ down.mT, up.mT @ up


def delta_square(factors: LoRAFactors) -> float:
    """Return ‖scaling · up @ down‖²_F without forming the out × in matrix."""
    down_gram, up_gram = factor_grams(factors)
    return max(factors.scaling**2 * float((down_gram * up_gram).sum()), 0.0)
