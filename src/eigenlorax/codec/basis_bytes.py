"""Quantised bases as bytes: docs/pack-format.md, "A side's bytes".

The bytes of each basis begin with their length, so that the bytes of all bases can be joined in one tensor.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import FormatError
from . import entropy, varint
from .adapter_codes import ModuleLayout
from .quantised_basis import QuantisedBasis, row_classes

PART = "coded"
"""Name of the bytes of a basis in its payload, and suffix of their tensor in packs up to format 5."""
EMPTY = bytes([3, 1, 0, 0])
"""Bytes of a basis without a row."""
_NUMBERS_AT_ONCE = 1 << 22
"""Numbers of bases that are decoded together: one basis after the other takes longer, all of them take more memory."""


def encode(bases: Sequence[QuantisedBasis]) -> list[bytes]:
    """Return the bytes of each basis. They begin with their length, so that they can be joined and split again."""
    streams = entropy.encode([(b.codes.numpy().ravel(), _code_classes(b.fineness, b.dimension)) for b in bases])
    return [
        with_length(
            bytes([max(len(basis.blocks), 1)])
            + np.array(basis.blocks or [basis.k], "<u2").tobytes()
            + basis.fineness.astype("u1").tobytes()
            # profiles are 0 or less
            + (-basis.profile).astype("u1").tobytes()
            + stream
        )
        for basis, stream in zip(bases, streams, strict=True)
    ]


def with_length(data: bytes) -> bytes:
    """Prepend the length of the bytes of a basis, which packs up to format 5 do not store."""
    return varint.encode(len(data)) + data


def split(data: bytes, n: int) -> list[bytes]:
    """Return the bytes of each of `n` bases whose bytes were joined; `FormatError` if there are fewer or more."""
    bases, start = [], 0
    for _ in range(n):
        size, at = varint.decode(data, start)
        if size > len(data) - at:
            raise FormatError("the bytes of the bases end too early.")
        bases.append(data[start : at + size])
        start = at + size
    if start != len(data):
        raise FormatError(f"the bytes of {n} bases are followed by {len(data) - start} more.")
    return bases


def _code_classes(fineness: np.ndarray, dimension: int) -> np.ndarray:
    """Return the class of every code of a basis, row by row, in one byte each."""
    return np.repeat(row_classes(fineness, dimension).astype(np.uint8), dimension)


@dataclass(frozen=True, slots=True)
class _BasisHeader:
    """Header of a basis, and the entropy-coded stream that follows it.

    Attributes:
        blocks: Number of rows of each cluster; empty if there is one cluster.
        fineness: As in `QuantisedBasis`, (k,).
        profile: As in `QuantisedBasis`, (k,).
        stream: Entropy-coded codes of the rows.
    """

    blocks: tuple[int, ...]
    fineness: np.ndarray
    profile: np.ndarray
    stream: bytes

    @classmethod
    def read(cls, data: bytes) -> "_BasisHeader":
        """Read the header; `FormatError` where the bytes are shorter than it says."""
        data = data[varint.decode(data, 0)[1] :]
        blocks = (
            tuple(np.frombuffer(data[1 : 1 + 2 * min(data[0], (len(data) - 1) // 2)], "<u2").tolist())
            if len(data) > 2
            else ()
        )
        # a count of blocks that is too large yields fewer blocks than it says
        k, at = sum(blocks), 1 + 2 * len(blocks)
        if not blocks or len(blocks) != data[0] or len(data) < at + 2 * k:
            raise FormatError("the bytes of a basis end too early.")
        fineness, profile = (np.frombuffer(data, "u1", k, at + start).astype(np.int64) for start in (0, k))
        return cls(blocks if len(blocks) > 1 else (), fineness, -profile, data[at + 2 * k :])


def decode(sides: Sequence[tuple[bytes, tuple[int, int]]]) -> Iterator[QuantisedBasis]:
    """Yield the bases that `encode` wrote, each from its bytes and the shape (k, d) of its rows.

    `FormatError` for bytes of another number of rows, before any of them is decoded.
    """
    headers: list[tuple[_BasisHeader, int]] = []
    for data, (k, dimension) in sides:
        header = _BasisHeader.read(data)
        if len(header.fineness) != k:
            raise FormatError(f"the bytes of a basis have {len(header.fineness)} rows, and should have {k}.")
        headers.append((header, dimension))
    start = numbers = 0
    for end, (header, dimension) in enumerate(headers, start=1):
        numbers += len(header.fineness) * dimension
        if numbers >= _NUMBERS_AT_ONCE or end == len(headers):
            yield from _decode_batch(headers[start:end])
            start, numbers = end, 0


def _decode_batch(headers: Sequence[tuple[_BasisHeader, int]]) -> Iterator[QuantisedBasis]:
    """Yield the bases of headers and widths of rows."""
    streams = [(header.stream, _code_classes(header.fineness, dimension)) for header, dimension in headers]
    for codes, (header, dimension) in zip(entropy.decode(streams), headers, strict=True):
        rows = torch.from_numpy(codes).reshape(len(header.fineness), dimension)
        yield QuantisedBasis(rows, header.fineness, header.profile, header.blocks)


def read_layout(sides: Sequence[tuple[bytes, int]], cluster: int) -> ModuleLayout:
    """Return the layout of a cluster from the bytes and widths of a module's bases, (down, up).

    No row is decoded for it. `FormatError` where a basis has no such cluster.
    """
    bases, no_codes = [], torch.zeros(1, 1, dtype=torch.int64)
    for data, dimension in sides:
        header = _BasisHeader.read(data)
        # a side without a row has none in any cluster
        if (header.blocks or len(header.fineness)) and cluster >= max(len(header.blocks), 1):
            n_clusters = max(len(header.blocks), 1)
            raise FormatError(f"an adapter is in cluster {cluster}, and a basis has {n_clusters} of them.")
        # an expanded zero has the shape of the codes, and takes no memory
        codes = no_codes.expand(len(header.fineness), dimension)
        bases.append(QuantisedBasis(codes, header.fineness, header.profile, header.blocks))
    return ModuleLayout.of((bases[0], bases[1]), cluster)
