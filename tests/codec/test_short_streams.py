"""Short streams: every integer of every class comes back, in hardly more bytes than their probability asks for."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eigenlorax.codec import short_streams
from eigenlorax.codec.class_tables import CLASSES, TOTAL, class_table
from eigenlorax.errors import FormatError

NUMBERS = st.one_of(st.integers(-3, 3), st.integers(-(2**31), 2**31 - 1))


@given(st.lists(st.tuples(NUMBERS, st.integers(0, CLASSES - 1)), max_size=40))
def test_integers_come_back(pairs):
    integers, classes = (np.array([pair[i] for pair in pairs], dtype=np.int64) for i in range(2))
    data = short_streams.encode(integers, classes)
    assert short_streams.decode(data, classes).tolist() == integers.tolist()


def test_bytes_are_those_of_the_probability():
    generator = np.random.default_rng(1)
    for size in (0, 1, 7, 300):
        integers, classes = generator.integers(-1, 2, size), np.full(size, 14)
        bounds, first = class_table(14).bounds, class_table(14).first
        bits = sum(math.log2(TOTAL / (bounds[n - first + 1] - bounds[n - first])) for n in integers.tolist())
        assert bits / 8 - 1e-9 <= len(short_streams.encode(integers, classes)) <= bits / 8 + 1.1


def test_zeros_of_a_low_class_take_one_byte():
    assert short_streams.encode(np.zeros(5, int), np.zeros(5, int)) == b"\x01"
    assert short_streams.decode(b"\x01", np.zeros(5, int)).tolist() == [0] * 5


def test_other_bytes_are_noticed():
    integers, classes = np.arange(60) % 7 - 3, np.full(60, 20)
    data = short_streams.encode(integers, classes)
    for other in (data + b"\x00", data + b"\x01", data[:-1], data[:5]):
        with pytest.raises(FormatError, match="not those of its integers"):
            short_streams.decode(other, classes)


@pytest.mark.parametrize(("n", "size"), [(1025, 1), (1, 9), (0, 1)])
def test_longer_ones_are_refused_before_they_are_decoded(n, size):
    with pytest.raises(FormatError, match=f"a short stream has {n:,} integers in {size:,} bytes"):
        short_streams.decode(bytes(size), np.zeros(n, int))
