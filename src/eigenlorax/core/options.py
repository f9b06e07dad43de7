"""What callers may pass as an option: checked at the boundary, and turned into plain numbers and lists."""

import difflib
import operator
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from ..errors import OptionError

MAX_BYTES = 2**63 - 1
"""More than any file system holds."""

_SIZE = re.compile(r"(?P<number>\d{1,30}(\.\d{1,30})?)\s*(?P<unit>([kmgt]i?)?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SHOWN_BITS = 128


def format_value(value: Any) -> str:
    """A value in a message: floats without needless digits, and an integer that fills the screen by its size."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and value.bit_length() > _SHOWN_BITS:
        return f"an integer of {value.bit_length():,} bits"
    return repr(value)


def to_int(name: str, value: Any) -> int:
    """`value` as an int: NumPy's integers too, but no truth value and no fraction."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise OptionError(f"{name} must be an integer, got {value!r}.") from error


def to_float(name: str, value: Any) -> float:
    """`value` as a float."""
    try:
        if isinstance(value, bool | str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{name} must be a number, got {value!r}.") from error
    except OverflowError as error:
        raise OptionError(f"{name} must be a number that a float can hold, got {format_value(value)}.") from error


def to_byte_count(name: str, value: Any) -> int:
    """`value` as a number of bytes from 1 to `MOST_BYTES`: an integer, or a float that is one, such as 2e9."""
    whole = int(value) if isinstance(value, float) and value.is_integer() else to_int(name, value)
    if not 1 <= whole <= MAX_BYTES:
        wanted = "at least 1" if whole < 1 else "below 2**63"
        raise OptionError(f"{name} is a number of bytes, {wanted}, got {format_value(value)}.")
    return whole


def parse_byte_count(name: str, text: str) -> int:
    """A number of bytes as people write it: `40MB` and `40m` are 40 · 10⁶, `1.5GiB` is 1.5 · 2³⁰."""
    match, found = _SIZE.fullmatch(text.strip()), 0
    if match is not None:
        unit = match["unit"].lower()
        base = 1024 if unit.endswith("i") else 1000
        # a float would lose the last digits of large numbers
        found = int(Fraction(match["number"]) * base ** _POWERS[unit.removesuffix("i")])
    if not 1 <= found <= MAX_BYTES:
        raise OptionError(
            f"{name} is {text!r}; it must be a number of bytes above 0 and below 2**63, as 8GB, 500MB or 2GiB."
        )
    return found


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Raise `OptionError` unless `value` is one of the names `known`."""
    listed = list(known)
    if value not in listed:
        raise OptionError(f"{name} must be one of {', '.join(listed)}, got {value!r}.{suggestion(value, listed)}")


def suggestion(given: Any, known: Iterable[str]) -> str:
    """Return a sentence that names what of `known` is spelled most like `given`, after a space; "" where nothing is."""
    folded = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(str(given).casefold(), folded, n=1)
    return f" Did you mean {folded[near[0]]!r}?" if near else ""


def name_list(value: str | Iterable[str]) -> list[str]:
    """A list of names; one name alone is a list of one."""
    return [value] if isinstance(value, str) else list(value)
