"""Fields that most entries of a manifest have alike, so that the manifest states them once."""

import json
from collections import Counter
from collections.abc import Collection, Hashable, Mapping
from typing import Any


def most_common(entries: Collection[Mapping[str, Any]], names: Collection[str]) -> dict[str, Any]:
    """Return the most common value of each field that at least two entries have alike.

    Args:
        entries: The entries, each with all fields.
        names: Names of the fields that may be shared.
    """
    return {name: json.loads(text) for name in names if (text := _most_common_text(entries, name)) is not None}


def _most_common_text(entries: Collection[Mapping[str, Any]], name: str) -> str | None:
    """Return the most common value of a field as JSON, of several the first in the order of texts; None if none is."""
    # most values are alike and need no text; 1, 1.0 and True are equal to Python, and not in JSON
    counts = Counter(
        (type(value), value, "") if isinstance(value, Hashable) else (type(value), None, json.dumps(value))
        for value in (fields[name] for fields in entries)
    )
    most = max(counts.values(), default=0)
    if most < 2:
        return None
    return min(text or json.dumps(value) for (_, value, text), count in counts.items() if count == most)
