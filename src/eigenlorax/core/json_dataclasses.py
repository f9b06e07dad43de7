"""What JSON gave, as frozen dataclasses: every field there, none more, each of the type that its annotation says."""

import json
from dataclasses import is_dataclass
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints


class JsonTypeError(ValueError):
    """What in a document is not as it should be. For who reads it, who knows which file it is of."""


def from_json(kind: Any, value: Any, where: str) -> Any:
    """`value` as what the annotation `kind` says; `where` is its place in the document, for the message."""
    origin, inner = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        fields = from_json(dict, value, where)
        hints = _hints(kind)
        if fields.keys() != hints.keys():
            raise JsonTypeError(f"{where} has the fields {sorted(fields)}, not {sorted(hints)}.")
        return kind(**{name: from_json(hint, fields[name], f"{where}.{name}") for name, hint in hints.items()})
    if origin in (list, tuple):
        items = from_json(list, value, where)
        kinds = [inner[0]] * len(items) if origin is list or inner[-1] is ... else list(inner)
        if len(kinds) != len(items):
            raise JsonTypeError(f"{where} has {len(items)} items, not {len(kinds)}.")
        found = [from_json(one, item, f"{where}[{i}]") for i, (one, item) in enumerate(zip(kinds, items, strict=True))]
        return found if origin is list else tuple(found)
    if origin is dict:
        return {key: from_json(inner[1], item, f"{where}.{key}") for key, item in from_json(dict, value, where).items()}
    if origin is UnionType:
        return None if value is None else from_json(inner[0], value, where)
    if kind is float and type(value) is int:
        # a number that JSON gave without a point; one that is too large for a float stays what it is, and is refused
        value = float(value) if abs(value) < 2**53 else value
    if type(value) is not kind:
        raise JsonTypeError(f"{where} is {_shown(value)}, where {kind.__name__} belongs.")
    return value


# to evaluate annotations takes longer than all else here
_hints = cache(get_type_hints)


def _shown(value: Any) -> str:
    """What is there, in a few words: an object or array may be as large and as deep as its file."""
    if value is ...:
        return "missing"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    return json.dumps(value)[:40]


def reject_constant(name: str) -> None:
    """For `json.loads(parse_constant=…)`: NaN and Infinity are Python's, not JSON's."""
    raise ValueError(f"{name} is not a number of JSON")
