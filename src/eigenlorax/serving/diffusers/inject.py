"""Injection of a pack's adapters into the layers of a pipeline, all adapters at once.

PEFT adds one adapter at a time and goes through all modules of the model for each. Here a layer is wrapped when it gets
its first adapter, and no other module is visited.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core import atomic_files
from ...core.subspace import Subspace
from ...errors import OptionError
from ...pack.packed_adapter import PackedAdapter
from ...tuner.config import EigenLoraxConfig
from ...tuner.forward import wrap_layer
from ...tuner.layer import EigenLoraxLayer
from ...tuner.supported_modules import in_out_features, is_supported
from .pipeline_layers import PipelineLayer


class PackedConfig(EigenLoraxConfig):
    """Configuration of an adapter of a pack in a pipeline. It cannot be saved from there, only from its pack."""

    def check_saving(self, adapter_name: str) -> None:
        """Raise `OptionError`."""
        raise OptionError(
            f"adapter {adapter_name!r} was loaded from a pack for inference, and cannot be saved from the model: "
            "`eigenlorax export` writes a LoRA for pipe.load_lora_weights, pack.adapter(name) returns a LoRA in memory."
        )


def inject_adapters(
    adapters: Mapping[str, PackedAdapter],
    layers: Mapping[str, PipelineLayer],
    subspace: Subspace,
    fingerprint: str,
    dtype: torch.dtype | None,
) -> dict[str, dict[str, int]]:
    """Add adapters and their bases to the layers of a pipeline.

    Args:
        adapters: Adapters by name in the pipeline.
        layers: Layers by module name in the subspace.
        subspace: The bases.
        fingerprint: Fingerprint of the subspace.
        dtype: Dtype of the bases; None for the dtype of each layer's weight.

    Returns:
        Number of layers by adapter and model name.
    """
    counts: dict[str, dict[str, int]] = {}
    adapted: dict[str, EigenLoraxLayer] = {}
    for name, packed in adapters.items():
        modules_by_model: dict[str, dict[str, str]] = {}
        for module, coefficients in packed.coefficients.items():
            subspace_name = packed.subspace_names[module]
            layer = layers.get(subspace_name)
            if layer is None:
                continue
            if layer.name not in adapted:
                adapted[layer.name] = _adapted_layer(layer, dtype)
            # a pack can have two modules for one layer, under its old and its new name, with different bases
            key = fingerprint
            if subspace_name != layer.name:
                key += f"_{atomic_files.digest(subspace_name.encode())[:8]}"
            adapted[layer.name].add_for_inference(name, subspace.modules[subspace_name], key, coefficients)
            modules_by_model.setdefault(layer.owner.name, {})[layer.layer] = module
        owners = {layer.owner.name: layer.owner for layer in layers.values()}
        for owner, modules in modules_by_model.items():
            _register(owners[owner].model, name, packed, modules, fingerprint)
        counts[name] = {owner: len(modules) for owner, modules in modules_by_model.items()}
    for eigenlorax_layer in adapted.values():
        eigenlorax_layer.blend()
    return counts


def _adapted_layer(layer: PipelineLayer, dtype: torch.dtype | None) -> EigenLoraxLayer:
    """Return the adapted layer of a layer of a pipeline; wrap the layer if there is none."""
    for module in wrapped_modules(layer.module):
        if isinstance(module, EigenLoraxLayer):
            if dtype is not None or module.serving is None:
                module.serve(dtype)
            return module
    target, base_layer = layer.module, base_layer_of(layer.module)
    adapted = wrap_layer(target, "", isinstance(base_layer, Conv1D), **get_quantization_kwargs(layer.owner.model))
    adapted.serve(dtype or adapted.dtype)
    # the coefficients are frozen, whatever mode the model is in
    adapted.training = False
    if isinstance(target, BaseTunerLayer):
        adapted._active_adapter, adapted._disable_adapters = target._active_adapter, target._disable_adapters
    parent, _, name = layer.layer.rpartition(".")
    setattr(layer.owner.model.get_submodule(parent), name, adapted)
    return adapted


def wrapped_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and the modules that it wraps, the base layer last."""
    yield module
    while isinstance(module, BaseTunerLayer):
        module = module.base_layer
        yield module


def base_layer_of(module: nn.Module) -> nn.Module:
    """Return the model's own layer, inside of all adapted layers."""
    *_, base_layer = wrapped_modules(module)
    return base_layer


def shape_of(module: nn.Module) -> tuple[int, int] | None:
    """Return (out, in) of a layer; None if it cannot have coefficients."""
    base_layer = base_layer_of(module)
    if not is_supported(base_layer):
        return None
    in_features, out_features = in_out_features(base_layer)
    return out_features, in_features


def merged_adapters(layer: PipelineLayer) -> list[str]:
    """Return the EigenLoRAx adapters that are merged into the weight of a layer."""
    adapted = (module for module in wrapped_modules(layer.module) if isinstance(module, EigenLoraxLayer))
    return [name for module in adapted for name in module.merged_adapters]


def tuner_layers(models: Iterable[nn.Module]) -> Iterator[BaseTunerLayer]:
    """Yield the adapted layers of models, for all PEFT methods."""
    return (module for model in models for module in model.modules() if isinstance(module, BaseTunerLayer))


def _register(model: nn.Module, name: str, packed: PackedAdapter, modules: Mapping[str, str], fingerprint: str) -> None:
    """Add the configuration of an adapter to a model, as PEFT does.

    Args:
        model: The model.
        name: Name of the adapter in the pipeline.
        packed: The adapter.
        modules: Module name in the adapter by name of the layer.
        fingerprint: Fingerprint of the subspace.
    """
    coefficients = {layer: packed.coefficients[module] for layer, module in modules.items()}
    ranks = {layer: factors.rank for layer, factors in coefficients.items()}
    alphas = {layer: factors.scaling * factors.rank for layer, factors in coefficients.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    config = PackedConfig(
        subspace_fingerprint=fingerprint,
        r=rank,
        lora_alpha=alpha,
        rank_pattern={layer: layer_rank for layer, layer_rank in ranks.items() if layer_rank != rank},
        alpha_pattern={layer: layer_alpha for layer, layer_alpha in alphas.items() if layer_alpha != alpha},
        target_modules=sorted(coefficients),
        subspace_modules={layer: packed.subspace_names[module] for layer, module in modules.items()},
        kernels={layer: list(factors.kernel) for layer, factors in coefficients.items() if factors.kernel},
        inference_mode=True,
    )
    # PEFT, diffusers and transformers look for the adapters of a model in these two attributes
    model.__dict__.setdefault("peft_config", {})[name] = config
    model.__dict__["_hf_peft_config_loaded"] = True
