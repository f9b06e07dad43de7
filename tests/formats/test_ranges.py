"""Safetensors files read by offsets: what the safetensors library reads, and refuses, so do we; and no file is kept."""

import json
import math
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from test_official import make as make_official

import eigenlorax as ex
import remote_disk  # noqa: F401 (registers disk://)
from adapters import MODULES, change_tensors, factors, make_adapter
from eigenlorax.errors import FormatError
from eigenlorax.formats import urls
from eigenlorax.formats.ranges import local_file, open_tensors
from eigenlorax.formats.safetensors_file import to_bytes

WEIGHTS = "adapter_model.safetensors"
QUERY = "encoder.layer.0.query"
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}


def written(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file of this header (JSON, or its bytes word for word) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*flat)


def assert_same_tensors(path: Path) -> None:
    found, wanted = open_tensors(local_file(path)), load_file(path)
    assert found.entries.keys() == wanted.keys()
    read = found.load(list(wanted))
    assert all(same_bits(one, other) for one, other in zip(read, wanted.values(), strict=True))


class TestWhatIsRead:
    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
    def test_every_dtype_to_the_bit(self, tmp_path, dtype):
        drawn = torch.randint(0, 2, (3, 40), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        save_file({"odd": torch.ones(3, dtype=torch.uint8), "t": drawn.view(dtype)}, tmp_path / "a.safetensors")
        assert_same_tensors(tmp_path / "a.safetensors")

    def test_four_bits_as_pairs(self, tmp_path):
        dtype = getattr(torch, "float4_e2m1fn_x2", None)
        if dtype is None:
            pytest.skip("this torch has no four-bit floats")
        path = written(tmp_path / "a", {"t": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]}}, b"\1\2\3")
        (read,) = open_tensors(local_file(path)).load(["t"])
        with safe_open(path, "pt") as file:
            assert same_bits(read, file.get_tensor("t"))

    def test_shapes_at_the_edge(self, tmp_path):
        save_file(
            {"scalar": torch.tensor(3.5), "none": torch.empty(0, 5), "row": torch.arange(7.0)},
            tmp_path / "a.safetensors",
            metadata={"format": "pt"},
        )
        assert_same_tensors(tmp_path / "a.safetensors")

    def test_a_header_longer_than_the_first_read(self, tmp_path):
        save_file({f"{'long' * 40}.{i}": torch.full((i % 3,), float(i)) for i in range(700)}, tmp_path / "a")
        assert_same_tensors(tmp_path / "a")

    def test_no_tensor_at_all(self, tmp_path):
        assert open_tensors(local_file(written(tmp_path / "a", {}))).load([]) == []

    def test_offsets_that_no_dtype_is_aligned_to(self, tmp_path):
        header = {
            "b": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "f": {"dtype": "F64", "shape": [1], "data_offsets": [3, 11]},
        }
        path = written(tmp_path / "a", json.dumps(header).encode() + b" ", bytes(range(11)))
        (read,) = open_tensors(local_file(path)).load(["f"])
        assert read.view(torch.uint8).tolist() == list(range(3, 11))

    def test_in_the_order_of_the_call_and_as_often(self, tmp_path):
        save_file({"a": torch.arange(3.0), "b": torch.arange(5.0)}, tmp_path / "f")
        read = open_tensors(local_file(tmp_path / "f")).load(["b", "a", "b"])
        assert [len(tensor) for tensor in read] == [5, 3, 5]

    def test_each_has_memory_of_its_own(self, tmp_path):
        save_file({"a": torch.arange(3.0), "b": torch.arange(5.0)}, tmp_path / "f")
        found = open_tensors(local_file(tmp_path / "f"))
        first, second = found.load(["a", "b"])
        first.fill_(9)
        assert second.tolist() == [0, 1, 2, 3, 4]
        assert found.load(["a"])[0].tolist() == [0, 1, 2]
        assert first.untyped_storage().nbytes() == 12

    def test_an_adapter_keeps_heads_of_any_dtype(self, tmp_path):
        head = torch.arange(6).to(torch.uint16).view(2, 3)
        folder = make_adapter(tmp_path / "a", seed=1, tensors={"base_model.model.classifier.weight": head})
        assert same_bits(ex.read_adapter(folder).heads["base_model.model.classifier.weight"], head)


DAMAGED = {
    "empty": (lambda p: p.write_bytes(b""), "it has 0 bytes"),
    "no length": (lambda p: p.write_bytes(b"1234567"), "it has 7 bytes"),
    "a length beyond all bounds": (lambda p: written(p, {}, length=2**63), "its header would have"),
    "a length beyond the file": (lambda p: written(p, {"a": ONE}, b"1234", length=900), "it ends within its header"),
    "nothing for a header": (lambda p: written(p, b""), "EOF while parsing"),
    "a list": (lambda p: written(p, []), "invalid type: sequence"),
    "not UTF-8": (lambda p: written(p, b'{"\xff":1}'), "invalid UTF-8 in header"),
    "half a character": (lambda p: written(p, {"\ud800": ONE}, b"1234"), "invalid JSON in header"),
    "cut JSON": (lambda p: written(p, b'{"a":'), "EOF while parsing"),
    "JSON too deep": (lambda p: written(p, b'{"a":' + b"[" * 100_000), "recursion limit exceeded"),
    "NaN": (lambda p: written(p, b'{"a":NaN}'), "invalid JSON in header"),
    "a name twice": (
        lambda p: written(p, b'{"a":%b,"a":%b}' % ((json.dumps(ONE).encode(),) * 2), b"1234"),
        "its header has 'a' twice",
    ),
    "metadata of numbers": (lambda p: written(p, {"__metadata__": {"a": 1}}), "expected a string"),
    "a tensor that is a number": (lambda p: written(p, {"a": 3}), "invalid type: integer `3`"),
    "no offsets": (lambda p: written(p, {"a": {"dtype": "F32", "shape": [1]}}), "missing field `data_offsets`"),
    "offsets backwards": (
        lambda p: written(p, {"a": {**ONE, "data_offsets": [4, 0]}}, b"1234"),
        "invalid offset for tensor `a`",
    ),
    "negative offsets": (
        lambda p: written(p, {"a": {**ONE, "data_offsets": [-4, 0]}}, b"1234"),
        "invalid value: integer `-4`",
    ),
    "fractions": (lambda p: written(p, {"a": {**ONE, "data_offsets": [0.0, 4.0]}}, b"1234"), "floating point `0.0`"),
    "a hole before": (
        lambda p: written(p, {"a": {**ONE, "data_offsets": [4, 8]}}, b"12345678"),
        "invalid offset for tensor `a`",
    ),
    "a hole between": (
        lambda p: written(p, {"a": ONE, "b": {**ONE, "data_offsets": [8, 12]}}, b"123456789012"),
        "invalid offset for tensor `b`",
    ),
    "an overlap": (
        lambda p: written(p, {"a": ONE, "b": {**ONE, "data_offsets": [2, 6]}}, b"123456"),
        "invalid offset for tensor `b`",
    ),
    "bytes too many for the shape": (
        lambda p: written(p, {"a": {**ONE, "shape": [2]}}, b"1234"),
        "invalid shape, data type, or offset",
    ),
    "a shape that is true": (
        lambda p: written(p, {"a": {**ONE, "shape": [True]}}, b"1234"),
        "invalid type: boolean `true`",
    ),
    "no dtype": (lambda p: written(p, {"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"), "missing field `dtype`"),
    "a byte missing": (lambda p: written(p, {"a": ONE}, b"123"), "file not fully covered"),
    "a byte too many": (lambda p: written(p, {"a": ONE}, b"12345"), "file not fully covered"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_file_that_is_not_whole(tmp_path, case):
    damage, said = DAMAGED[case]
    damage(tmp_path / "a")
    with pytest.raises(FormatError, match=f"a is not a valid safetensors file: .*{said}"):
        open_tensors(local_file(tmp_path / "a"))


@pytest.mark.parametrize("remote", [False, True], ids=["on disk", "behind a URL"])
@pytest.mark.parametrize(
    "metadata", [{"format": "pt", "note": "\ud800"}, {"\udfff": "x"}, {"a": "\ud800\ud800"}, {"note": {"a": "\ud800"}}]
)
def test_half_a_character_in_metadata_is_refused_as_the_library_refuses_it(tmp_path, metadata, remote):
    """Read here, it would come into a pack, and no export of that would ever be written."""
    path = written(tmp_path / "one.safetensors", {"__metadata__": metadata, "a": ONE}, b"1234")
    with pytest.raises(SafetensorError):
        load_file(path)
    file = urls.folder(f"disk://{tmp_path}").file(path.name) if remote else local_file(path)
    with pytest.raises(FormatError, match="one.safetensors is not a valid safetensors file"):
        open_tensors(file)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ([0, 2**63], "the shape .* which is too large for a tensor"),
        ([0, 2**62, 2**62], "the shape .* which is too large for a tensor"),
        ([2**31, 2**31, 2, 0], "the shape .* which is too large for a tensor"),
        ([0] + [1] * 64, "the shape .* which is too large for a tensor"),
    ],
)
def test_a_shape_that_torch_has_no_strides_for(tmp_path, shape, said):
    path = written(tmp_path / "a", {"t": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})
    with pytest.raises(FormatError, match=f"a: tensor 't' has {said}"):
        open_tensors(local_file(path))


def test_a_tensor_larger_than_memory(tmp_path):
    size = 1 << 43
    path = written(tmp_path / "a", {"t": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    os.truncate(path, path.stat().st_size + size)
    with pytest.raises(
        FormatError, match="a: a tensor of 8,796,093,022,208 bytes does not fit in this machine's memory"
    ):
        open_tensors(local_file(path)).load(["t"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_what_is_no_plain_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a")
    with pytest.raises(FormatError, match="a is not a regular file"):
        local_file(tmp_path / "a")


HALVES = st.text(st.characters(codec=None, categories=None), max_size=4)
"""Texts of which some have half a character, which is no text in UTF-8."""


@given(
    st.dictionaries(
        HALVES, st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3)), max_size=4
    ),
    st.none() | st.dictionaries(HALVES, HALVES, max_size=3),
    st.booleans(),
)
def test_what_is_read_can_be_written_and_read_again(tmp_path_factory, described, metadata, remote):
    folder = tmp_path_factory.getbasetemp()
    header, at = {} if metadata is None else {"__metadata__": metadata}, 0
    for name, (dtype, shape) in described.items():
        size = math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    path = written(folder / "drawn.safetensors", header, bytes(n % 2 for n in range(at)))
    file = urls.folder(f"disk://{folder}").file(path.name) if remote else local_file(path)
    try:
        found = open_tensors(file)
    except FormatError:
        with pytest.raises(SafetensorError):
            load_file(path)
        return
    wanted = load_file(path)
    read = dict(zip(found.entries, found.load(list(found.entries)), strict=True))
    assert read.keys() == wanted.keys()
    (folder / "again.safetensors").write_bytes(to_bytes(read, found.metadata))
    again = open_tensors(local_file(folder / "again.safetensors"))
    assert dict(again.metadata) == dict(found.metadata) == (metadata or {})
    assert all(same_bits(again.load([name])[0], value) for name, value in wanted.items())


@pytest.mark.parametrize("stated", ["F6_E2M3", "F6_E3M2"])
def test_a_dtype_that_cannot_be_read_is_named(tmp_path, stated):
    path = written(tmp_path / "a", {"head": {"dtype": stated, "shape": [4], "data_offsets": [0, 3]}}, b"123")
    with pytest.raises(
        FormatError, match=f"a: tensor 'head' is {stated}, a dtype that this release of torch cannot read"
    ):
        open_tensors(local_file(path))


@given(st.data())
def test_what_the_library_refuses_is_refused_and_the_rest_is_read_alike(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b.c": torch.arange(5, dtype=torch.int16)}, path)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        # mostly in the header: what is changed in the data cannot be seen
        whole[data.draw(st.integers(0, min(len(whole) - 1, 140)))] = data.draw(
            st.sampled_from(b' {}[]",:0123456789abFIU\x00\xff')
        )
    path.write_bytes(whole[: len(whole) - data.draw(st.sampled_from([0, 0, 0, 1, 40]))])
    try:
        wanted = load_file(path)
    except SafetensorError:
        with pytest.raises(FormatError):
            open_tensors(local_file(path))
    else:
        try:
            found = open_tensors(local_file(path))
        except FormatError as error:
            # what the format's description forbids, and the library lets pass
            assert "twice" in str(error)  # noqa: PT017
        else:
            assert all(same_bits(found.load([name])[0], value) for name, value in wanted.items())


class TestWhileItIsInUse:
    @pytest.fixture
    def folder(self, tmp_path):
        return make_adapter(tmp_path / "one", seed=1, head=(2, 31))

    def test_a_file_that_shrank(self, folder):
        adapter = ex.read_adapter(folder)
        os.truncate(folder / WEIGHTS, 900)
        with pytest.raises(FormatError, match=f"one/{WEIGHTS} was changed while it was in use"):
            adapter.modules[QUERY]

    def test_a_file_of_the_same_size_that_was_replaced(self, folder):
        adapter = ex.read_adapter(folder)
        before = (folder / WEIGHTS).stat()
        change_tensors(folder, lambda tensors: [tensor.neg_() for tensor in tensors.values()])
        os.utime(folder / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        assert (folder / WEIGHTS).stat().st_size == before.st_size
        with pytest.raises(FormatError, match="not the file whose header was read"):
            adapter.heads["base_model.model.classifier.weight"]

    def test_from_another_current_folder(self, folder, tmp_path, monkeypatch):
        monkeypatch.chdir(folder.parent)
        adapter = ex.read_adapter("one")
        monkeypatch.chdir("/")
        assert torch.equal(adapter.modules[QUERY].down, factors(seed=1)[f"base_model.model.{QUERY}.lora_A.weight"])

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
    def test_no_file_stays_open_or_mapped(self, folder):
        adapter = ex.read_adapter(folder)
        held = [adapter.modules[module] for module in MODULES]
        assert WEIGHTS not in Path("/proc/self/maps").read_text()
        opened = [os.readlink(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd") if _is_open(one)]
        assert not any(WEIGHTS in path for path in opened)
        assert len(held) == len(MODULES)

    def test_many_threads_at_once(self, folder):
        adapter = ex.read_adapter(folder)
        wanted = load_file(folder / WEIGHTS)

        def is_right(module: str) -> bool:
            found = adapter.modules[module]
            key = f"base_model.model.{module}.lora"
            return torch.equal(found.down, wanted[f"{key}_A.weight"]) and torch.equal(
                found.up, wanted[f"{key}_B.weight"]
            )

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(is_right, [*MODULES] * 100))


def _is_open(descriptor: str) -> bool:
    # that of the listing itself is closed by now
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


def _tensors(adapter: ex.Adapter) -> dict[str, list]:
    """All tensors as numbers, by name: what a worker process sends back."""
    heads = {key: value.double().tolist() for key, value in adapter.heads.items()}
    modules = {
        f"{module}.{side}": getattr(factors, side).double().tolist()
        for module, factors in adapter.modules.items()
        for side in ("down", "up")
    }
    return {**heads, **modules, "scalings": [factors.scaling for factors in adapter.modules.values()]}


@pytest.mark.parametrize("kind", ["safetensors", "pickle", "official"])
def test_an_adapter_reads_its_tensors_in_a_process_it_was_sent_to(tmp_path, kind):
    if kind == "official":
        folder = make_official(tmp_path / "one", lora_alpha=2)
    else:
        folder = make_adapter(tmp_path / "one", seed=1, head=(2, 31), pickled=kind == "pickle")
    adapter = ex.read_adapter(folder, allow_pickle=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_tensors, (adapter,)) == _tensors(adapter)
