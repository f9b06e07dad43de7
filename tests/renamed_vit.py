"""A tiny ViT, whose modules transformers 5 calls otherwise than transformers 4 did, and LoRAs under either names."""

import torch
from transformers import ViTConfig, ViTForImageClassification

import eigenlorax as ex
from eigenlorax.core import module_names
from eigenlorax.core.adapter import LoRAFactors
from planted import normal

LABELS = 5
# of transformers 4, whatever is installed
OLD = {
    "query": "vit.encoder.layer.{}.attention.attention.query",
    "value": "vit.encoder.layer.{}.attention.attention.value",
    "out": "vit.encoder.layer.{}.attention.output.dense",
    "up": "vit.encoder.layer.{}.intermediate.dense",
    "down": "vit.encoder.layer.{}.output.dense",
}
NEW = {
    "query": "vit.layers.{}.attention.q_proj",
    "value": "vit.layers.{}.attention.v_proj",
    "out": "vit.layers.{}.attention.o_proj",
    "up": "vit.layers.{}.mlp.fc1",
    "down": "vit.layers.{}.mlp.fc2",
}
SHAPES = {"query": (24, 24), "value": (24, 24), "out": (24, 24), "up": (40, 24), "down": (24, 40)}
NAMES = {"old": OLD, "new": NEW}


def make_vit():
    with torch.random.fork_rng():
        torch.manual_seed(6)
        config = ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=40,
            image_size=16,
            patch_size=8,
            num_labels=LABELS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.2,
        )
        return ViTForImageClassification(config).eval()


def pictures(n=3):
    return normal(n, 3, 16, 16, seed=4).float()


def lora(name, naming, seed, kinds=tuple(SHAPES), rank=3):
    """The same numbers under either naming."""
    factors = {
        NAMES[naming][kind].format(layer): LoRAFactors(
            0.3 * normal(rank, SHAPES[kind][1], seed=seed + 10 * layer + i).float(),
            0.3 * normal(SHAPES[kind][0], rank, seed=seed + 10 * layer + i + 5).float(),
            1.0,
        )
        for layer in range(2)
        for i, kind in enumerate(kinds)
    }
    return ex.from_factors(name, factors)


def dense(adapter):
    """The model with the updates in its weights."""
    model = make_vit()
    places = module_names.resolve_all(adapter.specs, [name for name, _ in model.named_modules()])
    for module, place in places.items():
        factors = adapter.modules[module]
        model.get_submodule(place).weight.data += factors.scaling * factors.up @ factors.down
    return model
