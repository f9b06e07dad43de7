"""Base models' configs and adapters for GGUF, with numbers by a formula, so that reference files can be made again."""

import json
from math import prod

import torch

import eigenlorax as ex
from eigenlorax.core.adapter import from_factors

LAYERS, HEADS, KV_HEADS, HEAD, HIDDEN, INNER, VOCABULARY = 2, 6, 2, 8, 48, 64, 37
ATTENTION = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
}
GATED = {
    **ATTENTION,
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
"""Rows and columns of a layer's modules, as most architectures have them."""
MODULES = {
    "PhiForCausalLM": {
        **{name: shape for name, shape in ATTENTION.items() if name != "self_attn.o_proj"},
        "self_attn.dense": (HIDDEN, HEADS * HEAD),
        "mlp.fc1": (INNER, HIDDEN),
        "mlp.fc2": (HIDDEN, INNER),
    },
    "Phi3ForCausalLM": {
        "self_attn.qkv_proj": ((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
        "mlp.gate_up_proj": (2 * INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    },
    "Starcoder2ForCausalLM": {**ATTENTION, "mlp.c_fc": (INNER, HIDDEN), "mlp.c_proj": (HIDDEN, INNER)},
    "GPT2LMHeadModel": {
        "attn.c_attn": (3 * HIDDEN, HIDDEN),
        "attn.c_proj": (HIDDEN, HIDDEN),
        "mlp.c_fc": (INNER, HIDDEN),
        "mlp.c_proj": (HIDDEN, INNER),
    },
}
"""The same for the architectures that have other modules."""


def config(architecture="LlamaForCausalLM", **fields):
    """Fields of a base model's config."""
    return {
        "architectures": [architecture],
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        **fields,
    }


def write_config(folder, architecture="LlamaForCausalLM", **fields):
    """Write a base model's config, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(architecture, **fields)))
    return folder


def numbers(*shape, start=0):
    """Numbers between -2 and 2 with few digits, which differ between places."""
    count = torch.arange(start, start + prod(shape), dtype=torch.int64)
    return (((count * 7919) % 257 - 128).double() / 64).reshape(shape).float()


def adapter(architecture="LlamaForCausalLM", *, name="french", rank=4, layers="model.layers", scaling=2.0):
    """An adapter of all linear modules of the layers. scaling: of all modules, or a function of the module's number."""
    modules = {}
    shapes = MODULES.get(architecture, GATED)
    for layer in range(LAYERS):
        for module, (n_out, n_in) in shapes.items():
            n = len(modules)
            factors = numbers(rank, n_in, start=1000 * n), numbers(n_out, rank, start=1000 * n + 500)
            modules[f"{layers}.{layer}.{module}"] = ex.LoRAFactors(
                *factors, scaling(n) if callable(scaling) else scaling
            )
    return from_factors(name, modules, base_model="org/tiny-1B")
