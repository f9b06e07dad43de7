"""Pickled adapters whose tensors are not what they seem: each is refused by name, before its numbers are touched."""

import pickle
import zipfile

import pytest
import torch
from torch.nested._internal import nested_tensor

import eigenlorax as ex
from adapters import factors, make_adapter
from eigenlorax.errors import FormatError, ShapeError

FACTOR, HEAD = "base_model.model.encoder.layer.0.query.lora_A.weight", "base_model.model.classifier.weight"

ODD = {
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]), "is nested"),
    "of strides of zero": (lambda: torch.ones(1).expand(3, 10**11), "has 300,000,000,000 entries"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(3, 11), 0.1, 0, torch.qint8), "is nested, quantised"),
    "meta": (lambda: torch.ones(3, 11, device="meta"), "is on another device than the CPU"),
    "sparse": (lambda: torch.eye(3, 11).to_sparse(), "is .* or sparse; a dense tensor"),
    "compressed rows": (lambda: torch.eye(3, 11).to_sparse_csr(), "is .* or sparse; a dense tensor"),
    "conjugate": (lambda: torch.ones(3, 11, dtype=torch.complex64).conj(), "is a conjugated or negated view"),
    "negative": (lambda: torch.ones(3, 11, dtype=torch.complex64).conj().imag, "is a conjugated or negated view"),
    "of an odd dtype": (
        lambda: torch.ones(3, 11, dtype=torch.complex128),
        "is complex128, which safetensors files do not",
    ),
}
KEPT = {
    "complex": lambda: torch.ones(3, 11, dtype=torch.complex64),
    "float8": lambda: torch.ones(3, 11).to(torch.float8_e4m3fn),
    "bool": lambda: torch.ones(3, 11).bool(),
    "a number": lambda: torch.tensor(1.0),
}
VIEWS = {
    "parameter": lambda: torch.nn.Parameter(torch.ones(3, 11)),
    "transposed": lambda: torch.ones(11, 3).T,
    "overlapping": lambda: torch.ones(33).as_strided((3, 11), (1, 1)),
    "part of another": lambda: torch.ones(10**4)[-33:].view(3, 11),
}


def pickled(folder, key, tensor, **options):
    make_adapter(folder, seed=1, pickled=True)
    torch.save({**factors(seed=1), key: tensor}, folder / "adapter_model.bin", **options)
    return folder


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse", "ignore:.*quant")
@pytest.mark.parametrize("key", [FACTOR, HEAD])
@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_plain_array_is_named(tmp_path, key, odd):
    make, message = ODD[odd]
    folder = pickled(tmp_path / "a", key, make())
    expected = f"adapter_model.bin: tensor '{key}' {message}"
    try:
        torch.load(folder / "adapter_model.bin", weights_only=True)
    except pickle.UnpicklingError:
        # torch 2.15 itself refuses nested tensors
        expected = "adapter_model.bin cannot be read as plain tensors"
    with pytest.raises(FormatError, match=expected):
        ex.read_adapter(folder, allow_pickle=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.skipif(not hasattr(nested_tensor, "_rebuild_njt"), reason="this version of torch does not load them")
@pytest.mark.parametrize("registered", [True, False])
def test_jagged_tensors_are_refused_whether_or_not_torch_loads_them(tmp_path, registered):
    # Making one imports `torch._dynamo`, which registers classes that torch needs to load it. A process that only reads
    # has not imported that, and accelerate drops what was registered while it loaded a checkpoint.
    jagged = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
    folder = pickled(tmp_path / "a", FACTOR, jagged)
    from torch._dynamo.decorators import _DimRange

    registered_before = torch.serialization.get_safe_globals()
    try:
        if registered:
            torch.serialization.add_safe_globals([type(jagged), nested_tensor._rebuild_njt, _DimRange])
            assert type(torch.load(folder / "adapter_model.bin", weights_only=True)[FACTOR]) is type(jagged)
        else:
            torch.serialization.clear_safe_globals()
        with pytest.raises(FormatError, match=r"adapter_model.bin cannot be read as plain tensors .* contains other"):
            ex.read_adapter(folder, allow_pickle=True)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(registered_before)


@pytest.mark.parametrize("kept", KEPT)
def test_dtypes_that_no_factor_may_have_are_kept_as_heads(tmp_path, kept):
    tensor = KEPT[kept]()
    with pytest.raises(ShapeError if kept == "a number" else FormatError, match=FACTOR):
        ex.read_adapter(pickled(tmp_path / "factor", FACTOR, tensor), allow_pickle=True)
    ex.fit(pickled(tmp_path / "head", HEAD, tensor), n_components=2, allow_pickle=True).save(tmp_path / "pack")
    ex.Pack.open(tmp_path / "pack").export(tmp_path / "out")
    found = ex.read_adapter(tmp_path / "out" / "head").heads[HEAD]
    assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("view", VIEWS)
def test_views_of_numbers_that_are_there_are_read(tmp_path, view, zipped):
    tensor = VIEWS[view]()
    folder = pickled(tmp_path / "a", FACTOR, tensor, _use_new_zipfile_serialization=zipped)
    adapter = ex.read_adapter(folder, allow_pickle=True)
    assert torch.equal(adapter.modules["encoder.layer.0.query"].down, tensor.detach())


def test_an_archive_that_is_compressed_is_not_unpacked(tmp_path):
    folder = pickled(tmp_path / "a", HEAD, torch.zeros(100_000))
    path = folder / "adapter_model.bin"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(FormatError, match=r"adapter_model.bin is compressed, 4\d\d,\d+ bytes when unpacked"):
        ex.read_adapter(folder, allow_pickle=True)
