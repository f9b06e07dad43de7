"""A table of a report as data: columns, and rows of printed cells. Columns without any value are left out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .. import numbers

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell. text: what is printed. exact: the exact value, or "" if the text is exact."""

    text: str
    exact: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """One column. label: the heading. meaning: its explanation, or "". numeric: whether the cells are numbers."""

    label: str
    meaning: str = ""
    numeric: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """A table. caption: describes the rows. rows: one cell for each of `columns`."""

    caption: str
    columns: list[Column]
    rows: list[list[Cell]]


@dataclass(frozen=True, slots=True)
class Field(Generic[T]):
    """A column and how to fill it from a row.

    value: None where nothing was measured. exact: whether cells are bytes whose exact number is a tooltip.
    """

    label: str
    value: Callable[[T], Any]
    show: Callable[[Any], str] = str
    meaning: str = ""
    numeric: bool = True
    exact: bool = False


def make_table(caption: str, fields: Iterable[Field[T]], rows: Sequence[T]) -> Table:
    """Return a table with a row per element of `rows`, and a column per field that has a value in any of them."""
    shown = [field for field in fields if any(field.value(row) is not None for row in rows)]
    columns = [Column(field.label, field.meaning, field.numeric) for field in shown]
    return Table(caption, columns, [[_cell(field, field.value(row)) for field in shown] for row in rows])


def _cell(field: Field[Any], value: Any) -> Cell:
    if value is None:
        return Cell(numbers.MISSING)
    return Cell(field.show(value), numbers.exact(value) if field.exact else "")
