"""Convolutions in the bank: each row against PEFT's LoRA alone, or against dense weights where PEFT's is another."""

import pytest
import torch
from peft import PeftModel
from torch import nn

import eigenlorax as ex
from convnets import CONVOLUTIONS, OWN_WAYS, conv_pack, images, make_convnet, random_loras, with_updates
from eigenlorax.core.adapter import Adapter, LoRAFactors
from eigenlorax.errors import ModuleNameError, ShapeError

PLAIN = [name for name in (*CONVOLUTIONS, "head") if name not in OWN_WAYS]
NAMES = ["a0", "__base__", "wide", "a1", "a1", "part", "a2"]


def ragged(modules):
    """Adapters of several ranks and sets of modules."""
    base = make_convnet()
    (wide,) = random_loras(base, modules, n=1, rank=5, seed=900)
    (part,) = random_loras(base, modules[1::2], n=1, rank=2, seed=950)
    return [Adapter("wide", wide.specs, wide.modules), Adapter("part", part.specs, part.modules)]


@pytest.fixture(scope="module")
def packs():
    made = {}
    for kind, modules in (("plain", PLAIN), ("all", (*CONVOLUTIONS, "head"))):
        adapters = random_loras(make_convnet(), modules)
        made[kind] = ex.fit([*adapters, *ragged(modules)], n_components=7)
    return made


def dense(pack, name):
    return make_convnet() if name == "__base__" else with_updates(pack.adapter(name))


@torch.inference_mode()
def test_each_row_is_that_of_peft(packs, tmp_path):
    folders = packs["plain"].export(tmp_path)
    bank = ex.AdapterBank(make_convnet(), packs["plain"])
    x = images(len(NAMES))
    got = bank(x, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        model = make_convnet()
        if name != "__base__":
            model = PeftModel.from_pretrained(model, folders[name]).eval()
        torch.testing.assert_close(got[row : row + 1], model(x[row : row + 1]), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("repeats", [1, 3])
def test_each_row_has_its_dense_weights(packs, repeats):
    bank = ex.AdapterBank(make_convnet(), packs["all"])
    names = NAMES * repeats
    got = bank(images(len(names)), adapter_names=names)
    for row, name in enumerate(names):
        wanted = dense(packs["all"], name)(images(len(names))[row : row + 1])
        torch.testing.assert_close(got[row : row + 1], wanted, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("n", [1, 3])
def test_one_adapter_for_all_rows_before_and_after_folding(packs, n):
    bank = ex.AdapterBank(make_convnet(), packs["all"])
    for name in ("a1", "wide", "part", "__base__"):
        wanted = dense(packs["all"], name)(images(n))
        with bank.using(name):
            for _ in range(3):
                torch.testing.assert_close(bank.model(images(n)), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(bank.unload()(images(n)), make_convnet()(images(n)))


@torch.inference_mode()
def test_small_images_are_not_folded(packs):
    """Few places: the shared order, on both sides."""
    conv = nn.Sequential()
    conv.line = make_convnet().line
    bank = ex.AdapterBank(conv, packs["all"], adapters=[])
    factors = packs["all"].adapter("a1").modules["line"]
    bank.add("one", ex.from_factors("one", {"line": factors}), warn_above=1.0)
    bank.add("two", ex.from_factors("two", {"line": packs["all"].adapter("a2").modules["line"]}), warn_above=1.0)
    x = torch.randn(2, 6, 3)
    got = bank(x, adapter_names=["one", "two"])
    update = nn.functional.conv1d(x[:1], (factors.scaling * factors.up @ factors.down).view(10, 6, 3), stride=2)
    torch.testing.assert_close(got[:1], make_convnet().line(x[:1]) + update)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_of_the_model(packs, dtype):
    bank = ex.AdapterBank(make_convnet(dtype), packs["all"])
    got = bank(images(2).to(dtype), adapter_names=["a0", "wide"])
    assert got.dtype == dtype
    for row, name in enumerate(("a0", "wide")):
        wanted = dense(packs["all"], name)(images(2)[row : row + 1])
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(got[row : row + 1].float(), wanted, atol=tolerance, rtol=tolerance)


@torch.inference_mode()
def test_channels_last(packs):
    model = make_convnet()
    model.circular.to(memory_format=torch.channels_last)
    bank = ex.AdapterBank(model, packs["all"])
    got = bank(images(2), adapter_names=["a0", "wide"])
    torch.testing.assert_close(got[:1], dense(packs["all"], "a0")(images(2)[:1]), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_compiled_as_one_graph(packs):
    bank = ex.AdapterBank(make_convnet(), packs["all"])
    compiled = torch.compile(bank.model, backend="aot_eager", fullgraph=True)
    for names in (NAMES, NAMES[::-1]):
        with bank.using(names):
            got = compiled(images(len(names)))
        torch.testing.assert_close(got, bank(images(len(names)), adapter_names=names), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_served_is_named(packs):
    pack, _ = conv_pack(n_components=5, energy=None)
    grouped = make_convnet()
    grouped.same = nn.Conv2d(6, 8, (2, 3), groups=2)
    with pytest.raises(ModuleNameError, match="modules that the model lacks, such as 'same'"):
        ex.AdapterBank(grouped, pack)
    turned = make_convnet()
    turned.strided = nn.Conv2d(5, 7, (5, 3), stride=(2, 1), padding=(2, 1))
    with pytest.raises(
        ShapeError, match=r"adapter 'a0', module strided: its kernel is \(3, 5\), and the model's kernel"
    ):
        ex.AdapterBank(turned, pack)
    bank = ex.AdapterBank(make_convnet(), pack)
    with pytest.raises(ShapeError, match=r"module line got an input of shape \(6, 9\).* x\[None\]"), bank.using("a0"):
        bank.model.line(torch.randn(6, 9))
    linear = LoRAFactors(torch.randn(2, 75), torch.randn(7, 2), 1.0)
    with pytest.raises(ShapeError, match=r"module strided: its kernel is \(\)"):
        bank.add("linear", ex.from_factors("linear", {"strided": linear}), warn_above=1.0)
