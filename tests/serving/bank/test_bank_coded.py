"""Adapters of a coded pack in the bank: against PEFT's LoRA of what the pack gives back."""

import pytest
import torch
from peft import PeftModel

import eigenlorax as ex
from coded import SHARES, coded_pack
from convnets import conv_pack, images, make_convnet, with_updates
from tiny import BERT, IN, make_bert

pytestmark = pytest.mark.slow

NAMES = ["a0", "__base__", "a2", "a1", "a0"]


@pytest.fixture(scope="module", params=SHARES)
def path(request, tmp_path_factory):
    pack = coded_pack(dict.fromkeys(BERT, (IN, IN)), request.param)
    return pack.save(tmp_path_factory.mktemp("coded") / "pack")


@torch.no_grad()
@pytest.mark.parametrize("basis_dtype", [None, "int8"])
@pytest.mark.parametrize("tokens", [1, 30])
def test_each_row_and_one_for_all(path, tmp_path, basis_dtype, tokens):
    loras = ex.Pack.open(path).export(tmp_path)
    bank = ex.AdapterBank(make_bert(), path, basis_dtype=basis_dtype)
    ids = torch.randint(3, 53, (len(NAMES), tokens))
    close = {"atol": 2e-3 if basis_dtype else 5e-6, "rtol": 0}
    got = bank(ids, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        alone = make_bert()
        if name != "__base__":
            alone = PeftModel.from_pretrained(alone, loras[name]).eval()
        torch.testing.assert_close(got[row : row + 1], alone(ids[row : row + 1]).logits, **close)
        for _ in range(2):
            torch.testing.assert_close(bank(ids, adapter_names=name).logits, alone(ids).logits, **close)


@torch.no_grad()
def test_a_lora_is_added_as_the_pack_would(path):
    pack = ex.Pack.open(path)
    bank = ex.AdapterBank(make_bert(), path, basis_dtype="int8")
    lora = ex.from_factors("new", pack.adapter("a3").modules)
    record = bank.add("new", lora)
    assert record.delta_error <= 0.21
    bank.replace("a0", lora)
    ids = torch.randint(3, 53, (2, 9))
    assert torch.equal(bank(ids, adapter_names="new").logits, bank(ids, adapter_names="a0").logits)


def test_bytes_are_those_of_floats_and_of_what_the_pack_keeps_beside(path):
    pack = ex.Pack.open(path)
    bank = ex.AdapterBank(make_bert(), pack)
    bases = [pair.side(side) for pair in pack.subspace.modules.values() for side in ("down", "up")]
    wanted = sum(one.components.nbytes + sum(t.nbytes for t in (one.payload or {}).values()) for one in bases)
    wanted += sum(one.stored_bytes for name in pack.names for one in pack.packed(name).coefficients.values())
    assert bank.nbytes == wanted


@torch.inference_mode()
@pytest.mark.parametrize("max_error", [0.05, 0.6])
def test_convolutions(max_error):
    pack, _ = conv_pack(energy=None, max_error=max_error)
    bank = ex.AdapterBank(make_convnet(), pack)
    x = images(len(NAMES))
    got = bank(x, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        dense = make_convnet() if name == "__base__" else with_updates(pack.adapter(name))
        torch.testing.assert_close(got[row : row + 1], dense(x[row : row + 1]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(bank(x, adapter_names=name), dense(x), atol=1e-5, rtol=1e-5)
