"""Tables of a report as data: columns and printed cells. Columns without any value are left out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .. import numbers

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell.

    Attributes:
        text: Printed text.
        exact: The exact value, or "" if the text is exact.
    """

    text: str
    exact: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        label: Heading.
        meaning: Explanation of the heading, or "".
        numeric: True if the cells are numbers.
    """

    label: str
    meaning: str = ""
    numeric: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """One table.

    Attributes:
        caption: Description of the rows.
        columns: Columns from left to right.
        rows: One cell for each column, by row.
    """

    caption: str
    columns: list[Column]
    rows: list[list[Cell]]


@dataclass(frozen=True, slots=True)
class Field(Generic[T]):
    """Column of a table, with the function that computes its cells.

    Attributes:
        label: Heading.
        value: Function from a row to its value; None if it was not measured.
        show: Function that formats a value.
        meaning: Explanation of the heading, or "".
        numeric: True if the values are numbers.
        exact: True if the values are bytes, whose exact number is shown as a tooltip.
    """

    label: str
    value: Callable[[T], Any]
    show: Callable[[Any], str] = str
    meaning: str = ""
    numeric: bool = True
    exact: bool = False


def make_table(caption: str, fields: Iterable[Field[T]], rows: Sequence[T]) -> Table:
    """Return a table with one line per row, and one column per field that has a value in any row."""
    shown = [field for field in fields if any(field.value(row) is not None for row in rows)]
    columns = [Column(field.label, field.meaning, field.numeric) for field in shown]
    return Table(caption, columns, [[_cell(field, field.value(row)) for field in shown] for row in rows])


def _cell(field: Field[Any], value: Any) -> Cell:
    if value is None:
        return Cell(numbers.MISSING)
    return Cell(field.show(value), numbers.exact(value) if field.exact else "")
