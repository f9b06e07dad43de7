"""An entropy coder for integers that are mostly near zero.

Each integer has a *class*, known to encoder and decoder beforehand: a logistic distribution of scale 2^(c/4 − 4) for
class c. Likely integers take few bits, down to a hundredth of one. The coder is rANS (Duda 2013, arXiv 1311.2540) with
32-bit states, 16-bit words and probabilities of 15 bits.
docs/pack-format.md describes each byte.

rANS is sequential: each integer needs the state after the previous one. A stream is therefore divided into several
*lanes*, each with its own state, and NumPy advances all lanes of all streams by one integer at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

from ..errors import FormatError
from .class_tables import ALL_CLASSES, PRECISION, TOTAL, class_table
from .stream_tables import ESCAPED, EncodingTables, StreamTables, check_classes

LANE_BYTES = 512
"""Bytes that a lane writes on average. Its last state takes 4 of them, so that lanes cost less than one per cent."""
LANE_INTEGERS = 1 << 14
"""Maximum number of integers of a lane, approximately. It bounds the number of steps in Python."""
MAX_LANES = 1 << 14
_BLOCK = 1 << 16
"""Integers whose tables are looked up at a time: each takes some fifty bytes meanwhile."""
_MIN_STATE = 1 << 16
"""Between integers, states are in [2^16, 2^32), so that each integer moves at most one 16-bit word."""
# arrays, because a number of Python or NumPy would be converted at each step
_SHORT_STATE, _SLOT_MASK, _WORD_MASK = (np.array(number, np.uint32) for number in (_MIN_STATE, TOTAL - 1, 0xFFFF))
_PRECISION_BITS, _WORD_BITS = (np.array(bits, np.uint32) for bits in (PRECISION, 16))
_FULL_BITS = np.array(32 - PRECISION, np.uint32)
_FREQUENCY_MASK, _TOTAL = np.uint64(2**16 - 1), np.uint64(TOTAL)


def encode(streams: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[bytes]:
    """Encode streams of integers.

    Streams that are encoded together have the same bytes as alone, and take less time.

    Args:
        streams: Integers (n,) and their classes (n,), for each stream.

    Returns:
        The bytes of each stream.

    Raises:
        FormatError: An integer needs more than 32 bits, or a class is not below `ALL_CLASSES`.
    """
    if not streams:
        return []
    classes = [np.asarray(stream_classes) for _, stream_classes in streams]
    lanes = _Lanes.of(classes)
    used = sum(np.bincount(stream_classes.astype(np.uint8), minlength=ALL_CLASSES) for stream_classes in classes)
    tables = EncodingTables(np.flatnonzero(used).tolist())
    intervals = np.zeros(lanes.slices[-1].stop, dtype=np.uint32)
    tails = []
    # one stream after the other: the arrays of one fit a cache
    for (numbers, _), stream_classes, span in zip(streams, classes, lanes.slices, strict=True):
        integers = np.asarray(numbers)
        _check_range(integers)
        narrow_classes = stream_classes.astype(np.uint8, copy=False)
        intervals[span], escaped = tables.intervals(integers, narrow_classes)
        # raw bits and escaped integers follow the words: they need no model, and would only slow the coder down
        raw_bits = _pack_raw_bits(integers, tables.raw_bits(narrow_classes), escaped)
        tails.append(raw_bits + integers[escaped].astype("<i4").tobytes())
    states, words, word_lanes = _encode_symbols(intervals, lanes)
    word_streams = lanes.stream[word_lanes]
    # words of a stream stay in their order
    words = words[np.argsort(word_streams, kind="stable")]
    ends = np.cumsum(np.bincount(word_streams, minlength=len(streams)))[:-1]
    state_ends = np.cumsum(lanes.counts)[:-1]
    return [
        stream_states.astype("<u4").tobytes() + stream_words.tobytes() + tail
        for stream_states, stream_words, tail in zip(
            np.split(states, state_ends), np.split(words, ends), tails, strict=True
        )
    ]


def _check_range(integers: np.ndarray) -> None:
    """Raise `FormatError` if an integer needs more than 32 bits."""
    if len(integers) and (integers.max() >= 2**31 or integers.min() < -(2**31)):
        raise FormatError(
            f"integers from {integers.min():,} to {integers.max():,} are beyond 32 bits: ask for a larger max_error."
        )


def _encode_symbols(intervals: np.ndarray, lanes: "_Lanes") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the final states of the lanes, all words in the order in which they are read, and the lane of each.

    Args:
        intervals: Interval of each integer, as `EncodingTables` returns them.
        lanes: Division of the streams into lanes.
    """
    states = np.full(len(lanes.stream), _MIN_STATE, dtype=np.uint64)
    # rANS is last in, first out: encoding from the end lets the decoder read from the start
    words: list[np.ndarray] = []
    word_lanes: list[np.ndarray] = []
    for active, steps in reversed(lanes.spans()):
        start, stride, state = lanes.start[active], lanes.stride[active], states[active]
        for step in reversed(steps):
            interval = intervals.take(start + step * stride).astype(np.uint64)
            share = interval & _FREQUENCY_MASK
            # a state that the next symbol would push beyond 32 bits writes its low word first
            (full,) = (state >= share << _FULL_BITS).nonzero()
            if len(full):
                full_states = state[full]
                words.append(full_states.astype("<u2"))
                word_lanes.append(active[full])
                state[full] = full_states >> _WORD_BITS
            state += state // share * (_TOTAL - share) + (interval >> _WORD_BITS)
        states[active] = state
    if not words:
        return states, np.zeros(0, "<u2"), np.zeros(0, int)
    return states, np.concatenate(words[::-1]), np.concatenate(word_lanes[::-1])


def decode(streams: Sequence[tuple[bytes, np.ndarray]]) -> list[np.ndarray]:
    """Decode the streams that `encode` wrote. Memory: about seven bytes per integer, the result included.

    Args:
        streams: Bytes and the classes (n,) of the integers, for each stream.

    Returns:
        The integers of each stream, (n,) int32.

    Raises:
        FormatError: The bytes are damaged, or have another number of integers.
    """
    if not streams:
        return []
    classes = [np.asarray(stream_classes) for _, stream_classes in streams]
    lanes = _Lanes.of(classes)
    states, words, first_words = _split_streams([data for data, _ in streams], lanes)
    # after the lanes, whose states show with little memory whether the bytes can be so many integers
    tables = StreamTables.of(np.concatenate(classes))
    integers, next_words = _decode_high_bits(states, words, first_words, tables, lanes)
    for (data, _), span, count, start, stop in zip(
        streams, lanes.slices, lanes.counts, first_words, next_words, strict=True
    ):
        _add_raw_bits(data[4 * count + 2 * int(stop - start) :], tables, integers[span], span)
    return [integers[span] for span in lanes.slices]


def _decode_high_bits(
    states: np.ndarray, words: np.ndarray, first_words: np.ndarray, tables: StreamTables, lanes: "_Lanes"
) -> tuple[np.ndarray, np.ndarray]:
    """Decode all streams but for raw bits and escaped integers.

    Args:
        states: Last states of the lanes, changed in place.
        words: Words of all streams.
        first_words: Index of the first word of each stream.
        tables: Tables of all integers.
        lanes: Division of the streams into lanes.

    Returns:
        Every integer, int32, with zeros for its raw bits, or `ESCAPED`; and the index of the first word of each stream
        that was not read.

    Raises:
        FormatError: If the words are too few or do not lead back to the first states.
    """
    integers = np.zeros(lanes.slices[-1].stop, dtype=np.int32)
    next_words = first_words.copy()
    for active, steps in lanes.spans():
        state = states[active]
        reader = _WordReader(words, next_words, lanes.stream[active])
        start, stride = lanes.start[active], lanes.stride[active]
        block = max(_BLOCK // len(active), 1)
        for first in range(steps.start, steps.stop, block):
            # look-ups that need no state, for many steps at once
            at = start + np.arange(first, min(first + block, steps.stop))[:, None] * stride
            slots = _decode_steps(state, tables.first_slots(at), tables.slots, reader)
            integers[at] = tables.slot_integers.take(slots)
        states[active] = state
    # the encoder started from these states: any other end shows damage
    if len(states) and (states != _MIN_STATE).any():
        raise FormatError("the coded bytes do not end where they should.")
    return integers, next_words


def _decode_steps(state: np.ndarray, slots: np.ndarray, slot_table: np.ndarray, reader: "_WordReader") -> np.ndarray:
    """Advance all lanes by some steps.

    Args:
        state: States of the lanes, (lanes,) uint32, changed in place.
        slots: First slot of the class of each integer in `slot_table`, (steps, lanes), changed in place.
        slot_table: `StreamTables.slots`.
        reader: Reader of the lanes' words.

    Returns:
        The slot of each integer, in the memory of `slots`.
    """
    for slot in slots:
        # the low bits of a state are in the interval of the symbol that was encoded last
        slot += state & _SLOT_MASK
        entry = slot_table.take(slot)
        state >>= _PRECISION_BITS
        state *= entry >> _WORD_BITS
        state += entry & _WORD_MASK
        (short,) = (state < _SHORT_STATE).nonzero()
        if len(short):
            state[short] = state[short] << _WORD_BITS | reader.read(short)
    return slots


class _WordReader:
    """Reader of the words of lanes that are sorted by stream.

    The lanes of one stream read consecutive words, in the order of lanes.

    Args:
        words: Words of all streams.
        next_words: Index of the next word of each stream, changed in place.
        lane_streams: Stream of each lane, ascending.
    """

    __slots__ = ("_is_alone", "_lane_streams", "_next_words", "_order", "_words")

    def __init__(self, words: np.ndarray, next_words: np.ndarray, lane_streams: np.ndarray) -> None:
        self._words, self._next_words, self._lane_streams = words, next_words, lane_streams
        self._order = np.arange(len(lane_streams))
        self._is_alone = len(next_words) == 1

    def read(self, lanes: np.ndarray) -> np.ndarray:
        """Return the next word of each of these lanes, in ascending order."""
        if self._is_alone:
            # half the time of the general case
            start = int(self._next_words[0])
            self._next_words[0] = stop = start + len(lanes)
            if stop > len(self._words):
                raise FormatError("the coded bytes end too early.")
            return self._words[start:stop]
        streams = self._lane_streams.take(lanes)
        counts = np.bincount(streams, minlength=len(self._next_words))
        before = counts.cumsum() - counts
        positions = (self._next_words - before).take(streams) + self._order[: len(lanes)]
        if positions.max() >= len(self._words):
            raise FormatError("the coded bytes end too early.")
        self._next_words += counts
        return self._words.take(positions)


@dataclass(frozen=True, slots=True)
class _Lanes:
    """Division of streams into lanes: lane l of n contains the integers l, l + n, l + 2n, … of its stream.

    Attributes:
        stream: Stream of each lane, ascending.
        start: First integer of each lane, counted over all streams.
        stride: Distance between the integers of each lane.
        length: Number of integers of each lane.
        slices: The integers of each stream.
        counts: Number of lanes of each stream.
    """

    stream: np.ndarray
    start: np.ndarray
    stride: np.ndarray
    length: np.ndarray
    slices: list[slice]
    counts: list[int]

    @classmethod
    def of(cls, classes: Sequence[np.ndarray]) -> "_Lanes":
        """Divide streams by their classes alone, which the decoder has too."""
        counts = [_lane_count(stream_classes) for stream_classes in classes]
        edges = np.concatenate([[0], np.cumsum([len(stream_classes) for stream_classes in classes])]).astype(np.int64)
        within = np.concatenate([np.arange(count) for count in counts]).astype(np.int64)
        stream = np.repeat(np.arange(len(classes)), counts)
        stride = np.repeat(np.array(counts, dtype=np.int64), counts)
        sizes = np.diff(edges)[stream]
        return cls(
            stream,
            edges[stream] + within,
            stride,
            # streams without an integer have no lane, and a stride of 0
            (sizes - within + stride - 1) // np.maximum(stride, 1),
            [slice(int(start), int(stop)) for start, stop in pairwise(edges)],
            counts,
        )

    def spans(self) -> list[tuple[np.ndarray, range]]:
        """Return ranges of steps, and the lanes that have an integer at all steps of each range."""
        edges = [0, *np.unique(self.length).tolist()]
        return [
            (np.flatnonzero(self.length > start), range(start, stop)) for start, stop in pairwise(edges) if start < stop
        ]


def _lane_count(classes: np.ndarray) -> int:
    """Return the number of lanes of a stream, from the expected size of its integers in bytes.

    The count is part of the format, so it is computed in integers: a sum of floats depends on its order.
    """
    if not len(classes):
        return 0
    check_classes(classes)
    counts = np.bincount(classes.astype(np.uint8), minlength=ALL_CLASSES)
    hundredths = sum(int(counts[index]) * _hundredths_of_bits(int(index)) for index in np.flatnonzero(counts))
    lanes = max(hundredths // (100 * 8 * LANE_BYTES), len(classes) // LANE_INTEGERS, 1)
    return min(lanes, len(classes), MAX_LANES)


@cache
def _hundredths_of_bits(class_index: int) -> int:
    """Return the mean bits of an integer of a class, in whole hundredths, without escapes."""
    table = class_table(class_index)
    frequencies = np.diff(table.bounds)[:-1]
    bits = PRECISION - np.log2(frequencies.astype(np.float64)) + table.raw_bits
    return round(100 * float((frequencies / TOTAL * bits).sum()))


def _split_streams(blobs: Sequence[bytes], lanes: _Lanes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the last states of the lanes, all that may be words, and the first of these of each stream.

    Only decoding tells where the words of a stream end, and its raw bits begin.
    """
    states, words, first_words, end = [], [], [], 0
    for data, count in zip(blobs, lanes.counts, strict=True):
        if len(data) < 4 * count:
            raise FormatError("the coded bytes end too early.")
        states.append(np.frombuffer(data, "<u4", count).astype(np.uint32))
        after_states = data[4 * count : 4 * count + (len(data) - 4 * count) // 2 * 2]
        words.append(np.frombuffer(after_states, "<u2").astype(np.uint32))
        first_words.append(end)
        end += len(words[-1])
    return np.concatenate(states), np.concatenate(words), np.array(first_words, dtype=np.int64)


def _pack_raw_bits(integers: np.ndarray, raw_bits: np.ndarray | None, escaped: np.ndarray) -> bytes:
    """Return the raw bits of the integers that have some, the highest bit of each first.

    Args:
        integers: Integers of a stream.
        raw_bits: Numbers of their raw bits; None if all are 0.
        escaped: Indices of escaped integers, which have no raw bits.
    """
    if raw_bits is None:
        return b""
    counts = raw_bits.astype(np.int64)
    counts[escaped] = 0
    owner = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.packbits(((integers[owner] >> (counts[owner] - 1 - within)) & 1).astype(np.uint8)).tobytes()


def _unpack_raw_bits(packed: bytes, start: int, counts: np.ndarray) -> np.ndarray:
    """Return the raw bits of integers as numbers.

    Args:
        packed: Bytes of `_pack_raw_bits`.
        start: First bit of the first integer.
        counts: Number of raw bits of each integer, 1 to 26.
    """
    ends = start % 8 + counts.cumsum(dtype=np.int64)
    size = -(-int(ends[-1]) // 8) if len(ends) else 0
    # the eight bytes from every byte on: raw bits that begin in a byte end in the five after it
    padded = packed[start // 8 : start // 8 + size] + bytes(8)
    windows = np.ndarray(size + 1, ">u8", padded, strides=(1,)).astype(np.uint64)
    first = ends - counts
    words = windows.take(first >> 3) >> (64 - counts - (first & 7)).astype(np.uint64)
    raw: np.ndarray = words.astype(np.int32) & ((1 << counts.astype(np.int32)) - 1)
    return raw


def _add_raw_bits(data: bytes, tables: StreamTables, integers: np.ndarray, span: slice) -> None:
    """Add the raw bits to the integers of a stream, and insert the escaped ones.

    Args:
        data: Bytes that follow the words of the stream.
        tables: Tables of all streams.
        integers: Integers of the stream, from `_decode_high_bits`, changed in place.
        span: Position of the stream among all integers.
    """
    (escaped,) = (integers == ESCAPED).nonzero()
    counts = tables.raw_bits(span)
    counts[escaped] = 0
    # the sizes are checked before any bit is unpacked
    size = -(-int(counts.sum(dtype=np.int64)) // 8)
    if len(data) != size + 4 * len(escaped):
        raise FormatError(f"{len(data)} bytes follow the coded ones; {size + 4 * len(escaped)} were expected.")
    start = 0
    for first in range(0, len(integers), _BLOCK) if size else ():
        (within,) = counts[first : first + _BLOCK].nonzero()
        at = first + within
        # no more than 32 bits: tables end at multiples of 2^(raw bits)
        integers[at] += _unpack_raw_bits(data, start, counts[at])
        start += int(counts[at].sum(dtype=np.int64))
    integers[escaped] = np.frombuffer(data[size:], "<i4")
