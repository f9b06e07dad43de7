"""Adapters of a coded pack whose heads are coded too: PEFT loads them from their folders, and a bank serves them."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import eigenlorax as ex
from eigenlorax.core import registry
from eigenlorax.errors import FormatError
from tiny import make_bert

HEAD = "base_model.model.classifier.weight"


def model_with_head(seed):
    """The tiny BERT with a LoRA, and a head near one that all seeds have."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=3,
        target_modules=["query", "value"],
        init_lora_weights=False,
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    model = get_peft_model(make_bert(n_labels=13), config)
    head = model.get_base_model().classifier.modules_to_save["default"]
    with torch.no_grad():
        start = torch.randn(13, 24, generator=torch.Generator().manual_seed(0))
        head.weight.copy_(start + 0.03 * torch.randn(13, 24))
        head.bias.copy_(torch.randn(13))
    return model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    pack = ex.fit({f"a{seed}": model_with_head(seed) for seed in range(5)}, max_error=0.1)
    assert len(pack.reference_tensors) == 1
    return pack.save(tmp_path_factory.mktemp("heads") / "pack")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@torch.no_grad()
def test_peft_loads_the_decoded_head(path, ids, tmp_path, low_cpu_mem_usage):
    registry.clear()
    pack = ex.Pack.open(path)
    model = PeftModel.from_pretrained(
        make_bert(n_labels=13), path / "adapters" / "a2", low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert torch.equal(model.get_base_model().classifier.modules_to_save["default"].weight, pack["a2"].heads[HEAD])
    exported = pack.export(tmp_path / "loras", "a2")["a2"]
    expected = PeftModel.from_pretrained(make_bert(n_labels=13), exported).eval()(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_bank_serves_each_row_with_its_decoded_head(path, ids, tmp_path):
    pack = ex.Pack.open(path)
    exported = pack.export(tmp_path / "loras", ["a1", "a3"])
    expected = [
        PeftModel.from_pretrained(make_bert(n_labels=13), exported[name]).eval()(ids[:1]).logits for name in exported
    ]
    bank = ex.AdapterBank(make_bert(n_labels=13).eval(), pack)
    found = bank(ids[:1].repeat(2, 1), adapter_names=["a1", "a3"]).logits
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_pack_loads_them_into_a_model(path, ids):
    pack = ex.Pack.open(path)
    model = model_with_head(9)
    pack.load_into(model, "a4")
    head = model.get_base_model().classifier.modules_to_save["a4"].weight
    assert torch.equal(head, pack["a4"].heads[HEAD])


def test_a_folder_that_was_moved_out_of_its_pack(path, tmp_path):
    pack = ex.Pack.open(path)
    moved = shutil.copytree(path / "adapters" / "a2", tmp_path / "a2")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "subspace": str(path)}))
    assert torch.equal(ex.read_adapter(moved).heads[HEAD], pack["a2"].heads[HEAD])
    registry.clear()
    with pytest.raises(FormatError, match="heads cannot be decoded: .*refers to reference 0"):
        ex.read_adapter(moved)
