"""Tables of the classes of a stream, which the entropy coder looks symbols up in."""

from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np

from ..errors import FormatError
from .class_tables import ALL_CLASSES, TOTAL, class_table

ESCAPED = 2**31 - 1
"""Mark of an integer that is not in the table of its class, in `StreamTables.slot_integers`. No table has this number:
the low bits of large ones are raw."""


class StreamTables:
    """The tables of the classes that occur, one after the other, and the table of each integer of all streams.

    Args:
        class_indices: Classes that occur, ascending.
        rows: Table of each integer, as an index into `class_indices`, (n,).
    """

    def __init__(self, class_indices: np.ndarray, rows: np.ndarray) -> None:
        self._class_indices = class_indices.tolist()
        self._rows = rows
        self._raw_bits = np.array([class_table(index).raw_bits for index in self._class_indices], dtype=np.uint8)

    @classmethod
    def of(cls, classes: np.ndarray) -> "StreamTables":
        """Build the tables for the class of each integer."""
        check_classes(classes)
        # one byte per integer, where the inverse of `np.unique` takes eight
        narrow = classes.astype(np.uint8)
        class_indices = np.flatnonzero(np.bincount(narrow, minlength=ALL_CLASSES))
        row = np.zeros(ALL_CLASSES, dtype=np.uint8)
        row[class_indices] = np.arange(len(class_indices))
        return cls(class_indices, row[narrow])

    def raw_bits(self, span: slice) -> np.ndarray:
        """Return the number of low bits of each integer that are written without a model, uint8."""
        counts: np.ndarray = self._raw_bits[self._rows[span]]
        return counts

    @cached_property
    def slots(self) -> np.ndarray:
        """The interval of each slot, for all classes one after the other: frequency · 2^16 + slot − lower bound."""
        return np.concatenate([_slot_table(class_index)[0] for class_index in self._class_indices])

    @cached_property
    def slot_integers(self) -> np.ndarray:
        """The integer of each slot with zeros for its raw bits, or `ESCAPED`, for all classes one after the other."""
        return np.concatenate([_slot_table(class_index)[1] for class_index in self._class_indices])

    def first_slots(self, at: np.ndarray) -> np.ndarray:
        """Return the first slot, in `slots`, of the class of the integers at these indices."""
        slots: np.ndarray = self._rows[at].astype(np.intp) * TOTAL
        return slots


@lru_cache(maxsize=64)
def _slot_table(class_index: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the entries of a class in `slots`, (TOTAL,) uint32, and in `slot_integers`, (TOTAL,) int32."""
    table = class_table(class_index)
    frequencies = np.diff(table.bounds)
    remainders = np.arange(TOTAL) - np.repeat(table.bounds[:-1], frequencies)
    integers = (np.arange(len(frequencies)) + table.first) << table.raw_bits
    # integers beyond 32 bits are not encoded, though tables of wide classes have them
    integers[table.escape], integers[(integers < -(2**31)) | (integers >= 2**31)] = ESCAPED, ESCAPED
    entries = (np.repeat(frequencies << 16, frequencies) + remainders).astype(np.uint32)
    return entries, np.repeat(integers.astype(np.int32), frequencies)


class EncodingTables:
    """The tables of some classes, in which the encoder looks up the intervals of integers.

    Args:
        class_indices: The classes.
    """

    def __init__(self, class_indices: Sequence[int]) -> None:
        tables = [class_table(class_index) for class_index in class_indices]
        width = max((len(table.bounds) for table in tables), default=2) - 1
        # as arrays over all classes, since an integer is looked up by its class
        self._first, self._escape, self._start = (np.zeros(ALL_CLASSES, dtype=np.int32) for _ in range(3))
        self._raw_bits = np.zeros(ALL_CLASSES, dtype=np.uint8)
        self._intervals = np.zeros(len(tables) * width, dtype=np.uint32)
        for row, (class_index, table) in enumerate(zip(class_indices, tables, strict=True)):
            self._first[class_index], self._escape[class_index] = table.first, table.escape
            self._start[class_index], self._raw_bits[class_index] = row * width, table.raw_bits
            low, frequency = table.bounds[:-1].astype(np.uint32), np.diff(table.bounds).astype(np.uint32)
            self._intervals[row * width : row * width + len(low)] = low << np.uint32(16) | frequency
        self._has_raw_bits = bool(self._raw_bits.any())

    def raw_bits(self, classes: np.ndarray) -> np.ndarray | None:
        """Return the number of low bits of each integer that are written without a model; None if all are 0."""
        return self._raw_bits[classes] if self._has_raw_bits else None

    def intervals(self, integers: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the interval of each integer, and the indices of those that are escaped.

        Args:
            integers: Integers, (n,).
            classes: Their classes, (n,) uint8.

        Returns:
            Lower bounds · 2^16 + frequencies, (n,) uint32, and the indices.
        """
        raw_bits = self.raw_bits(classes)
        # no integer of 16 bits leaves 32 bits below
        symbols: np.ndarray = integers.astype(np.int32 if integers.dtype.itemsize <= 2 else np.int64)
        if raw_bits is not None:
            np.right_shift(symbols, raw_bits, out=symbols)
        np.subtract(symbols, self._first[classes], out=symbols)
        escape: np.ndarray = self._escape[classes]
        (escaped,) = ((symbols < 0) | (symbols >= escape)).nonzero()
        symbols[escaped] = escape[escaped]
        np.add(symbols, self._start[classes], out=symbols)
        return self._intervals[symbols], escaped


def check_classes(classes: np.ndarray) -> None:
    """Raise `FormatError` for a class that does not exist."""
    if len(classes) and not (classes.min() >= 0 and classes.max() < ALL_CLASSES):
        raise FormatError(f"classes are 0 to {ALL_CLASSES - 1}, got up to {classes.max()}.")
