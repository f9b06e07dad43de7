"""The header of a GGUF file: metadata and the places of tensors, read within limits.

The reader of the package `gguf` maps the whole file and trusts the counts in it. Here each count is compared with the
bytes that are left, and tensors must fill the file in order, as llama.cpp requires. Specification:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ...core import keys, limits
from ...errors import FormatError, MissingExtraError
from ..ranges import File
from . import architectures

MAGIC = b"GGUF"
ADAPTER = "adapter"
"""`general.type` of adapters."""
MAX_HEADER = 1 << 23
"""Largest header in bytes. An adapter's has about 100 bytes for each tensor; vocabularies are in models only."""
_VERSIONS = (2, 3)
_MAX_ALIGNMENT = 1 << 16
_MAX_DIMENSIONS = 4
_READ = 1 << 16
"""Bytes that are read at once."""
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_BLOCK = 32
"""Numbers in a block of Q8_0, which share a scale in float16."""


class TensorType(Enum):
    """A type of tensors, by its number in GGUF files."""

    F32 = 0
    F16 = 1
    Q8_0 = 8
    BF16 = 30

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the numbers when they are read."""
        return {TensorType.F16: torch.float16, TensorType.BF16: torch.bfloat16}.get(self, torch.float32)

    def n_bytes(self, shape: tuple[int, ...]) -> int | None:
        """Return the bytes of a tensor; None if its rows cannot have this type."""
        if self is TensorType.Q8_0:
            return math.prod(shape) // _BLOCK * (2 + _BLOCK) if shape[-1] % _BLOCK == 0 else None
        return math.prod(shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Entry:
    """Place, type and shape of a tensor. The shape is in PyTorch's order, the reverse of the file's."""

    type: TensorType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file whose header has been read."""

    file: File
    entries: Mapping[str, Entry]
    metadata: Mapping[str, Any]

    def load(self, names: Sequence[str]) -> list[Tensor]:
        """Read tensors by name, each into memory of its own; Q8_0 becomes float32."""
        entries = [self.entries[name] for name in names]
        buffers = [torch.empty(entry.end - entry.begin, dtype=torch.uint8) for entry in entries]
        self.file.read_into(
            [(entry.begin, buffer.numpy().data) for entry, buffer in zip(entries, buffers, strict=True)]
        )
        return [_numbers(buffer, entry) for buffer, entry in zip(buffers, entries, strict=True)]


def _numbers(buffer: Tensor, entry: Entry) -> Tensor:
    if entry.type is not TensorType.Q8_0:
        return buffer.view(entry.type.dtype).reshape(entry.shape)
    blocks = buffer.reshape(-1, 2 + _BLOCK)
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    return (blocks[:, 2:].contiguous().view(torch.int8).float() * scales).reshape(entry.shape)


class _Header:
    """Values of a header, read one after another.

    Args:
        file: The file.
    """

    def __init__(self, file: File) -> None:
        self.file, self.position, self._data = file, 0, b""

    def take(self, count: int) -> bytes:
        """Return the next bytes; raise `FormatError` if the file or the limit ends before."""
        end = self.position + count
        if end > min(self.file.size, MAX_HEADER):
            limit = f"the {self.file.size:,} bytes of the file" if self.file.size < MAX_HEADER else f"{MAX_HEADER:,}"
            raise FormatError(f"{self.file}: its header would end at byte {end:,}, after {limit}. It is damaged.")
        if end > len(self._data):
            more = bytearray(min(max(end, 2 * len(self._data), _READ), self.file.size, MAX_HEADER) - len(self._data))
            self.file.read_into([(len(self._data), memoryview(more))])
            self._data += bytes(more)
        start, self.position = self.position, end
        return self._data[start:end]

    def number(self, layout: str) -> Any:
        """Return the next number, in the layout of `struct`."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self) -> str:
        """Return the next text: its length, and its characters in UTF-8."""
        data = self.take(self.number("<Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.file}: the text {data[:40]!r} in its header is not UTF-8.") from error

    def value(self, kind: int) -> Any:
        """Return the next value of a type; a list for numbers, None for lists of texts, which are skipped."""
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise FormatError(f"{self.file}: its metadata has a value of type {kind}, which GGUF does not define.")
        element, count = self.number("<I"), self.number("<Q")
        if element in _SCALARS:
            size = struct.calcsize(_SCALARS[element])
            data = self.take(count * size)
            return [number for (number,) in struct.iter_unpack(_SCALARS[element], data)]
        if element != _STRING:
            raise FormatError(
                f"{self.file}: its metadata has a list of type {element}; numbers or texts were expected."
            )
        # a text has at least the eight bytes of its length
        if count > (min(self.file.size, MAX_HEADER) - self.position) // 8:
            raise FormatError(f"{self.file}: its metadata has a list of {count:,} texts, more than it has room for.")
        for _ in range(count):
            self.take(self.number("<Q"))
        return None


def is_gguf(file: File) -> bool:
    """Return whether a file starts as GGUF files do."""
    return file.size >= len(MAGIC) and _Header(file).take(len(MAGIC)) == MAGIC


def is_adapter(file: File) -> bool:
    """Return whether a GGUF file is an adapter by its metadata. A damaged file counts as one, for an error about it."""
    header = _Header(file)
    try:
        for _ in range(_start(header)[1]):
            key, kind = header.text(), header.number("<I")
            if key == "general.type":
                return bool(header.value(kind) == ADAPTER)
            header.value(kind)
    except FormatError:
        # the vocabulary of a model is longer than the limit
        return file.size < MAX_HEADER
    return False


def _start(header: _Header) -> tuple[int, int]:
    """Return the numbers of tensors and of metadata."""
    file = header.file
    start = header.take(min(file.size, len(MAGIC)))
    limits.check_is_content(start, str(file))
    if start != MAGIC:
        raise FormatError(f"{file} is not a GGUF file: it does not start with 'GGUF'.")
    version = header.number("<I")
    if int.from_bytes(struct.pack("<I", version), "big") in _VERSIONS:
        raise FormatError(
            f"{file} is for big-endian machines, and is not read. Convert the adapter for little-endian ones."
        )
    if version not in _VERSIONS:
        raise FormatError(f"{file} has GGUF version {version}; 2 or 3 was expected. Convert it with a newer llama.cpp.")
    return header.number("<Q"), header.number("<Q")


def open_file(file: File) -> GgufFile:
    """Read and check the header of an adapter's GGUF file.

    Raises:
        FormatError: The file is damaged, a model, or has tensors of another type than `TensorType`.
    """
    header = _Header(file)
    n_tensors, n_fields = _start(header)
    metadata: dict[str, Any] = {}
    for _ in range(n_fields):
        key = header.text()
        if key in metadata:
            raise FormatError(f"{file}: its metadata has {key!r} twice.")
        metadata[key] = header.value(header.number("<I"))
        if key == "general.type" and metadata[key] != ADAPTER:
            raise FormatError(
                f"{file} is not an adapter: general.type is {metadata[key]!r}. Pass a LoRA, as llama.cpp's "
                "convert_lora_to_gguf.py writes it."
            )
    infos: dict[str, tuple[TensorType, tuple[int, ...], int]] = {}
    for _ in range(n_tensors):
        name = header.text()
        keys.check_tensor_names([name], str(file))
        if name in infos:
            raise FormatError(f"{file}: tensor {name!r} occurs twice.")
        infos[name] = _info(header, name)
    return GgufFile(file, _places(file, infos, header.position, metadata), metadata)


def _info(header: _Header, name: str) -> tuple[TensorType, tuple[int, ...], int]:
    """Return type, shape and offset of the next tensor."""
    n_dimensions = header.number("<I")
    if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
        raise FormatError(f"{header.file}: tensor {name!r} has {n_dimensions} dimensions; 1 to 4 were expected.")
    shape = tuple(reversed([header.number("<Q") for _ in range(n_dimensions)]))
    number, offset = header.number("<I"), header.number("<Q")
    if number not in [kind.value for kind in TensorType]:
        raise FormatError(
            f"{header.file}: tensor {name!r} has the type {_type_name(number)} of ggml; "
            f"{', '.join(kind.name for kind in TensorType)} can be read. Convert the adapter again, with one of them."
        )
    return TensorType(number), shape, offset


def _type_name(number: int) -> str:
    """Return the name of a type of ggml, such as Q4_K; its number if it is not known."""
    try:
        return str(architectures.package().GGMLQuantizationType(number).name)
    except (ValueError, MissingExtraError):
        return str(number)


def _places(
    file: File, infos: Mapping[str, tuple[TensorType, tuple[int, ...], int]], end: int, metadata: Mapping[str, Any]
) -> dict[str, Entry]:
    """Return the place of each tensor.

    Args:
        file: The file.
        infos: Type, shape and offset of each tensor.
        end: End of the header.
        metadata: Metadata of the file.
    """
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise FormatError(f"{file}: general.alignment is {alignment!r}; a power of two was expected.")
    start = position = end + -end % alignment
    entries = {}
    for name, (kind, shape, offset) in infos.items():
        size = kind.n_bytes(shape)
        if size is None:
            raise FormatError(
                f"{file}: tensor {name!r} of type {kind.name} has rows of {shape[-1]} numbers. They have blocks of 32."
            )
        if start + offset != position:
            raise FormatError(
                f"{file}: tensor {name!r} begins at byte {start + offset:,}; it was expected at {position:,}. The file "
                "is damaged."
            )
        if position + size > file.size:
            raise FormatError(
                f"{file}: tensor {name!r} ends at byte {position + size:,}, and the file at {file.size:,}. The file is "
                "damaged: download or convert it again."
            )
        # a sparse file can have any size without occupying space on the disk
        if size > limits.machine_memory():
            raise FormatError(f"{file}: tensor {name!r} of {size:,} bytes does not fit in this machine's memory.")
        entries[name] = Entry(kind, shape, position, position + size)
        position += size + -size % alignment
    if file.size > position:
        raise FormatError(f"{file}: {file.size - position:,} bytes follow its last tensor. The file is damaged.")
    return entries
