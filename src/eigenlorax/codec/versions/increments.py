"""Entropy-coded increments of rows: integers that are added to the prediction of a version's rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int64, UInt8

from ...errors import FormatError
from .. import entropy
from ..class_tables import CLASSES, GROUP
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
    """Rows of a block that are in one stream, all of them in groups or none.

    Attributes:
        block: Number of the block.
        rows: Indices of its rows.
        width: Width of a row.
        has_groups: True if `GROUP` integers are coded as one.
    """

    block: int
    rows: Int64[np.ndarray, " rows"]
    width: int
    has_groups: bool

    @property
    def coded_width(self) -> int:
        """Number of coded integers of a row."""
        return -(-self.width // GROUP) if self.has_groups else self.width

    @property
    def size(self) -> int:
        """Number of coded integers."""
        return len(self.rows) * self.coded_width

    def classes(self, shapes: Sequence[RowShape]) -> UInt8[np.ndarray, " size"]:
        """Return the class of each coded integer."""
        return np.repeat(shapes[self.block].classes[self.rows], self.coded_width)

    def pack(self, increments: Int[np.ndarray, "_ width"]) -> Int[np.ndarray, " size"]:
        """Return the coded integers of these rows of the block."""
        rows: np.ndarray = increments[self.rows]
        if not self.has_groups:
            return rows.ravel()
        padded = np.zeros((len(rows), self.coded_width * GROUP), np.int64)
        padded[:, : self.width] = rows
        groups: np.ndarray = padded.reshape(-1, GROUP) + 1
        packed: np.ndarray = groups @ _PLACES
        return packed

    def unpack(self, integers: Int[np.ndarray, " size"]) -> Int[np.ndarray, "rows width"]:
        """Return the increments of these rows from their coded integers."""
        if not self.has_groups:
            return integers.reshape(len(self.rows), self.width)
        if ((integers < 0) | (integers >= 3**GROUP)).any():
            raise FormatError("a group of integers is out of range.")
        rows: np.ndarray = (_GROUPS[integers]).reshape(len(self.rows), -1)[:, : self.width]
        return rows


_PLACES = 3 ** np.arange(GROUP)
_GROUPS = (np.arange(3**GROUP)[:, None] // _PLACES % 3 - 1).astype(np.int8)
"""Integers of each group."""


def encode(shapes: Sequence[RowShape], increments: Sequence[Int[np.ndarray, "_ _"]]) -> list[bytes]:
    """Return the streams of the increments of blocks."""
    return [
        entropy.encode(
            [
                (
                    np.concatenate([piece.pack(increments[piece.block]) for piece in pieces]),
                    np.concatenate([piece.classes(shapes) for piece in pieces]),
                )
            ]
        )[0]
        for pieces in _divide(shapes)
    ]


def count_streams(shapes: Sequence[RowShape]) -> int:
    """Return the number of streams of blocks."""
    return sum(1 for _ in _divide(shapes))


def count_coded(shapes: Sequence[RowShape]) -> int:
    """Return the number of integers in the streams of blocks."""
    return sum(shape.width * int((shape.classes != ZERO_CLASS).sum()) for shape in shapes)


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
        FormatError, ValueError: The bytes are damaged.
    """
    waiting: list[tuple[Sequence[RowShape], list[list[_Piece]], Sequence[bytes]]] = []
    numbers = 0
    for shapes, streams in versions:
        divided = list(_divide(shapes))
        size = count_coded(shapes)
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
                coded = integers[start : start + piece.size]
                blocks[piece.block].append(Increments(piece.rows, piece.unpack(coded)))
                start += piece.size
        increments.append(blocks)
    return increments


def _divide(shapes: Sequence[RowShape]) -> Iterator[list[_Piece]]:
    """Yield the rows of each stream."""
    pieces: list[_Piece] = []
    numbers = 0
    for block, shape in enumerate(shapes):
        in_groups = (shape.classes >= CLASSES) & (shape.classes != ZERO_CLASS)
        for has_groups, chosen in ((False, shape.classes < CLASSES), (True, in_groups)):
            rows = np.flatnonzero(chosen)
            at_once = max(1, CODED_TOGETHER // shape.width)
            for start in range(0, len(rows), at_once):
                piece = _Piece(block, rows[start : start + at_once], shape.width, has_groups)
                if pieces and numbers + piece.size > CODED_TOGETHER:
                    yield pieces
                    pieces, numbers = [], 0
                pieces.append(piece)
                numbers += piece.size
    if pieces:
        yield pieces
