"""JSON documents with text that no JSON writer gives: NaN, numbers that overflow, keys given twice, deep nesting."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Path = list[str | int]
"""Keys and indices from the top of a document to a value. `ANY` stands for every key or index at its place. A string
on the way that is JSON itself is parsed, and written again."""
ANY = "*"


@dataclass(frozen=True)
class Raw:
    """Text that stands in a document as it is: pieces, each repeated so many times."""

    pieces: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        return "".join(text * times for text, times in self.pieces)


@dataclass(frozen=True)
class Long:
    """A string of one text repeated."""

    text: str
    times: int


def raw(text: str) -> Raw:
    """One piece of text, once."""
    return Raw(((text, 1),))


def nested(depth: int, opening: str = "[", closing: str = "]") -> Raw:
    """Lists, or objects, in one another."""
    return Raw(((opening, depth), ("0", 1), (closing, depth)))


def dumps(value: Any, indent: int | None = None) -> str:
    """The text of a document."""
    pieces: list[str] = []

    def placed(special: Any) -> str:
        if isinstance(special, Long):
            return special.text * special.times
        assert isinstance(special, Raw)
        pieces.append(special.text)
        return f"\0raw {len(pieces) - 1}\0"

    text = json.dumps(value, indent=indent, default=placed)
    for number, piece in enumerate(pieces):
        text = text.replace(json.dumps(f"\0raw {number}\0"), piece, 1)
    return text


def to_plain(value: Any) -> Any:
    """A value as JSON data, for a file of cases."""
    if isinstance(value, Raw):
        return {"$raw": [list(piece) for piece in value.pieces]}
    if isinstance(value, Long):
        return {"$long": [value.text, value.times]}
    if isinstance(value, dict):
        return {key: to_plain(one) for key, one in value.items()}
    return [to_plain(one) for one in value] if isinstance(value, list) else value


def from_plain(value: Any) -> Any:
    """The inverse of `to_plain`."""
    if isinstance(value, dict):
        if value.keys() == {"$raw"}:
            return Raw(tuple((text, times) for text, times in value["$raw"]))
        if value.keys() == {"$long"}:
            return Long(*value["$long"])
        return {key: from_plain(one) for key, one in value.items()}
    return [from_plain(one) for one in value] if isinstance(value, list) else value


def paths(value: Any, start: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The place of every value in a document, the top included; those in strings that are JSON objects too."""
    yield start
    value = _opened(value)
    if isinstance(value, dict):
        for key, one in value.items():
            yield from paths(one, (*start, key))
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from paths(one, (*start, index))


def at(value: Any, path: Path) -> Any:
    """The value at a place. `LookupError` or `TypeError` where there is none."""
    for key in path:
        value = _opened(value)[key]
    return value


def replaced(value: Any, path: Path, change: Any) -> Any:
    """The document with `change(old value)` at a place; as it is where there is no such place."""
    if not path:
        return change(value)
    opened = _opened(value)
    first, rest = path[0], path[1:]
    if isinstance(opened, dict):
        chosen = list(opened) if first == ANY else [first] if first in opened else []
        found: Any = {key: replaced(one, rest, change) if key in chosen else one for key, one in opened.items()}
    elif isinstance(opened, list):
        here = range(len(opened)) if first == ANY else [first]
        found = [replaced(one, rest, change) if index in here else one for index, one in enumerate(opened)]
    else:
        return value
    return dumps(found) if isinstance(value, str) else found


def _opened(value: Any) -> Any:
    """A string that is a JSON object as that object; any other value as it is."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
