"""`source_file.json`: the single file that an adapter was read from, with the metadata of that file."""

import base64
import json
import zlib
from typing import Any

from ..core import keys, limits
from ..core.json_dataclasses import from_json
from ..core.origin import Origin

_DEFLATED = "deflated_metadata"
"""Field in place of `metadata`: the same object as JSON, deflated, in base64. Trainers write tens of kilobytes."""


_MAX_METADATA_BYTES = 1 << 22
"""Maximum size of deflated metadata: JSON that deflates well takes thirty times its size in memory."""


def to_bytes(origin: Origin) -> bytes:
    """Return the file of an origin, with its metadata in the shorter of two forms."""
    fields = {"format": origin.format, "spelling": list(origin.spelling)}
    metadata, compressor = _json(origin.metadata), zlib.compressobj(9, zlib.DEFLATED, -15)
    deflated = compressor.compress(metadata) + compressor.flush()
    forms: list[dict[str, Any]] = [{"metadata": origin.metadata}]
    if len(metadata) <= _MAX_METADATA_BYTES:
        forms.append({_DEFLATED: base64.b64encode(deflated).decode("ascii")})
    return min((_json({**fields, **form}) + b"\n" for form in forms), key=len)


def from_bytes(data: bytes) -> Origin:
    """Return the origin of a file that `to_bytes` returned.

    Raises:
        ValueError: The file has another form, its metadata exceed their limit, or they are no texts.
    """
    _, fields = limits.parse_json_object(data, keys.SOURCE_FILE)
    if _DEFLATED in fields and "metadata" not in fields:
        fields["metadata"] = _inflated(from_json(str, fields.pop(_DEFLATED), _DEFLATED))
    origin: Origin = from_json(Origin, fields, keys.SOURCE_FILE)
    # lone surrogates cannot be exported: this raises an error for them
    "".join(text for pair in origin.metadata.items() for text in pair).encode("utf-8")
    return origin


def _inflated(text: str) -> dict[str, Any]:
    """Return deflated metadata; `ValueError` for damaged ones, and for more than `_MAX_METADATA_BYTES`."""
    decompressor = zlib.decompressobj(-15)
    try:
        # one byte more than allowed, so that metadata that are too long are noticed
        data = decompressor.decompress(base64.b64decode(text, validate=True), _MAX_METADATA_BYTES + 1)
    except zlib.error as error:
        raise ValueError(f"{_DEFLATED} cannot be inflated: {error}") from error
    if len(data) > _MAX_METADATA_BYTES or not decompressor.eof or decompressor.unused_data:
        raise ValueError(f"{_DEFLATED} is not one deflated object of at most {_MAX_METADATA_BYTES:,} bytes")
    return limits.parse_json_object(data, _DEFLATED)[1]


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("utf-8")
