"""Layout of tables and sentences for a terminal. Lines break between words: no word, path or number is truncated.

A width of None means that the stream is not a terminal. Nothing is wrapped then, so that tools can read whole lines.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rich.cells import cell_len

MARGIN, GAP = " ", "  "


def wrapped(text: str, width: int | None) -> list[str]:
    """Return a text as lines of at most `width` terminal cells.

    A longer word gets a line of its own, which the terminal wraps. Spaces at the beginning indent every line.
    """
    if width is None or cell_len(text) <= width:
        return [text]
    words = text.lstrip(" ").split(" ")
    indent = text[: len(text) - len(text.lstrip(" "))]
    lines = [indent + words[0]]
    for word in words[1:]:
        if cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(indent + word)
    return lines


def fields(pairs: Iterable[tuple[str, str]], width: int | None, indent: str = MARGIN) -> list[str]:
    """Return lines of names and values. A value with a word that is too long for its column goes below its name."""
    pairs = list(pairs)
    name_width = max((cell_len(name) for name, _ in pairs), default=0)
    value_width = None if width is None else width - cell_len(indent) - name_width - len(GAP)
    lines = []
    for name, value in pairs:
        if value_width is None or _least_width(value) <= value_width:
            first, *following = wrapped(value, value_width)
            lines.append(f"{indent}{_padded(name, name_width)}{GAP}{first}".rstrip(" "))
            lines += [f"{indent}{' ' * name_width}{GAP}{line}" for line in following]
        else:
            lines += [*wrapped(indent + name, width), *wrapped(f"{indent}{GAP * 2}{value.lstrip(' ')}", width)]
    return lines


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[int], width: int | None
) -> tuple[list[str], list[str]]:
    """Return the lines of a table's header and of its rows.

    Args:
        numbers: Indices of columns that are aligned to the right and whose cells are not wrapped.
        width: Width of the terminal. If the longest words do not fit, there is no header, and each row becomes a list
            of fields.
    """
    columns = [_Column(name, [row[index] for row in rows], index in numbers) for index, name in enumerate(header)]
    widths = _widths(columns, width)
    if widths is None:
        return [], _records(header, rows, width)
    rule = MARGIN + "─" * (sum(widths) + len(GAP) * (len(widths) - 1))
    names = [wrapped(column.name, column_width) for column, column_width in zip(columns, widths, strict=True)]
    # align names at the bottom, next to their cells
    names = [[""] * (max(map(len, names)) - len(name)) + name for name in names]
    heads = _row(names, columns, widths)
    body = []
    for row in rows:
        cells = [wrapped(cell, column_width) for cell, column_width in zip(row, widths, strict=True)]
        body += _row(cells, columns, widths)
    return [*heads, rule], body


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of a table. Cells with numbers are not wrapped."""

    name: str
    cells: Sequence[str]
    is_number: bool

    @property
    def natural(self) -> int:
        """Width at which neither the name nor a cell wraps."""
        return max(cell_len(self.name), self.body)

    @property
    def body(self) -> int:
        """Width at which no cell wraps."""
        return max((cell_len(cell) for cell in self.cells), default=0)

    @property
    def least(self) -> int:
        """Width of the longest part that must not be broken."""
        body = self.body if self.is_number else max(map(_least_width, self.cells), default=0)
        return max(_least_width(self.name), body)


def _widths(columns: Sequence[_Column], width: int | None) -> list[int] | None:
    """Return the columns' widths, or None if the terminal is too narrow. Headers wrap first, then the widest cells."""
    widths = [column.natural for column in columns]
    if width is None:
        return widths
    least = [column.least for column in columns]
    heads_wrap = [max(column.body, minimum) for column, minimum in zip(columns, least, strict=True)]
    excess = sum(widths) + len(MARGIN) + len(GAP) * (len(widths) - 1) - width
    for floors in (heads_wrap, least):
        while excess > 0:
            wide = [index for index, column_width in enumerate(widths) if column_width > floors[index]]
            if not wide:
                break
            widths[max(wide, key=widths.__getitem__)] -= 1
            excess -= 1
    return widths if excess <= 0 else None


def _row(cells: Sequence[Sequence[str]], columns: Sequence[_Column], widths: Sequence[int]) -> list[str]:
    """Return the lines of a row whose cells have several lines."""
    lines = []
    for line_of_cells in zip_longest(*cells, fillvalue=""):
        padded = [
            _padded(text, column_width, right=column.is_number)
            for text, column, column_width in zip(line_of_cells, columns, widths, strict=True)
        ]
        lines.append((MARGIN + GAP.join(padded)).rstrip(" "))
    return lines


def _records(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Return each row as its first cell, with the other cells that are not empty below it, named by their columns."""
    lines: list[str] = []
    for row in rows:
        cells = [(name, cell) for name, cell in zip(header[1:], row[1:], strict=True) if cell]
        lines += [""] * bool(lines)
        lines += [*wrapped(f"{MARGIN}{row[0]}", width), *fields(cells, width, MARGIN + GAP)]
    return lines


def _least_width(text: str) -> int:
    """Return the width of the longest word, plus the indent."""
    words = text.lstrip(" ")
    return len(text) - len(words) + max(map(cell_len, words.split(" ")))


def _padded(text: str, width: int, *, right: bool = False) -> str:
    space = " " * (width - cell_len(text))
    return space + text if right else text + space
