"""`load_into`, which checks adapters of a pack against a pipeline and injects them."""

import os
import sys
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ...core import convolution, dtypes, keys
from ...core.options import name_list
from ...errors import (
    AdapterNameError,
    MissingPartWarning,
    ModuleNameError,
    OptionError,
    ShapeError,
    WrappedModelWarning,
)
from ...pack.pack import Pack
from ...pack.packed_adapter import PackedAdapter
from . import inject, pipeline_layers
from .pipeline_layers import LayerMatch, PipelineLayer, match_layers


def load_into(
    pipe: object,
    pack: "Pack | str | os.PathLike[str]",
    names: str | Sequence[str] | None = None,
    *,
    dtype: str | torch.dtype | None = None,
) -> dict[str, dict[str, int]]:
    """
    Load adapters of a pack into a pipeline of diffusers.

    All adapters share one basis, of which each layer has one copy. Afterwards they are adapters of the pipeline like
    any others, for `set_adapters`, `disable_lora`, `fuse_lora`, `delete_adapters` and so on. As with
    `load_lora_weights`, only the last one is active. All checks are made before the pipeline is changed.

    Args:
        pipe (`DiffusionPipeline` or `nn.Module`):
            A pipeline, or one of its models.
        pack ([`Pack`], `str` or `os.PathLike`):
            A pack, its folder, or a repository on the Hub.
        names (`str` or `Sequence[str]`, *optional*):
            The adapters to download and load. By default all. Dots in names become `_` in the pipeline.
        dtype (`str` or `torch.dtype`, *optional*):
            Dtype of the bases. "int8" stores 8 bits per entry and a scale per row, which a layer converts for each
            product. By default the dtype of each layer's weight.

    Returns:
        `dict`: The number of layers by adapter and model name.

    Raises:
        OptionError: An adapter has heads or carried tensors, or is fused into the pipeline already.
        AdapterNameError: An adapter is unknown, or its name cannot be used in the pipeline.
        ModuleNameError: The pipeline lacks a module of an adapter.
        ShapeError: A layer has another shape than the pack's module.

    Example:
        >>> layers = eigenlorax.load_into(pipe, "style-pack/", ["toy"])
        >>> pipe.set_adapters("toy")
    """
    selected = list(dict.fromkeys(name_list(names))) if names is not None else None
    if selected == []:
        raise OptionError("names is empty. Pass names of adapters: load_into(pipe, pack, ['toy', 'sketch']).")
    opened = _open(pack, selected)
    adapters = _read_adapters(opened, opened.names if selected is None else selected)
    models = [model for model in pipeline_layers.adaptable_models(pipe).values() if model is not None]
    _check_names(adapters, models)
    basis_dtype = torch.int8 if dtype in ("int8", torch.int8) else dtypes.parse(dtype)
    modules = {subspace_name for packed in adapters.values() for subspace_name in packed.subspace_names.values()}
    match = match_layers(modules, pipe)
    _check(adapters, match, opened, pipe)
    disabled = any(layer.disable_adapters for layer in inject.tuner_layers(models))
    counts = inject.inject_adapters(adapters, match.layers, opened.subspace, opened.info.fingerprint, basis_dtype)
    for layer in inject.tuner_layers(models):
        layer.set_adapter([*adapters][-1:], inference_mode=True)
        if disabled:
            layer.enable_adapters(False)
    _reapply_group_offloading(models)
    _warn_of_compiled_models(pipe, counts)
    return counts


def _open(pack: "Pack | str | os.PathLike[str]", names: list[str] | None) -> Pack:
    if not isinstance(pack, Pack):
        return Pack.from_pretrained(pack, adapters=names)
    for name in names or ():
        keys.check_known(name, pack.names)
    return pack


def _read_adapters(pack: Pack, names: list[str]) -> dict[str, PackedAdapter]:
    """Return the adapters by their names in the pipeline.

    Raises:
        OptionError: There is no adapter, or an adapter has heads or carried tensors.
        AdapterNameError: Two adapters have the same name in the pipeline.
    """
    if not names:
        raise OptionError("the pack has no adapter. Add one with `eigenlorax add`.")
    adapters: dict[str, PackedAdapter] = {}
    for name in names:
        packed = pack.packed(name)
        if packed.heads:
            raise OptionError(
                f"adapter {name!r} has its own heads or biases, such as {min(packed.heads)!r}, which a "
                "pipeline cannot use. Serve it with eigenlorax.AdapterBank(model, pack), or load it with PEFT."
            )
        if packed.carried:
            folder = pack.path if pack.path is not None else "pack/"
            raise OptionError(
                f"adapter {name!r} has tensors that coefficients cannot express, such as {min(packed.carried)!r}. Pass "
                "names of other adapters only, and load this one with pipe.load_lora_weights after "
                f"`eigenlorax export {folder} {name} -o loras/ --format diffusers`."
            )
        short = name.replace(".", "_")
        if short in adapters:
            raise AdapterNameError(
                f"adapters {adapters[short].name!r} and {name!r} would both be {short!r} in the pipeline, since "
                "names in PEFT have no dots. Load one of them."
            )
        adapters[short] = packed
    return adapters


def _check_names(adapters: Mapping[str, PackedAdapter], models: Sequence[nn.Module]) -> None:
    """Raise `AdapterNameError` for a name that is in use, or that PEFT's containers cannot store."""
    used_names = {name for model in models for name in getattr(model, "peft_config", {})}
    for name in adapters:
        if name in used_names:
            raise AdapterNameError(
                f"the pipeline already has an adapter {name!r}. Remove it with pipe.delete_adapters({name!r}) first."
            )
        if hasattr(nn.ParameterDict(), name):
            raise AdapterNameError(
                f"{name!r} cannot be the name of an adapter in a pipeline: torch's containers of parameters use it. "
                "Give the adapter another name when the pack is fitted, NAME=PATH."
            )


def _check(adapters: Mapping[str, PackedAdapter], match: LayerMatch, pack: Pack, pipe: object) -> None:
    """Raise an error unless all modules of the adapters have a layer of their shape, before a layer is changed."""
    pipeline = type(pipe).__name__
    for packed in adapters.values():
        for module, coefficients in packed.coefficients.items():
            layer = match.layers.get(packed.subspace_names[module])
            if layer is not None:
                sides = pack.info.modules[packed.subspace_names[module]]
                shape = sides["up"].dimension, sides["down"].dimension
                _check_layer(layer, shape, coefficients.kernel, pack, pipeline)
    if match.missing:
        more = f" and {len(match.missing) - 1} more are" if len(match.missing) > 1 else " is"
        models = ", ".join(sorted({layer.owner.name for layer in match.layers.values()}))
        raise ModuleNameError(
            f"{match.missing[0]}{more} not in this {pipeline}, which has "
            f"{f'others, of {models}' if models else 'no module of these adapters'}. The pack is for another base model"
            f"{f', {pack.base_model},' if pack.base_model else ''} or another kind of pipeline."
        )
    for name, packed in adapters.items():
        _check_unique_layers(name, packed, match)
        if not any(subspace_name in match.layers for subspace_name in packed.subspace_names.values()):
            raise ModuleNameError(
                f"adapter {name!r} has no module of this {pipeline}: its {len(packed.subspace_names)} modules, such as "
                f"{min(packed.subspace_names.values())}, belong to other models."
            )
    if match.absent and not isinstance(pipe, nn.Module):
        missing = ", ".join(sorted({module.partition(".")[0] for module in match.absent}))
        warnings.warn(
            f"this {pipeline} was created without {missing}: {len(match.absent)} modules of the adapters are ignored.",
            MissingPartWarning,
            stacklevel=3,
        )
    merged = {name for layer in match.layers.values() for name in inject.merged_adapters(layer)}
    if merged:
        raise OptionError(
            f"adapters are fused into the pipeline: {', '.join(sorted(merged))}. Call pipe.unfuse_lora() first."
        )


def _check_unique_layers(name: str, packed: PackedAdapter, match: LayerMatch) -> None:
    """Raise `ModuleNameError` if two modules of an adapter are one layer, such as its old name and its new name."""
    owners: dict[str, str] = {}
    for module, subspace_name in packed.subspace_names.items():
        layer = match.layers.get(subspace_name)
        if layer is not None and owners.setdefault(layer.name, module) != module:
            raise ModuleNameError(
                f"modules {owners[layer.name]!r} and {module!r} of adapter {name!r} are both the layer {layer.name} of "
                "the pipeline. Remove one of them from the adapter's file."
            )


def _check_layer(
    layer: PipelineLayer, shape: tuple[int, int], kernel: tuple[int, ...], pack: Pack, pipeline: str
) -> None:
    """Raise an error unless a layer has this shape (out, in) and kernel, and a weight."""
    remedy = f"The pack is for another base model{f': {pack.base_model}' if pack.base_model else ''}."
    base_layer, actual = inject.base_layer_of(layer.module), inject.shape_of(layer.module)
    if actual is None:
        raise ModuleNameError(
            f"{layer.name} is a {type(base_layer).__name__} in this {pipeline}, which cannot have an adapter. {remedy}"
        )
    if actual != shape:
        raise ShapeError(f"{layer.name}: (out, in) is {actual} in this {pipeline} and {shape} in the pack. {remedy}")
    if base_layer.weight.is_meta:
        raise OptionError(
            f"{layer.name} has no weight in memory, as with enable_sequential_cpu_offload, which does not support "
            "bases. Use enable_model_cpu_offload or group offloading, or load the model's weights first."
        )
    layer_kernel = convolution.kernel_size(base_layer)
    if not convolution.kernels_match(kernel, layer_kernel):
        raise ShapeError(
            f"{layer.name}: the kernel is {layer_kernel} in this {pipeline} and {kernel} in the pack. {remedy}"
        )


def _warn_of_compiled_models(pipe: object, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Warn of models from `torch.compile(model)`, which `pipe.set_adapters` silently ignores."""
    for name in sorted({name for layers in counts.values() for name in layers}):
        model = getattr(pipe, name, None)
        if model is not None and pipeline_layers.unwrap_compiled(model) is not model:
            warnings.warn(
                f"pipe.{name} is the result of torch.compile(pipe.{name}), in which diffusers finds no adapters: "
                f"pipe.set_adapters ignores it. Compile in place, pipe.{name}.compile(), or call "
                f"pipe.{name}.set_adapters.",
                WrappedModelWarning,
                stacklevel=3,
            )


def _reapply_group_offloading(models: Sequence[nn.Module]) -> None:
    """Apply diffusers' group offloading to the new tensors, if it was enabled before they were added."""
    if "diffusers" in sys.modules:
        from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

        for model in models:
            _maybe_remove_and_reapply_group_offloading(model)
