"""What an adapted layer adds to the memory of training, and checkpointed models."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

import eigenlorax as ex
from eigenlorax.core import half_products
from tiny import BERT, make_bert, make_pack, shake

IN, OUT, K, R = 23, 31, 9, 4


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(IN, OUT)

    def forward(self, x):
        return self.layer(x)


@pytest.fixture
def _by_blocks(monkeypatch):
    monkeypatch.setattr(half_products, "_MIN_BLOCK_NUMBERS", 1)


@pytest.mark.usefixtures("_by_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("core", "numbers"), [(False, K + R), (True, K)])
def test_a_layer_keeps_what_is_as_wide_as_its_coefficients(dtype, core, numbers):
    pack, _ = make_pack({"layer": (OUT, IN)}, n_components=K)
    config = ex.EigenLoraxConfig(subspace=pack, r=R, core=core)
    model = shake(get_peft_model(OneLayer().to(dtype), config))
    frozen = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack_tensor(tensor):
        if tensor.data_ptr() not in frozen:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(2, 7, IN, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda tensor: tensor):
        output = model(x)
    assert output.dtype == dtype
    assert sum(kept.values()) == 2 * 7 * numbers * 4


def gradients(pack, ids, options=None, *, early=True, dtype=torch.float32):
    base = make_bert().to(dtype)
    if options and early:
        base.gradient_checkpointing_enable(options)
    model = shake(get_peft_model(base, ex.EigenLoraxConfig(subspace=pack, r=R))).train()
    if options and not early:
        model.gradient_checkpointing_enable(options)
        model.enable_input_require_grads()
    model(ids, labels=torch.tensor([0, 1, 2, 1, 0])).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if "eigenlorax_" in name}


@pytest.mark.usefixtures("_by_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(bert_pack, ids, reentrant, early, dtype):
    plain = gradients(bert_pack, ids, dtype=dtype)
    checkpointed = gradients(bert_pack, ids, {"use_reentrant": reentrant}, early=early, dtype=dtype)
    assert len(plain) == 2 * len(BERT)
    for name, gradient in plain.items():
        assert gradient.abs().sum() > 0
        assert torch.equal(checkpointed[name], gradient)


@pytest.mark.slow
@pytest.mark.usefixtures("_by_blocks")
def test_a_compiler_converts_whole_tensors():
    pack, _ = make_pack({"layer": (OUT, IN)}, n_components=K)
    model = shake(get_peft_model(OneLayer().bfloat16(), ex.EigenLoraxConfig(subspace=pack, r=R))).base_model.model
    x = torch.randn(2, 7, IN, dtype=torch.bfloat16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
