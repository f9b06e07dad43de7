"""Lossless versions as bytes and back: the LoRA factors, and all other tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..codec import varint
from ..codec.versions import lossless
from ..codec.versions.version import DecodedVersion, EncodedVersion
from ..core import keys
from ..core.adapter import LoRAFactors
from ..formats import peft


@dataclass(frozen=True, slots=True)
class LosslessVersion:
    """A version with its original tensors.

    Attributes:
        modules: LoRA factors by module name.
        tensors: Heads and other tensors, by PEFT's key.
    """

    modules: Mapping[str, LoRAFactors]
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the version takes."""
        factors = sum(each.down.nbytes + each.up.nbytes for each in self.modules.values())
        return factors + sum(tensor.nbytes for tensor in self.tensors.values())


def _factor_tensors(modules: Mapping[str, LoRAFactors]) -> dict[str, Tensor]:
    """Return the weights of the LoRA layers by PEFT's key."""
    return {
        keys.lora_key(module, side): tensor
        for module, factors in modules.items()
        for side, tensor in zip(keys.SIDES, factors.weights, strict=True)
    }


def encode(version: LosslessVersion, reference: DecodedVersion | None) -> EncodedVersion:
    """Encode a version so that every bit returns, as differences to an earlier version.

    Args:
        version: The version.
        reference: The earlier version; None to encode the version by itself.
    """
    factors = lossless.encode(_factor_tensors(version.modules), _reference_factors(reference))
    tensors = lossless.encode(version.tensors, reference.tensors if reference is not None else None)
    size = varint.encode(len(factors))
    return EncodedVersion(
        data=b"".join((size, factors, tensors)),
        has_reference=reference is not None,
        delta_error=0.0,
        tensor_error=0.0,
        lora_bytes=len(size) + len(factors),
        tensor_bytes=len(tensors),
        decoded=version,
    )


def decode(data: bytes, reference: DecodedVersion | None, config: str) -> LosslessVersion:
    """Decode a lossless version.

    Args:
        data: The bytes of `encode`.
        reference: The decoded version that it refers to; None if there is none.
        config: Text of the adapter's config, with the scalings of the modules.

    Raises:
        FormatError, ValueError: The bytes are damaged, or do not fit the reference or the config.
    """
    size, start = varint.decode(data, 0)
    factors = lossless.decode(data[start : start + size], _reference_factors(reference))
    tensors = lossless.decode(data[start + size :], reference.tensors if reference is not None else None)
    modules = peft.from_tensors("version", config, factors, where="a lossless version").modules
    if 2 * len(modules) != len(factors):
        raise ValueError(f"{len(factors)} LoRA tensors are {len(modules)} modules")
    return LosslessVersion(dict(modules), tensors)


def _reference_factors(reference: DecodedVersion | None) -> dict[str, Tensor] | None:
    return _factor_tensors(reference.modules) if reference is not None else None
