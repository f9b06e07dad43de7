import pytest
import torch
from peft import PeftModel

import eigenlorax as ex
from eigenlorax.errors import ModuleNameError, OptionError
from eigenlorax.tuner import lora_from_components
from tiny import BERT, make_bert


def weights(model, name):
    layer = model.get_submodule(f"base_model.model.{name}")
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@pytest.mark.parametrize("r", [4, 9, 12])
def test_an_ordinary_lora_starts_from_the_components(bert_pack, ids, tmp_path, r):
    wanted = make_bert()(ids).logits
    model = lora_from_components(make_bert(), bert_pack, r=r, task_type="SEQ_CLS").eval()
    assert torch.equal(model(ids).logits, wanted)
    subspace = ex.Pack.open(bert_pack).subspace
    for name in BERT:
        down, up = weights(model, name)
        kept = min(r, 9)
        assert torch.equal(down[:kept], subspace.modules[name].down.components[:kept])
        assert down.shape[0] == r
        assert down.requires_grad
        assert up.requires_grad
        assert not up.any()
    model.save_pretrained(tmp_path / "lora")
    assert PeftModel.from_pretrained(make_bert(), tmp_path / "lora").peft_config["default"].peft_type == "LORA"


def test_both_sides_as_in_the_paper(bert_pack):
    model = lora_from_components(make_bert(), bert_pack, r=5, lora_alpha=10, start="components")
    subspace = ex.Pack.open(bert_pack).subspace
    for name in BERT:
        down, up = weights(model, name)
        assert torch.equal(up, subspace.modules[name].up.components[:5].mT)
        assert torch.linalg.norm(2 * up @ down).item() == pytest.approx(2 * 5**0.5, rel=1e-5)


def test_wrong_use(bert, bert_pack, gpt2_pack):
    with pytest.raises(OptionError, match="start must be one of zero, components, got 'mean'"):
        lora_from_components(bert, bert_pack, start="mean")
    with pytest.raises(ModuleNameError, match="none of the modules"):
        lora_from_components(bert, gpt2_pack)
