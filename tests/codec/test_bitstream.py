"""The two forms of an adapter's bytes: the shorter one is written, both are read, and no third one is."""

import numpy as np
import pytest

from eigenlorax.codec import bitstream
from eigenlorax.codec.adapter_codes import NO_INTEGERS, UNTRAINED, AdapterCodes, ModuleCodes, ModuleLayout, SideCodes
from eigenlorax.errors import FormatError

NO_SIDE = SideCodes(NO_INTEGERS, NO_INTEGERS, NO_INTEGERS, NO_INTEGERS)
RANKS = {"a": 2, "b": 2}


def layouts(k, dimension=11):
    profile = np.zeros(k, dtype=np.int64)
    layout = ModuleLayout((profile, profile), (dimension, dimension), (k, k), (0, 0))
    return {"a": layout, "b": layout}


def cores(k, levels=(15, 15), step_size=2.0**-7, cluster=0):
    core = np.arange(k * k).reshape(k, k) % 5 - 2
    modules = {
        name: ModuleCodes(NO_INTEGERS, NO_SIDE, NO_SIDE, level, core if level else NO_INTEGERS)
        for name, level in zip("ab", levels, strict=True)
    }
    return AdapterCodes(step_size, cluster, modules)


def residuals(dimension):
    side = SideCodes(np.array([0]), np.zeros((0, 0), int), np.array([15]), np.ones((1, dimension), int))
    return AdapterCodes(0.3, 0, {"a": ModuleCodes(np.array([0]), side, side, 0, NO_INTEGERS), "b": UNTRAINED})


def encoded(codes, its_layouts):
    (data,) = bitstream.encode_adapters([(codes, its_layouts)])
    return data


def kind(data):
    return int.from_bytes(data[:3], "little") >> 21


@pytest.mark.parametrize(
    ("codes", "its_layouts", "expected"),
    [
        (cores(3), layouts(3), 4),
        (cores(3, levels=(15, 16)), layouts(3), 2),
        (cores(3, levels=(0, 0)), layouts(3), 4),
        (residuals(11), layouts(0), 2),
        # too many numbers, another cluster, and a step size beyond 64 octaves
        (residuals(600), layouts(0, 600), None),
        (cores(3, cluster=1), layouts(3), None),
        (cores(3, step_size=2.0**-65), layouts(3), None),
    ],
)
def test_each_form_is_read(codes, its_layouts, expected):
    data = encoded(codes, its_layouts)
    assert kind(data) == expected if expected else kind(data) in (0, 7)
    found = bitstream.decode_adapter(data, its_layouts, RANKS)
    assert (found.cluster, bitstream.read_cluster(data)) == (codes.cluster, codes.cluster)
    assert found.step_size == pytest.approx(codes.step_size, rel=1e-4)
    for name, module in codes.modules.items():
        other = found.modules[name]
        assert (other.core_level, other.scales.tolist()) == (module.core_level, module.scales.tolist())
        assert other.core.ravel().tolist() == module.core.ravel().tolist()
        assert other.down.residuals.ravel().tolist() == module.down.residuals.ravel().tolist()


def test_a_tiny_adapter_has_four_bytes_beside_its_numbers():
    data = encoded(cores(3), layouts(3))
    # 18 numbers from −2 to 2 in class 14
    assert len(data) == 4 + 6


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "unknown form"),
        (b"\x00\x00", "unknown form"),
        (b"\x00\x00\xa0\x10", "unknown form"),
        (b"\x00\x00\x80", "levels of an adapter cannot be read"),
        (b"\x00\x00\x60\x05abc", "levels of an adapter cannot be read"),
        (b"\x00\x00\x40\x00", "levels of an adapter cannot be read"),
        # 18 numbers have at most 144 bytes
        (b"\x00\x00\x80\x0f" + bytes(145), "18 integers in 145 bytes"),
    ],
)
def test_other_bytes_are_refused(data, message):
    with pytest.raises(FormatError, match=message):
        bitstream.decode_adapter(data, layouts(3), RANKS)


def test_a_cut_of_the_long_form_is_noticed():
    data = encoded(residuals(600), layouts(0, 600))
    for other in (data[:-1], data + b"0"):
        with pytest.raises(FormatError, match="coded bytes|bytes follow the coded ones"):
            bitstream.decode_adapter(other, layouts(0, 600), RANKS)


def test_a_short_stream_of_many_numbers_is_refused():
    with pytest.raises(FormatError, match="a short stream has 2,450 integers"):
        bitstream.decode_adapter(b"\x00\x00\x80\x0f", layouts(35), RANKS)
