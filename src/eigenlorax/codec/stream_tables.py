"""Tables of the classes of a stream, which the entropy coder looks symbols up in."""

import numpy as np

from ..errors import FormatError
from .class_tables import ALL_CLASSES, TOTAL, class_table


class StreamTables:
    """The tables of the classes that occur, as rows of arrays, and the row of each integer of all streams.

    Args:
        class_indices: Classes that occur, ascending.
        rows: Row of each integer, as an index into `class_indices`, (n,).
    """

    def __init__(self, class_indices: np.ndarray, rows: np.ndarray) -> None:
        tables = [class_table(int(class_index)) for class_index in class_indices]
        widest = max((len(table.bounds) for table in tables), default=2)
        self._rows = rows
        # shorter tables are padded with intervals of width zero
        self._bounds = np.full((len(tables), widest), TOTAL, dtype=np.int64)
        for row, table in enumerate(tables):
            self._bounds[row, : len(table.bounds)] = table.bounds
        self._first = np.array([table.first for table in tables], dtype=np.int64)
        self._escape = np.array([table.escape for table in tables], dtype=np.int64)
        self._raw_bits = np.array([table.raw_bits for table in tables], dtype=np.int64)
        self._slots: np.ndarray | None = None
        self._low, self._frequencies = np.zeros(0, np.uint64), np.zeros(0, np.uint64)

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
        """Return the number of low bits of each integer that are written without a model."""
        counts: np.ndarray = self._raw_bits[self._rows[span]]
        return counts

    def symbols(self, integers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the symbol of each integer, and whether that is the escape."""
        symbols = (integers >> self.raw_bits(slice(None))) - self._first[self._rows]
        escape = self._escape[self._rows]
        escaped = (symbols < 0) | (symbols >= escape)
        return np.where(escaped, escape, symbols), escaped

    def escaped(self, symbols: np.ndarray, span: slice) -> np.ndarray:
        """Return which of the integers are escaped."""
        escaped: np.ndarray = symbols == self._escape[self._rows[span]]
        return escaped

    def integers(self, symbols: np.ndarray, span: slice) -> np.ndarray:
        """Return the integers of symbols, with zeros for their raw bits."""
        rows = self._rows[span]
        integers: np.ndarray = (symbols + self._first[rows]) << self._raw_bits[rows]
        return integers

    def intervals(self, symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the lower cumulative frequency and the frequency of the symbol of every integer, uint64."""
        bounds = self._bounds.astype(np.uint64)
        at = self._rows.astype(np.intp) * bounds.shape[1] + symbols
        low = bounds.ravel()[at]
        return low, bounds.ravel()[at + 1] - low

    def symbol_at(self, at: np.ndarray | slice, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the symbols whose intervals contain these slots, their lower bounds, and their frequencies.

        Args:
            at: Indices of the integers, (n,).
            slots: Cumulative frequencies, (n,).

        Returns:
            The symbols, (n,) int16; lower bounds and frequencies, (n,) uint64.
        """
        if self._slots is None:
            # table look-ups in place of a binary search; int16 keeps the largest one small
            self._slots = np.concatenate(
                [np.repeat(np.arange(len(row) - 1, dtype=np.int16), np.diff(row)) for row in self._bounds]
            )
            self._low = self._bounds.astype(np.uint64).ravel()
            self._frequencies = np.diff(self._bounds, axis=1, append=TOTAL).astype(np.uint64).ravel()
        rows = self._rows[at].astype(np.intp)
        symbols = self._slots.take(rows * TOTAL + slots)
        index = rows * self._bounds.shape[1] + symbols
        return symbols, self._low.take(index), self._frequencies.take(index)


def check_classes(classes: np.ndarray) -> None:
    """Raise `FormatError` for a class that does not exist."""
    if len(classes) and not (classes.min() >= 0 and classes.max() < ALL_CLASSES):
        raise FormatError(f"classes are 0 to {ALL_CLASSES - 1}, got up to {classes.max()}.")
