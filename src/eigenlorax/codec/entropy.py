"""Integers as few bytes: an entropy coder for numbers that are mostly near zero.

Each integer has a *class*, known beforehand on both sides, which says how far from zero it is likely to be: class c
stands for a logistic distribution of scale 2^(c/4 − 4). What is likely costs few bits, down to a hundredth of one. The
coder is rANS (Duda 2013, arXiv 1311.2540) with 32-bit states, 16-bit words and probabilities of 15 bits, in lanes that
take turns, so that NumPy does a step of all of them at once. docs/pack-format.md says what each byte is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import cache
from itertools import pairwise

import numpy as np

from ..errors import FormatError

CLASSES = 128
PRECISION = 15
"""Bits of a probability."""
LANE_BYTES = 512
"""About so many bytes are written by one lane, whose last state takes four."""
LANE_INTEGERS = 1 << 14
"""A lane has at most about so many integers, however little they take."""
_TOTAL = 1 << PRECISION
_LOWEST = 1 << 16
_WIDEST = 24
"""From this class on, the last bits of an integer are written as they are; one more every fourth class."""
_CONTEXT = Context(prec=30)


@dataclass(frozen=True, slots=True)
class Table:
    """The distribution of a class, over what is left of an integer when its last `raw` bits are taken off.

    first: the smallest symbol. bounds: cumulated frequencies, (symbols + 2,): the last one is for what is beyond.
    """

    raw: int
    first: int
    bounds: np.ndarray

    @property
    def escape(self) -> int:
        """The place of the symbol that stands for all others."""
        return len(self.bounds) - 2


@cache
def table(number: int) -> Table:
    """The table of a class; made in decimal arithmetic, so that it is the same on every machine."""
    raw = max(0, (number - _WIDEST) // 4 + 1)
    # the context of the program that calls may have fewer digits
    with localcontext(_CONTEXT):
        scale = Decimal(2) ** (Decimal(number) / 4 - 4)
        reach = int(16 * scale / 2**raw) + 2
        symbols = 2 * reach + 1
        spread = _TOTAL - symbols - 1
        bounds = [0]
        for place in range(1, symbols):
            edge = (Decimal((place - reach) * 2**raw) - Decimal("0.5")) / scale
            bounds.append(place + int(spread / (1 + (-edge).exp()) + Decimal("0.5")))
    return Table(raw, -reach, np.array([*bounds, symbols + spread, _TOTAL], dtype=np.int64))


@cache
def _costs(number: int) -> tuple[np.ndarray, float]:
    """Bits of each symbol of a class, the escape last; and of one on average."""
    one = table(number)
    found = PRECISION - np.log2(np.diff(one.bounds).astype(np.float64)) + one.raw
    found[-1] += 32 - one.raw
    share = np.diff(one.bounds) / _TOTAL
    return found, float((share[:-1] * found[:-1]).sum())


def cost(values: np.ndarray, number: int) -> float:
    """About how many bits some integers take in a class."""
    one, (bits, _) = table(number), _costs(number)
    places = (values >> one.raw) - one.first
    outside = (places < 0) | (places >= one.escape)
    return float(bits[np.where(outside, one.escape, places)].sum())


def encode(streams: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[bytes]:
    """Each stream's integers, with the class of each of them, as bytes of its own."""
    if not streams:
        return []
    values = np.concatenate([np.asarray(one, dtype=np.int64) for one, _ in streams])
    if len(values) and (values.max() >= 2**31 or values.min() < -(2**31)):
        raise FormatError("integers beyond 32 bits cannot be coded: ask for a larger error.")
    classes = [np.asarray(kinds, dtype=np.int64) for _, kinds in streams]
    tables = _Tables.of(np.concatenate(classes))
    places, outside = tables.places(values)
    lanes = _Lanes.of(classes)
    states = np.full(len(lanes.stream), _LOWEST, dtype=np.uint64)
    written: list[tuple[np.ndarray, np.ndarray]] = []
    for step in range(lanes.steps - 1, -1, -1):
        active = lanes.active(step)
        at = lanes.start[active] + step * lanes.stride[active]
        low, high = tables.interval(at, places[at])
        frequency = (high - low).astype(np.uint64)
        now = states[active]
        full = now >= frequency << np.uint64(32 - PRECISION)
        written.append((active[full], (now[full] & np.uint64(0xFFFF)).astype("<u2")))
        now = np.where(full, now >> np.uint64(16), now)
        quotient, rest = np.divmod(now, frequency)
        states[active] = (quotient << np.uint64(PRECISION)) + rest + low.astype(np.uint64)
    owners = np.concatenate([lanes.stream[lane] for lane, _ in reversed(written)]) if written else np.zeros(0, int)
    words = np.concatenate([word for _, word in reversed(written)]) if written else np.zeros(0, "<u2")
    return [
        b"".join(
            (
                states[lanes.stream == number].astype("<u4").tobytes(),
                words[owners == number].tobytes(),
                _raw_bits(values[part], tables.raw(part), outside[part]),
                values[part][outside[part]].astype("<i4").tobytes(),
            )
        )
        for number, part in enumerate(lanes.parts)
    ]


def decode(streams: Sequence[tuple[bytes, np.ndarray]]) -> list[np.ndarray]:
    """Return the integers of each stream, int32, from its bytes and the classes of its integers.

    Takes about seven bytes of memory an integer, those of the result included. `FormatError` if the bytes cannot be
    such ones.
    """
    if not streams:
        return []
    classes = [np.asarray(kinds) for _, kinds in streams]
    lanes = _Lanes.of(classes)
    states, words, first = _opened([data for data, _ in streams], lanes)
    tables = _Tables.of(np.concatenate(classes))
    position = first.copy()
    # no table has more than 256 symbols
    places = np.zeros(lanes.parts[-1].stop, dtype=np.uint8)
    for step in range(lanes.steps):
        active = lanes.active(step)
        at = lanes.start[active] + step * lanes.stride[active]
        now = states[active]
        slot = (now & np.uint64(_TOTAL - 1)).astype(np.int64)
        found = tables.find(at, slot)
        places[at] = found
        low, high = tables.interval(at, found)
        now = (high - low).astype(np.uint64) * (now >> np.uint64(PRECISION)) + (slot - low).astype(np.uint64)
        short = np.flatnonzero(now < _LOWEST)
        if len(short):
            of = lanes.stream[active[short]]
            head = np.flatnonzero(np.concatenate([[True], of[1:] != of[:-1]]))
            sizes = np.diff(np.append(head, len(of)))
            taken = position[of] + np.arange(len(of)) - np.repeat(head, sizes)
            if taken.max() >= len(words):
                raise FormatError("the coded bytes end too early.")
            now[short] = (now[short] << np.uint64(16)) | words[taken]
            position[of[head]] += sizes
        states[active] = now
    if len(states) and (states != _LOWEST).any():
        raise FormatError("the coded bytes do not end where they should.")
    return [
        _finished(data[4 * count + 2 * int(end - start) :], tables, places[part], part)
        for (data, _), part, count, start, end in zip(streams, lanes.parts, lanes.counts, first, position, strict=True)
    ]


class _Tables:
    """The tables of the classes that occur, side by side, and which of them each integer has."""

    def __init__(self, numbers: np.ndarray, which: np.ndarray) -> None:
        tables = [table(int(number)) for number in numbers]
        widest = max((len(one.bounds) for one in tables), default=2)
        self._which = which
        self._bounds = np.full((len(tables), widest), _TOTAL, dtype=np.int64)
        for row, one in enumerate(tables):
            self._bounds[row, : len(one.bounds)] = one.bounds
        self._first = np.array([one.first for one in tables], dtype=np.int64)
        self._escape = np.array([one.escape for one in tables], dtype=np.int64)
        self._raw = np.array([one.raw for one in tables], dtype=np.int64)
        self._slots: np.ndarray | None = None

    @classmethod
    def of(cls, classes: np.ndarray) -> "_Tables":
        _check_classes(classes)
        # one byte an integer, where the inverse of `np.unique` takes eight
        narrow = classes.astype(np.uint8)
        numbers = np.flatnonzero(np.bincount(narrow, minlength=CLASSES))
        row = np.zeros(CLASSES, dtype=np.uint8)
        row[numbers] = np.arange(len(numbers))
        return cls(numbers, row[narrow])

    def raw(self, part: slice) -> np.ndarray:
        """How many bits of each integer are written as they are."""
        found: np.ndarray = self._raw[self._which[part]]
        return found

    def places(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The place of each integer in its table, and whether that is the escape's."""
        found = (values >> self.raw(slice(None))) - self._first[self._which]
        escape = self._escape[self._which]
        outside = (found < 0) | (found >= escape)
        return np.where(outside, escape, found), outside

    def values(self, places: np.ndarray, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `places`, without the bits that are written as they are."""
        which = self._which[part]
        return (places + self._first[which]) << self._raw[which], places == self._escape[which]

    def interval(self, at: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = self._which[at]
        return self._bounds[rows, places], self._bounds[rows, places + 1]

    def find(self, at: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Of each slot, the place whose interval it is in."""
        if self._slots is None:
            self._slots = np.stack(
                [np.repeat(np.arange(len(row) - 1, dtype=np.int16), np.diff(row)) for row in self._bounds]
            )
        found: np.ndarray = self._slots[self._which[at], slots].astype(np.int64)
        return found


@dataclass(frozen=True, slots=True)
class _Lanes:
    """Who codes which integer: lane l of the n of a stream has every n-th of its integers from the l-th on.

    stream, start, stride, length: by lane. parts: the integers of each stream; counts: how many lanes it has.
    """

    stream: np.ndarray
    start: np.ndarray
    stride: np.ndarray
    length: np.ndarray
    parts: list[slice]
    counts: list[int]

    @classmethod
    def of(cls, classes: Sequence[np.ndarray]) -> "_Lanes":
        counts = [_lanes(kinds) for kinds in classes]
        edges = np.concatenate([[0], np.cumsum([len(kinds) for kinds in classes])]).astype(np.int64)
        own = np.concatenate([np.arange(count) for count in counts]).astype(np.int64)
        stream = np.repeat(np.arange(len(classes)), counts)
        stride = np.repeat(np.array(counts, dtype=np.int64), counts)
        sizes = np.diff(edges)[stream]
        return cls(
            stream,
            edges[stream] + own,
            stride,
            (sizes - own + stride - 1) // np.maximum(stride, 1),
            [slice(int(start), int(stop)) for start, stop in pairwise(edges)],
            counts,
        )

    @property
    def steps(self) -> int:
        return int(self.length.max()) if len(self.length) else 0

    def active(self, step: int) -> np.ndarray:
        """The lanes that have an integer left."""
        return np.flatnonzero(self.length > step)


def _check_classes(classes: np.ndarray) -> None:
    if len(classes) and not (classes.min() >= 0 and classes.max() < CLASSES):
        raise FormatError(f"classes are 0 to {CLASSES - 1}, got up to {classes.max()}.")


def _lanes(classes: np.ndarray) -> int:
    """How many lanes a stream has: by what its integers should take, in whole hundredths of a bit."""
    if not len(classes):
        return 0
    _check_classes(classes)
    counts = np.bincount(classes.astype(np.uint8), minlength=CLASSES)
    hundredths = sum(int(counts[number]) * _hundredths(int(number)) for number in np.flatnonzero(counts))
    lanes = max(hundredths // (100 * 8 * LANE_BYTES), len(classes) // LANE_INTEGERS, 1)
    return min(lanes, len(classes), 1 << 14)


@cache
def _hundredths(number: int) -> int:
    """What an integer of a class takes on average, in whole hundredths of a bit."""
    return round(100 * _costs(number)[1])


def _opened(blobs: Sequence[bytes], lanes: _Lanes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The last states of the lanes; all words, one stream's after the other's; and where each stream's begin."""
    states, words, first, end = [], [], [], 0
    for data, count in zip(blobs, lanes.counts, strict=True):
        if len(data) < 4 * count:
            raise FormatError("the coded bytes end too early.")
        states.append(np.frombuffer(data, "<u4", count).astype(np.uint64))
        rest = data[4 * count : 4 * count + (len(data) - 4 * count) // 2 * 2]
        words.append(np.frombuffer(rest, "<u2").astype(np.uint64))
        first.append(end)
        end += len(words[-1])
    return np.concatenate(states), np.concatenate(words), np.array(first, dtype=np.int64)


def _raw_bits(values: np.ndarray, raw: np.ndarray, outside: np.ndarray) -> bytes:
    """The last bits of the integers that have some, the highest first."""
    owner, shift = _bit_places(raw, outside)
    return np.packbits(((values[owner] >> shift) & 1).astype(np.uint8)).tobytes()


def _bit_places(raw: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each bit that is written as it is, whose it is and by how much it is shifted there."""
    counts = np.where(outside, 0, raw)
    owner = np.repeat(np.arange(len(raw)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return owner, counts[owner] - 1 - within


_BLOCK = 1 << 16
"""Integers whose last bits are put in place at a time: each bit takes some thirty bytes meanwhile."""


def _finished(data: bytes, tables: _Tables, places: np.ndarray, part: slice) -> np.ndarray:
    """The integers of a stream, int32, from their places and what follows its words."""
    blocks = [slice(start, min(start + _BLOCK, part.stop)) for start in range(part.start, part.stop, _BLOCK)]
    found = np.zeros(len(places), dtype=np.int32)
    outside = np.zeros(len(places), dtype=bool)
    bits = 0
    for block in blocks:
        own = slice(block.start - part.start, block.stop - part.start)
        _, outside[own] = tables.values(places[own], block)
        bits += int(tables.raw(block)[~outside[own]].sum())
    size, escapes = -(-bits // 8), int(outside.sum())
    if len(data) != size + 4 * escapes:
        raise FormatError(f"{len(data)} bytes follow the coded ones; {size + 4 * escapes} were expected.")
    packed, at = np.frombuffer(data, np.uint8, size), 0
    for block in blocks:
        own = slice(block.start - part.start, block.stop - part.start)
        values, beyond = tables.values(places[own], block)
        owner, shift = _bit_places(tables.raw(block), beyond)
        first, at = at, at + len(owner)
        inside = np.unpackbits(packed[first // 8 : -(-at // 8)])[first % 8 :][: len(owner)].astype(np.int64)
        np.add.at(values, owner, inside << shift)
        if (values >= 2**31).any() or (values < -(2**31)).any():
            raise FormatError("a coded integer is beyond 32 bits.")
        found[own] = values
    found[outside] = np.frombuffer(data[size:], "<i4")
    return found
