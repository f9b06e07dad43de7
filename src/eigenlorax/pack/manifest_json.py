"""The manifest of a pack as a file, `subspace_config.json`: JSON with a digest, read in every format version.

docs/pack-format.md describes the fields.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..core import atomic_files, keys
from ..core.json_dataclasses import JsonTypeError, from_json, reject_constant
from ..errors import AdapterNameError, PackDamagedError, PackVersionError
from ..version import __version__
from . import history_json, licenses, manifest_checks, subspace_json
from .manifest import Entry, FitInfo, Manifest, SubspaceInfo
from .record import Record
from .shared_fields import most_common

_FORMAT = "eigenlorax-pack"
_SINCE: dict[int, dict[str, Any]] = {
    2: {"max_error": None, "auto": False},
    3: {"solver": "exact"},
    5: {"max_bytes": None, "ratio": None},
    7: {"purpose": None, "head_error": None},
}
"""Fields of `fit` by the format version that introduced them, with their values in older packs."""
_SHARED_FIELDS = {"parent", *Record.__dataclass_fields__} - {"delta_error", "rounding_error", "source_sha256"}
"""Fields of an adapter that are often the same for most adapters."""
_SHARED_FILES = {keys.ADAPTER_CONFIG, keys.SOURCE_CONFIG}
"""Files whose digest is often the same for most adapters; every adapter has both."""
_FILES_SHARED_SINCE = 8
"""Format version that introduced digests which several adapters share."""
_MAX_SHARED_RANKS = 64
"""Largest number of ranks that entries share, because each entry has a list of its own in memory."""
_BASIS_FIELDS = {"fit", "coefficient_dtype", "subspace"}
_REMEDY = "Restore the pack from a copy, or fit it again."


def to_bytes(manifest: Manifest) -> bytes:
    """Return the manifest as JSON with sorted keys, and a digest of all other fields.

    The format version is the newest one, also if the manifest was read from an older version.
    """
    body: dict[str, Any] = {
        "format": _FORMAT,
        "format_version": keys.FORMAT_VERSION,
        "eigenlorax_version": __version__,
        "base_model_name_or_path": manifest.base_model,
        "revision": manifest.revision,
        **_bases_fields(manifest),
        "basis": _bases_fields(manifest.basis) if manifest.basis is not None else None,
        "source_fields": manifest.source_fields,
        **_adapter_fields(manifest.adapters),
        "histories": history_json.to_json(manifest.histories),
        **licenses.to_json(manifest.licenses),
    }
    body["digest"] = atomic_files.digest(_canonical(body))
    # without the blanks of the canonical form, which would be a third of the file
    return (json.dumps(body, sort_keys=True, allow_nan=False, separators=(",", ":")) + "\n").encode("utf-8")


def _adapter_fields(adapters: Mapping[str, Entry]) -> dict[str, Any]:
    """Return the entries of the adapters, and the values of fields that most entries share and do not repeat."""
    entries = {
        name: {**asdict(entry.record), "files": entry.files, "parent": entry.parent} for name, entry in adapters.items()
    }
    shared = most_common(entries.values(), _SHARED_FIELDS)
    if len(shared.get("ranks", [])) > _MAX_SHARED_RANKS:
        del shared["ranks"]
    digests = most_common([entry.files for entry in adapters.values()], _SHARED_FILES)
    if digests:
        shared["files"] = digests
    return {
        "shared_fields": shared,
        "adapters": {
            name: {
                **{key: value for key, value in fields.items() if not _is_implied(key, fields, shared)},
                "files": {file: value for file, value in fields["files"].items() if digests.get(file) != value},
            }
            for name, fields in entries.items()
        },
    }


def _is_implied(key: str, fields: dict[str, Any], shared: dict[str, Any]) -> bool:
    """Return whether an entry does without a field: it has the shared value, or all errors are from rounding."""
    if key == "rounding_error":
        return bool(fields[key] == fields["delta_error"])
    return key in shared and bool(shared[key] == fields[key])


def _bases_fields(manifest: Manifest) -> dict[str, Any]:
    """Return the fields that describe bases, their file and their fit."""
    return {
        "fit": asdict(manifest.fit),
        "coefficient_dtype": manifest.coefficient_dtype,
        "subspace": {
            **subspace_json.to_json(manifest.subspace),
            "file": manifest.subspace_file,
            "sha256": manifest.subspace_sha256,
        },
    }


def parse(data: bytes, path: Path) -> Manifest:
    """Parse the bytes of a manifest; `PackVersionError` if its format is newer, `PackDamagedError` if it is invalid."""
    try:
        body = json.loads(data, parse_constant=reject_constant)
    except (ValueError, RecursionError) as error:
        raise PackDamagedError(f"{path} is not valid JSON: {error}. {_REMEDY}") from error
    if not isinstance(body, dict) or type(body.get("format_version")) is not int:
        raise PackDamagedError(f"{path} has no format_version: it is not the manifest of a pack. {_REMEDY}")
    if body["format_version"] > keys.FORMAT_VERSION:
        raise PackVersionError(
            f"{path} is of pack format {body['format_version']} (written by eigenlorax "
            f"{body.get('eigenlorax_version', '?')}); this is eigenlorax {__version__}, which reads "
            f"up to format {keys.FORMAT_VERSION}: pip install --upgrade eigenlorax."
        )
    digest = body.pop("digest", None)
    try:
        intact = digest == atomic_files.digest(_canonical(body))
    except (ValueError, RecursionError) as error:
        raise PackDamagedError(f"{path} has values that no manifest can have: {error}. {_REMEDY}") from error
    if not intact:
        raise PackDamagedError(f"{path} was changed after it was written: its digest does not fit. {_REMEDY}")
    try:
        return _manifest(body)
    except (JsonTypeError, AdapterNameError) as error:
        raise PackDamagedError(
            f"{path} does not follow the pack format: {error} Write the pack again, with another tool or release."
        ) from error


def _manifest(body: dict[str, Any]) -> Manifest:
    """Convert JSON of any format version to a manifest; `JsonTypeError` or `AdapterNameError` if a field is wrong."""
    if body.get("format") != _FORMAT or body["format_version"] < 1:
        raise JsonTypeError(f"format and format_version are {body.get('format')!r} and {body['format_version']}.")
    entries = _entries(body)
    license_of = licenses.read(body.get("licenses", []), entries) if body["format_version"] >= 8 else {}
    manifest = replace(
        _without_adapters(body),
        basis=_basis(body),
        source_fields=from_json(dict, body.get("source_fields"), "source_fields") if _shares(body) else {},
        adapters={
            keys.check_name(name): replace(
                _entry(fields, f"adapters.{name}", body["format_version"]), license=license_of.get(name)
            )
            for name, fields in entries.items()
        },
        histories=history_json.read(body.get("histories", ...), entries) if body["format_version"] >= 8 else {},
    )
    manifest_checks.check(manifest)
    return manifest


def _shares(body: dict[str, Any]) -> bool:
    """Return whether the format has fields that several adapters share."""
    return bool(body["format_version"] >= 7)


def _entries(body: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of all adapters, with the fields that they share."""
    entries = dict(from_json(dict, body.get("adapters"), "adapters"))
    if not _shares(body):
        return entries
    shared = dict(from_json(dict, body.get("shared_fields"), "shared_fields"))
    files = _shared_files(shared.pop("files", {}) if body["format_version"] >= _FILES_SHARED_SINCE else {})
    if not shared.keys() <= _SHARED_FIELDS:
        raise JsonTypeError(f"shared_fields has the fields {sorted(shared)}, and may have {sorted(_SHARED_FIELDS)}.")
    if len(from_json(list, shared.get("ranks", []), "shared_fields.ranks")) > _MAX_SHARED_RANKS:
        raise JsonTypeError(f"shared_fields.ranks has more than {_MAX_SHARED_RANKS} ranks.")
    complete = {name: {**shared, **from_json(dict, fields, f"adapters.{name}")} for name, fields in entries.items()}
    for name, fields in complete.items():
        if "delta_error" in fields:
            fields.setdefault("rounding_error", fields["delta_error"])
        if files:
            fields["files"] = {**files, **from_json(dict, fields.get("files"), f"adapters.{name}.files")}
    return complete


def _shared_files(value: Any) -> dict[str, str]:
    """Return the digests that most adapters share, by file; `JsonTypeError` for a file that not every adapter has."""
    files: dict[str, str] = from_json(dict[str, str], value, "shared_fields.files")
    if not files.keys() <= _SHARED_FILES:
        raise JsonTypeError(f"shared_fields.files has the files {sorted(files)}, and may have {sorted(_SHARED_FILES)}.")
    return files


def _without_adapters(body: dict[str, Any]) -> Manifest:
    """Convert the fields of a pack that describe its base model and its bases."""
    fit, subspace = from_json(FitInfo, _fit(body), "fit"), subspace_json.complete(body)
    return Manifest(
        format_version=body["format_version"],
        base_model=from_json(str | None, body.get("base_model_name_or_path", ...), "base_model_name_or_path"),
        revision=from_json(str | None, body.get("revision", ...), "revision"),
        fit=fit,
        subspace_file=from_json(str, subspace.pop("file", None), "subspace.file"),
        subspace_sha256=from_json(str, subspace.pop("sha256", None), "subspace.sha256"),
        subspace=from_json(SubspaceInfo, subspace, "subspace"),
        coefficient_dtype=from_json(str, body.get("coefficient_dtype"), "coefficient_dtype"),
        adapters={},
    )


def _basis(body: dict[str, Any]) -> Manifest | None:
    """Return the manifest of the basis for training; None if the pack has none, or its format had none yet."""
    if body["format_version"] < 7:
        return None
    fields = from_json(dict | None, body.get("basis", ...), "basis")
    if fields is None:
        return None
    if fields.keys() != _BASIS_FIELDS:
        raise JsonTypeError(f"basis has the fields {sorted(fields)}, and should have {sorted(_BASIS_FIELDS)}.")
    return _without_adapters({**body, **fields})


def _fit(body: dict[str, Any]) -> Any:
    """Return `fit` with defaults for fields that an older format lacks."""
    version, fit = body["format_version"], body.get("fit")
    if not isinstance(fit, dict):
        return fit
    lacking = {name: value for since, new in _SINCE.items() if version < since for name, value in new.items()}
    early = sorted(lacking.keys() & fit.keys())
    if early:
        raise JsonTypeError(f"fit has the fields {early}, which version {version} lacks.")
    return {**fit, **lacking}


def _entry(value: Any, where: str, version: int) -> Entry:
    fields = dict(from_json(dict, value, where))
    lacking: dict[str, Any] = {"bound": False} if version < 3 else {}
    if version < 7:
        lacking |= {
            "head_error": 0.0,
            "source_head_bytes": fields.get("head_bytes"),
            "source_carried_bytes": fields.get("carried_bytes"),
            # unknown, and without effect where tensors are stored exactly
            "head_numbers": 0,
            "carried_numbers": 0,
        }
    early = sorted(lacking.keys() & fields.keys())
    if early:
        raise JsonTypeError(f"{where} has the fields {early}, which version {version} lacks.")
    fields |= lacking
    files = from_json(dict[str, str], fields.pop("files", None), f"{where}.files")
    parent = from_json(str | None, fields.pop("parent", ...), f"{where}.parent") if version >= 6 else None
    return Entry(from_json(Record, fields, where), files, parent)


def _canonical(value: Any) -> bytes:
    """Return the form of a manifest of which its digest is."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("utf-8")
