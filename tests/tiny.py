"""Tiny random models, and packs of planted adapters for them."""

import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import eigenlorax as ex
from eigenlorax.core.adapter import from_factors
from planted import random_factors

IN, INNER, RANK = 24, 40, 3
BERT = [f"bert.encoder.layer.{i}.attention.self.{name}" for i in range(2) for name in ("query", "value")]
GPT2 = {
    f"transformer.h.{i}.{name}": shape
    for i in range(2)
    for name, shape in {"attn.c_attn": (3 * IN, IN), "mlp.c_proj": (IN, INNER)}.items()
}


def make_bert(n_labels=3):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = BertConfig(
            vocab_size=53,
            hidden_size=IN,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=INNER,
            num_labels=n_labels,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return BertForSequenceClassification(config).eval()


def make_gpt2():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = GPT2Config(
            vocab_size=53, n_embd=IN, n_layer=2, n_head=2, n_inner=INNER, n_positions=32, bos_token_id=1, eos_token_id=2
        )
        return GPT2LMHeadModel(config).eval()


def make_pack(shapes, n=4, n_components=9, dtype="float32"):
    adapters = [
        from_factors(
            f"a{index}",
            {
                module: random_factors(RANK, n_out, n_in, seed=100 * index + 7 * place, dtype=torch.float32, size=0.5)
                for place, (module, (n_out, n_in)) in enumerate(shapes.items())
            },
            base_model=None,
        )
        for index in range(n)
    ]
    return ex.fit(adapters, n_components=n_components, dtype=dtype), adapters


def shake(model, adapter_name="default", seed=5):
    """Give an adapter's coefficients numbers, so that nothing is right by being zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "eigenlorax_" in name and name.endswith(f".{adapter_name}"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3)
    return model
