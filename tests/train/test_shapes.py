"""Layers of base models from their configs, of several architectures, beside the models themselves."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlavaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
)

from eigenlorax.errors import FormatError
from eigenlorax.serving.vllm.plan import COLUMN, EMBEDDING, HEAD, LINEAR, ROW, Layer
from eigenlorax.train.shapes import from_config, load_shapes
from tiny import make_bert, make_gpt2

SMALL = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_a_llama():
    shapes = from_config(LlamaConfig(**SMALL, dtype="float16"), "m")
    block = "model.layers.0."
    assert shapes.layers == {
        "model.embed_tokens": Layer(24, 53, EMBEDDING),
        f"{block}self_attn.q_proj": Layer(24, 24, LINEAR, COLUMN),
        f"{block}self_attn.k_proj": Layer(12, 24, LINEAR, COLUMN, parts=2),
        f"{block}self_attn.v_proj": Layer(12, 24, LINEAR, COLUMN, parts=2),
        f"{block}self_attn.o_proj": Layer(24, 24, LINEAR, ROW),
        f"{block}mlp.gate_proj": Layer(40, 24, LINEAR, COLUMN),
        f"{block}mlp.up_proj": Layer(40, 24, LINEAR, COLUMN),
        f"{block}mlp.down_proj": Layer(24, 40, LINEAR, ROW),
        "lm_head": Layer(53, 24, HEAD),
    }
    assert (shapes.dtype, shapes.heads, shapes.whole) == ("float16", 4, False)


@pytest.mark.parametrize(("dtype", "served"), [("float32", "bfloat16"), (None, "bfloat16"), ("float16", "float16")])
def test_the_dtype_that_vllm_chooses(dtype, served):
    assert from_config(LlamaConfig(**SMALL, dtype=dtype), "m").dtype == served


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_every_linear_layer_has_its_sizes(make):
    model = make()
    model.config.architectures = [type(model).__name__]
    shapes = from_config(model.config, "m")
    wanted = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            wanted[name] = tuple(module.weight.shape)
        elif type(module).__name__ == "Conv1D":
            wanted[name] = tuple(reversed(module.weight.shape))
    found = {name: (layer.out, layer.input) for name, layer in shapes.layers.items() if layer.kind != EMBEDDING}
    assert found == wanted
    # neither says how it is cut
    assert shapes.whole


def test_the_class_is_the_one_that_the_checkpoint_has():
    config = LlamaConfig(**SMALL, num_labels=3, architectures=["LlamaForSequenceClassification"])
    shapes = from_config(config, "m")
    layers = shapes.layers
    assert shapes.architecture == "LlamaForSequenceClassification"
    assert layers["score"] == Layer(3, 24)
    assert "lm_head" not in layers
    assert {n for n, m in LlamaForSequenceClassification(config).named_modules() if isinstance(m, nn.Linear)} < set(
        layers
    )


def test_a_class_that_transformers_lacks():
    shapes = from_config(LlamaConfig(**SMALL, architectures=["SomebodysLlama"]), "m")
    assert "lm_head" in shapes.layers
    assert shapes.architecture == "SomebodysLlama"
    assert from_config(LlamaConfig(**SMALL), "m").architecture == "LlamaForCausalLM"


def test_an_encoder_without_a_head():
    config = BertConfig(hidden_size=24, num_attention_heads=2, num_hidden_layers=1, architectures=["BertModel"])
    assert "encoder.layer.0.attention.self.query" in from_config(config, "m").layers


@pytest.mark.parametrize("config", [Qwen2Config(**SMALL), Phi3Config(**SMALL, pad_token_id=0), GPT2Config(n_layer=1)])
def test_nothing_is_left_of_it_in_memory_or_in_the_defaults(config):
    before = torch.get_default_dtype(), torch.get_default_device(), torch.random.get_rng_state()
    from_config(config, "m")
    assert torch.get_default_dtype() == before[0]
    assert torch.get_default_device() == before[1]
    assert torch.equal(torch.random.get_rng_state(), before[2])


def test_where_the_experts_of_a_mixture_are():
    shapes = from_config(MixtralConfig(**SMALL, num_local_experts=4), "m")
    (experts,) = shapes.experts
    assert experts.startswith("model.layers.0.")


def test_of_a_model_that_sees_only_the_part_that_reads():
    text = LlamaConfig(**SMALL)
    config = LlavaConfig(text_config=text, architectures=["LlavaForConditionalGeneration"])
    layers = from_config(config, "m").layers
    assert len([name for name in layers if name.endswith("q_proj")]) == SMALL["num_hidden_layers"]
    assert not [name for name in layers if "vision" in name]


def test_a_quantised_model(tmp_path):
    plain = LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"])
    quantised = LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"])
    quantised.quantization_config = {"quant_method": "awq", "bits": 4}
    quantised.save_pretrained(tmp_path)
    assert load_shapes(str(tmp_path)).layers == from_config(plain, "m").layers


def test_a_config_of_which_no_model_can_be_made():
    with pytest.raises(FormatError, match="transformers cannot make a model of the config of m"):
        from_config(LlamaConfig(**{**SMALL, "intermediate_size": -40}), "m")
