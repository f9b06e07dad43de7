"""What callers may pass as an option: checked at the boundary, and turned into plain numbers and lists."""

import operator
from collections.abc import Iterable
from typing import Any

from .errors import OptionError


def integer(name: str, value: Any) -> int:
    """`value` as an int: NumPy's integers too, but no truth value and no fraction."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise OptionError(f"{name} must be an integer, got {value!r}.") from error


def number(name: str, value: Any) -> float:
    """`value` as a float."""
    try:
        if isinstance(value, bool | str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{name} must be a number, got {value!r}.") from error


def names(value: str | Iterable[str]) -> list[str]:
    """A list of names; one name alone is a list of one."""
    return [value] if isinstance(value, str) else list(value)
