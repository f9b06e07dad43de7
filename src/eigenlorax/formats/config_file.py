"""JSON files of adapters as they come from outside: how large and how deep they may be, and of which types fields are.

What the fields mean is not known here.
"""

import json
from typing import Any

from ..errors import FormatError, reason

MAX_BYTES = 16 << 20
"""Of a config: one with a pattern for each of ten thousand modules has two."""
MAX_DEPTH = 100
"""Lists and objects in one another. Python reads, and then cannot write, what is ten times as deep."""


def parse(data: bytes, where: str) -> tuple[str, dict[str, Any]]:
    """The text of an `adapter_config.json`, and its fields. `FormatError` where they are not those of an adapter.

    where: stands before what is wrong with them.
    """
    text, config = parse_object(data, where)
    _check_texts(config, where)
    return text, config


def parse_object(data: bytes, where: str) -> tuple[str, dict[str, Any]]:
    """The text of a JSON file that holds an object, and the object. `FormatError` where it holds anything else."""
    if len(data) > MAX_BYTES:
        raise FormatError(f"{where} has {len(data):,} bytes, more than the {MAX_BYTES:,} that are read of such a file.")
    try:
        text = data.decode("utf-8")
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not valid JSON: {reason(error)}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{where} holds a JSON {type(found).__name__}; an object was expected.")
    if _depth(found) > MAX_DEPTH:
        raise FormatError(f"{where} has more than {MAX_DEPTH} lists and objects in one another.")
    return text, found


def _depth(value: Any) -> int:
    """How many lists and objects are in one another."""
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _check_texts(config: dict[str, Any], where: str) -> None:
    """`FormatError` where a field that has to be a text, or a list of them, is something else."""
    for field in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(field), str | None):
            raise FormatError(f"{where}: {field} is {config[field]!r}; a text or null was expected.")
    for field in ("modules_to_save", "target_parameters"):
        value = config.get(field) or []
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise FormatError(f"{where}: {field} is {value!r}; a list of texts was expected.")
