"""Lossless versions: every bit returns, how many bytes they take, and what damaged bytes do."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from eigenlorax.codec import varint
from eigenlorax.codec.versions import byte_planes, lossless
from eigenlorax.errors import FormatError, OptionError

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = list(byte_planes.LAYOUTS)
RUN = Path(__file__).parents[4] / "shared/zoo/lineages/roberta-portuguese"


def bits(tensor: Tensor) -> bytes:
    return tensor.view(INTEGERS[tensor.dtype.itemsize]).numpy().tobytes()


def assert_equal_bits(decoded: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    assert list(decoded) == list(tensors)
    for key, tensor in tensors.items():
        assert (decoded[key].dtype, decoded[key].shape) == (tensor.dtype, tensor.shape)
        assert bits(decoded[key]) == bits(tensor)


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """A tensor of any bit patterns: NaN with payloads, infinities, subnormal numbers and both zeros."""
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    random = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, n_bytes, dtype=np.uint8)
    return torch.from_numpy(random.view(f"i{dtype.itemsize}")).view(dtype).reshape(shape)


def trained(seed: int, change: float = 0.0, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tensors of one run; `change` is the size of an optimizer's update since the start."""
    start, update = (torch.Generator().manual_seed(number) for number in (0, seed))
    shapes = {"a": (8, 384), "b": (192, 8), "head": (5, 384), "bias": (5,)}
    return {
        key: (torch.randn(shape, generator=start) / 50 + change * torch.randn(shape, generator=update)).to(dtype)
        for key, shape in shapes.items()
    }


tensors_strategy = st.dictionaries(
    st.text(max_size=5),
    st.tuples(
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
        st.integers(0, 2**32),
    ).map(lambda drawn: random_bits(*drawn)),
    max_size=6,
)


@settings(deadline=None)
@given(tensors_strategy, tensors_strategy, st.data())
def test_every_bit_returns(tensors: dict[str, Tensor], others: dict[str, Tensor], drawn: st.DataObject) -> None:
    # some tensors as they were, some with other bits, some only in one of the versions
    equal = drawn.draw(st.sets(st.sampled_from(sorted(tensors)))) if tensors else set()
    earlier = others | {key: tensor.roll(1) if tensor.ndim else tensor for key, tensor in tensors.items()}
    earlier |= {key: tensors[key] for key in equal}
    for reference in (None, earlier):
        assert_equal_bits(lossless.decode(lossless.encode(tensors, reference), reference), tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_special_numbers_return(dtype: torch.dtype) -> None:
    integers = INTEGERS[dtype.itemsize]
    quiet = torch.tensor([float("nan"), -0.0, 0.0, float("inf"), -float("inf"), 1.0], dtype=dtype)
    payloads = torch.cat([quiet.view(integers), quiet.view(integers) + 1, quiet.view(integers) - 1]).view(dtype)
    tensors = {"numbers": payloads, "scalar": torch.tensor(-0.0, dtype=dtype), "empty": torch.empty(3, 0, dtype=dtype)}
    for earlier in (None, {key: -tensor for key, tensor in tensors.items()}):
        assert_equal_bits(lossless.decode(lossless.encode(tensors, earlier), earlier), tensors)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.is_floating_point or dtype.is_signed])
def test_integers_have_the_order_of_the_numbers(dtype: torch.dtype) -> None:
    numbers = random_bits(dtype, (2000,), 7)
    integers = byte_planes.LAYOUTS[dtype].to_integers(numbers)
    sorted_numbers = numbers.double().numpy()[np.argsort(integers, kind="stable")]
    sorted_numbers = sorted_numbers[~np.isnan(sorted_numbers)]
    assert len(sorted_numbers) > 1000
    assert (sorted_numbers[1:] >= sorted_numbers[:-1]).all()


@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**32))
def test_small_integers_of_either_sign_fold_to_small_ones(width: int, seed: int) -> None:
    integers = random_bits(INTEGERS[width], (9,), seed).numpy()
    expected = [2 * int(n) if n >= 0 else -2 * int(n) - 1 for n in integers]
    assert byte_planes.fold(integers).tolist() == expected
    assert byte_planes.unfold(byte_planes.fold(integers)).tolist() == integers.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_close_versions_take_fewer_bytes(dtype: torch.dtype) -> None:
    before, after = trained(1, dtype=dtype), trained(1, 1e-5, dtype=dtype)
    assert len(lossless.encode(after, before)) < 0.8 * len(lossless.encode(after, None))


def test_equal_versions_take_few_bytes() -> None:
    tensors = {"a": torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))}
    assert len(lossless.encode(tensors, tensors)) < 300


def test_unrelated_tensors_are_not_predicted() -> None:
    zeros = {"a": torch.zeros(8, 4096)}
    noise = {"a": torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))}
    assert len(lossless.encode(zeros, noise)) == len(lossless.encode(zeros, None))


def test_changes_of_low_bits_take_about_those_bits() -> None:
    # changes of 2^k units in the last place, with k + 1 random bits each, where the exponent says what k is
    random = np.random.default_rng(3)
    exponents = random.integers(100, 108, 1 << 20)
    before = (exponents << 23 | random.integers(0, 1 << 22, 1 << 20)).astype(np.int32)
    n_bits = 3 + 2 * (exponents - 100)
    after = before + (random.random(1 << 20) * 2.0**n_bits).astype(np.int32)
    versions = [{"a": torch.from_numpy(integers).view(torch.float32)} for integers in (before, after)]
    entropy = n_bits.sum() / 8
    assert entropy <= len(lossless.encode(versions[1], versions[0])) < 1.1 * entropy


def test_blocks_of_many_numbers_return(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless, "BLOCK_NUMBERS", 2500)
    tensors = trained(1, 1e-4) | {"ids": torch.arange(3000), "step": torch.tensor(7)}
    earlier = trained(1) | {"ids": torch.arange(3000)}
    assert_equal_bits(lossless.decode(lossless.encode(tensors, earlier), earlier), tensors)


def test_equal_input_has_equal_bytes() -> None:
    assert lossless.encode(trained(1, 1e-4), trained(1)) == lossless.encode(trained(1, 1e-4), trained(1))


def test_decoded_tensors_share_no_memory() -> None:
    tensors = {"a": torch.arange(4), "b": torch.arange(4)}
    decoded = lossless.decode(lossless.encode(tensors, None), None)
    decoded["a"].zero_()
    assert decoded["b"].tolist() == [0, 1, 2, 3]


def test_an_unknown_dtype_is_an_error() -> None:
    with pytest.raises(OptionError, match="tensor a has the dtype complex64; a lossless version can have float64, "):
        lossless.encode({"a": torch.zeros(3, dtype=torch.complex64)}, None)


FLOAT_BITS = {"float64": (52, 11), "float32": (23, 8), "float16": (10, 5), "bfloat16": (7, 8)}
"""Bits of mantissa and exponent."""


def decode_by_the_page(data: bytes, earlier: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Decode the bytes of each tensor, number by number, as docs/pack-format.md says."""
    size, at = varint.decode(data, 0)
    rows = json.loads(byte_planes.zstd.decompress(data[at : at + size]))
    at += size
    blocks: list[list[list]] = []
    for row in rows:
        kind = (row[1], row[3])
        last = next((block for block in reversed(blocks) if (block[0][1], block[0][3]) == kind), None)
        if last is None or sum(int(np.prod(member[2])) for member in last) >= 2**20:
            blocks.append([row])
        else:
            last.append(row)
    decoded = {}
    for block in blocks:
        dtype, width = block[0][1], getattr(torch, block[0][1]).itemsize
        before = b"".join(bits(earlier[row[0]]) for row in block) if block[0][3] else None
        n = sum(int(np.prod(row[2])) for row in block)
        planes = []
        for _ in range(width):
            size, at = varint.decode(data, at)
            plane = data[at : at + size]
            planes.append(plane if size == n else byte_planes.zstd.decompress(plane))
            at += size
        folded = [sum(plane[i] << 8 * k for k, plane in enumerate(planes)) for i in range(n)]
        integers = [number // 2 if number % 2 == 0 else -(number + 1) // 2 for number in folded]
        if before is not None:
            numbers = [int.from_bytes(before[width * i : width * (i + 1)], "little") for i in range(n)]
            order = list(range(n))
            if dtype in FLOAT_BITS:
                mantissa, exponent = FLOAT_BITS[dtype]
                order.sort(key=lambda i: (numbers[i] >> mantissa & (2**exponent - 1)) & 255)
                numbers = [inverted(number, width) for number in numbers]
            restored = dict(zip(order, integers, strict=True))
            integers = [restored[i] + numbers[i] for i in range(n)]
        integers = [number % 2 ** (8 * width) for number in integers]
        for row in block:
            own, integers = integers[: int(np.prod(row[2]))], integers[int(np.prod(row[2])) :]
            assert zlib.crc32(b"".join(number.to_bytes(width, "little") for number in own)) == row[4]
            own = [inverted(number, width) for number in own] if dtype in FLOAT_BITS else own
            decoded[row[0]] = b"".join(number.to_bytes(width, "little") for number in own)
    assert at == len(data)
    return decoded


def inverted(number: int, width: int) -> int:
    """Invert all bits but the highest if that is 1."""
    highest = 1 << (8 * width - 1)
    return number ^ (highest - 1) if number & highest else number


@pytest.mark.parametrize("dtype", [*(getattr(torch, name) for name in FLOAT_BITS), torch.int32, torch.uint8])
def test_the_bytes_are_those_of_the_page(dtype: torch.dtype) -> None:
    before = {"a": random_bits(dtype, (7, 300), 1), "b": random_bits(dtype, (40,), 2), "c": random_bits(dtype, (9,), 3)}
    integers = before["a"].view(INTEGERS[dtype.itemsize])
    near = {"a": (integers + (torch.arange(300) % 5).to(integers.dtype)).view(dtype), "b": before["b"]}
    after = {**near, "d": random_bits(dtype, (), 4), "c": random_bits(dtype, (9,), 5), "e": torch.arange(4)}
    encoded = lossless.encode(after, before)
    assert decode_by_the_page(encoded, before) == {key: bits(tensor) for key, tensor in after.items()}


@pytest.mark.skipif(not RUN.exists(), reason="needs ../shared")
def test_a_published_run_returns_and_shrinks() -> None:
    early, late, last = (load_file(RUN / f"checkpoint-{step}/adapter_model.safetensors") for step in (500, 8500, 8610))
    for tensors, earlier, ratio in ((early, None, 1.18), (late, early, 1.2), (last, late, 2.1)):
        encoded = lossless.encode(tensors, earlier)
        assert_equal_bits(lossless.decode(encoded, earlier), tensors)
        assert sum(tensor.nbytes for tensor in tensors.values()) > ratio * len(encoded)


@pytest.fixture(scope="module")
def versions() -> tuple[dict[str, Tensor], dict[str, Tensor], bytes]:
    """Two versions, and the second one encoded."""
    before, after = trained(1), trained(1, 1e-4)
    return before, after, lossless.encode(after, before)


def test_every_truncation_is_damage(versions) -> None:
    before, _, encoded = versions
    for length in [*range(300), *range(300, len(encoded), 97), len(encoded) - 1]:
        with pytest.raises(FormatError, match="cannot be decoded"):
            lossless.decode(encoded[:length], before)


def test_changed_bytes_are_damage(versions) -> None:
    before, _, encoded = versions
    for at in [*range(300), *range(300, len(encoded), 101)]:
        damaged = bytearray(encoded)
        damaged[at] ^= 0x5A
        with pytest.raises(FormatError, match="cannot be decoded"):
            lossless.decode(bytes(damaged), before)


def test_more_bytes_are_damage(versions) -> None:
    before, _, encoded = versions
    with pytest.raises(FormatError, match="followed by more bytes"):
        lossless.decode(encoded + b"\0", before)


def test_another_earlier_version_is_an_error(versions) -> None:
    before, after, encoded = versions
    with pytest.raises(FormatError, match="does not have its checksum: .* belong to another earlier version"):
        lossless.decode(encoded, before | {"a": before["a"] + 1e-6})
    with pytest.raises(FormatError, match="tensor a is predicted, and the earlier version does not have it"):
        lossless.decode(encoded, None)
    with pytest.raises(FormatError, match=r"has float32 and the shape \(8, 384\), the earlier version's float32 and"):
        lossless.decode(encoded, before | {"a": before["a"].reshape(384, 8)})
    assert_equal_bits(lossless.decode(encoded, before), after)


def with_header(rows: object, planes: bytes = b"") -> bytes:
    part = byte_planes.compress(json.dumps(rows).encode())
    return varint.encode(len(part)) + part + planes


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "not a list of lists"),
        ([["a"]], "argument 2 is shorter"),
        ([["a", "float32", [2], 0, 0]], "predicted is 0; bool was expected"),
        ([["a", "complex64", [2], False, 0]], "has the dtype complex64, which is unknown"),
        ([["a", "float32", [2, -1], False, 0]], r"has the shape \(2, -1\)"),
        ([["a", "float32", [0, 1 << 80], False, 0]], "cannot be decoded"),
        ([["a", "float32", [0], False, 0]] * 2, "has a key twice"),
        ([["a", "float32", [1 << 40], False, 0]], "would take 4,398,046,511,104 bytes of memory"),
        ([["a", "uint8", [1], False, 0]] * 1 + [["b", "int64", [1 << 62, 1 << 62], False, 0]], "bytes of memory"),
    ],
)
def test_invalid_headers_are_errors(rows: object, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        lossless.decode(with_header(rows), None)


def test_a_decompression_bomb_is_refused() -> None:
    # 32 MB of zeros where the header announces four bytes, and a header of 128 MB of blanks
    frame = byte_planes.compress(bytes(1 << 25))
    planes = b"".join(varint.encode(len(frame)) + frame for _ in range(4))
    with pytest.raises(FormatError, match="a Zstandard frame ends too early or too late"):
        lossless.decode(with_header([["a", "float32", [4], False, 0]], planes), None)
    header = byte_planes.compress(b" " * (1 << 27))
    with pytest.raises(FormatError, match="a Zstandard frame ends too early or too late"):
        lossless.decode(varint.encode(len(header)) + header, None)


def test_memory_does_not_grow_along_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"a": torch.zeros(40_000)}
    second = {**first, "b": torch.zeros(40_000)}
    monkeypatch.setattr("eigenlorax.core.limits.MAX_EXPANSION", 10**9)
    encoded = lossless.encode(second, first)
    monkeypatch.setattr("eigenlorax.core.limits.MAX_EXPANSION", 64)
    with pytest.raises(FormatError, match="bytes of memory more"):
        lossless.decode(encoded, first)
    assert_equal_bits(lossless.decode(lossless.encode(second, first), first), second)


def test_a_frame_with_a_large_window_is_refused() -> None:
    parameters = {byte_planes.zstd.CompressionParameter.window_log: 27}
    compressor = byte_planes.zstd.ZstdCompressor(options=parameters)
    frame = compressor.compress(b"[]") + compressor.flush()
    with pytest.raises(FormatError, match="Zstandard frame is damaged"):
        lossless.decode(varint.encode(len(frame)) + frame, None)


def test_zeros_that_look_like_a_bomb_return(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eigenlorax.core.limits.MEMORY_ALLOWANCE", 1000)
    tensors = {"zeros": torch.zeros(300, 400), "same": random_bits(torch.float32, (300, 400), 0)}
    earlier = {"same": tensors["same"]}
    encoded = lossless.encode(tensors, earlier)
    assert 480_000 < len(encoded) < 481_000
    assert_equal_bits(lossless.decode(encoded, earlier), tensors)
