"""An arithmetic coder for few integers, with the classes of `entropy`: exact, without states that a stream begins with.

rANS stores a state of four bytes, of which two tell nothing. That is a quarter of a small adapter. Here, all integers
together are one fraction in [0, 1), whose interval is as wide as their probability, in Python's integers of any size.
Time is quadratic in the number of integers.
"""

import numpy as np

from ..errors import FormatError
from .class_tables import PRECISION, class_table

MAX_INTEGERS = 1 << 10
"""Maximum number of integers of a short stream."""
_ESCAPE_BITS = 32
_MAX_BYTES_PER_INTEGER = 8
"""Upper limit of the bytes of an integer: 15 bits for the escape, and 32 bits for the integer itself."""


def encode(integers: np.ndarray, classes: np.ndarray) -> bytes:
    """Return about as few bytes as integers need.

    Args:
        integers: Integers of at most 32 bits, (n,), n at most `MAX_INTEGERS`.
        classes: Their classes, (n,).
    """
    # the interval is [low, low + width) / 2^bits
    low, width, bits = 0, 1, 0
    for integer, class_index in zip(integers.tolist(), classes.tolist(), strict=True):
        table = class_table(class_index)
        symbol = (integer >> table.raw_bits) - table.first
        is_escaped = not 0 <= symbol < table.escape
        start, end = table.bounds[table.escape if is_escaped else symbol :][:2].tolist()
        low, width, bits = (low << PRECISION) + width * start, width * (end - start), bits + PRECISION
        # these bits are uniform: the interval is divided into equal parts
        n_bits = _ESCAPE_BITS if is_escaped else table.raw_bits
        low, bits = (low << n_bits) + width * (integer & (1 << n_bits) - 1), bits + n_bits
    # fewer bytes may do by chance, but then a cut stream could not be told from a whole one
    size = max(0, bits - width.bit_length()) // 8
    while True:
        # the first multiple of 256^−size in the interval
        numerator = -(-(low << 8 * size) >> bits)
        if numerator << bits < low + width << 8 * size:
            return numerator.to_bytes(size, "big")
        size += 1


def decode(data: bytes, classes: np.ndarray) -> np.ndarray:
    """Return the integers, (n,) int64, that `encode` was given.

    Args:
        data: The bytes.
        classes: Classes of the integers, (n,).

    Raises:
        FormatError: There are more integers or more bytes than a short stream may have, or other bytes than `encode`
            returns.
    """
    if len(classes) > MAX_INTEGERS or len(data) > _MAX_BYTES_PER_INTEGER * len(classes):
        raise FormatError(f"a short stream has {len(classes):,} integers in {len(data):,} bytes.")
    # the fraction within the current interval is remainder / width
    remainder, width = int.from_bytes(data, "big"), 1 << 8 * len(data)
    integers = []
    for class_index in classes.tolist():
        table = class_table(class_index)
        slot = (remainder << PRECISION) // width
        symbol = int(np.searchsorted(table.bounds, slot, "right")) - 1
        start, end = table.bounds[symbol : symbol + 2].tolist()
        remainder, width = (remainder << PRECISION) - start * width, (end - start) * width
        n_bits = _ESCAPE_BITS if symbol == table.escape else table.raw_bits
        raw, remainder = divmod(remainder << n_bits, width)
        if symbol == table.escape:
            integers.append(raw - (1 << _ESCAPE_BITS) * (raw >> _ESCAPE_BITS - 1))
        else:
            integers.append((symbol + table.first << n_bits) + raw)
    decoded = np.array(integers, dtype=np.int64)
    if encode(decoded, classes) != data:
        raise FormatError("the bytes of a short stream are not those of its integers.")
    return decoded
