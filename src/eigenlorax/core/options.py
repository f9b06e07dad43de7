"""Options from callers and the command line, converted to plain numbers and lists, or rejected with `OptionError`."""

import difflib
import functools
import inspect
import operator
import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, ParamSpec, TypeVar

from ..errors import OptionError

P = ParamSpec("P")
R = TypeVar("R")
MAX_BYTES = 2**63 - 1
"""Largest number of bytes that an option may ask for; more than any file system holds."""

_SIZE = re.compile(r"(?P<number>\d{1,30}(\.\d{1,30})?)\s*(?P<unit>([kmgt]i?)?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
# Integers with more bits are described by their size, because Python itself does not print very large integers
_MAX_PRINTED_BITS = 128


def format_value(value: Any) -> str:
    """Return a value as text for a message: floats without needless digits, huge integers by their size."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and value.bit_length() > _MAX_PRINTED_BITS:
        return f"an integer of {value.bit_length():,} bits"
    return repr(value)


def to_int(name: str, value: Any) -> int:
    """Return `value` as an int. NumPy's integers are accepted, booleans and fractions are not.

    Args:
        name: Name of the option, for the message.
        value: Value that the caller passed.

    Raises:
        OptionError: `value` is not an integer.
    """
    try:
        # a bool is an int to Python, and most likely a misplaced argument
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise OptionError(f"{name} must be an integer, got {value!r}.") from error


def to_float(name: str, value: Any) -> float:
    """Return `value` as a float. NumPy's numbers are accepted, booleans and strings raise `OptionError`."""
    try:
        if isinstance(value, bool | str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{name} must be a number, got {value!r}.") from error
    except OverflowError as error:
        raise OptionError(f"{name} must be a number that a float can hold, got {format_value(value)}.") from error


def to_byte_count(name: str, value: Any) -> int:
    """Return `value` as a number of bytes from 1 to `MAX_BYTES`. Integral floats such as 2e9 are accepted."""
    whole = int(value) if isinstance(value, float) and value.is_integer() else to_int(name, value)
    if not 1 <= whole <= MAX_BYTES:
        bound = "at least 1" if whole < 1 else "below 2**63"
        raise OptionError(f"{name} is a number of bytes, {bound}, got {format_value(value)}.")
    return whole


def parse_byte_count(name: str, text: str) -> int:
    """Parse a number of bytes as people write it: `40MB` and `40m` are 40 · 10⁶, `1.5GiB` is 1.5 · 2³⁰."""
    match, n_bytes = _SIZE.fullmatch(text.strip()), 0
    if match is not None:
        unit = match["unit"].lower()
        base = 1024 if unit.endswith("i") else 1000
        # a fraction, because a float would round large numbers
        n_bytes = int(Fraction(match["number"]) * base ** _POWERS[unit.removesuffix("i")])
    if not 1 <= n_bytes <= MAX_BYTES:
        raise OptionError(
            f"{name} is {text!r}; it must be a number of bytes above 0 and below 2**63, as 8GB, 500MB or 2GiB."
        )
    return n_bytes


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise `OptionError` unless `value` is one of the names in `allowed`."""
    choices = list(allowed)
    if value not in choices:
        raise OptionError(f"{name} must be one of {', '.join(choices)}, got {value!r}.{suggestion(value, choices)}")


def suggestion(value: Any, names: Iterable[str]) -> str:
    """Return " Did you mean …?" with the name in `names` that is spelled most like `value`; "" where none is close."""
    # the case of letters should not hide the intended name
    given, folded = str(value).casefold(), {name.casefold(): name for name in names}
    # "v07" is "v007" rather than "v097"
    padded = sorted(name for name in folded if name.replace("0", "") == given.replace("0", ""))
    closest = padded or difflib.get_close_matches(given, folded, n=1)
    return f" Did you mean {folded[closest[0]]!r}?" if closest else ""


def suggest_keywords(**other_names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make the `TypeError` for an unknown keyword of a function name the right one.

    Args:
        other_names: What other libraries call a keyword → its name here. Similar spellings are found without it.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        keyword_names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args: P.args, **keywords: P.kwargs) -> R:
            unknown = next((keyword for keyword in keywords if keyword not in keyword_names), None)
            if unknown is not None:
                meant = other_names.get(unknown)
                hint = f" Did you mean {meant!r}?" if meant is not None else suggestion(unknown, keyword_names)
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {unknown!r}.{hint}")
            return function(*args, **keywords)

        return call

    return decorate


def name_list(value: str | Iterable[str]) -> list[str]:
    """Return a list of names; a single string is a list of one name."""
    return [value] if isinstance(value, str) else list(value)
