"""The header of a safetensors file: which tensors it has, of what dtype and shape, and where their bytes lie.

The library tells nobody the offsets, without which no range can be read. Whether it would read such a file is its own
to say (`ranges`): here are errors that name the tensor, and bounds of what is read. Where bytes come from is not known
here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeGuard

import torch

from ..core.boundary import MAX_HEADER_BYTES
from ..errors import FormatError

LENGTH_BYTES = 8
_MAX_DIMENSIONS = 64
"""Of a tensor of torch's."""
METADATA = "__metadata__"
# a size in bits, and what torch calls it: under None, and in releases that lack the name, it cannot be read
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
class Entry:
    """A tensor of the file: its bytes are those from `begin` to before `end`, counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def length(first: bytes, size: int, where: str) -> int:
    """Bytes of the header after the `LENGTH_BYTES` that say so, of a file of `size` bytes that begins with `first`."""
    if size < LENGTH_BYTES:
        raise _damaged(where, f"it has {size} bytes, fewer than the {LENGTH_BYTES} that it has to begin with")
    stated = int.from_bytes(first[:LENGTH_BYTES], "little")
    if stated > MAX_HEADER_BYTES:
        raise _damaged(
            where, f"its header would have {stated:,} bytes, more than the {MAX_HEADER_BYTES:,} one may have"
        )
    if LENGTH_BYTES + stated > size:
        raise _damaged(where, f"it ends within its header, which has {stated:,} bytes; the file has {size:,}")
    return stated


def parse(text: bytes, size: int, where: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file of `size` bytes by name, in the order of their bytes, and the file's metadata. `where`
    stands before what is wrong.

    text: the header itself, without the bytes that say its length.
    """
    if not text.startswith(b"{"):
        raise _damaged(where, f"its header begins with {text[:1]!r}, not with an opening brace")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        # an escape of half a character is JSON to Python, and no text to anybody
        "".join(header).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise _damaged(where, f"its header is not valid JSON: {error}") from error
    metadata = header.pop(METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(where, f"its {METADATA} are not texts by name")
    entries = {}
    start = LENGTH_BYTES + len(text)
    at = 0
    for name, (begin, end), described in sorted(
        ((name, _offsets(name, described, where), described) for name, described in header.items()),
        key=lambda item: item[1],
    ):
        if begin != at:
            raise _damaged(where, f"the bytes of tensor {name!r} begin at {begin:,}, where {at:,} was expected")
        entries[name] = _entry(name, described, start + begin, start + end, where)
        at = end
    if start + at != size:
        raise _damaged(where, f"its header and tensors take {start + at:,} bytes; the file has {size:,}")
    return entries, metadata


def _damaged(where: str, what: str) -> FormatError:
    return FormatError(f"{where} is not a whole safetensors file: {what}.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _offsets(name: str, described: Any, where: str) -> tuple[int, int]:
    offsets = described.get("data_offsets") if isinstance(described, dict) else None
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(where, f"tensor {name!r} has the data_offsets {offsets!r}; [begin, end] was expected")
    return offsets[0], offsets[1]


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether a value of JSON is a list of integers from 0 on that an int64 holds."""
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**63 for one in value)


def _entry(name: str, described: Mapping[str, Any], begin: int, end: int, where: str) -> Entry:
    stated, shape = described.get("dtype"), described.get("shape")
    if not isinstance(stated, str) or not _are_sizes(shape):
        raise _damaged(where, f"tensor {name!r} has the dtype {stated!r} and the shape {shape!r}")
    bits, called = _DTYPES.get(stated, (None, None))
    dtype = getattr(torch, called, None) if called is not None else None
    if bits is not None and bits * prod(shape) != 8 * (end - begin):
        raise _damaged(
            where, f"tensor {name!r} has {end - begin:,} bytes, which are not those of {stated} of shape {tuple(shape)}"
        )
    if bits is None or dtype is None:
        raise FormatError(f"{where}: tensor {name!r} is {stated}, a dtype that cannot be read here.")
    if len(shape) > _MAX_DIMENSIONS or bits * prod(max(size, 1) for size in shape) >= 2**63:
        # strides count where there is no number either
        raise FormatError(f"{where}: tensor {name!r} has a shape that no tensor can have: {tuple(shape)}.")
    if bits == 4:
        if not shape or shape[-1] % 2:
            raise FormatError(f"{where}: tensor {name!r} is {stated} of shape {tuple(shape)}: an odd number of halves.")
        # torch counts pairs
        shape = [*shape[:-1], shape[-1] // 2]
    return Entry(dtype, tuple(shape), begin, end)
