"""The layers of a base model by name, from its config alone: no weight is read, and none is made."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import FormatError, MissingExtraError, reason
from ..serving.vllm.plan import COLUMN, EMBEDDING, HEAD, LINEAR, ROW, Layer, Shapes
from . import models

_AUTO = ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel")
_KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "wk", "wv")
"""Last parts of the names of projections that have as many heads as keys and values have."""


def shapes_of(model: str, revision: str | None = None) -> Shapes:
    """The shapes of a folder's model or of one on the Hub, quantised or not.

    `HubError` where it cannot be had, `FormatError` where transformers knows no such model.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"the shapes of a model need {error.name}, which is not installed: pip install 'eigenlorax[peft]'."
        ) from error
    with models.quiet():
        config = models.config_of(model, revision)
        return of_config(config, model)


def of_config(config: Any, model: str) -> Shapes:
    """The shapes of a config's model, which is called `model`."""
    empty = _empty(config, model)
    text = config.get_text_config()
    plan = {re.compile(name.replace(".", r"\.").replace("*", r"[^.]+")): how for name, how in _tp_plan(empty).items()}
    kv_heads = getattr(text, "num_key_value_heads", None)
    head = empty.get_output_embeddings()
    modules = dict(empty.named_modules())
    layers = {}
    for name in _of_language(modules, multimodal=text is not config):
        sizes = _sizes(modules[name])
        if sizes is None:
            continue
        out, n_in = sizes
        if isinstance(modules[name], nn.Embedding):
            layers[name] = Layer(out, n_in, EMBEDDING)
        elif modules[name] is head:
            layers[name] = Layer(out, n_in, HEAD)
        else:
            how = next((how for pattern, how in plan.items() if pattern.fullmatch(name)), None)
            repeated = name.rpartition(".")[2] in _KEYS_AND_VALUES and kv_heads is not None
            layers[name] = Layer(out, n_in, LINEAR, _split(how), kv_heads if repeated else None)
    return Shapes(
        model=model,
        dtype=_dtype(config, text),
        layers=layers,
        heads=getattr(text, "num_attention_heads", None),
        whole=not plan,
        experts=tuple(name for name in modules if name.rpartition(".")[2] == "experts"),
    )


def _empty(config: Any, model: str) -> Any:
    """The model without memory for its weights, of the class whose checkpoints it has."""
    import transformers

    # quantised weights have other shapes, LoRAs for them have not
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    named = [name for name in getattr(config, "architectures", None) or () if hasattr(transformers, name)]
    last: Exception | None = None
    for name in [*named[:1], *_AUTO]:
        kind = getattr(transformers, name)
        try:
            with torch.device("meta"):
                built = kind.from_config(config) if name in _AUTO else kind(config)
        except (ValueError, ImportError, NotImplementedError, RuntimeError, AttributeError, TypeError) as error:
            last = last or error
        else:
            return built
    assert last is not None
    raise FormatError(
        f"transformers cannot make a model of the config of {model}: {reason(last)} Its shapes are needed to say what "
        "a server takes."
    ) from last


def _tp_plan(model: Any) -> Mapping[str, str]:
    """How transformers would cut each layer among GPUs, which is how vLLM does it: parts of names may be `*`."""
    found = getattr(model, "tp_plan", None)
    return found if isinstance(found, Mapping) else {}


def _split(how: str | None) -> str | None:
    return None if how is None else COLUMN if "colwise" in how else ROW if "rowwise" in how else None


def _of_language(modules: Iterable[str], *, multimodal: bool) -> list[str]:
    """The modules that vLLM's LoRAs may be for. Where a model has towers for images or sounds, they are not."""
    names = list(modules)
    if not multimodal or not any("language_model" in name.split(".") for name in names):
        return names
    return [name for name in names if {"language_model", "lm_head"} & set(name.split("."))]


def _sizes(module: Any) -> tuple[int, int] | None:
    """(out, in) of a layer that LoRAs may be for; None for one of another kind."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    if isinstance(module, Conv1D):
        n_in, out = module.weight.shape
        return out, n_in
    return None


def _dtype(*configs: Any) -> str:
    """vLLM's `--dtype auto`: half precision, of the kind that the config says."""
    for config in configs:
        # its name before transformers 4.56
        found = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        if found is not None:
            return "float16" if str(found).removeprefix("torch.") == "float16" else "bfloat16"
    return "bfloat16"
