"""Shapes of a base model's layers, computed from its config. No weights are read or allocated."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import FormatError, MissingExtraError, reason
from ..serving.vllm.plan import COLUMN, EMBEDDING, HEAD, LINEAR, ROW, Layer, Shapes
from . import models

_AUTO = ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel")
"""Classes of transformers to try if the config names no class, or one that cannot be built."""
_KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "wk", "wv")
"""Last name parts of projections that have one head per key–value head, not one per attention head."""


def load_shapes(model: str, revision: str | None = None) -> Shapes:
    """Return the shapes of a model's layers. For a quantised model, they are the shapes before quantisation.

    Args:
        model: Folder or Hub id of the model.
        revision: Revision on the Hub. Default: the main branch.

    Raises:
        HubError: The config could not be loaded from the Hub.
        FormatError: transformers does not support the model.
        MissingExtraError: transformers is not installed.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"the shapes of a model need {error.name}, which is not installed: pip install 'eigenlorax[peft]'."
        ) from error
    with models.quiet():
        config = models.load_config(model, revision)
        return from_config(config, model)


def from_config(config: Any, model: str) -> Shapes:
    """Return the shapes of the model that a config describes.

    Args:
        config: Config of transformers.
        model: Name of the model, for messages.

    Raises:
        FormatError: transformers cannot build the model.
    """
    empty_model = _build_empty(config, model)
    text = config.get_text_config()
    plan = {
        re.compile(name.replace(".", r"\.").replace("*", r"[^.]+")): split
        for name, split in _tp_plan(empty_model).items()
    }
    kv_heads = getattr(text, "num_key_value_heads", None)
    head = empty_model.get_output_embeddings()
    modules = dict(empty_model.named_modules())
    layers = {}
    for name in _language_modules(modules, multimodal=text is not config):
        shape = _weight_shape(modules[name])
        if shape is None:
            continue
        n_out, n_in = shape
        if isinstance(modules[name], nn.Embedding):
            layers[name] = Layer(n_out, n_in, EMBEDDING)
        elif modules[name] is head:
            layers[name] = Layer(n_out, n_in, HEAD)
        else:
            split = next((split for pattern, split in plan.items() if pattern.fullmatch(name)), None)
            repeated = name.rpartition(".")[2] in _KEYS_AND_VALUES and kv_heads is not None
            layers[name] = Layer(n_out, n_in, LINEAR, _tensor_parallel_split(split), kv_heads if repeated else None)
    return Shapes(
        model=model,
        dtype=_dtype(config, text),
        layers=layers,
        heads=getattr(text, "num_attention_heads", None),
        whole=not plan,
        experts=tuple(name for name in modules if name.rpartition(".")[2] == "experts"),
        # the first name is the one that vLLM looks for
        architecture=next(iter(getattr(config, "architectures", None) or ()), type(empty_model).__name__),
    )


def _build_empty(config: Any, model: str) -> Any:
    """Build the model on the meta device, with the class that the config names or with one of the auto classes."""
    import transformers

    # quantised weights have other shapes, but LoRAs have the shapes of the original weights
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    class_names = [name for name in getattr(config, "architectures", None) or () if hasattr(transformers, name)]
    first_error: Exception | None = None
    for name in [*class_names[:1], *_AUTO]:
        model_class = getattr(transformers, name)
        try:
            with torch.device("meta"):
                built = model_class.from_config(config) if name in _AUTO else model_class(config)
        except (ValueError, ImportError, NotImplementedError, RuntimeError, AttributeError, TypeError) as error:
            first_error = first_error or error
        else:
            return built
    assert first_error is not None
    raise FormatError(
        f"transformers cannot make a model of the config of {model}: {reason(first_error)} Its shapes are needed to "
        "compute memory."
    ) from first_error


def _tp_plan(model: Any) -> Mapping[str, str]:
    """Return pattern of module names → how transformers and vLLM split the module's weight among GPUs."""
    plan = getattr(model, "tp_plan", None)
    return plan if isinstance(plan, Mapping) else {}


def _tensor_parallel_split(style: str | None) -> str | None:
    """Convert transformers' name of a split, such as "colwise", to `COLUMN`, `ROW` or None."""
    if style is None:
        return None
    return COLUMN if "colwise" in style else ROW if "rowwise" in style else None


def _language_modules(modules: Iterable[str], *, multimodal: bool) -> list[str]:
    """Return the modules for which vLLM supports LoRA. Modules of image and audio encoders are left out."""
    names = list(modules)
    if not multimodal or not any("language_model" in name.split(".") for name in names):
        return names
    return [name for name in names if {"language_model", "lm_head"} & set(name.split("."))]


def _weight_shape(module: Any) -> tuple[int, int] | None:
    """Return the weight's shape (out, in) of a layer that can have a LoRA, or None for other layers."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    if isinstance(module, Conv1D):
        n_in, n_out = module.weight.shape
        return n_out, n_in
    return None


def _dtype(*configs: Any) -> str:
    """Return the dtype that vLLM's `--dtype auto` chooses: float16 if a config names it, otherwise bfloat16."""
    for config in configs:
        # before transformers 4.56 the field is named torch_dtype
        dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        if dtype is not None:
            return "float16" if str(dtype).removeprefix("torch.") == "float16" else "bfloat16"
    return "bfloat16"
