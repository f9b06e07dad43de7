"""Histories in the manifest of a pack: JSON without repeated fields, and checks of what is read."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from typing import Any, get_type_hints

from ..core import keys
from ..core.json_dataclasses import JsonTypeError, from_json
from . import source_configs
from .history import History, VersionRecord
from .shared_fields import most_common

MAX_CHAIN = 64
"""Maximum number of versions that are decoded for one, because few bytes of a version may change many numbers."""
_FIELDS = {"shared_fields", "source_fields", "versions"}
_DEFAULTS: Mapping[str, Any] = {
    "step": None,
    "metrics": {},
    "reference": None,
    "origin": None,
    "change": None,
    "change_error": None,
    "bundle": None,
    "offset": None,
}
"""Values of fields that an entry does without."""
_SHARED_FIELDS = {
    "bundle",
    "lossless",
    "max_error",
    "head_error",
    "delta_error",
    "tensor_error",
    "tensor_bytes",
    "source_lora_bytes",
    "source_tensor_bytes",
    "source_file_bytes",
    "source_config",
}
"""Fields that are often the same for most versions."""
_MAX_FIGURE = 2**63
_FIGURES = [name for name, kind in get_type_hints(VersionRecord).items() if kind in (int, float)]
_BOUNDS = ("max_error", "head_error")


def to_json(histories: Mapping[str, History]) -> dict[str, Any]:
    """Return the field `histories` of a manifest."""
    return {name: _history_fields(history) for name, history in sorted(histories.items())}


def manifest_bytes(history: History) -> int:
    """Return the number of bytes that a history takes in a manifest."""
    text = json.dumps(to_json({history.name: history}), sort_keys=True, separators=(",", ":"))
    return len(text) - len("{}")


def _history_fields(history: History) -> dict[str, Any]:
    entries = [_fields(record) for record in history.versions]
    common = most_common(entries, _SHARED_FIELDS)
    shared = {name: value for name, value in common.items() if name not in _DEFAULTS or value is not None}
    implied = {**_DEFAULTS, **shared}
    return {
        "shared_fields": shared,
        "source_fields": dict(history.source_fields),
        "versions": [
            {
                name: value
                for name, value in entry.items()
                if name not in implied or value != implied[name] or type(value) is not type(implied[name])
            }
            for entry in entries
        ],
    }


def _fields(record: VersionRecord) -> dict[str, Any]:
    # `asdict` would copy each value of thousands of versions
    fields = {name: getattr(record, name) for name in VersionRecord.__dataclass_fields__}
    return {**fields, "origin": asdict(record.origin) if record.origin is not None else None}


def read(value: Any, adapters: Mapping[str, Any]) -> dict[str, History]:
    """Return the histories of the field `histories` of a manifest.

    Args:
        value: The field.
        adapters: Adapters of the pack, by name, of which a history has another name.

    Raises:
        JsonTypeError, AdapterNameError: A field is wrong.
    """
    histories = {
        keys.check_name(name): _history(name, fields) for name, fields in from_json(dict, value, "histories").items()
    }
    names = [name.lower() for name in (*histories, *adapters)]
    if histories and len(set(names)) < len(names):
        raise JsonTypeError("a history has the name of an adapter or of another history.")
    return histories


def _history(name: str, value: Any) -> History:
    where = f"histories.{name}"
    fields = from_json(dict, value, where)
    if fields.keys() != _FIELDS:
        raise JsonTypeError(f"{where} has the fields {sorted(fields)}, and should have {sorted(_FIELDS)}.")
    shared = from_json(dict, fields["shared_fields"], f"{where}.shared_fields")
    if not shared.keys() <= _SHARED_FIELDS:
        raise JsonTypeError(f"{where}.shared_fields has {sorted(shared)}, and may have {sorted(_SHARED_FIELDS)}.")
    source_fields = from_json(dict, fields["source_fields"], f"{where}.source_fields")
    if not source_configs.is_small(source_fields):
        raise JsonTypeError(f"{where}.source_fields is too large.")
    versions = tuple(
        from_json(
            VersionRecord,
            {**_DEFAULTS, **shared, **from_json(dict, entry, f"{where}.versions[{i}]")},
            f"{where}.versions[{i}]",
        )
        for i, entry in enumerate(from_json(list, fields["versions"], f"{where}.versions"))
    )
    history = History(name, versions, source_fields)
    _check_labels(history)
    for text in {record.source_config for record in versions}:
        _check_config(text, source_fields, where)
    kinds: dict[str, bool] = {}
    ends: dict[str, int] = {}
    lengths: dict[str | None, int] = {None: 0}
    for i, record in enumerate(versions):
        _check(record, kinds, f"{where}.versions[{i}]")
        kinds[record.version] = record.lossless
        if record.bundle is not None:
            # versions are side by side, so that a bundle has no byte that belongs to none
            end = ends.get(record.bundle, 0)
            if record.offset != end:
                raise JsonTypeError(f"{where}.versions[{i}]: offset is wrong.")
            ends[record.bundle] = end + record.file_bytes
        lengths[record.version] = lengths[record.reference] + 1
    if max(lengths.values()) > MAX_CHAIN:
        raise JsonTypeError(f"{where}: more than {MAX_CHAIN} versions would have to be decoded for one.")
    return history


def _check_config(text: str, source_fields: Mapping[str, Any], where: str) -> None:
    """Raise `JsonTypeError` unless a `source_config` is an object, and its differences have a known form."""
    try:
        source_configs.from_bytes(text.encode("utf-8"), source_fields)
    except ValueError as error:
        raise JsonTypeError(f"{where}.versions: {error}.") from error


def _check_labels(history: History) -> None:
    labels = {keys.check_label(record.version).lower() for record in history.versions}
    if not labels:
        raise JsonTypeError(f"histories.{history.name} has no version.")
    if len(labels) < len(history):
        raise JsonTypeError(f"histories.{history.name} has two versions of one label.")


def _check(record: VersionRecord, earlier: Mapping[str, bool], where: str) -> None:
    """Raise `JsonTypeError` for impossible values of a version.

    Args:
        record: The version.
        earlier: Whether each earlier version is lossless, by label.
        where: Path to the version in the manifest, for the message.
    """
    bounds = [getattr(record, name) for name in _BOUNDS]
    for is_right, text in (
        (record.bundle is None or keys.is_digest(record.bundle), "bundle"),
        ((record.bundle is None) == (record.offset is None), "bundle goes with offset, which"),
        (keys.is_digest(record.sha256) and keys.is_digest(record.source_sha256), "a digest"),
        (all(isfinite(number) for number in record.metrics.values()), "metrics"),
        (record.step is None or 0 <= record.step < _MAX_FIGURE, "step"),
        (all(0 <= getattr(record, name) < _MAX_FIGURE for name in _FIGURES), "a figure"),
        (record.change is None or 0 <= record.change < _MAX_FIGURE, "change"),
        (record.change_error is None or 0 <= record.change_error < _MAX_FIGURE, "change_error"),
        (record.change_error is None or (record.reference is not None and not record.lossless), "change_error"),
        (all((bound is None) == record.lossless for bound in bounds), "lossless goes without error bounds, which"),
        (all(bound is None or 0 < bound < 1 for bound in bounds), "an error bound"),
        (record.reference is None or earlier.get(record.reference) == record.lossless, "reference"),
    ):
        if not is_right:
            raise JsonTypeError(f"{where}: {text} is wrong.")
