"""A version of an adapter before it is encoded, as bytes, and as it was decoded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from ...core.adapter import LoRAFactors


@dataclass(frozen=True, slots=True)
class Version:
    """A version of an adapter before it is encoded.

    Attributes:
        modules: LoRA factors by module name.
        tensors: Heads and other tensors beside the LoRA, by PEFT's key.
        max_error: Bound of the relative error ‖D − D̂‖ / ‖D‖ over all modules, above 0 and below 1.
        tensor_bounds: Bound of the relative error of each tensor, by key; 0 for a tensor that is stored exactly.
    """

    modules: Mapping[str, LoRAFactors]
    tensors: Mapping[str, Tensor]
    max_error: float
    tensor_bounds: Mapping[str, float]


@runtime_checkable
class DecodedVersion(Protocol):
    """A version as its bytes say, with all that is needed to predict a later version."""

    @property
    def modules(self) -> Mapping[str, LoRAFactors]:
        """LoRA factors by module name, of the source's ranks, scalings and dtypes."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the version takes."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Heads and other tensors, by key, in the source's dtypes."""


@dataclass(frozen=True, slots=True)
class EncodedVersion:
    """A version as bytes.

    Attributes:
        data: The bytes.
        has_reference: True if the bytes refer to the earlier version that was passed.
        delta_error: Relative error of the update over all modules, as it is decoded.
        tensor_error: Largest relative error of another tensor.
        lora_bytes: Bytes that the LoRA factors take.
        tensor_bytes: Bytes that the other tensors take. Both together are all bytes.
        decoded: The version as it is decoded.
    """

    data: bytes
    has_reference: bool
    delta_error: float
    tensor_error: float
    lora_bytes: int
    tensor_bytes: int
    decoded: DecodedVersion
