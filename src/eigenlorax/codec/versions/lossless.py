"""Encode and decode the tensors of a version without loss (docs/pack-format.md, "Lossless versions").

A tensor is predicted from the tensor of the same key, dtype and shape of one earlier version if that takes fewer bytes.
Tensors of one dtype are compressed together, in blocks: most of them are small.
"""

import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np
from torch import Tensor

from ...core import dtypes
from ...core.json_dataclasses import from_json
from ...core.limits import MAX_JSON_BYTES, PARSE_FAILURES, check_expansion, check_growth
from ...errors import FormatError, OptionError, reason
from .. import varint
from . import byte_planes
from .byte_planes import LAYOUTS, NumberLayout

BLOCK_NUMBERS = 1 << 20
"""A block ends with the tensor that brings it to this many numbers. It bounds the memory beside the tensors."""
_DTYPES = {dtypes.name(dtype): dtype for dtype in LAYOUTS}


@dataclass(frozen=True, slots=True)
class _TensorHeader:
    """Fields of a tensor in the header, in this order.

    Attributes:
        key: Key of the tensor.
        dtype: Name of its dtype.
        shape: Its shape.
        predicted: Whether it is predicted from the earlier version's tensor.
        checksum: CRC-32 of its integers' bytes, in little-endian order.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    predicted: bool
    checksum: int

    @property
    def layout(self) -> NumberLayout:
        return LAYOUTS[_DTYPES[self.dtype]]

    @property
    def n_numbers(self) -> int:
        return math.prod(self.shape)


def encode(tensors: Mapping[str, Tensor], earlier: Mapping[str, Tensor] | None) -> bytes:
    """Encode tensors so that every bit and the order of keys return.

    Args:
        tensors: Tensors by key, of any shape. Dtypes: floats of 8 to 64 bits, integers, booleans.
        earlier: Tensors of an earlier version, which `decode` needs too; None to predict nothing.

    Raises:
        OptionError: A dtype cannot be encoded.
    """
    earlier = earlier or {}
    headers = [_header_of(key, tensor, earlier.get(key)) for key, tensor in tensors.items()]
    text = json.dumps([astuple(header) for header in headers], separators=(",", ":")).encode()
    part = byte_planes.compress(text)
    head = varint.encode(len(part)) + part
    blocks = _blocks(headers)
    planes = [byte_planes.encode(*_block_integers(block, tensors, earlier), block[0].layout) for block in blocks]
    data = b"".join((head, *planes))
    try:
        _check_memory(headers, earlier, len(data))
    except ValueError:
        # almost only zeros, and hundreds of megabytes of them: `decode` takes them for a decompression bomb
        planes = [
            block_planes if block[0].predicted else _encode_uncompressed(block, tensors)
            for block, block_planes in zip(blocks, planes, strict=True)
        ]
        data = b"".join((head, *planes))
    return data


def decode(data: bytes, earlier: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Decode the tensors that `encode` was given.

    Args:
        data: The bytes.
        earlier: Tensors of the earlier version that `encode` was given.

    Returns:
        The tensors by key, in their order.

    Raises:
        FormatError: The bytes are damaged, would take more memory than their number explains, or belong to another
            earlier version.
    """
    try:
        return _decode(data, earlier or {})
    except PARSE_FAILURES as error:
        raise FormatError(f"a lossless version cannot be decoded: {reason(error).rstrip('.')}.") from error


def _decode(data: bytes, earlier: Mapping[str, Tensor]) -> dict[str, Tensor]:
    headers, at = _read_headers(data)
    for header in headers:
        _check_header(header, earlier)
    _check_memory(headers, earlier, len(data))
    decoded: dict[str, Tensor] = {}
    for block in _blocks(headers):
        layout, sizes = block[0].layout, [header.n_numbers for header in block]
        integers, at = byte_planes.decode(data, at, sum(sizes), _earlier_integers(block, earlier), layout)
        for header, numbers in zip(block, np.split(integers, np.cumsum(sizes)[:-1]), strict=True):
            decoded[header.key] = layout.to_tensor(numbers, _DTYPES[header.dtype], header.shape)
            if _checksum(numbers) != header.checksum:
                raise FormatError(
                    f"tensor {header.key} does not have its checksum: the bytes are damaged, or belong to another "
                    "earlier version."
                )
    if at != len(data):
        raise FormatError("the planes are followed by more bytes.")
    return {header.key: decoded[header.key] for header in headers}


def _header_of(key: str, tensor: Tensor, earlier: Tensor | None) -> _TensorHeader:
    """Return the header of a tensor, predicted from the earlier tensor if that takes fewer bytes."""
    if tensor.dtype not in LAYOUTS:
        raise OptionError(
            f"tensor {key} has the dtype {dtypes.name(tensor.dtype)}; a lossless version can have {', '.join(_DTYPES)}."
        )
    layout = LAYOUTS[tensor.dtype]
    integers = layout.to_integers(tensor)
    predicted = False
    if earlier is not None and earlier.dtype == tensor.dtype and earlier.shape == tensor.shape:
        with_prediction = byte_planes.encode(integers, layout.to_integers(earlier), layout)
        predicted = len(with_prediction) < len(byte_planes.encode(integers, None, layout))
    return _TensorHeader(key, dtypes.name(tensor.dtype), tuple(tensor.shape), predicted, _checksum(integers))


def _checksum(integers: np.ndarray) -> int:
    return zlib.crc32(integers.data)


def _blocks(headers: Iterable[_TensorHeader]) -> list[list[_TensorHeader]]:
    """Divide tensors into blocks of one dtype, all predicted or none, in the order of their first tensors."""
    blocks: list[list[_TensorHeader]] = []
    unfinished: dict[tuple[str, bool], list[_TensorHeader]] = {}
    n_numbers: dict[tuple[str, bool], int] = {}
    for header in headers:
        kind = header.dtype, header.predicted
        if kind not in unfinished:
            unfinished[kind], n_numbers[kind] = [], 0
            blocks.append(unfinished[kind])
        unfinished[kind].append(header)
        n_numbers[kind] += header.n_numbers
        if n_numbers[kind] >= BLOCK_NUMBERS:
            del unfinished[kind]
    return blocks


def _block_integers(
    block: list[_TensorHeader], tensors: Mapping[str, Tensor], earlier: Mapping[str, Tensor]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the integers of a block's tensors, and those that they are predicted from."""
    integers = np.concatenate([header.layout.to_integers(tensors[header.key]) for header in block])
    return integers, _earlier_integers(block, earlier)


def _earlier_integers(block: list[_TensorHeader], earlier: Mapping[str, Tensor]) -> np.ndarray | None:
    if not block[0].predicted:
        return None
    return np.concatenate([header.layout.to_integers(earlier[header.key]) for header in block])


def _encode_uncompressed(block: list[_TensorHeader], tensors: Mapping[str, Tensor]) -> bytes:
    return byte_planes.encode_uncompressed(_block_integers(block, tensors, {})[0], block[0].layout)


def _read_headers(data: bytes) -> tuple[list[_TensorHeader], int]:
    """Return the headers of all tensors, and the index after them."""
    size, at = varint.decode(data, 0)
    rows = json.loads(byte_planes.decompress(data[at : at + size], MAX_JSON_BYTES))
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise FormatError("the header is not a list of lists.")
    fields = list(_TensorHeader.__dataclass_fields__)
    headers = [from_json(_TensorHeader, dict(zip(fields, row, strict=True)), "the header") for row in rows]
    if len({header.key for header in headers}) != len(headers):
        raise FormatError("the header has a key twice.")
    return headers, at + size


def _check_header(header: _TensorHeader, earlier: Mapping[str, Tensor]) -> None:
    """Raise `FormatError` unless all fields are valid and a predicted tensor has its earlier one."""
    if header.dtype not in _DTYPES:
        raise FormatError(f"tensor {header.key} has the dtype {header.dtype}, which is unknown.")
    if min(header.shape, default=0) < 0:
        raise FormatError(f"tensor {header.key} has the shape {header.shape}.")
    if header.predicted:
        reference = earlier.get(header.key)
        if reference is None:
            raise FormatError(f"tensor {header.key} is predicted, and the earlier version does not have it.")
        if reference.dtype != _DTYPES[header.dtype] or reference.shape != header.shape:
            raise FormatError(
                f"tensor {header.key} is predicted: it has {header.dtype} and the shape {header.shape}, the earlier "
                f"version's {dtypes.name(reference.dtype)} and {tuple(reference.shape)}."
            )


def _check_memory(headers: Sequence[_TensorHeader], earlier: Mapping[str, Tensor], size: int) -> None:
    """Raise `ValueError` if tensors that are not predicted take more memory than `size` bytes explain.

    The others are as large as the earlier version's tensors, which are in memory already. All together may be larger
    than these only by what the bytes explain.
    """
    subject = "the tensors of a lossless version"
    sizes = [(header.layout.width * header.n_numbers, header.predicted) for header in headers]
    check_expansion(sum(nbytes for nbytes, predicted in sizes if not predicted), size, subject)
    if earlier:
        grown = sum(nbytes for nbytes, _ in sizes) - sum(tensor.nbytes for tensor in earlier.values())
        check_growth(grown, size, subject)
