"""The benchmark of training's memory counts what autograd saves, and names the part of the model that saves it."""

import pytest
import torch

import eigenlorax as ex
from tiny import make_pack

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install '.[peft]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[peft]'")
training_step = pytest.importorskip("training_step")

TOKENS, WIDTH, R, K = 13, 32, 2, 5
MODULES = {f"model.layers.{i}.self_attn.{name}": (WIDTH, WIDTH) for i in range(2) for name in ("q_proj", "v_proj")}


@pytest.fixture
def base():
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("method", ["LoRA", "coefficients"])
def test_saved_tensors_are_what_is_allocated_after_the_forward_pass(base, method):
    if method == "LoRA":
        config = peft.LoraConfig(r=R, target_modules=list(MODULES))
        # the input that q and v share, and two times r numbers
        numbers = WIDTH + 2 * R
    else:
        config = ex.EigenLoraxConfig(subspace=make_pack(MODULES, n_components=K)[0], r=R)
        numbers = 2 * (K + R)
    ids = torch.randint(3, 50, (1, TOKENS))
    batch = {"input_ids": ids, "labels": ids}
    measured = training_step.measure(peft.get_peft_model(base, config).train(), batch, resident=False, saved=True)
    saved = measured["saved"]
    assert saved["adapter"] == 2 * TOKENS * numbers * 4
    assert min(saved[part] for part in ("attention", "MLP", "norms", "head and loss")) > 0
    # beside what autograd saves, a loss and a few scalars are alive
    assert sum(saved.values()) == pytest.approx(measured["allocated_after_forward"], abs=1500)
    assert measured["allocated_peak"] > measured["allocated_after_forward"]
