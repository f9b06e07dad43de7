"""Formatting of numbers and names for the page and for Markdown."""

import math

MISSING = "–"
"""Text for a value that was not measured."""

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def error(value: float | None) -> str:
    """Format an error with three decimals; below 0.001 with two digits and an exponent."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    return f"{value:.3f}" if abs(value) >= 0.001 else f"{value:.1e}"


def estimate(value: float, standard_error: float | None) -> str:
    """Format an error, followed by its standard error unless that is 0 or unknown."""
    return f"{error(value)} ± {error(standard_error)}" if standard_error else error(value)


def share_estimate(value: float, standard_error: float | None) -> str:
    """Format a share, followed by its standard error unless that is 0 or unknown."""
    return f"{share(value)} ± {error(standard_error)}" if standard_error else share(value)


def bound(value: float) -> str:
    """Format an error bound as an option's value, rounded down to three significant digits."""
    rounded = float(f"{value:.3g}")
    return f"{rounded if rounded <= value else rounded - 10.0 ** (math.floor(math.log10(value)) - 2):.3g}"


def share(value: float | None) -> str:
    """Format a share from 0 to 1 with three decimals; ">0.999" where rounding would give 1."""
    if value is not None and 0.9995 <= value < 1:
        return ">0.999"
    return MISSING if value is None else f"{value:.3f}"


def cosine(value: float | None) -> str:
    """Format a cosine with three decimals and a sign."""
    return MISSING if value is None else f"{value:+.3f}".replace("-", "−")


def angle(value: float | None) -> str:
    """Format an angle in degrees."""
    return MISSING if value is None else f"{value:.1f}°"


def count(value: int | None) -> str:
    """Format a whole number with thousands separators."""
    return MISSING if value is None else f"{value:,}"


def norm(value: float | None) -> str:
    """Format a norm with three significant digits."""
    return MISSING if value is None else f"{value:.3g}"


def plain(value: float | None) -> str:
    """Format a number of any size with at most four significant digits, such as a perplexity."""
    return MISSING if value is None else f"{value:.4g}"


def ratio(value: float | None) -> str:
    """Format a ratio with three significant digits, such as "12.3×"."""
    if value is None:
        return MISSING
    return f"{value:,.0f}×" if value >= 100 else f"{value:.1f}×" if value >= 10 else f"{value:.2f}×"


def size(value: int | None) -> str:
    """Format bytes in decimal units, such as "1.2 MB"."""
    if value is None:
        return MISSING
    scaled, unit = float(value), 0
    # 999,950 bytes would be 1000.0 kB
    while scaled >= 999.95 and unit < len(_UNITS) - 1:
        scaled, unit = scaled / 1000, unit + 1
    return f"{value:,} bytes" if unit == 0 else f"{scaled:.1f} {_UNITS[unit]}"


def exact(value: int) -> str:
    """Format bytes exactly."""
    return f"{value:,} bytes"


def split_names(names: list[str], max_shown: int = 8) -> tuple[list[str], list[str]]:
    """Split names into the first ones and the remaining ones. A single remaining name is added to the first."""
    cut = len(names) if len(names) <= max_shown + 1 else max_shown
    return names[:cut], names[cut:]


def shortened(name: str, max_length: int) -> str:
    """Return the name on one line, with its middle left out if it is longer than `max_length` characters."""
    name = " ".join(name.split())
    if len(name) <= max_length:
        return name
    head = (max_length - 1) // 2
    return f"{name[:head]}…{name[len(name) - (max_length - 1 - head) :]}"


def plural(number: float, noun: str) -> str:
    """Return a number with its noun, such as "1 adapter", "1,000 adapters" or "2.5 epochs"."""
    is_whole = number == int(number)
    return f"{int(number) if is_whole else number:{',' if is_whole else 'g'}} {noun}{'' if number == 1 else 's'}"
