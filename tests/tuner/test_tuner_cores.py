"""Adapters of packs with cores in the tuner and the bank: against PEFT's LoRA of what the pack gives back."""

import copy

import pytest
import torch
from core_packs import fit_with_cores

import eigenlorax as ex
from eigenlorax.tuner import serve, to_lora
from loaders import several
from tiny import BERT, IN, make_bert, make_pack

CLOSE = {"atol": 3e-6, "rtol": 2e-5}
NAMES = ["a0", "a1", "a2"]


@pytest.fixture(scope="module", params=["full", "diagonal"])
def path(request, tmp_path_factory):
    _, adapters = make_pack(dict.fromkeys(BERT, (IN, IN)))
    pack = fit_with_cores(adapters, request.param, n_components=7)
    return pack.save(tmp_path_factory.mktemp("cores") / "pack")


@torch.no_grad()
def test_alone_mixed_served_merged_and_in_a_bank(path, ids, tmp_path):
    pack = ex.Pack.open(path)
    loras = pack.export(tmp_path)
    ours = several(lambda name: path / "adapters" / name, make_bert(), NAMES)
    theirs = several(lambda name: loras[name], make_bert(), NAMES)
    served, bank = copy.deepcopy(ours), ex.AdapterBank(make_bert(), path)
    serve(served)
    rows = [["a0", "__base__", "a2", "a1", "a0"][row % 5] for row in range(len(ids))]
    wanted = theirs(ids, adapter_names=rows).logits
    torch.testing.assert_close(ours(ids, adapter_names=rows).logits, wanted, **CLOSE)
    torch.testing.assert_close(bank(ids, adapter_names=rows).logits, wanted, **CLOSE)
    for names in (["a0"], ["a2", "a0"]):
        for model in (ours, theirs, served):
            model.base_model.set_adapter(names)
        wanted = theirs(ids).logits
        torch.testing.assert_close(ours(ids).logits, wanted, **CLOSE)
        torch.testing.assert_close(served(ids).logits, wanted, **CLOSE)
    ours.merge_adapter()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **CLOSE)
    for module, factors in to_lora(served, "a2").modules.items():
        torch.testing.assert_close(factors.down, pack.adapter("a2").modules[module].down)


@torch.no_grad()
def test_a_lora_is_added_to_a_bank_as_the_pack_would(path, ids):
    pack = ex.Pack.open(path)
    bank = ex.AdapterBank(make_bert(), path)
    lora = ex.from_factors("new", pack.adapter("a3").modules)
    assert bank.add("new", lora).delta_error < 1e-5
    torch.testing.assert_close(bank(ids, adapter_names="new").logits, bank(ids, adapter_names="a3").logits, **CLOSE)
