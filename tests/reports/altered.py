"""JSON documents with something changed: values, lengths, names, order, and fields that are gone or new."""

import copy
import random
from collections.abc import Iterator
from typing import Any

STRANGE = [None, True, 0, 1, -1, 2**62, 2**63, 10**400, 0.0, -0.5, 0.5, 1e-320, 1e99, -1e99, 1e300, "", "x", "pack"]
STRANGE += ["fit", "\ud800\x1b[31m", "a" * 5000, [], {}, [[]], [1], ["x"], [[1.0, 2.0]], {"a": 1}]

Path = tuple[str | int, ...]


def alter(document: Any, chance: random.Random, times: int = 1) -> Any:
    """A copy of an object or array in which something is changed, as often as that."""
    document = copy.deepcopy(document)
    for _ in range(times):
        # to change nothing but what is deepest would leave lists as long as they are
        *parents, last = chance.choice([path for path in _paths(document) if path])
        holder = _at(document, parents)
        value = holder[last]
        kind = chance.choice(["remove", "replace", "copy", "more", "less", "order", "scale", "rename"])
        if kind == "remove":
            del holder[last]
        elif kind == "more" and isinstance(value, list) and value:
            value.insert(chance.randrange(len(value)), copy.deepcopy(chance.choice(value)))
        elif kind == "less" and isinstance(value, list) and value:
            del value[chance.randrange(len(value))]
        elif kind == "order" and isinstance(value, list):
            chance.shuffle(value)
        elif kind == "scale" and isinstance(value, int | float):
            holder[last] = chance.choice([-value, value + 1, value - 1, value * 1e6, value / 1e6, float(value)])
        elif kind == "rename" and isinstance(holder, dict):
            holder[f"{last}x"] = holder.pop(last)
        elif kind == "copy":
            holder[last] = copy.deepcopy(_at(document, chance.choice([path for path in _paths(document) if path])))
        else:
            holder[last] = copy.deepcopy(chance.choice(STRANGE))
    return document


def _paths(value: Any, path: Path = ()) -> Iterator[Path]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*path, key))


def _at(value: Any, path: Any) -> Any:
    for key in path:
        value = value[key]
    return value
