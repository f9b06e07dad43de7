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
from .stream_tables import StreamTables, check_classes

LANE_BYTES = 512
"""Bytes that a lane writes on average. Its last state takes 4 of them, so that lanes cost less than one per cent."""
LANE_INTEGERS = 1 << 14
"""Maximum number of integers of a lane, approximately. It bounds the number of steps in Python."""
MAX_LANES = 1 << 14
_MIN_STATE = 1 << 16
"""Between integers, states are in [2^16, 2^32), so that each integer moves at most one 16-bit word."""
# of NumPy's types, because a number of Python would be converted at each step
_SHORT_STATE, _SLOT_MASK = np.uint64(_MIN_STATE), np.uint64(TOTAL - 1)
_PRECISION_BITS, _WORD_BITS = np.uint64(PRECISION), np.uint64(16)


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
    integers = np.concatenate([np.asarray(numbers, dtype=np.int64) for numbers, _ in streams])
    if len(integers) and (integers.max() >= 2**31 or integers.min() < -(2**31)):
        raise FormatError(
            f"integers from {integers.min():,} to {integers.max():,} are beyond 32 bits: ask for a larger max_error."
        )
    classes = [np.asarray(stream_classes, dtype=np.int64) for _, stream_classes in streams]
    tables = StreamTables.of(np.concatenate(classes))
    symbols, escaped = tables.symbols(integers)
    lanes = _Lanes.of(classes)
    states, words, word_lanes = _encode_symbols(symbols, tables, lanes)
    word_streams = lanes.stream[word_lanes]
    # raw bits and escaped integers follow the words: they need no model, and would only slow the coder down
    return [
        b"".join(
            (
                states[lanes.stream == number].astype("<u4").tobytes(),
                words[word_streams == number].tobytes(),
                _pack_raw_bits(integers[span], tables.raw_bits(span), escaped[span]),
                integers[span][escaped[span]].astype("<i4").tobytes(),
            )
        )
        for number, span in enumerate(lanes.slices)
    ]


def _encode_symbols(
    symbols: np.ndarray, tables: StreamTables, lanes: "_Lanes"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the final states of the lanes, all words in the order in which they are read, and the lane of each."""
    states = np.full(len(lanes.stream), _MIN_STATE, dtype=np.uint64)
    low, frequency = tables.intervals(symbols)
    # rANS is last in, first out: encoding from the end lets the decoder read from the start
    words: list[np.ndarray] = []
    word_lanes: list[np.ndarray] = []
    for active, steps in reversed(lanes.spans()):
        start, stride, state = lanes.start[active], lanes.stride[active], states[active]
        for step in reversed(steps):
            at = start + step * stride
            share = frequency[at]
            # a state that the next symbol would push beyond 32 bits writes its low word first
            full = np.flatnonzero(state >= share << np.uint64(32 - PRECISION))
            if len(full):
                words.append(state[full].astype("<u2"))
                word_lanes.append(active[full])
                state[full] >>= np.uint64(16)
            quotient = state // share
            state += quotient * (np.uint64(TOTAL) - share) + low[at]
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
    symbols, next_words = _decode_symbols(states, words, first_words, tables, lanes)
    return [
        _restore_integers(data[4 * count + 2 * int(stop - start) :], tables, symbols[span], span)
        for (data, _), span, count, start, stop in zip(
            streams, lanes.slices, lanes.counts, first_words, next_words, strict=True
        )
    ]


def _decode_symbols(
    states: np.ndarray, words: np.ndarray, first_words: np.ndarray, tables: StreamTables, lanes: "_Lanes"
) -> tuple[np.ndarray, np.ndarray]:
    """Decode the symbols of all streams.

    Args:
        states: Last states of the lanes, changed in place.
        words: Words of all streams.
        first_words: Index of the first word of each stream.
        tables: Tables of all integers.
        lanes: Division of the streams into lanes.

    Returns:
        The symbol of every integer, and the index of the first word of each stream that was not read.

    Raises:
        FormatError: If the words are too few or do not lead back to the first states.
    """
    # no table has more than 256 symbols
    symbols = np.zeros(lanes.slices[-1].stop, dtype=np.uint8)
    if len(lanes.slices) == 1:
        next_words = first_words + _decode_one_stream(states, words, tables, symbols)
    else:
        next_words = _decode_streams(states, words, first_words, tables, lanes, symbols)
    # the encoder started from these states: any other end shows damage
    if len(states) and (states != _MIN_STATE).any():
        raise FormatError("the coded bytes do not end where they should.")
    return symbols, next_words


def _decode_one_stream(states: np.ndarray, words: np.ndarray, tables: StreamTables, symbols: np.ndarray) -> int:
    """Decode the symbols of one stream into `symbols`, and return the number of words that were read.

    The integers of a step are consecutive, and so are the words that its lanes read, so that a step takes half the time
    of one of `_decode_streams`.
    """
    next_word = 0
    for first in range(0, len(symbols), max(len(states), 1)):
        # the last step may have fewer integers than there are lanes
        span = slice(first, min(first + len(states), len(symbols)))
        state = states[: span.stop - first]
        slot = state & _SLOT_MASK
        symbol, low, share = tables.symbol_at(span, slot.view(np.int64))
        symbols[span] = symbol
        state >>= _PRECISION_BITS
        state *= share
        state += slot
        state -= low
        (short,) = (state < _SHORT_STATE).nonzero()
        if len(short):
            read = words[next_word : next_word + len(short)]
            next_word += len(short)
            if len(read) < len(short):
                raise FormatError("the coded bytes end too early.")
            state[short] = state[short] << _WORD_BITS | read
    return next_word


def _decode_streams(
    states: np.ndarray,
    words: np.ndarray,
    first_words: np.ndarray,
    tables: StreamTables,
    lanes: "_Lanes",
    symbols: np.ndarray,
) -> np.ndarray:
    """Decode the symbols of several streams into `symbols`; return the first word of each that was not read."""
    next_words = first_words.copy()
    for active, steps in lanes.spans():
        start, stride, state = lanes.start[active], lanes.stride[active], states[active]
        # lanes are sorted by stream, so the lanes of one stream read consecutive words, in the order of lanes
        stream = lanes.stream[active]
        first_lane = np.flatnonzero(np.concatenate([[True], stream[1:] != stream[:-1]]))
        lane_streams, lane_counts = stream[first_lane], np.diff(np.append(first_lane, len(stream)))
        last_lane = first_lane + lane_counts - 1
        for step in steps:
            at = start + step * stride
            # the low bits of a state are in the interval of the symbol that was encoded last
            slot = (state & np.uint64(TOTAL - 1)).astype(np.intp)
            symbol, low, share = tables.symbol_at(at, slot)
            symbols[at] = symbol
            state = share * (state >> np.uint64(PRECISION)) + (slot.astype(np.uint64) - low)
            is_short = state < _MIN_STATE
            if is_short.any():
                reads = np.cumsum(is_short)
                totals = reads[last_lane]
                before = np.concatenate([[0], totals[:-1]])
                at_word = np.repeat(next_words[lane_streams] - before - 1, lane_counts) + reads
                short = np.flatnonzero(is_short)
                read = at_word[short]
                if read.max() >= len(words):
                    raise FormatError("the coded bytes end too early.")
                state[short] = (state[short] << np.uint64(16)) | words[read]
                next_words[lane_streams] += totals - before
        states[active] = state
    return next_words


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
        states.append(np.frombuffer(data, "<u4", count).astype(np.uint64))
        after_states = data[4 * count : 4 * count + (len(data) - 4 * count) // 2 * 2]
        words.append(np.frombuffer(after_states, "<u2").astype(np.uint64))
        first_words.append(end)
        end += len(words[-1])
    return np.concatenate(states), np.concatenate(words), np.array(first_words, dtype=np.int64)


def _pack_raw_bits(integers: np.ndarray, raw_bits: np.ndarray, escaped: np.ndarray) -> bytes:
    """Return the raw bits of the integers that have some, the highest bit of each first."""
    owner, shift = _bit_positions(raw_bits, escaped)
    return np.packbits(((integers[owner] >> shift) & 1).astype(np.uint8)).tobytes()


def _bit_positions(raw_bits: np.ndarray, escaped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, per raw bit, the index of its integer and its bit position."""
    counts = np.where(escaped, 0, raw_bits)
    owner = np.repeat(np.arange(len(raw_bits)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return owner, counts[owner] - 1 - within


_BLOCK = 1 << 16
"""Integers whose raw bits are unpacked at a time: each bit takes some thirty bytes meanwhile."""


def _restore_integers(data: bytes, tables: StreamTables, symbols: np.ndarray, span: slice) -> np.ndarray:
    """Return the integers of a stream, int32, from their symbols and the bytes that follow its words."""
    blocks = [slice(start, min(start + _BLOCK, span.stop)) for start in range(span.start, span.stop, _BLOCK)]
    integers = np.zeros(len(symbols), dtype=np.int32)
    escaped = np.zeros(len(symbols), dtype=bool)
    bits = 0
    for block in blocks:
        within = slice(block.start - span.start, block.stop - span.start)
        escaped[within] = tables.escaped(symbols[within], block)
        bits += int(tables.raw_bits(block)[~escaped[within]].sum())
    # the sizes are checked before any bit is unpacked
    size, n_escaped = -(-bits // 8), int(escaped.sum())
    if len(data) != size + 4 * n_escaped:
        raise FormatError(f"{len(data)} bytes follow the coded ones; {size + 4 * n_escaped} were expected.")
    packed, at = np.frombuffer(data, np.uint8, size), 0
    for block in blocks:
        within = slice(block.start - span.start, block.stop - span.start)
        wide = tables.integers(symbols[within], block)
        owner, shift = _bit_positions(tables.raw_bits(block), escaped[within])
        first, at = at, at + len(owner)
        # a block may begin and end in the middle of a byte
        block_bits = np.unpackbits(packed[first // 8 : -(-at // 8)])[first % 8 :][: len(owner)].astype(np.int64)
        # unlike `wide[owner] += …`, this adds all bits of an integer
        np.add.at(wide, owner, block_bits << shift)
        if (wide >= 2**31).any() or (wide < -(2**31)).any():
            raise FormatError("a coded integer is beyond 32 bits.")
        integers[within] = wide
    integers[escaped] = np.frombuffer(data[size:], "<i4")
    return integers
