"""Whole numbers in as few bytes as they need."""

from ..errors import FormatError


def encode(number: int) -> bytes:
    """Return a number in seven bits a byte, the lowest first; the eighth bit says that there are more bytes."""
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes([*data, number])


def decode(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at an index, and the index after it."""
    number = shift = 0
    while True:
        if at >= len(data) or shift > 56:
            raise FormatError("a number of several bytes does not end.")
        number |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return number, at
