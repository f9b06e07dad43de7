"""Files of the sources' configs: a config is stored as its differences from fields that most configs of a pack share.

PEFT writes some thirty fields for each LoRA, of which few differ within a collection.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..core import keys, limits
from ..core.json_dataclasses import reject_constant

CHANGED, REMOVED = "eigenlorax_changed", "eigenlorax_removed"
"""Fields of a file with differences: fields with other values, by name, and names of fields that the config lacks."""

MAX_SHARED_CHARACTERS = 2**16
"""Largest text of the shared fields, because each adapter has all of them again in memory."""

Fields = Mapping[str, Any]


def shared_fields(configs: Iterable[str]) -> dict[str, Any]:
    """Return the most common value of each field that at least two configs have alike, sorted by name.

    Fields that would exceed `MAX_SHARED_CHARACTERS` are left out.

    Args:
        configs: Texts of the configs. Their order does not matter.
    """
    counts: dict[str, Counter[str]] = {}
    for config in configs:
        for name, value in (_canonical_fields(config) or {}).items():
            counts.setdefault(name, Counter())[_text(value)] += 1
    shared: dict[str, Any] = {}
    for name, values in sorted(counts.items()):
        # of values that are as common, the first one in the order of texts
        text, count = min(values.items(), key=lambda pair: (-pair[1], pair[0]))
        if count > 1 and is_small({**shared, name: json.loads(text)}):
            shared[name] = json.loads(text)
    return shared


def is_small(shared: Fields) -> bool:
    """Return whether fields are so few and short that the adapters of a pack may share them."""
    return len(_text(shared)) <= MAX_SHARED_CHARACTERS


def to_bytes(config: str, shared: Fields) -> bytes:
    """Return the file of a config: its differences from `shared`, or the config word for word.

    Only a config in PEFT's own form, with sorted keys and two blanks of indentation, can be stored as differences.
    """
    whole = config.encode("utf-8")
    fields = _canonical_fields(config) if shared else None
    if fields is None:
        return whole
    changed = {
        name: value for name, value in fields.items() if name not in shared or _text(shared[name]) != _text(value)
    }
    removed = sorted(shared.keys() - fields.keys())
    differences = {CHANGED: changed, **({REMOVED: removed} if removed else {})}
    data = (_text(differences) + "\n").encode("utf-8")
    return data if len(data) < len(whole) else whole


def from_bytes(data: bytes, shared: Fields) -> tuple[str, dict[str, Any]]:
    """Return the text of a config and its fields, from the bytes that `to_bytes` returned.

    Raises:
        ValueError: The bytes are not a JSON object, their differences have another form, or they are nested too deep.
    """
    text, fields = limits.parse_json_object(data, keys.SOURCE_CONFIG)
    if CHANGED not in fields:
        return text, fields
    changed, removed = fields[CHANGED], fields.get(REMOVED, [])
    if not isinstance(changed, dict) or not isinstance(removed, list) or not fields.keys() <= {CHANGED, REMOVED}:
        raise ValueError(f"{keys.SOURCE_CONFIG} has differences of an unknown form")
    kept = {name: value for name, value in shared.items() if name not in removed}
    text = _peft_text({**kept, **changed})
    # parsed again, so that values of `shared` are not shared between adapters
    parsed = json.loads(text)
    limits.check_depth(parsed, keys.SOURCE_CONFIG)
    return text, parsed


def _canonical_fields(config: str) -> dict[str, Any] | None:
    """Return the fields of a config whose text follows from its fields; None for any other text."""
    try:
        fields = json.loads(config, parse_constant=reject_constant)
        is_canonical = isinstance(fields, dict) and _peft_text(fields) == config
    except (ValueError, RecursionError):
        return None
    return fields if is_canonical and CHANGED not in fields else None


def _peft_text(fields: Fields) -> str:
    return json.dumps(fields, indent=2, sort_keys=True)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
