"""The JSON of a report within a number of bytes: fewer digits first, then without the largest lists."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from ..core import keys
from ..core.json_dataclasses import JsonTypeError, from_json
from .data import MATRIX, SCHEMA_VERSION, AdapterFigures, ModuleFigures, ReportData
from .history_data import HistoryFigures
from .numbers import size
from .size_advice import pack_bytes

MIN_LIMIT = 200_000
"""Bytes that the JSON of any report may have."""
SHARE_OF_PACK = 0.1
"""Maximum share of the bytes of the pack's tensors that the JSON may have, where that is more than `MIN_LIMIT`."""
MAX_VERSIONS = 200
"""Maximum number of versions of a history in a JSON without the other ones."""
DIGITS = 4
"""Significant digits of numbers where all digits would take too many bytes."""


def limit(report: ReportData) -> int:
    """Return the maximum number of bytes of the report's JSON."""
    histories = sum(history.stored_bytes for history in report.histories)
    return max(MIN_LIMIT, round(SHARE_OF_PACK * (pack_bytes(report) + report.bytes.heads + histories)))


def to_json(report: ReportData) -> str:
    """Return the report as JSON (docs/report.md) of at most `limit` bytes, as far as shortening allows.

    Numbers are rounded to `DIGITS` significant digits first. Then the lists of `SHORTENED` are left out, one after the
    other, and a note in the JSON names them.
    """
    if report.similarity is not None and len(report.similarity.names) > MATRIX:
        report = _without_matrices(report)
    text, max_bytes = _dumps(report), limit(report)
    if len(text) > max_bytes:
        text = _dumps(report, rounded=True)
    notes, omitted = report.notes, []
    for name, shorten in SHORTENED.items():
        shortened = shorten(report)
        if len(text) <= max_bytes or shortened == report:
            continue
        omitted.append(name)
        note = f"To keep the JSON within {size(max_bytes)}, it does not contain: {', '.join(omitted)}."
        report = replace(shortened, notes=[*notes, note])
        text = _dumps(report, rounded=True)
    return text


def adapter_rows(columns: Any, where: str) -> list[dict[str, Any]]:
    """Return the adapters of a JSON document, which has a list for each of their fields, as one object each.

    Raises:
        JsonTypeError: The columns are not lists of equal length.
    """
    columns = from_json(dict[str, list], columns, where)
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        raise JsonTypeError(f"{where} has columns of {sorted(lengths)} items; equally many were expected.")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _without_matrices(report: ReportData) -> ReportData:
    assert report.similarity is not None
    return replace(report, similarity=replace(report.similarity, cosine=[], overlap=[]))


def _without_similarity(report: ReportData) -> ReportData:
    return report if report.similarity is None else _without_matrices(report)


def _without_module_errors(report: ReportData) -> ReportData:
    return replace(report, module_errors=[])


def _without_spectra(report: ReportData) -> ReportData:
    return replace(report, modules=[_without_spectrum(module) for module in report.modules])


def _without_spectrum(module: ModuleFigures) -> ModuleFigures:
    down, up = (replace(side, spectrum=[], null=[], angles=[], null_angles=[]) for side in (module.down, module.up))
    return replace(module, down=down, up=up)


def _without_metrics(report: ReportData) -> ReportData:
    histories = [
        replace(history, versions=[replace(version, metrics={}) for version in history.versions])
        for history in report.histories
    ]
    return replace(report, histories=histories)


def _with_fewer_versions(report: ReportData) -> ReportData:
    return replace(report, histories=[_thinned(history) for history in report.histories])


def _thinned(history: HistoryFigures) -> HistoryFigures:
    """Return a history with at most `MAX_VERSIONS` of its versions, those that were sampled, with both ends."""
    sampled = [version for version in history.versions if version.x is not None]
    count = min(len(sampled), MAX_VERSIONS)
    if len(history.versions) <= MAX_VERSIONS:
        return history
    return replace(history, versions=[sampled[index * (len(sampled) - 1) // (count - 1)] for index in range(count)])


SHORTENED: Mapping[str, Callable[[ReportData], ReportData]] = {
    "similarity matrices": _without_similarity,
    "module_errors": _without_module_errors,
    "spectra and angles": _without_spectra,
    "metrics of versions": _without_metrics,
    "most versions of long histories": _with_fewer_versions,
}
"""Lists that are left out of a large JSON, by the words of the note, in this order."""


def _dumps(report: ReportData, *, rounded: bool = False) -> str:
    body = {"schema": keys.REPORT_SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(report)}
    # a list for each field is a third of the size of an object for each adapter
    columns = {field.name: [row[field.name] for row in body["adapters"]] for field in fields(AdapterFigures)}
    body["adapters"] = columns
    return json.dumps(_rounded(body) if rounded else body, sort_keys=True, allow_nan=False) + "\n"


def _rounded(value: Any) -> Any:
    """Return a JSON document with floats of `DIGITS` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(member) for key, member in value.items()}
    return [_rounded(member) for member in value] if isinstance(value, list | tuple) else value
