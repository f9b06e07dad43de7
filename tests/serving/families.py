"""Tiny models of the families that vLLM serves, and adapters for each: every linear module of a layer has a LoRA."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)
from transformers.configuration_utils import PretrainedConfig

from eigenlorax.core.adapter import from_factors
from eigenlorax.formats import peft
from planted import random_factors

VOCABULARY = 211
_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 88,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
# hidden_size / num_attention_heads is the size of a head
_WIDE = {
    **{field: value for field, value in _SHARED.items() if field != "head_dim"},
    "hidden_size": 128,
    "intermediate_size": 192,
}
# of models that have as many heads of keys and values as of queries: vLLM would read the number from the config
_EQUAL_HEADS = {field: value for field, value in _WIDE.items() if field != "num_key_value_heads"}
_GEMMA = {**_SHARED, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}
# factors by which Granite multiplies what others do not
_GRANITE = {
    **_WIDE,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.1,
    "logits_scaling": 2.0,
}
_UNGATED = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """One kind of model. suffixes: of the modules that get a LoRA; engine: what vLLM has to be told to serve it."""

    config: Callable[..., PretrainedConfig]
    suffixes: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    fields: Mapping[str, Any] = field(default_factory=lambda: _SHARED)
    engine: Mapping[str, Any] = field(default_factory=dict)

    def made(self, folder: Path) -> Path:
        """The model and a tokenizer, in `folder`."""
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = AutoModelForCausalLM.from_config(self.config(**self.fields))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # biases start at zero, where nothing could be wrong with them
                if name.endswith("bias"):
                    parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
            if model.config.tie_word_embeddings:
                # or every token is followed by itself
                model.get_input_embeddings().weight.mul_(0.1)
        model.save_pretrained(folder)
        words = {f"w{i}": i for i in range(VOCABULARY)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="w3", bos_token="w1", eos_token="w2", pad_token="w0"
        ).save_pretrained(folder)
        return folder

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """(out, in) of every module that gets a LoRA."""
        return {
            name: tuple(module.weight.shape) for name, module in model.named_modules() if name.endswith(self.suffixes)
        }


FAMILIES = {
    "llama": Family(LlamaConfig),
    "mistral": Family(MistralConfig, fields={**_SHARED, "sliding_window": None}),
    # one without heads of another size, and with biases
    "qwen2": Family(Qwen2Config, fields=_WIDE),
    "qwen3": Family(Qwen3Config),
    "gemma": Family(GemmaConfig),
    "gemma2": Family(Gemma2Config, fields=_GEMMA),
    "gemma3": Family(Gemma3TextConfig, fields=_GEMMA),
    # fused for LoRAs too
    "phi3": Family(Phi3Config, suffixes=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), fields=_WIDE),
    "granite": Family(GraniteConfig, fields=_GRANITE),
    "olmo2": Family(Olmo2Config, fields=_WIDE),
    "starcoder2": Family(
        Starcoder2Config, suffixes=("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"), fields=_WIDE
    ),
    # its second layer has no positions
    "smollm3": Family(SmolLM3Config, fields={**_WIDE, "no_rope_layer_interval": 2}),
    "cohere": Family(CohereConfig, fields={**_WIDE, "tie_word_embeddings": True}),
    "arcee": Family(ArceeConfig, suffixes=_UNGATED),
    "opt": Family(
        OPTConfig,
        suffixes=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        fields={**_EQUAL_HEADS, "ffn_dim": 192, "word_embed_proj_dim": 128, "init_std": 0.2},
    ),
    "phi": Family(PhiConfig, suffixes=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"), fields=_WIDE),
    "nemotron": Family(NemotronConfig, suffixes=_UNGATED),
    "gpt_neox": Family(
        GPTNeoXConfig, suffixes=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), fields=_EQUAL_HEADS
    ),
    # fused for LoRAs in the second half of a layer only
    "glm4": Family(
        Glm4Config,
        suffixes=("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
        fields={**_SHARED, "attention_bias": True},
    ),
    # vLLM's own class has no LoRA
    "stablelm": Family(StableLmConfig, fields=_WIDE, engine={"model_impl": "transformers"}),
}


def made_adapters(family: Family, base: Path, folder: Path, n: int = 8, rank: int = 4) -> Path:
    """LoRAs of a model, `folder`/a0 and so on, that change what it says. No two have one scaling."""
    shapes = family.shapes(AutoModelForCausalLM.from_pretrained(base))
    for i in range(n):
        modules = {
            name: random_factors(rank, *shape, seed=100 * i + j, scaling=0.02 * (1 + i % 3), dtype=torch.float32)
            for j, (name, shape) in enumerate(shapes.items())
        }
        peft.write(from_factors(f"a{i}", modules, base_model=str(base)), folder / f"a{i}")
    return folder
