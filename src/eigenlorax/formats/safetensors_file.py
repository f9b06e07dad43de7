"""The safetensors format: the header of a file, whole files as reproducible bytes, and tensors from such bytes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save
from torch import Tensor

from ..core.limits import MAX_HEADER_BYTES, check_is_content
from ..errors import FormatError, reason

LENGTH_BYTES = 8
"""Size of the number at the start of a file: the length of its header, little-endian."""
METADATA = "__metadata__"
_ALIGNMENT = 8
_MAX_DIMENSIONS = 64
"""The largest number of dimensions of a torch tensor."""
# Name in the file → bits, and torch's name. Dtypes under None, and those that an older torch lacks, cannot be read.
_DTYPES: dict[str, tuple[int, str | None]] = {
    "F64": (64, "float64"),
    "F32": (32, "float32"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "C64": (64, "complex64"),
    "I64": (64, "int64"),
    "I32": (32, "int32"),
    "I16": (16, "int16"),
    "I8": (8, "int8"),
    "U64": (64, "uint64"),
    "U32": (32, "uint32"),
    "U16": (16, "uint16"),
    "U8": (8, "uint8"),
    "BOOL": (8, "bool"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, "float4_e2m1fn_x2"),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of a file. Its bytes are `begin` to `end` (exclusive), counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def header_length(first: bytes, file_size: int, where: str) -> int:
    """Return the length in bytes of the header that follows the first `LENGTH_BYTES` of a file.

    It is checked before the header is read, so that a hostile number allocates nothing.

    Args:
        first: Start of the file, at least `LENGTH_BYTES` unless the file is shorter.
        file_size: Size of the file in bytes.
        where: Name of the file for error messages.

    Raises:
        FormatError: The file is shorter than its header, or the header is longer than `MAX_HEADER_BYTES`.
    """
    if file_size < LENGTH_BYTES:
        raise invalid(where, f"it has {file_size} bytes, and the length of the header alone takes {LENGTH_BYTES}")
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    check_is_content(first, where)
    if length > MAX_HEADER_BYTES:
        raise invalid(where, f"its header would have {length:,} bytes, and at most {MAX_HEADER_BYTES:,} are allowed")
    if LENGTH_BYTES + length > file_size:
        raise invalid(where, f"it ends within its header, which has {length:,} bytes; the file has {file_size:,}")
    return length


def parse_header(text: bytes, where: str) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Return the tensors of a file by name, in the order of their bytes, and the metadata of the file.

    The safetensors library must accept the file first: it checks JSON, offsets and sizes, but does not return them.
    This function rejects what the library accepts and torch cannot represent.

    Args:
        text: The header without its length.
        where: Name of the file for error messages.

    Raises:
        FormatError: A name occurs twice, or a tensor has a dtype or a shape that torch does not have.
    """
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except ValueError as error:
        raise invalid(where, str(error)) from error
    metadata = header.pop(METADATA, None) or {}
    start = LENGTH_BYTES + len(text)
    entries = {}
    for name, fields in sorted(header.items(), key=lambda entry: entry[1]["data_offsets"]):
        dtype, shape = _torch_type(name, fields["dtype"], fields["shape"], where)
        begin, end = fields["data_offsets"]
        entries[name] = TensorEntry(dtype, shape, start + begin, start + end)
    return entries, metadata


def invalid(where: str, fault: str) -> FormatError:
    """Return the error for a file that is truncated, damaged or of another format."""
    return FormatError(f"{where} is not a valid safetensors file: {fault}. Download or export it again.")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"its header has {duplicate!r} twice")
    return fields


def _torch_type(name: str, stated: str, shape: list[int], where: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return the dtype and the shape that torch gives a tensor of the file."""
    bits, torch_name = _DTYPES.get(stated, (0, None))
    dtype = getattr(torch, torch_name, None) if torch_name is not None else None
    if dtype is None:
        raise FormatError(f"{where}: tensor {name!r} is {stated}, a dtype that this release of torch cannot read.")
    # torch computes strides of empty tensors too, as if their empty dimensions had size 1
    if len(shape) > _MAX_DIMENSIONS or bits * prod(max(size, 1) for size in shape) >= 2**63:
        raise FormatError(f"{where}: tensor {name!r} has the shape {tuple(shape)}, which is too large for a tensor.")
    if bits == 4:
        if not shape or shape[-1] % 2:
            raise FormatError(f"{where}: tensor {name!r} is {stated} with an odd last dimension: {tuple(shape)}.")
        # torch's four-bit dtype counts pairs
        shape = [*shape[:-1], shape[-1] // 2]
    return dtype, tuple(shape)


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a file with these tensors and metadata; equal input gives equal bytes.

    The library writes several metadata keys in random order, so the header is written again with sorted keys.
    """
    unsorted = save(dict(tensors))
    end = LENGTH_BYTES + int.from_bytes(unsorted[:LENGTH_BYTES], "little")
    header = json.loads(unsorted[LENGTH_BYTES:end])
    text = json.dumps(
        {METADATA: dict(sorted(metadata.items())), **header} if metadata else header,
        separators=(",", ":"),
        ensure_ascii=False,
    ).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + unsorted[end:]


def from_bytes(data: bytes, where: str) -> dict[str, Tensor]:
    """Return the tensors of a whole file by name, each in memory of its own.

    `safetensors.torch.load` reads fewer dtypes from bytes than from a file: four-bit floats are missing.

    Raises:
        FormatError: The bytes are not a valid file, or torch lacks the dtype or the shape of a tensor.
    """
    end = LENGTH_BYTES + header_length(data, len(data), where)
    try:
        buffers = {name: fields["data"] for name, fields in deserialize(data)}  # type: ignore[no-untyped-call]
    except (SafetensorError, ValueError) as error:
        raise invalid(where, reason(error)) from error
    entries, _ = parse_header(data[LENGTH_BYTES:end], where)
    return {
        name: _bytes_tensor(buffers[name]).view(entry.dtype).reshape(entry.shape) for name, entry in entries.items()
    }


def _bytes_tensor(buffer: bytearray) -> Tensor:
    # torch.frombuffer does not accept an empty buffer
    return torch.frombuffer(buffer, dtype=torch.uint8) if buffer else torch.empty(0, dtype=torch.uint8)
