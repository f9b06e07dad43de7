"""Reading of rows of text from JSON lines, CSV or a folder of `datasets`, and of their labels as class numbers."""

import csv
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..core import limits
from ..core.json_dataclasses import describe
from ..core.options import suggestion
from ..errors import FormatError, MissingExtraError, OptionError, RowsWarning, reason
from .options import Columns

_JSON_LINES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one file.

    Attributes:
        path: File of the rows.
        rows: Rows as column → cell; at least one.
        locations: Location of each row in the file, such as "line 3", for messages.
        classes: Class names of the label column if the file has them (a `ClassLabel` of `datasets`), otherwise None.
    """

    path: Path
    rows: list[dict[str, Any]]
    locations: list[str]
    classes: list[str] | None = None

    @property
    def columns(self) -> list[str]:
        """Names of the first row's columns."""
        return list(self.rows[0])


def read(path: Path, label_column: str = "label") -> Table:
    """Read all rows of a file.

    Args:
        path: File in JSON lines or CSV, or a folder saved by `datasets`.
        label_column: Column whose `ClassLabel` gives the class names, in a folder of `datasets`.

    Raises:
        FormatError: The file cannot be read, or has no rows. The message names the line.
        MissingExtraError: `path` is a folder, and `datasets` is not installed.
    """
    if path.is_dir():
        return _read_datasets(path, label_column)
    if not path.is_file():
        raise FormatError(f"{path} does not exist. Rows are read from .jsonl, .csv, or a folder saved by datasets.")
    if path.suffix.lower() not in (*_JSON_LINES, ".csv"):
        raise FormatError(
            f"{path}: rows are read from JSON lines ({', '.join(_JSON_LINES)}), .csv, or a folder saved by datasets."
        )
    if path.stat().st_size > limits.machine_memory():
        # checked first, because a single line of a sparse file may fill the memory
        raise FormatError(
            f"{path} has {path.stat().st_size:,} bytes. Its rows do not fit into the memory of this machine."
        )
    read_lines = _csv_rows if path.suffix.lower() == ".csv" else _json_rows
    try:
        # utf-8-sig, because spreadsheets write a byte order mark
        with open(path, encoding="utf-8-sig", newline="") as file:
            numbered_rows = list(read_lines(file, path))
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not text in UTF-8: {reason(error)}.") from error
    if not numbered_rows:
        raise FormatError(f"{path} has no rows.")
    return Table(path, [row for _, row in numbered_rows], [f"line {line}" for line, _ in numbered_rows])


def _json_rows(lines: Any, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers and rows."""
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            # without the line break, an error at the end of the line is reported in the column where it is
            row = json.loads(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            problem = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else reason(error)
            raise FormatError(
                f"{path}, line {line_number} is not JSON: {problem}. Each line has to be one JSON object."
            ) from error
        if not isinstance(row, dict):
            raise FormatError(f"{path}, line {line_number} is {describe(row)}; an object was expected.")
        limits.check_depth(row, f"{path}, line {line_number}")
        yield line_number, row


def _csv_rows(lines: Any, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers and rows. The first line has the names of the columns."""
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, None)
        if not header or len(set(header)) < len(header):
            content = ", ".join(header) if header else "empty"
            raise FormatError(f"{path}: the first line has to name the columns, each once; it is {content}.")
        for row in reader:
            if row and len(row) != len(header):
                raise FormatError(
                    f"{path}, line {reader.line_num}: the number of fields is {len(row)}; the first line names "
                    f"{len(header)}."
                )
            if row:
                yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise FormatError(f"{path}, line {reader.line_num} is not CSV: {reason(error)}.") from error


def _read_datasets(path: Path, label_column: str) -> Table:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"{path} is a folder. To read a folder saved by datasets: pip install datasets."
        ) from error
    if not (path / "state.json").is_file():
        splits = ", ".join(sorted(str(child.parent) for child in path.glob("*/state.json")))
        hint = f" It contains {splits}: pass one of them." if splits else ""
        raise FormatError(f"{path} is not a split written by `Dataset.save_to_disk`.{hint}")
    try:
        dataset = datasets.load_from_disk(str(path))
        rows = [dict(row) for row in dataset]
    except (OSError, *limits.PARSE_FAILURES) as error:
        raise FormatError(f"{path} cannot be read by datasets: {reason(error)}.") from error
    if not rows:
        raise FormatError(f"{path} has no rows.")
    feature = dataset.features.get(label_column)
    classes = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return Table(path, rows, [f"row {number}" for number in range(1, len(rows) + 1)], classes)


def column_texts(table: Table, column: str, option: str | None = None) -> list[str]:
    """Return the texts of a column.

    Args:
        table: Rows.
        column: Name of the column.
        option: Option that sets the column's name, for messages.

    Raises:
        OptionError: The table has no such column.
        FormatError: A row has no text in the column.
    """
    texts = []
    for cell, location in _column(table, column, option):
        if not isinstance(cell, str):
            raise FormatError(f"{table.path}, {location}: {column!r} is {cell!r}; a text was expected.")
        texts.append(cell)
    return texts


def has_columns(table: Table, *columns: str) -> bool:
    """Return whether the table has all these columns."""
    return set(columns) <= set(table.columns)


def _column(table: Table, column: str, option: str | None) -> Iterator[tuple[Any, str]]:
    """Yield the cells of a column with their locations."""
    if column not in table.columns:
        remedy = f" Pass another name with {option}." if option else ""
        hint = suggestion(column, table.columns)
        raise OptionError(f"{table.path} has no column {column!r}.{hint} It has: {', '.join(table.columns)}.{remedy}")
    for row, location in zip(table.rows, table.locations, strict=True):
        if column not in row:
            raise FormatError(f"{table.path}, {location} has no {column!r}, which other rows have.")
        yield row[column], location


@dataclass(frozen=True, slots=True)
class Labels:
    """Class names.

    Attributes:
        names: Name of each class, in the order of the head's outputs.
        origin: File whose texts are the names; None if they were passed or are numbers.
    """

    names: tuple[str, ...]
    origin: Path | None = field(default=None, compare=False)

    @property
    def numbered(self) -> bool:
        """True if the classes are named by their numbers."""
        return self.names == tuple(map(str, range(len(self.names))))

    def encode(self, table: Table, columns: Columns) -> list[int]:
        """Return the labels of a file as class numbers.

        A text in the label column is the name of a class, an integer is its number.

        Args:
            table: Rows.
            columns: Names of the columns.

        Raises:
            FormatError: A label is not one of the classes.
        """
        numbers_by_name = {name: number for number, name in enumerate(self.names)}
        # with names such as "1", "2", "3", an integer 1 could be the name or the number of a class
        is_ambiguous = not self.numbered and any(_is_number(name) for name in self.names)
        encoded = []
        for cell, location in _label_column(table, columns):
            label = f"{table.path}, {location}: label {cell!r}"
            if isinstance(cell, int):
                if is_ambiguous:
                    raise FormatError(f"{label} is an integer, but the classes are texts: {self._listing()}.")
                if not 0 <= cell < len(self.names):
                    raise FormatError(f"{label} is not one of the {len(self.names)} classes: {self._listing()}.")
                encoded.append(cell)
            elif cell in numbers_by_name:
                encoded.append(numbers_by_name[cell])
            else:
                hint = suggestion(cell, self.names)
                if self.numbered:
                    hint = " Name the classes in the order of the head: labels= (--labels A,B,…)."
                elif self.origin is not None:
                    hint += f" The classes are the labels in {self.origin}."
                raise FormatError(f"{label} is not one of the {len(self.names)} classes: {self._listing()}.{hint}")
        return encoded

    def _listing(self) -> str:
        return ", ".join(self.names[:12]) + (" …" if len(self.names) > 12 else "")


def infer_labels(table: Table, columns: Columns) -> Labels:
    """Return the classes of a training file.

    They are the classes of its `ClassLabel`, the integers from 0 to the highest label, or the sorted texts. Warns with
    `RowsWarning` if a class has no rows.

    Args:
        table: Training rows.
        columns: Names of the columns.

    Raises:
        OptionError: The table has no label column.
        FormatError: There is only one class, or some labels are integers and some are texts.
    """
    cells = [cell for cell, _ in _label_column(table, columns)]
    if table.classes is not None:
        labels = Labels(tuple(table.classes))
    elif all(isinstance(cell, int) or _is_csv_number(table, cell) for cell in cells):
        labels = _labels_from_integers(table, [int(cell) for cell in cells])
    elif all(isinstance(cell, str) for cell in cells):
        labels = Labels(tuple(sorted({str(cell) for cell in cells})), table.path)
    else:
        raise FormatError(f"{table.path}: some labels are integers and some are texts. Use one type for all.")
    if len(labels.names) < 2:
        raise FormatError(f"{table.path} has one class only, {labels.names[0]!r}: there is nothing to learn.")
    counts = Counter(labels.encode(table, columns))
    missing = [name for index, name in enumerate(labels.names) if not counts[index]]
    if missing:
        warnings.warn(f"{table.path} has no rows of class {', '.join(missing)}.", RowsWarning, stacklevel=2)
    return labels


def first_name(table: Table, columns: Columns) -> str | None:
    """Return the first label that is a text and not a number; None if there is no such label."""
    names = (cell for cell, _ in _label_column(table, columns) if isinstance(cell, str) and not _is_number(cell))
    return next(names, None)


def numbered_labels(n: int) -> Labels:
    """Return n classes with the names "0", "1", …"""
    return Labels(tuple(map(str, range(n))))


def _labels_from_integers(table: Table, numbers: Sequence[int]) -> Labels:
    """Return classes from 0 to the highest label. Raises `FormatError` for a label that cannot be a class number."""
    highest = max(numbers)
    if min(numbers) < 0 or highest >= max(len(numbers), 2):
        invalid = min(numbers) if min(numbers) < 0 else highest
        raise FormatError(
            f"{table.path}: label {invalid} among {len(numbers)} rows. Integers are class numbers from 0 on; write "
            "other names of classes as texts."
        )
    return numbered_labels(highest + 1)


def _label_column(table: Table, columns: Columns) -> Iterator[tuple[int | str, str]]:
    """Yield the labels with their locations. Raises `FormatError` for a cell that cannot be a label."""
    for cell, location in _column(table, columns.label, "Columns.label (--label-column)"):
        if isinstance(cell, bool) or not isinstance(cell, int | str):
            raise FormatError(
                f"{table.path}, {location}: label {cell!r}; an integer or a text was expected. Regression is not "
                "supported."
            )
        if isinstance(cell, str) and not cell.strip():
            raise FormatError(f"{table.path}, {location}: the label is empty. Remove the row, or label it.")
        yield cell, location


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and (text == "0" or not text.startswith("0"))


def _is_csv_number(table: Table, cell: Any) -> bool:
    """Return whether a cell is an integer in a CSV file, where every cell is read as text."""
    return table.path.suffix.lower() == ".csv" and isinstance(cell, str) and _is_number(cell)


def rows_sha256(table: Table) -> str:
    """Return the SHA-256 of the rows. It does not depend on the name or the format of their file."""
    text = json.dumps([table.rows, table.classes], sort_keys=True, default=str)
    return sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()
