"""The bank with bases in 8 bits: the same as with the rounded bases as floats, in a quarter of their bytes."""

from dataclasses import replace

import pytest
import torch

import eigenlorax as ex
from convnets import conv_pack, images, make_convnet
from eigenlorax.core import int8_rows
from eigenlorax.errors import OptionError
from rests import with_rests
from served import BASE

SIDES = {"plain-a": ["both"], "wide": ["down", "none"]}


@pytest.fixture(params=["bert", "llama"])
def one(request, served):
    return served(request.param)


def as_floats(bank):
    """A bank with the rounded bases as floats."""
    for hook in bank._update_hooks.values():
        down, up = (
            int8_rows.quantise_rows(rows).dequantise(torch.float32) for rows in (hook.bases.down, hook.bases.up)
        )
        hook.bases = replace(hook.bases, down=down, up=up)
    return bank


@torch.no_grad()
def got_of(bank, inputs, names):
    return bank(**inputs, adapter_names=names).logits


def bytes_of(bank):
    """What its bases take in 8 bits."""
    found = 0
    for sides in bank.pack.info.modules.values():
        found += sum(side.k * (side.dimension + 4) for side in sides.values())
    return found


@torch.no_grad()
def test_each_row_and_one_for_all(one):
    bank, wanted = one.bank(basis_dtype="int8"), as_floats(one.bank())
    names = ["wide", BASE, "narrow", "partial", "plain-a", "scaled"]
    for tokens in (2, 30):
        inputs = one.inputs(len(names), tokens)
        got = got_of(bank, inputs, names)
        torch.testing.assert_close(got, got_of(wanted, inputs, names), atol=1e-5, rtol=0)
        for name in names:
            for _ in range(2):
                alone = got_of(bank, inputs, name)
                torch.testing.assert_close(alone, got_of(wanted, inputs, name), atol=1e-5, rtol=0)
        # and near to what it is without rounding
        plain = one.wanted(names, inputs)
        torch.testing.assert_close(got, plain, atol=0.1 * plain.abs().max().item(), rtol=0)


@torch.no_grad()
def test_with_rests(served, tmp_path):
    one = served("bert")
    path = with_rests(ex.Pack.open(one.pack), SIDES).save(tmp_path / "pack")
    banks = [ex.AdapterBank(one.kind.model(), path, basis_dtype=dtype) for dtype in ("int8", None)]
    as_floats(banks[1])
    inputs, names = one.inputs(3), ["plain-a", "wide", "plain-b"]
    got, wanted = (got_of(bank, inputs, names) for bank in banks)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_convolutions():
    pack, _ = conv_pack(n_components=7, energy=None)
    banks = [ex.AdapterBank(make_convnet(), pack, basis_dtype=dtype) for dtype in (torch.int8, None)]
    as_floats(banks[1])
    for names in (["a0", BASE, "a2"], "a1"):
        got, wanted = (bank(images(3), adapter_names=names) for bank in banks)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_compiled(served):
    one = served("bert")
    bank, inputs = one.bank(basis_dtype="int8"), one.inputs(2)
    wanted = got_of(bank, inputs, ["wide", "plain-a"])
    compiled = torch.compile(bank.model, backend="aot_eager", fullgraph=True)
    with bank.using(["wide", "plain-a"]):
        torch.testing.assert_close(compiled(**inputs).logits, wanted, atol=1e-6, rtol=1e-5)


def test_bytes_are_those_that_are_held(one):
    pack = ex.Pack.open(one.pack)
    bank = one.bank(basis_dtype="int8", heads=False)
    coefficients = sum(record.coefficient_bytes for record in pack.records.values())
    assert bank.nbytes == bytes_of(bank) + coefficients
    floats = one.bank(heads=False).nbytes - coefficients
    assert (bank.nbytes - coefficients) < floats / 3
    # what somebody else holds in floats is there, and counted
    beside = ex.AdapterBank(one.kind.model(), pack, basis_dtype="int8", heads=False)
    assert beside.nbytes == bytes_of(bank) + floats + coefficients


def test_a_lora_is_projected_on_the_bases_as_they_were(one):
    """Coefficients are those that they would be; the pack is read for them, and let go again."""
    bank, wanted = one.bank(basis_dtype="int8"), one.bank()
    before = bank.nbytes
    records = [each.add("again", one.loras["wide"]) for each in (bank, wanted)]
    assert records[0] == records[1]
    assert torch.equal(bank._adapters["again"].flat, wanted._adapters["again"].flat)
    assert bank.nbytes - before == bank._adapters["again"].flat.nbytes + sum(
        tensor.nbytes for tensor in bank._adapters["again"].heads.tensors
    )


def test_adapters_of_before_the_subspace_grew(one, tmp_path):
    pack = ex.Pack.open(one.pack)
    pack.augment(2, 3)
    grown = pack.save(tmp_path / "grown")
    bank = ex.AdapterBank(one.kind.model(), grown, basis_dtype="int8")
    inputs = one.inputs(2)
    got, wanted = (got_of(each, inputs, ["wide", "plain-a"]) for each in (bank, as_floats(one.bank())))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_of_a_model_in_half_precision(served):
    one = served("llama")
    bank, inputs = one.bank(basis_dtype="int8"), one.inputs(3)
    names = ["plain-a", "wide", BASE]
    wanted = got_of(bank, inputs, names)
    bank.model.to(torch.bfloat16)
    got = got_of(bank, inputs, names)
    torch.testing.assert_close(got.float(), wanted, atol=0.05 * wanted.abs().max().item(), rtol=0)


def test_another_dtype_is_refused_before_anything_is_read(served):
    with pytest.raises(OptionError, match="basis_dtype must be 'int8' or None"):
        served("bert").bank(basis_dtype="float16")
