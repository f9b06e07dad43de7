"""Tensors beside LoRA factors as integers: heads, biases, norms, embeddings (docs/pack-format.md, "Coded tensors").

A tensor is the sum of a reference tensor, if it has one, and of integers times a quantisation step size. References are
tensors that several adapters resemble.
"""

import json
import math
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import dtypes, keys
from ..core.json_dataclasses import from_json
from ..core.limits import MAX_JSON_BYTES, PARSE_FAILURES, check_coded_count, check_expansion
from ..errors import FormatError, reason
from . import entropy, varint
from .class_tables import CLASSES
from .quantised_tensor import MANTISSA_BITS, QuantisedTensor, StepSize, row_count
from .storage.coded import tensor_bytes


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """A tensor as integers.

    Attributes:
        dtype: Dtype of the tensor.
        shape: Shape of the tensor, of at least one number.
        step_size: Quantisation step size.
        reference: Number of the reference that the integers are added to; None for none.
        classes: Class of each row's integers (`entropy`), one byte per row.
        stream: Entropy-coded integers; empty if all of them are 0.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    step_size: StepSize
    reference: int | None
    classes: bytes
    stream: bytes

    @property
    def size(self) -> int:
        """Number of bytes, without the header."""
        return len(self.classes) + len(self.stream)

    def referring_to(self, reference: int) -> "CodedTensor":
        """Return the same integers beside another reference."""
        return replace(self, reference=reference)

    def decode(self, references: Sequence[Tensor]) -> Tensor:
        """Return the tensor; arguments and errors as in `decode_tensors`."""
        return decode_tensors([self], references)[0]

    def _from_integers(self, integers: np.ndarray | None, references: Sequence[Tensor]) -> Tensor:
        """Return the tensor for its decoded integers; None stands for zeros."""
        if self.reference is None:
            rows = torch.zeros(self.shape, dtype=torch.float64)
        elif self.reference < len(references) and references[self.reference].shape == self.shape:
            rows = references[self.reference].double()
        else:
            raise FormatError(f"a tensor of shape {self.shape} refers to reference {self.reference}.")
        if integers is not None:
            rows = rows + torch.from_numpy(integers).reshape(self.shape).double() * float(self.step_size)
        decoded = rows.to(self.dtype)
        if not bool(decoded.isfinite().all()):
            raise ValueError("a number of a coded tensor is not finite")
        return decoded


def decode_tensors(tensors: Sequence[CodedTensor], references: Sequence[Tensor]) -> list[Tensor]:
    """Decode tensors, which takes less time together.

    Args:
        tensors: The coded tensors.
        references: The reference tensors of the pack.

    Raises:
        FormatError: A stream does not fit its shape, or a reference does not.
        ValueError: A number is not finite.
    """
    streams = []
    for tensor in tensors:
        if tensor.stream:
            classes = np.frombuffer(tensor.classes, np.uint8)
            streams.append((tensor.stream, np.repeat(classes, math.prod(tensor.shape) // len(classes))))
    integers = iter(entropy.decode(streams))
    return [tensor._from_integers(next(integers) if tensor.stream else None, references) for tensor in tensors]


class References(Sequence[Tensor]):
    """Reference tensors of a pack, decoded when they are first used.

    Args:
        coded: The tensors, none of which has a reference itself.
    """

    def __init__(self, coded: Sequence[CodedTensor] = ()) -> None:
        self.coded = tuple(coded)
        self._decoded: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.coded)

    def __getitem__(self, index: Any) -> Any:
        number = range(len(self.coded))[index]
        if number not in self._decoded:
            self._decoded[number] = self.coded[number].decode(())
        return self._decoded[number]

    @classmethod
    def from_bytes(cls, data: bytes) -> "References":
        """Read the references that `data` holds; `ValueError` for invalid bytes."""
        coded = [tensor for _, tensor in from_bytes(data)]
        check_total(coded)
        if any(tensor.reference is not None for tensor in coded):
            raise FormatError("a reference tensor has a reference.")
        return cls(coded)

    @cached_property
    def data(self) -> bytes:
        """The references as bytes; empty if there are none."""
        return to_bytes([("", tensor) for tensor in self.coded]) if self.coded else b""


def encode_tensors(tensors: Sequence[QuantisedTensor]) -> list[CodedTensor | None]:
    """Entropy-code the integers of tensors, which takes less time together. None for one that would not become smaller.

    The bytes of a tensor do not depend on the others.
    """
    classes = [tensor.classes if bool(tensor.integers.any()) else None for tensor in tensors]
    streams = iter(
        entropy.encode(
            [
                (tensor.rows.numpy().ravel(), np.repeat(row_classes, tensor.rows.shape[1]))
                for tensor, row_classes in zip(tensors, classes, strict=True)
                if row_classes is not None
            ]
        )
    )
    encoded: list[CodedTensor | None] = []
    for tensor, row_classes in zip(tensors, classes, strict=True):
        coded = CodedTensor(
            dtype=tensor.dtype,
            shape=tuple(tensor.integers.shape),
            step_size=tensor.step_size,
            reference=tensor.reference,
            classes=row_classes.astype(np.uint8).tobytes() if row_classes is not None else b"",
            stream=next(streams) if row_classes is not None else b"",
        )
        is_smaller = coded.size < tensor.dtype.itemsize * tensor.integers.numel()
        encoded.append(coded if is_smaller and _is_readable(coded) else None)
    return encoded


def _is_readable(coded: CodedTensor) -> bool:
    try:
        _Header.of("", coded).check()
    except ValueError:
        return False
    return True


def can_be_read(tensors: Collection[CodedTensor], references: Collection[CodedTensor] = ()) -> bool:
    """Return whether `check_total` accepts coded tensors; arguments as there."""
    try:
        check_total(tensors, references)
    except ValueError:
        return False
    return True


def check_total(tensors: Collection[CodedTensor], references: Collection[CodedTensor] = ()) -> None:
    """Raise `ValueError` if coded tensors together decode to more numbers than their bytes explain.

    Args:
        tensors: The tensors.
        references: The references of the pack, which explain as many numbers as they have.
    """
    numbers = sum(math.prod(tensor.shape) for tensor in tensors)
    explained = sum(math.prod(reference.shape) for reference in references)
    check_coded_count(numbers - explained, sum(len(tensor.stream) for tensor in tensors), "coded tensors together")


@dataclass(frozen=True, slots=True)
class _Header:
    """Fields of a coded tensor in the header, in this order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    mantissa: int
    exponent: int
    reference: int | None
    classes: int
    stream: int

    @classmethod
    def of(cls, name: str, tensor: CodedTensor) -> "_Header":
        step_size = tensor.step_size
        return cls(
            name,
            dtypes.name(tensor.dtype),
            tensor.shape,
            step_size.mantissa,
            step_size.exponent,
            tensor.reference,
            len(tensor.classes),
            len(tensor.stream),
        )

    def check(self) -> None:
        """Raise `ValueError` unless all fields are valid and belong together."""
        if min(self.classes, self.stream, self.reference or 0) < 0:
            raise FormatError("the header of coded tensors has a negative number.")
        dtypes.by_name(self.dtype)
        if not all(size > 0 for size in self.shape):
            raise FormatError(f"a coded tensor has the shape {self.shape}.")
        expected = row_count(self.shape) if self.stream else 0
        if self.classes != expected:
            raise FormatError(f"a coded tensor has {self.classes} classes, and should have {expected}.")
        if not 0 < self.mantissa < 2**MANTISSA_BITS or abs(self.exponent) > 1000:
            raise FormatError(f"a coded tensor has the step size {self.mantissa} · 2^{self.exponent}.")
        # zeros beside a reference are as large as the reference, which was checked
        if self.stream or self.reference is None:
            check_coded_count(math.prod(self.shape), self.stream, "a coded tensor")


def to_bytes(tensors: Iterable[tuple[str, CodedTensor]]) -> bytes:
    """Return coded tensors and their names as bytes: a header, the classes of all rows, and the streams."""
    listed = list(tensors)
    header = [astuple(_Header.of(name, tensor)) for name, tensor in listed]
    text = json.dumps(header, separators=(",", ":")).encode()
    parts = [_deflate(text), _deflate(b"".join(tensor.classes for _, tensor in listed))]
    return b"".join([*(varint.encode(len(part)) + part for part in parts), *(tensor.stream for _, tensor in listed)])


def from_bytes(data: bytes) -> list[tuple[str, CodedTensor]]:
    """Read the names and coded tensors that `to_bytes` wrote. No tensor is decoded for it.

    Raises:
        ValueError: The bytes are not valid, or a tensor has more numbers than they explain.
    """
    header, at = _inflate(data, 0, MAX_JSON_BYTES)
    rows = json.loads(header)
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise FormatError("the header of coded tensors is not a list of lists.")
    fields = list(_Header.__dataclass_fields__)
    headers = [from_json(_Header, dict(zip(fields, row, strict=True)), "the header of coded tensors") for row in rows]
    # before memory is taken for anything that a header states
    for entry in headers:
        entry.check()
    n_classes = sum(entry.classes for entry in headers)
    check_expansion(n_classes, len(data), "the classes of coded tensors")
    all_classes, at = _inflate(data, at, n_classes)
    if max(all_classes, default=0) >= CLASSES:
        raise FormatError(f"a coded tensor has the class {max(all_classes)}; classes end at {CLASSES - 1}.")
    tensors, start = [], 0
    for entry in headers:
        classes, stream = all_classes[start : start + entry.classes], data[at : at + entry.stream]
        if len(stream) != entry.stream:
            raise FormatError("the bytes of coded tensors end too early.")
        dtype, step_size = dtypes.by_name(entry.dtype), StepSize(entry.mantissa, entry.exponent)
        tensors.append((entry.name, CodedTensor(dtype, entry.shape, step_size, entry.reference, classes, stream)))
        start, at = start + entry.classes, at + entry.stream
    if start != len(all_classes) or at != len(data):
        raise FormatError("the bytes of coded tensors are followed by more.")
    return tensors


def _deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return compressor.compress(data) + compressor.flush()


def _inflate(data: bytes, at: int, limit: int) -> tuple[bytes, int]:
    """Return a deflated part that begins with its length, of at most `limit` bytes, and the index after it."""
    size, at = varint.decode(data, at)
    part = data[at : at + size]
    decompressor = zlib.decompressobj(-15)
    inflated = decompressor.decompress(part, limit + 1)
    if len(part) != size or len(inflated) > limit or not decompressor.eof or decompressor.unused_data:
        raise FormatError("a deflated part of coded tensors is damaged.")
    return inflated, at + size


def decode_heads(tensors: Mapping[str, Tensor], references: References) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file with decoded heads in place of their empty tensors, whatever their keys.

    Raises:
        FormatError: The codes are not valid, or refer to a tensor that is not among the references.
    """
    try:
        listed = dict(from_bytes(tensor_bytes(tensors, keys.CODED_HEADS)))
        check_total(listed.values(), references.coded)
        decoded = decode_tensors([code for _, code in sorted(listed.items(), key=lambda pair: pair[0])], references)
        return {
            key: decoded[tensor.shape[1]] if is_mark(tensor) else tensor
            for key, tensor in tensors.items()
            if key != keys.CODED_HEADS
        }
    except PARSE_FAILURES as error:
        raise FormatError(f"the adapter's heads cannot be decoded: {reason(error)}.") from error


def is_mark(tensor: Tensor) -> bool:
    """Return whether a tensor of an adapter's file only marks the key of a coded head."""
    return tensor.dtype == torch.uint8 and tensor.ndim == 2 and not len(tensor)
