"""Conversion of parsed JSON to frozen dataclasses, whose fields must all be present, of their annotated types."""

import json
from dataclasses import is_dataclass
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

LARGEST_EXACT_INTEGER = 2**53
"""Integers below this are floats without rounding."""


class JsonTypeError(ValueError):
    """A value in a JSON document that does not match its annotation. The caller adds the name of the file."""


def from_json(kind: Any, value: Any, where: str) -> Any:
    """Convert a value that `json.loads` returned to the type of an annotation.

    Args:
        kind: A dataclass, `list[...]`, `tuple[...]`, `dict[str, ...]`, `X | None`, or one of JSON's own types.
        value: The parsed value; `...` if it is missing.
        where: Path to the value in the document, for the message.

    Raises:
        JsonTypeError: The value does not match the annotation.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        return _dataclass_from_json(kind, value, where)
    if origin in (list, tuple):
        return _sequence_from_json(kind, value, where)
    if origin is dict:
        members = from_json(dict, value, where)
        return {key: from_json(arguments[1], member, f"{where}.{key}") for key, member in members.items()}
    if origin is UnionType:
        return None if value is None else from_json(arguments[0], value, where)
    if kind is float and type(value) is int:
        # JSON writers may leave out the point; an integer that a float would round stays one, and fails below
        value = float(value) if abs(value) < LARGEST_EXACT_INTEGER else value
    # not isinstance: True is an int to Python, and not to JSON
    if type(value) is not kind:
        raise JsonTypeError(f"{where} is {describe(value)}; {kind.__name__} was expected.")
    return value


def _dataclass_from_json(kind: Any, value: Any, where: str) -> Any:
    fields = from_json(dict, value, where)
    hints = _type_hints(kind)
    if fields.keys() != hints.keys():
        raise JsonTypeError(f"{where} has the fields {sorted(fields)}, not {sorted(hints)}.")
    # most fields have the very type of their annotation, and there may be thousands of versions
    return kind(
        **{
            name: fields[name] if type(fields[name]) is hint else from_json(hint, fields[name], f"{where}.{name}")
            for name, hint in hints.items()
        }
    )


def _sequence_from_json(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    members = from_json(list, value, where)
    has_any_length = origin is list or arguments[-1] is ...
    kinds = [arguments[0]] * len(members) if has_any_length else list(arguments)
    if len(kinds) != len(members):
        raise JsonTypeError(f"{where} has {len(members)} items, not {len(kinds)}.")
    pairs = zip(kinds, members, strict=True)
    converted = [from_json(member_kind, member, f"{where}[{i}]") for i, (member_kind, member) in enumerate(pairs)]
    return converted if origin is list else tuple(converted)


# evaluating annotations takes longer than everything else here
_type_hints = cache(get_type_hints)


def describe(value: Any) -> str:
    """Describe a value of a JSON document briefly, since an object or array may be as large and as deep as its file."""
    if value is ...:
        return "missing"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    return json.dumps(value)[:40]


def reject_constant(name: str) -> None:
    """Raise `ValueError` for NaN and Infinity, which Python reads and JSON does not have.

    Pass it as `json.loads(parse_constant=reject_constant)`.
    """
    raise ValueError(f"{name} is not a JSON number")
