"""Rows of text out of JSON lines, CSV or a folder of `datasets`; labels as numbers. Nothing here knows a tokenizer."""

import csv
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..core import boundary
from ..core.options import suggestion
from ..errors import FormatError, MissingExtraError, OptionError, RowsWarning, reason
from .options import Columns

_JSON_LINES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one file, and where each of them stands in it. `classes`: a label column's names, where the file
    itself has them (a `ClassLabel` of datasets)."""

    where: Path
    rows: list[dict[str, Any]]
    places: list[str]
    classes: list[str] | None = None

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0])


def read(path: Path, label_column: str = "label") -> Table:
    """All rows of a file. `FormatError` says which line is not what it should be."""
    if path.is_dir():
        return _read_datasets(path, label_column)
    if not path.is_file():
        raise FormatError(f"{path} does not exist. Rows are read from .jsonl, .csv, or a folder saved by datasets.")
    if path.suffix.lower() not in (*_JSON_LINES, ".csv"):
        raise FormatError(
            f"{path}: rows are read from JSON lines ({', '.join(_JSON_LINES)}), .csv, or a folder saved by datasets."
        )
    if path.stat().st_size > boundary.machine_memory():
        # one line of a sparse file may be longer than that
        raise FormatError(f"{path} has {path.stat().st_size:,} bytes, more than this machine has memory for its rows.")
    read_lines = _csv_rows if path.suffix.lower() == ".csv" else _json_rows
    try:
        # what a spreadsheet saves begins with a mark
        with open(path, encoding="utf-8-sig", newline="") as file:
            found = list(read_lines(file, path))
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not text in UTF-8: {reason(error)}.") from error
    if not found:
        raise FormatError(f"{path} has no rows.")
    return Table(path, [row for _, row in found], [f"line {line}" for line, _ in found])


def _json_rows(lines: Any, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            # a line that ends too early ends where it does, and not on the next one
            row = json.loads(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            said = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else reason(error)
            raise FormatError(
                f"{path}, line {number} is not JSON: {said}. Each line has to be one JSON object."
            ) from error
        if not isinstance(row, dict):
            raise FormatError(f"{path}, line {number} is a JSON {type(row).__name__}; an object was expected.")
        boundary.check_depth(row, f"{path}, line {number}")
        yield number, row


def _csv_rows(lines: Any, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, None)
        if not header or len(set(header)) < len(header):
            said = f"{', '.join(header)}" if header else "empty"
            raise FormatError(f"{path}: the first line has to name the columns, each once; it is {said}.")
        for row in reader:
            if row and len(row) != len(header):
                raise FormatError(
                    f"{path}, line {reader.line_num}: {len(row)} fields, where the first line names {len(header)}."
                )
            if row:
                yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise FormatError(f"{path}, line {reader.line_num} is not CSV: {reason(error)}.") from error


def _read_datasets(path: Path, label_column: str) -> Table:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(f"{path} is a folder; to read one saved by datasets: pip install datasets.") from error
    if not (path / "state.json").is_file():
        splits = ", ".join(sorted(str(child.parent) for child in path.glob("*/state.json")))
        hint = f" It holds {splits}: name one." if splits else ""
        raise FormatError(f"{path} is not a split that `Dataset.save_to_disk` has written.{hint}")
    try:
        found = datasets.load_from_disk(str(path))
        rows = [dict(row) for row in found]
    except (OSError, *boundary.PARSE_FAILURES) as error:
        raise FormatError(f"{path} cannot be read by datasets: {reason(error)}.") from error
    if not rows:
        raise FormatError(f"{path} has no rows.")
    feature = found.features.get(label_column)
    classes = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return Table(path, rows, [f"row {number}" for number in range(1, len(rows) + 1)], classes)


def texts(table: Table, column: str, option: str | None = None) -> list[str]:
    """The texts of a column. `option` is what names the column in the command."""
    found = []
    for value, place in _column(table, column, option):
        if not isinstance(value, str):
            raise FormatError(f"{table.where}, {place}: {column!r} is {value!r}; a text was expected.")
        found.append(value)
    return found


def has_columns(table: Table, *columns: str) -> bool:
    """Whether the first row has them all."""
    return set(columns) <= set(table.columns)


def _column(table: Table, column: str, option: str | None) -> Iterator[tuple[Any, str]]:
    if column not in table.columns:
        hint = f" {option} names another one." if option else ""
        near = suggestion(column, table.columns)
        raise OptionError(f"{table.where} has no column {column!r}.{near} It has: {', '.join(table.columns)}.{hint}")
    for row, place in zip(table.rows, table.places, strict=True):
        if column not in row:
            raise FormatError(f"{table.where}, {place} has no {column!r}, which other rows have.")
        yield row[column], place


@dataclass(frozen=True, slots=True)
class Labels:
    """The names of the classes, in the order of the head's outputs."""

    names: tuple[str, ...]

    @property
    def numbered(self) -> bool:
        """Whether the classes have no names but their numbers."""
        return self.names == tuple(map(str, range(len(self.names))))

    def encode(self, table: Table, columns: Columns) -> list[int]:
        """The labels of a file as class numbers. A text is looked up among the names; an integer is a number."""
        known = {name: number for number, name in enumerate(self.names)}
        # names such as "1", "2", "3" were texts: which of them an integer 1 means, nobody can say
        unclear = not self.numbered and any(_is_number(name) for name in self.names)
        encoded = []
        for value, place in _label_column(table, columns):
            at = f"{table.where}, {place}: label {value!r}"
            if isinstance(value, int):
                if unclear:
                    raise FormatError(f"{at} is an integer, but the classes are texts: {self._listing()}.")
                if not 0 <= value < len(self.names):
                    raise FormatError(f"{at} is none of the {len(self.names)} classes: {self._listing()}.")
                encoded.append(value)
            elif value in known:
                encoded.append(known[value])
            else:
                near = suggestion(value, self.names)
                raise FormatError(f"{at} is none of the {len(self.names)} classes: {self._listing()}.{near}")
        return encoded

    def _listing(self) -> str:
        return ", ".join(self.names[:12]) + (" …" if len(self.names) > 12 else "")


def labels_of(table: Table, columns: Columns) -> Labels:
    """The classes of a training file: those it names itself; integers as they are; texts in sorted order."""
    values = [value for value, _ in _label_column(table, columns)]
    if table.classes is not None:
        labels = Labels(tuple(table.classes))
    elif all(isinstance(value, int) or _is_csv_number(table, value) for value in values):
        labels = _numbered(table, [int(value) for value in values])
    elif all(isinstance(value, str) for value in values):
        labels = Labels(tuple(sorted({str(value) for value in values})))
    else:
        raise FormatError(f"{table.where}: some labels are integers and some are texts. Make them one or the other.")
    if len(labels.names) < 2:
        raise FormatError(f"{table.where} has one class only, {labels.names[0]!r}: there is nothing to learn.")
    counts = Counter(labels.encode(table, columns))
    missing = [name for number, name in enumerate(labels.names) if not counts[number]]
    if missing:
        warnings.warn(f"{table.where} has no rows of class {', '.join(missing)}.", RowsWarning, stacklevel=2)
    return labels


def named_label(table: Table, columns: Columns) -> str | None:
    """The first label that is a name, and no number."""
    names = (value for value, _ in _label_column(table, columns) if isinstance(value, str) and not _is_number(value))
    return next(names, None)


def numbered(n: int) -> Labels:
    """Classes that have no names."""
    return Labels(tuple(map(str, range(n))))


def _numbered(table: Table, numbers: Sequence[int]) -> Labels:
    highest = max(numbers)
    if min(numbers) < 0 or highest >= max(len(numbers), 2):
        worst = min(numbers) if min(numbers) < 0 else highest
        raise FormatError(
            f"{table.where}: label {worst} among {len(numbers)} rows. Integers are class numbers from 0 on; write "
            "classes that have other names as texts."
        )
    return numbered(highest + 1)


def _label_column(table: Table, columns: Columns) -> Iterator[tuple[int | str, str]]:
    for value, place in _column(table, columns.label, "Columns.label (--label-column)"):
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise FormatError(
                f"{table.where}, {place}: label {value!r}; an integer or a text was expected. Classes alone are "
                "learned, no numbers."
            )
        if isinstance(value, str) and not value.strip():
            raise FormatError(f"{table.where}, {place}: the label is empty. Leave the row out, or label it.")
        yield value, place


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and (text == "0" or not text.startswith("0"))


def _is_csv_number(table: Table, value: Any) -> bool:
    """In CSV all is text: where every label is an integer, that is what is meant."""
    return table.where.suffix.lower() == ".csv" and isinstance(value, str) and _is_number(value)


def digest(table: Table) -> str:
    """sha256 of the rows, whatever their file is called."""
    text = json.dumps([table.rows, table.classes], sort_keys=True, default=str)
    return sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()
