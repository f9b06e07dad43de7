"""Fields that most entries of a manifest have alike, so that the manifest states them once."""

import json
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any


def most_common(entries: Collection[Mapping[str, Any]], names: Collection[str]) -> dict[str, Any]:
    """Return the most common value of each field that at least two entries have alike.

    Args:
        entries: The entries, each with all fields.
        names: Names of the fields that may be shared.
    """
    shared = {}
    for name in names:
        counts = Counter(json.dumps(fields[name]) for fields in entries)
        text, count = min(counts.items(), key=lambda pair: (-pair[1], pair[0]), default=("", 0))
        if count > 1:
            shared[name] = json.loads(text)
    return shared
