"""Files of a report: JSON, Markdown and an HTML page. Only JSON can be read again."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..core import atomic_files, keys
from ..core.json_dataclasses import JsonTypeError, from_json, reject_constant
from ..core.limits import MAX_REPORT_BYTES, read_file
from ..errors import FormatError, OptionError, PackExistsError
from ..pack import report_files
from . import validation
from .data import SCHEMA_VERSION, ReportData
from .json_document import adapter_rows, to_json
from .render import markdown, page


@dataclass(frozen=True, slots=True)
class Report(ReportData):
    """Report of a pack, from `eigenlorax.report`, with methods to save and load it.

    Example:
        >>> report = eigenlorax.report(pack)
        >>> report.collection.adapters
        3
    """

    def save(self, path: str | Path) -> None:
        """Write the report to a file. An existing report is replaced.

        Args:
            path: File whose suffix selects the format: .html, .md or .json.

        Raises:
            OptionError: The suffix is unknown, or packs use this name.
            PackExistsError: The file exists and is no report.

        Example:
            >>> eigenlorax.report(pack).save("report.md")
        """
        write(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Read a report from JSON.

        Args:
            path: File that `save` wrote as JSON.

        Raises:
            FormatError: The file is no report, or has another schema version.

        Example:
            >>> eigenlorax.report(pack).save("report.json")
            >>> eigenlorax.Report.load("report.json").collection.adapters
            3
        """
        return read(path)


def read(path: str | Path) -> Report:
    """Read a report from JSON; `FormatError` if the file is no report, or has another schema version."""
    try:
        body = json.loads(read_file(Path(path), MAX_REPORT_BYTES), parse_constant=reject_constant)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(body, dict) or body.pop("schema", None) != keys.REPORT_SCHEMA:
        raise FormatError(
            f"{path} is no report: its schema is not {keys.REPORT_SCHEMA!r}. `eigenlorax report` makes one."
        )
    try:
        version = from_json(int, body.pop("schema_version", ...), "schema_version")
        if version != SCHEMA_VERSION:
            raise FormatError(
                f"{path} has version {version} of the report's schema, expected version {SCHEMA_VERSION}. Make the "
                "report again."
            )
        body["adapters"] = adapter_rows(body.get("adapters", ...), "report.adapters")
        report: Report = from_json(Report, body, "report")
        validation.check(report)
    except JsonTypeError as error:
        raise FormatError(f"{path} does not match the schema of reports: {error} Make the report again.") from error
    return report


KINDS: dict[str, Callable[[ReportData], str]] = {
    ".html": page.render,
    ".htm": page.render,
    ".json": to_json,
    ".md": markdown.render,
}


RESERVED = {keys.MANIFEST, keys.ADAPTER_CONFIG, keys.SOURCE_CONFIG}
"""Names of files that make a folder a pack or an adapter."""


def check(path: Path) -> None:
    """Raise `OptionError` if a report cannot have this path, `PackExistsError` if another file exists there."""
    if path.suffix.lower() not in KINDS:
        raise OptionError(
            f"{path}: the suffix of a report must be .html, .json or .md. "
            f"For example {path.with_suffix('.html') if path.name else 'report.html'}."
        )
    if path.is_dir():
        raise OptionError(f"{path} is a folder. Pass a file in it: {path / 'report.html'}.")
    free = path.with_name(f"report{path.suffix}")
    if path.name.lower() in RESERVED:
        raise OptionError(f"{path}: packs and adapters use the name {path.name}. Choose another name, such as {free}.")
    if path.name.lower() == keys.CARD.lower() and (path.parent / keys.MANIFEST).is_file():
        raise OptionError(f"{path} is the model card of the pack. Choose another name, such as {free}.")
    if path.is_file() and path.stat().st_size and not report_files.is_report(path):
        raise PackExistsError(
            f"{path} exists, and is not a report of eigenlorax, so it is not replaced. Choose another name, or remove "
            "the file."
        )


def write(report: ReportData, path: str | Path) -> None:
    """Write the report atomically, in the format that the suffix selects. An existing report is replaced."""
    target = Path(path)
    check(target)
    content = KINDS[target.suffix.lower()](report).encode("utf-8", errors="replace")
    try:
        with atomic_files.ensure_folder(target.parent):
            atomic_files.write_file(target, content)
    except OSError as error:
        # the error names the temporary file, which the user does not know
        raise OSError(error.errno, error.strerror, str(target)) from error
