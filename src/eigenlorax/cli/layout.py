"""Tables and sentences as lines that fit a terminal. Lines break between words: no word, path or number is cut.

A width of None is that of a stream that is no terminal: nothing is wrapped there, so that tools find lines whole.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rich.cells import cell_len

MARGIN, GAP = " ", "  "


def wrapped(text: str, width: int | None) -> list[str]:
    """`text` in lines of at most `width` cells. A word that is longer has a line of its own, which the terminal wraps.

    Spaces at the beginning indent every line.
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
    """Names beside their values. A value with a word too long to stand beside its name stands below it."""
    pairs = list(pairs)
    beside = max((cell_len(name) for name, _ in pairs), default=0)
    room = None if width is None else width - cell_len(indent) - beside - len(GAP)
    lines = []
    for name, value in pairs:
        if room is None or _least_width(value) <= room:
            first, *others = wrapped(value, room)
            lines.append(f"{indent}{_padded(name, beside)}{GAP}{first}".rstrip(" "))
            lines += [f"{indent}{' ' * beside}{GAP}{other}" for other in others]
        else:
            lines += [*wrapped(indent + name, width), *wrapped(f"{indent}{GAP * 2}{value.lstrip(' ')}", width)]
    return lines


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[int], width: int | None
) -> tuple[list[str], list[str]]:
    """The lines of a table's header, and of its rows.

    numbers: columns that are aligned to the right, and whose cells do not wrap. Where words alone are wider than the
    terminal, there is no header, and each row is a list of fields.
    """
    columns = [_Column(name, [row[place] for row in rows], place in numbers) for place, name in enumerate(header)]
    widths = _widths(columns, width)
    if widths is None:
        return [], _records(header, rows, width)
    rule = MARGIN + "─" * (sum(widths) + len(GAP) * (len(widths) - 1))
    names = [wrapped(column.name, one) for column, one in zip(columns, widths, strict=True)]
    # the last line of a name stands above its figures
    names = [[""] * (max(map(len, names)) - len(name)) + name for name in names]
    heads = _row(names, columns, widths)
    body = []
    for row in rows:
        cells = [wrapped(cell, one) for cell, one in zip(row, widths, strict=True)]
        body += _row(cells, columns, widths)
    return [*heads, rule], body


@dataclass(frozen=True, slots=True)
class _Column:
    """A column: its cells do not wrap if they are numbers."""

    name: str
    cells: Sequence[str]
    is_number: bool

    @property
    def natural(self) -> int:
        """The width at which nothing wraps."""
        return max(cell_len(self.name), self.body)

    @property
    def body(self) -> int:
        """The width at which no cell wraps."""
        return max((cell_len(cell) for cell in self.cells), default=0)

    @property
    def least(self) -> int:
        """The width of the longest piece that must not break."""
        body = self.body if self.is_number else max(map(_least_width, self.cells), default=0)
        return max(_least_width(self.name), body)


def _widths(columns: Sequence[_Column], width: int | None) -> list[int] | None:
    """The columns' widths: headers wrap first, then the widest cells. None where the terminal is too narrow."""
    widths = [column.natural for column in columns]
    if width is None:
        return widths
    least = [column.least for column in columns]
    heads_wrap = [max(column.body, one) for column, one in zip(columns, least, strict=True)]
    excess = sum(widths) + len(MARGIN) + len(GAP) * (len(widths) - 1) - width
    for floors in (heads_wrap, least):
        while excess > 0:
            wide = [place for place, one in enumerate(widths) if one > floors[place]]
            if not wide:
                break
            widths[max(wide, key=widths.__getitem__)] -= 1
            excess -= 1
    return widths if excess <= 0 else None


def _row(cells: Sequence[Sequence[str]], columns: Sequence[_Column], widths: Sequence[int]) -> list[str]:
    """The lines of a row whose cells have several."""
    lines = []
    for parts in zip_longest(*cells, fillvalue=""):
        padded = [
            _padded(part, one, right=column.is_number) for part, column, one in zip(parts, columns, widths, strict=True)
        ]
        lines.append((MARGIN + GAP.join(padded)).rstrip(" "))
    return lines


def _records(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Each row as its first cell, and below it the others that are not empty, by their columns."""
    lines: list[str] = []
    for row in rows:
        others = [(name, cell) for name, cell in zip(header[1:], row[1:], strict=True) if cell]
        lines += [""] * bool(lines)
        lines += [*wrapped(f"{MARGIN}{row[0]}", width), *fields(others, width, MARGIN + GAP)]
    return lines


def _least_width(text: str) -> int:
    """The width of the longest word, with the spaces that indent it."""
    words = text.lstrip(" ")
    return len(text) - len(words) + max(map(cell_len, words.split(" ")))


def _padded(text: str, width: int, *, right: bool = False) -> str:
    space = " " * (width - cell_len(text))
    return space + text if right else text + space
