"""Base models in GGUF: the modules that llama.cpp has for each architecture, their names, and the order of their rows.

llama.cpp renames modules (`model.layers.0.self_attn.q_proj` is `blk.0.attn_q`) by tables in the package `gguf`. For
some architectures it also reorders the rows of query and key, because its rotary embedding pairs neighbouring rows.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...core import limits
from ...core.options import suggestion
from ...errors import FormatError, MissingExtraError, OptionError

CONFIG = "config.json"
"""Config of a base model, in the folder that transformers' `save_pretrained` writes."""

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_GATED = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_ROTARY = ("self_attn.q_proj", "self_attn.k_proj")


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture that llama.cpp applies LoRAs to.

    Attributes:
        gguf: Name of the architecture in GGUF files.
        layers: Module that holds the layers.
        modules: Linear modules of a layer.
        embedding: Module of the token embedding.
        is_permuted: Whether llama.cpp reorders the rows of query and key.
        is_tied: Whether the output layer shares the embedding's weights if the base model's config does not say.
    """

    gguf: str
    layers: str = "model.layers"
    modules: tuple[str, ...] = _GATED
    embedding: str = "model.embed_tokens"
    is_permuted: bool = False
    is_tied: bool = False


# by the name in `architectures` of a base model's config; the first one of a GGUF name gives the names of modules that
# are read without a config
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", is_permuted=True),
    "MistralForCausalLM": Architecture("llama", is_permuted=True),
    "GraniteForCausalLM": Architecture("granite", is_permuted=True),
    "SmolLM3ForCausalLM": Architecture("smollm3", is_permuted=True, is_tied=True),
    "OlmoForCausalLM": Architecture("olmo", is_permuted=True),
    "Olmo2ForCausalLM": Architecture("olmo2"),
    "Olmo3ForCausalLM": Architecture("olmo2"),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "GemmaForCausalLM": Architecture("gemma", is_tied=True),
    "Gemma2ForCausalLM": Architecture("gemma2", is_tied=True),
    "Gemma3ForCausalLM": Architecture("gemma3", is_tied=True),
    "Gemma3ForConditionalGeneration": Architecture(
        "gemma3",
        layers="model.language_model.layers",
        embedding="model.language_model.embed_tokens",
        is_tied=True,
    ),
    "PhiForCausalLM": Architecture("phi2", modules=(*_ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2")),
    "Phi3ForCausalLM": Architecture(
        "phi3", modules=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ),
    "Starcoder2ForCausalLM": Architecture("starcoder2", modules=(*_ATTENTION, "mlp.c_fc", "mlp.c_proj"), is_tied=True),
    "GPT2LMHeadModel": Architecture(
        "gpt2",
        layers="transformer.h",
        modules=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        embedding="transformer.wte",
        is_tied=True,
    ),
}
_REGROUPED = "llama.cpp reorders the rows of its fused query, key and value"
_EXPERTS = "llama.cpp stacks the weights of its experts in one tensor"
_REFUSED = {
    "FalconForCausalLM": _REGROUPED,
    "GPTNeoXForCausalLM": _REGROUPED,
    "BloomForCausalLM": _REGROUPED,
    "MixtralForCausalLM": _EXPERTS,
    "Qwen2MoeForCausalLM": _EXPERTS,
    "Qwen3MoeForCausalLM": _EXPERTS,
    "GraniteMoeForCausalLM": _EXPERTS,
    "OlmoeForCausalLM": _EXPERTS,
    "PhiMoEForCausalLM": _EXPERTS,
    "GptOssForCausalLM": _EXPERTS,
}
OUTPUT = "lm_head"
"""Module of the output layer."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """Properties of a base model on which names and row order in a GGUF file depend.

    Attributes:
        architecture: Its architecture.
        n_layers: Number of layers; None if it is not known.
        heads: Number of heads by the modules whose rows are permuted; empty for other architectures.
        is_tied: Whether the output layer shares the embedding's weights.
        where: Source of this, for error messages.
    """

    architecture: Architecture
    n_layers: int | None
    heads: Mapping[str, int]
    is_tied: bool
    where: str

    def stem(self, module: str) -> str | None:
        """Return the name of a module's weight in GGUF, such as `blk.0.attn_q.weight`; None if llama.cpp has none."""
        names = weight_names(self.architecture)
        match = re.fullmatch(re.escape(self.architecture.layers) + r"\.(0|[1-9][0-9]{0,8})\.(.+)", module)
        if match is None:
            return names.get(module)
        stem = names.get(f"{self.architecture.layers}.0.{match[2]}")
        if stem is None or (self.n_layers is not None and int(match[1]) >= self.n_layers):
            return None
        return f"blk.{match[1]}.{stem.removeprefix('blk.0.')}"

    def module(self, stem: str) -> str | None:
        """Return the module of a weight's name in GGUF; None if there is none."""
        modules = {name: module for module, name in weight_names(self.architecture).items()}
        match = re.fullmatch(r"blk\.(0|[1-9][0-9]{0,8})\.(.+)", stem)
        if match is None:
            return modules.get(stem)
        module = modules.get(f"blk.0.{match[2]}")
        if module is None or (self.n_layers is not None and int(match[1]) >= self.n_layers):
            return None
        layers = self.architecture.layers
        return f"{layers}.{match[1]}.{module.removeprefix(f'{layers}.0.')}"

    def n_heads(self, module: str) -> int | None:
        """Return the number of heads by which a module's rows are permuted; None if they are not."""
        return next((heads for suffix, heads in self.heads.items() if module.endswith(f".{suffix}")), None)


def package() -> Any:
    """Return the package `gguf`; raise `MissingExtraError` if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("GGUF files need the package gguf: pip install 'eigenlorax[gguf]'.") from error
    return gguf


@cache
def weight_names(architecture: Architecture) -> dict[str, str]:
    """Return the names of weights in GGUF by module, for the first layer and the modules outside of layers."""
    gguf = package()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture.gguf], 1)
    modules = [f"{architecture.layers}.0.{module}" for module in architecture.modules]
    weights = {}
    for module in (*modules, architecture.embedding, OUTPUT):
        # the tables do not know the prefix of models that also see images
        name = names.get_name(module.replace("language_model.", "") + ".weight", try_suffixes=(".weight",))
        if name is not None:
            weights[module] = name
    return weights


def base_model(source: str | Path | Mapping[str, Any] | BaseModel) -> BaseModel:
    """Return what is needed of a base model.

    Args:
        source: Folder with the base model's `config.json`, that file, or its fields.

    Raises:
        FormatError: There is no config, or a field of it is unusable.
        OptionError: The architecture is not supported.
    """
    if isinstance(source, BaseModel):
        return source
    if isinstance(source, Mapping):
        return _from_fields(source, "the base model's config")
    path = Path(source)
    path = path / CONFIG if path.is_dir() else path
    try:
        data = limits.read_file(path, limits.MAX_JSON_BYTES)
    except FileNotFoundError as error:
        raise FormatError(
            f"{path} does not exist: pass the folder of the base model, which has its {CONFIG}. Its weights are not "
            "needed."
        ) from error
    return _from_fields(limits.parse_json_object(data, str(path))[1], str(path))


def of_gguf(name: str, where: str) -> BaseModel:
    """Return what an architecture's name in GGUF says of a base model.

    Raises:
        FormatError: The architecture is not supported, or more must be known because its rows are permuted.
    """
    architecture = next((each for each in ARCHITECTURES.values() if each.gguf == name), None)
    if architecture is None:
        supported = sorted({each.gguf for each in ARCHITECTURES.values()})
        raise FormatError(f"{where}: architecture {name!r} is not supported. Supported are {', '.join(supported)}.")
    if architecture.is_permuted:
        raise FormatError(
            f"{where} is for a base model of architecture {name!r}, whose query and key rows llama.cpp reorders by "
            f"their heads. Pass the folder with the base model's {CONFIG}, which states how many there are: "
            f"base_config='DIR' (--base-config DIR). Or convert it first: `eigenlorax convert {where} OUT --to peft "
            "--base-config DIR`."
        )
    return BaseModel(architecture, None, {}, is_tied=False, where=where)


def _from_fields(config: Mapping[str, Any], where: str) -> BaseModel:
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else None
    text = config.get("text_config")
    fields = {**config, **text} if isinstance(text, dict) else config
    if not isinstance(name, str):
        raise OptionError(
            f"{where}: architectures is {listed!r}; a list with the name of the model's class was expected, such as "
            "['LlamaForCausalLM']."
        )
    if name not in ARCHITECTURES:
        reason = f": {_REFUSED[name]}" if name in _REFUSED else suggestion(name, ARCHITECTURES)
        raise OptionError(
            f"{where}: the architecture {name!r} is not supported for GGUF{reason.rstrip('.')}. Supported are "
            f"{', '.join(ARCHITECTURES)}."
        )
    architecture = ARCHITECTURES[name]
    n_layers = _count(fields, ("num_hidden_layers", "n_layer"), where)
    heads = {}
    if architecture.is_permuted:
        n_heads = _count(fields, ("num_attention_heads",), where)
        n_key_heads = _count(fields, ("num_key_value_heads", "num_attention_heads"), where)
        heads = dict(zip(_ROTARY, (n_heads, n_key_heads), strict=True))
    tied = fields.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return BaseModel(architecture, n_layers, heads, architecture.is_tied if tied is None else bool(tied), where)


def _count(fields: Mapping[str, Any], names: tuple[str, ...], where: str) -> int:
    """Return the first of some fields; raise `FormatError` if it is not a usable number."""
    value = next((fields[name] for name in names if fields.get(name) is not None), None)
    if type(value) is not int or not 1 <= value <= limits.MAX_DIMENSION:
        raise FormatError(f"{where}: {names[0]} is {value!r}; a number of at least 1 was expected.")
    return value
