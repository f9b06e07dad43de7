"""Names of the modules of text models, made from configs of transformers without weights: those that have modules below
`transformer`, `text_encoder` or `text_model`, as pipelines of images have, and some others."""

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 9}
COMMON = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 9,
    "max_position_embeddings": 8,
}
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]], "vocab_size": 9},
    ),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", {**GPT, "n_head": 4, "rotary_dim": 2}),
    "openai-gpt": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**COMMON, "num_kv_heads": 1}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 9}),
    "mpt": ("MptForCausalLM", "MptConfig", {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 9}),
    "ctrl": ("CTRLLMHeadModel", "CTRLConfig", {**GPT, "dff": 24}),
    "xlnet": (
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24, "vocab_size": 9},
    ),
    "xlm": ("XLMWithLMHeadModel", "XLMConfig", {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 9}),
    "distilbert": ("DistilBertModel", "DistilBertConfig", {"dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 9}),
    "bert": ("BertModel", "BertConfig", COMMON),
    "llama": ("LlamaForCausalLM", "LlamaConfig", COMMON),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 9},
    ),
    "vits": ("VitsModel", "VitsConfig", {}),
    "seamless": ("SeamlessM4TForTextToText", "SeamlessM4TConfig", {}),
}
# its code is on the Hub alone
CHATGLM = [
    f"transformer.encoder.layers.0.{name}"
    for name in ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
]
ENCODERS = ("vits", "seamless")
NAMES = [*MODELS, "chatglm"]


def modules(name: str) -> list[str]:
    """The linear modules of the layers of a text model by the names that PEFT saves them under; of those with a
    `text_encoder`, the modules of that alone."""
    if name == "chatglm":
        return CHATGLM
    model, config, fields = MODELS[name]
    with torch.device("meta"):
        found = getattr(transformers, model)(getattr(transformers, config)(**fields))
    linear = [name for name, module in found.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    part = "text_encoder." if name in ENCODERS else ""
    return [one for one in linear if one.startswith(part) and ".0." in one]
