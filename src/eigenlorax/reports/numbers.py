"""Numbers as text, the same on the page and in Markdown. Nothing here knows what is counted."""

MISSING = "–"
"""Stands where nothing was measured."""

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def error(value: float | None) -> str:
    """Three decimals; below a thousandth two digits and an exponent: what is small shall not look like nothing."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    return f"{value:.3f}" if abs(value) >= 0.001 else f"{value:.1e}"


def share(value: float | None) -> str:
    """A share, 0 to 1. What only rounding would make whole is not called whole."""
    if value is not None and 0.9995 <= value < 1:
        return ">0.999"
    return MISSING if value is None else f"{value:.3f}"


def cosine(value: float | None) -> str:
    """Three decimals with a sign."""
    return MISSING if value is None else f"{value:+.3f}".replace("-", "−")


def angle(value: float | None) -> str:
    """Degrees."""
    return MISSING if value is None else f"{value:.1f}°"


def count(value: int | None) -> str:
    """A whole number, thousands apart."""
    return MISSING if value is None else f"{value:,}"


def norm(value: float | None) -> str:
    """Three digits that count."""
    return MISSING if value is None else f"{value:.3g}"


def plain(value: float | None) -> str:
    """A figure of any size, with at most four digits: perplexities, say."""
    return MISSING if value is None else f"{value:.4g}"


def ratio(value: float | None) -> str:
    """How many times as large."""
    if value is None:
        return MISSING
    return f"{value:,.0f}×" if value >= 100 else f"{value:.1f}×" if value >= 10 else f"{value:.2f}×"


def size(value: int | None) -> str:
    """Bytes in decimal units, such as 1.2 MB."""
    if value is None:
        return MISSING
    scaled, unit = float(value), 0
    # 999,950 bytes would be 1000.0 kB
    while scaled >= 999.95 and unit < len(_UNITS) - 1:
        scaled, unit = scaled / 1000, unit + 1
    return f"{value:,} bytes" if unit == 0 else f"{scaled:.1f} {_UNITS[unit]}"


def exact(value: int) -> str:
    """Bytes to the last one."""
    return f"{value:,} bytes"


def some(names: list[str], most: int = 8) -> tuple[list[str], list[str]]:
    """The first names, and the rest. One more than `most` is not worth folding."""
    cut = len(names) if len(names) <= most + 1 else most
    return names[:cut], names[cut:]


def shortened(name: str, most: int) -> str:
    """The name on one line, its middle left out where it is longer than `most` characters."""
    name = " ".join(name.split())
    if len(name) <= most:
        return name
    head = (most - 1) // 2
    return f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"


def plural(number: int, noun: str) -> str:
    """Such as "1 adapter", "1,000 adapters"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
