"""A model that serves with bases in 8 bits: the same as with the rounded bases as floats."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch._dynamo.testing import CompileCounter

import eigenlorax as ex
from convnets import conv_pack, images, make_convnet
from eigenlorax.core import int8_rows
from eigenlorax.tuner import serve, to_lora
from eigenlorax.tuner.layer import EigenLoraxLayer
from loaders import several
from rests import SIDES, with_rests
from tiny import BERT, IN, make_bert, make_pack

CLOSE = {"atol": 2e-6, "rtol": 2e-5}
NAMES = ["a0", "a1", "a3"]


@pytest.fixture(autouse=True)
def _compiled_anew():
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    pack, _ = make_pack(dict.fromkeys(BERT, (IN, IN)))
    return with_rests(pack, SIDES).save(tmp_path_factory.mktemp("bytes") / "pack")


def layers(model):
    return [module for module in model.modules() if isinstance(module, EigenLoraxLayer)]


def both(path, base=None, names=NAMES):
    """A model whose bases are the rounded ones, as floats, and one that has them in 8 bits."""
    served = several(lambda name: path / "adapters" / name, base or make_bert(), names)
    plain = copy.deepcopy(served)
    for layer in layers(plain):
        for bases in (layer.eigenlorax_basis_down, layer.eigenlorax_basis_up):
            for key in list(bases):
                bases[key] = int8_rows.quantise_rows(bases[key]).dequantise(bases[key].dtype)
    serve(plain)
    serve(served, torch.int8)
    return plain, served


def test_is_the_rounded_basis(path, ids):
    plain, served = both(path)
    with torch.no_grad():
        for names in (["a0"], ["a3"], ["a1", "a3"]):
            for model in (plain, served):
                model.base_model.set_adapter(names)
            torch.testing.assert_close(served(ids).logits, plain(ids).logits, **CLOSE)
        rows = ["a0", "a3", "__base__", "a1", "a3"]
        torch.testing.assert_close(
            served(ids, adapter_names=rows).logits, plain(ids, adapter_names=rows).logits, **CLOSE
        )
        for model in (plain, served):
            model.merge_adapter()
        torch.testing.assert_close(served(ids).logits, plain(ids).logits, **CLOSE)


def test_no_float_copy_stays(path):
    _, served = both(path)
    for layer in layers(served):
        down, up = layer.eigenlorax_basis_down, layer.eigenlorax_basis_up
        assert {basis.dtype for basis in [*down.values(), *up.values()]} == {torch.int8}
        k = layer.n_components["a3"][0]
        held = sum(buffer.nbytes for name, buffer in layer.named_buffers() if "_basis_" in name or "_scales_" in name)
        assert held == 2 * (k * IN + 4 * k)
    wide = [name for name, buffer in served.named_buffers() if buffer.dtype == torch.float32 and "_basis_" in name]
    assert not wide


def test_what_comes_later_is_in_8_bits_too_and_goes_with_its_scales(path, ids):
    plain, served = both(path)
    for model in (plain, served):
        for name in NAMES:
            model.delete_adapter(name)
    assert all(not list(layer.eigenlorax_scales_down) for layer in layers(served))
    for model in (plain, served):
        model.load_adapter(path / "adapters" / "a2", adapter_name="a2")
        model.set_adapter("a2")
    for layer in layers(served):
        assert {basis.dtype for basis in layer.eigenlorax_basis_down.values()} == {torch.int8}
    with torch.no_grad():
        got, floats = served(ids).logits, plain(ids).logits
    assert not torch.equal(got, floats)
    torch.testing.assert_close(got, floats, atol=1e-3, rtol=0)


def test_back_to_floats(path, ids):
    plain, served = both(path)
    serve(served, torch.float32)
    for layer in layers(served):
        assert not list(layer.eigenlorax_scales_down)
        assert {basis.dtype for basis in layer.eigenlorax_basis_up.values()} == {torch.float32}
    for model in (plain, served):
        model.set_adapter("a3")
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, plain(ids).logits, **CLOSE)


def test_exported_as_it_is_served(path):
    plain, served = both(path)
    for name in NAMES:
        found, wanted = to_lora(served, name), to_lora(plain, name)
        for module, factors in found.modules.items():
            torch.testing.assert_close(factors.down, wanted.modules[module].down)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_computes_in_the_dtype_of_the_model(path, ids, dtype):
    plain, served = both(path, make_bert().to(dtype))
    for layer in layers(served):
        assert {basis.dtype for basis in layer.bases_of("a3")} == {dtype}
    for model in (plain, served):
        model.base_model.set_adapter(["a0", "a3"])
    with torch.no_grad():
        got, wanted = served(ids).logits, plain(ids).logits
    assert got.dtype == dtype
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-6}[dtype]
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


def test_nothing_is_compiled_again(path, ids):
    plain, served = both(path)
    counter = CompileCounter()
    compiled = torch.compile(served.get_base_model(), backend=counter, fullgraph=True)
    with torch.no_grad():
        for names in (["a0"], ["a3"], ["a1", "a3"], ["a1"]):
            for model in (plain, served):
                model.base_model.set_adapter(names)
            torch.testing.assert_close(compiled(ids).logits, plain(ids).logits, **CLOSE)
    assert counter.frame_count == 1


def test_convolutions(tmp_path):
    pack, _ = conv_pack(n_components=7, energy=None)
    wanted, served = both(pack.save(tmp_path / "pack"), make_convnet(), ["a0", "a1"])
    with torch.no_grad():
        for name in ("a0", "a1"):
            for model in (wanted, served):
                model.set_adapter(name)
            torch.testing.assert_close(served(images(2)), wanted(images(2)), atol=1e-5, rtol=1e-5)


def test_embedded_bases_stay(path, ids):
    config = ex.EigenLoraxConfig(subspace=path, r=2, embed_subspace=True)
    model = get_peft_model(make_bert(), config).eval()
    serve(model, torch.int8)
    for layer in layers(model):
        assert layer.eigenlorax_embedded_down["default"].dtype == torch.float32
