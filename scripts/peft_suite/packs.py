"""Small models of every architecture that PEFT's tests name, and a pack for each, fitted to random LoRAs.

All of them lie in the current folder, so that a test's name holds a model's name and no path.
"""

from pathlib import Path

import torch
import transformers as tf
from torch import nn
from transformers.pytorch_utils import Conv1D

import eigenlorax as ex
from eigenlorax.core.adapter import LoRAFactors

N_COMPONENTS = 4
HEADS = ("lm_head", "classifier", "score", "pooler")
"""Not adapted: heads are trained whole, and PEFT's tests want a gradient for whatever is adapted."""

_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, **_LAYERS}
_ENCODER = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64, **_LAYERS}
_SMALL = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
_BERT = {**_SMALL, **_ENCODER}
_GPT = {**_SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_LLAMA = {**_SMALL, **_DECODER, "tie_word_embeddings": False}
_BART = {
    "d_model": 32,
    **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 48))},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    "vocab_size": 100,
    "init_std": 0.2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 100}


def _opt(width: int) -> tf.PreTrainedModel:
    small = {key: value for key, value in _SMALL.items() if key != "initializer_range"}
    config = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 2 * width, "max_position_embeddings": 64}
    return tf.OPTForCausalLM(tf.OPTConfig(**small, **config, **_LAYERS, init_std=0.2))


# by the last component of the id that PEFT's tests have
MODELS = {
    "tiny-random-OPTForCausalLM": lambda: _opt(32),
    "OPT-of-64": lambda: _opt(64),
    "tiny-random-GPT2LMHeadModel": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT)),
    "tiny-random-GPTJForCausalLM": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**_GPT, rotary_dim=4)),
    "tiny-random-LlamaForCausalLM": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA)),
    "tiny-dummy-qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_LLAMA)),
    "tiny-random-Gemma3ForCausalLM": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**{**_LLAMA, "tie_word_embeddings": True}, head_dim=8)
    ),
    "tiny-random-T5ForConditionalGeneration-calibrated": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**_T5, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    ),
    "tiny-random-BartForConditionalGeneration": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_BART)),
    "tiny-random-BertModel": lambda: tf.BertModel(tf.BertConfig(**_BERT)),
    "tiny-random-RobertaModel": lambda: tf.RobertaModel(tf.RobertaConfig(**_BERT)),
    "tiny-random-DebertaModel": lambda: tf.DebertaModel(tf.DebertaConfig(**_BERT)),
    "tiny-random-DebertaV2Model": lambda: tf.DebertaV2Model(tf.DebertaV2Config(**_BERT)),
    "tiny-random-BertForSequenceClassification": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_BERT)),
    "tiny-random-RobertaForSequenceClassification": lambda: tf.RobertaForSequenceClassification(
        tf.RobertaConfig(**_BERT)
    ),
    "tiny-LlamaForSequenceClassification-3.2": lambda: tf.LlamaForSequenceClassification(
        tf.LlamaConfig(**_LLAMA, num_labels=1)
    ),
}


def local(model_id: str) -> str:
    """The folder with our stand-in for a model of the Hub, made on the first call."""
    name = model_id.rpartition("/")[2]
    if not Path(name).is_dir():
        torch.manual_seed(0)
        model = MODELS[name]()
        model.save_pretrained(name)
        # as if the pack's adapters were of another task: their names of modules lack the leading one
        pack_of(name, model.base_model if "SequenceClassification" in name else model)
    return name


def pack_of(name: str, model: nn.Module, n_components: int = N_COMPONENTS) -> str:
    """A pack for `model`, in a folder called after `name`: three random LoRAs, fitted."""
    folder = folder_of(name)
    shapes = {
        module: layer.weight.shape[::-1] if isinstance(layer, Conv1D) else layer.weight.shape
        for module, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and not set(module.split(".")) & set(HEADS)
    }
    adapters = [ex.from_factors(f"a{seed}", _factors(shapes, seed), base_model=name) for seed in range(3)]
    ex.fit(adapters, n_components=n_components).save(folder)
    return folder


def folder_of(name: str) -> str:
    """Where the pack of that name lies."""
    return str(Path("packs", name))


def _factors(shapes: dict[str, torch.Size], seed: int, rank: int = 4) -> dict[str, LoRAFactors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        module: LoRAFactors.from_weights(
            torch.randn(rank, *patch, generator=generator),
            torch.randn(n_out, rank, *[1] * (len(patch) - 1), generator=generator),
            1.0,
        )
        for module, (n_out, *patch) in shapes.items()
    }
