"""Entropy-coded increments of rows: integers that are added to the prediction of a version's rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8

from ...core.limits import check_coded_count
from .. import entropy
from .lattice import ZERO_CLASS

CODED_TOGETHER = 1 << 22
"""About how many integers are coded in one stream, and decoded at once."""


@dataclass(frozen=True, slots=True)
class RowShape:
    """Width and classes of the rows of a block, from which encoder and decoder divide blocks into streams.

    Attributes:
        width: Width of the rows.
        classes: Class of each row; rows of `ZERO_CLASS` are in no stream.
    """

    width: int
    classes: UInt8[np.ndarray, " rows"]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of a block that are in one stream."""

    block: int
    rows: np.ndarray

    def classes(self, shapes: Sequence[RowShape]) -> np.ndarray:
        shape = shapes[self.block]
        return np.repeat(shape.classes[self.rows], shape.width)


def encode(shapes: Sequence[RowShape], increments: Sequence[Int[np.ndarray, "_ _"]]) -> list[bytes]:
    """Return the streams of the increments of blocks."""
    return [
        entropy.encode(
            [
                (
                    np.concatenate([increments[piece.block][piece.rows].ravel() for piece in pieces]),
                    np.concatenate([piece.classes(shapes) for piece in pieces]),
                )
            ]
        )[0]
        for pieces in _divide(shapes)
    ]


def count_streams(shapes: Sequence[RowShape]) -> int:
    """Return the number of streams of blocks."""
    return sum(1 for _ in _divide(shapes))


@dataclass(frozen=True, slots=True)
class Increments:
    """Increments of some rows of a block.

    Attributes:
        rows: Indices of the rows.
        integers: Their increments.
    """

    rows: np.ndarray
    integers: Int[np.ndarray, "rows width"]


def decode(
    versions: Sequence[tuple[Sequence[RowShape], Sequence[bytes]]],
) -> Iterator[list[list[list[Increments]]]]:
    """Decode the streams of several versions, as many at once as memory allows, which takes less time.

    Args:
        versions: Shapes of the blocks and streams of each version.

    Yields:
        For each of some consecutive versions, and each of its blocks, the increments of its rows.

    Raises:
        FormatError, ValueError: The bytes are damaged, or have too many integers.
    """
    waiting: list[tuple[Sequence[RowShape], list[list[_Piece]], Sequence[bytes]]] = []
    numbers = 0
    for shapes, streams in versions:
        divided = list(_divide(shapes))
        size = sum(shape.width * int((shape.classes != ZERO_CLASS).sum()) for shape in shapes)
        check_coded_count(size, sum(map(len, streams)), "a version")
        if waiting and numbers + size > CODED_TOGETHER:
            yield _decode_together(waiting)
            waiting, numbers = [], 0
        waiting.append((shapes, divided, streams))
        numbers += size
    if waiting:
        yield _decode_together(waiting)


def _decode_together(
    versions: Sequence[tuple[Sequence[RowShape], list[list[_Piece]], Sequence[bytes]]],
) -> list[list[list[Increments]]]:
    streams = [
        (stream, np.concatenate([piece.classes(shapes) for piece in pieces]))
        for shapes, divided, coded in versions
        for pieces, stream in zip(divided, coded, strict=True)
    ]
    # several streams at once are as many integers as one of the largest
    decoded = iter(entropy.decode(streams) if len(versions) > 1 else (entropy.decode([each])[0] for each in streams))
    increments: list[list[list[Increments]]] = []
    for shapes, divided, _ in versions:
        blocks: list[list[Increments]] = [[] for _ in shapes]
        for pieces in divided:
            integers, start = next(decoded), 0
            for piece in pieces:
                width = shapes[piece.block].width
                stop = start + len(piece.rows) * width
                blocks[piece.block].append(Increments(piece.rows, integers[start:stop].reshape(-1, width)))
                start = stop
        increments.append(blocks)
    return increments


def _divide(shapes: Sequence[RowShape]) -> Iterator[list[_Piece]]:
    """Yield the rows of each stream."""
    pieces: list[_Piece] = []
    numbers = 0
    for block, shape in enumerate(shapes):
        rows = np.flatnonzero(shape.classes != ZERO_CLASS)
        at_once = max(1, CODED_TOGETHER // shape.width)
        for start in range(0, len(rows), at_once):
            piece = _Piece(block, rows[start : start + at_once])
            size = len(piece.rows) * shape.width
            if pieces and numbers + size > CODED_TOGETHER:
                yield pieces
                pieces, numbers = [], 0
            pieces.append(piece)
            numbers += size
    if pieces:
        yield pieces
