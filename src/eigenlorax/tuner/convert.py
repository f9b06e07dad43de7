"""Export, import, swapping, scaling and combining of adapters, which PEFT supports for LoRA only.

All functions multiply k × r matrices, without decompositions.
"""

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from .. import formats
from ..core import convolution, keys, metrics, module_names, projection
from ..core.adapter import Adapter, LoRAFactors
from ..core.basis import Basis
from ..core.metrics import ModuleError
from ..core.options import suggestion, to_float
from ..core.subspace import ModuleBases
from ..errors import AdapterNameError, ModuleNameError, OptionError, ProjectionWarning, ShapeError
from ..formats import coefficients
from ..pack.pack import Pack
from .config import EigenLoraxConfig
from .layer import EigenLoraxLayer

Source = str | os.PathLike[str] | Adapter

# Relative error that rounding to float32 explains.
_ROUNDING_ERROR = 1e-5
_LORA_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "task_type", "modules_to_save")


def to_lora(model: nn.Module, adapter_name: str = "default") -> Adapter:
    """
    Convert an adapter of a model to an ordinary LoRA. `write_adapter` saves it.

    Args:
        model (`nn.Module`):
            A model with the adapter.
        adapter_name (`str`):
            The name of the adapter. Defaults to `'default'`.

    Returns:
        `Adapter`: The LoRA, with the current scaling, heads and trained biases. Its rank is `r`, or min(k_down, k_up)
        for a core.
    """
    config = _config(model, adapter_name)
    modules = {}
    for name, layer in _layers(model, adapter_name).items():
        down_basis, up_basis = (basis.cpu() for basis in layer.bases_of(adapter_name))
        scaling, (down, up) = layer.scaling[adapter_name], layer.factors_of(adapter_name)
        if up is None:
            factors = coefficients.from_core(down.detach().cpu(), down_basis, up_basis, scaling)
        else:
            residuals = (None if tensor is None else tensor.cpu() for tensor in layer.residuals_of(adapter_name))
            down, up = down.detach().cpu(), up.detach().cpu()
            factors = coefficients.from_pair(down, up, down_basis, up_basis, scaling, *residuals)
        modules[name] = replace(factors, kernel=layer.kernel)
    tensors = _state_dict(model, adapter_name)
    heads = {key: tensor.cpu() for key, tensor in tensors.items() if not _is_update(key) and not _is_basis(key)}
    return coefficients.lora(adapter_name, modules, heads, asdict(config))


def from_lora(
    model: nn.Module,
    source: Source,
    adapter_name: str = "default",
    *,
    subspace: "str | os.PathLike[str] | Pack",
    **fields: Any,
) -> PeftModel:
    """
    Add a LoRA to a model, projected on a subspace, with its heads.

    A warning gives the relative error of the update if it is not in the subspace.

    Args:
        model (`nn.Module`):
            The model, adapted or not.
        source (`str`, `os.PathLike` or `Adapter`):
            The LoRA, or its folder.
        adapter_name (`str`):
            The name of the new adapter. Defaults to `'default'`.
        subspace (`str`, `os.PathLike` or [`Pack`]):
            The pack whose subspace is used.
        fields:
            Passed to [`EigenLoraxConfig`]. Ranks, alphas, task type and saved modules are taken from the LoRA by
            default.
    """
    adapter = _read_lora(source)
    lora_config = {"r": 8, "lora_alpha": 8, "bias": "none", **adapter.config}
    if not adapter.config:
        first = next(iter(adapter.specs.values()))
        lora_config |= {"r": first.rank, "lora_alpha": first.scaling * first.rank}
    config = EigenLoraxConfig(
        subspace=subspace,
        **{
            **{field: lora_config[field] for field in _LORA_FIELDS if lora_config.get(field) is not None},
            "bias": lora_config["bias"].replace("lora_only", "eigenlorax_only"),
            "target_modules": sorted(adapter.specs),
            "kernels": {module: list(spec.kernel) for module, spec in adapter.specs.items() if spec.kernel},
            **fields,
        },
    )
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(model, config, adapter_name=adapter_name)
    swap(model, adapter, adapter_name)
    return model


def swap(model: nn.Module, source: Source, adapter_name: str = "default") -> float:
    """
    Replace an adapter by another one in place, so that a compiled model is not compiled again.

    An adapter of the same subspace is represented exactly. For any other adapter, a warning gives the relative error of
    its update. Modules where the replaced adapter has a residual have no error: the new residual is the difference. If
    the subspace has grown since the replaced adapter was saved, the adapter first gets coefficients on all components,
    for which a compiled model is compiled once more.

    Args:
        model (`nn.Module`):
            A model with the adapter that is replaced.
        source (`str`, `os.PathLike` or `Adapter`):
            The new adapter as a LoRA of the same ranks, such as `pack.adapter("sst2")`, or its folder. Modules that it
            lacks get zeros.
        adapter_name (`str`):
            The name of the adapter that is replaced. Defaults to `'default'`.

    Returns:
        `float`: The delta error, the relative Frobenius error over all modules.
    """
    _config(model, adapter_name)
    adapter = _read_lora(source)
    layers = _layers(model, adapter_name)
    _check_unmerged(layers)
    _extend_coefficients(model, adapter_name)
    state = _state_dict(model, adapter_name)
    model_names = module_names.resolve_all(adapter.specs, layers)
    missing = sorted(module for module, model_name in model_names.items() if model_name is None)
    if missing:
        raise ModuleNameError(f"module {missing[0]!r} of {adapter.name!r} has no coefficients in {adapter_name!r}.")
    new: dict[str, Tensor] = {key: torch.zeros_like(tensor) for key, tensor in state.items() if _is_update(key)}
    errors: list[ModuleError] = []
    for module, model_name in model_names.items():
        assert model_name is not None
        layer, factors = layers[model_name], adapter.modules[module]
        if not convolution.kernels_match(factors.kernel, layer.kernel):
            raise ShapeError(
                f"module {module}: the kernel of {adapter.name!r} is {factors.kernel}, in the model it is "
                f"{layer.kernel}. The adapter belongs to another base model."
            )
        tensors, error = _project(layer, adapter_name, factors)
        errors.append(error)
        new |= {f"{keys.MODEL_PREFIX}{model_name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    new |= {key: tensor for key, tensor in adapter.heads.items() if key in state}
    for key, tensor in new.items():
        if state[key].shape != tensor.shape:
            raise ShapeError(
                f"{key} is {tuple(state[key].shape)} in the model and {tuple(tensor.shape)} in {adapter.name!r}: "
                "adapters can only be swapped if their ranks and heads have the same shapes."
            )
    _load_state_dict(model, {**state, **new}, adapter_name)
    delta_error = metrics.adapter_error(errors).delta_error
    if delta_error > _ROUNDING_ERROR:
        warnings.warn(
            f"the update of {adapter.name!r} is not in the subspace: its relative error (delta error) is "
            f"{delta_error:.4f}.",
            ProjectionWarning,
            stacklevel=2,
        )
    return delta_error


@contextmanager
def scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """
    Multiply the scaling of all active adapters by `factor` inside a `with` block.

    Args:
        model (`nn.Module`):
            A model with adapters that are not merged.
        factor (`float`):
            The factor.
    """
    factor, layers = to_float("factor", factor), _layers(model)
    _check_unmerged(layers)
    scalings = {name: dict(layer.scaling) for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.scale_layer(factor)
        yield
    finally:
        for name, layer in layers.items():
            layer.scaling.update(scalings[name])
            layer.blend()


def combine(model: PeftModel, adapters: Mapping[str, float] | Sequence[str], adapter_name: str) -> None:
    """
    Add the weighted sum Σ weight · update of adapters of one subspace as a new adapter.

    The sum is exact; the rank of the new adapter is the sum of their ranks. Heads are not combined: PEFT initialises
    the heads of the new adapter.

    Args:
        model ([`PeftModel`]):
            A model with the adapters.
        adapters (`Mapping[str, float]` or `Sequence[str]`):
            The weight of each adapter, or a list of names for their mean.
        adapter_name (`str`):
            The name of the new adapter.
    """
    weights = dict(adapters) if isinstance(adapters, Mapping) else {name: 1 / len(adapters) for name in adapters}
    if not weights:
        raise OptionError("adapters is empty: pass the names of the adapters to combine.")
    configs = {name: _config(model, name) for name in weights}
    for name in weights:
        # adapters that were saved before the subspace grew can be added to later ones
        _extend_coefficients(model, name)
    if with_gradients := sorted(name for name, config in configs.items() if config.n_gradient):
        raise OptionError(
            f"adapter {with_gradients[0]!r} has gradient components of its own, so that its coefficients cannot be "
            "added to others. Convert the adapters to LoRAs (to_lora), and combine these."
        )
    if len({(c.subspace_fingerprint, c.n_extra, c.extra_seed, c.core) for c in configs.values()}) > 1:
        raise OptionError(
            f"adapters {', '.join(sorted(weights))} have different subspaces, or only some of them are cores: their "
            "coefficients cannot be added."
        )
    layers = {name: layer for name, layer in _layers(model).items() if any(map(layer.has_adapter, weights))}
    config = _combined_config(next(iter(configs.values())), layers, list(weights))
    model.add_adapter(adapter_name, config)
    with torch.no_grad():
        for layer in layers.values():
            scalings = {
                name: weight * layer.scaling[name] for name, weight in weights.items() if layer.has_adapter(name)
            }
            if config.core:
                cores = [scaling * layer.eigenlorax_core[name] for name, scaling in scalings.items()]
                layer.eigenlorax_core[adapter_name].copy_(torch.stack(cores).sum(dim=0))
            else:
                downs = [layer.eigenlorax_down[name] for name in scalings]
                ups = [scaling * layer.eigenlorax_up[name] for name, scaling in scalings.items()]
                layer.eigenlorax_down[adapter_name].copy_(torch.cat(downs))
                layer.eigenlorax_up[adapter_name].copy_(torch.cat(ups, dim=1))
                _combine_residuals(layer, scalings, adapter_name)
            layer.blend()


def _combined_config(
    config: EigenLoraxConfig, layers: Mapping[str, EigenLoraxLayer], adapters: Sequence[str]
) -> EigenLoraxConfig:
    """Return the config of a sum of adapters, which has the sum of their ranks and a scaling of 1 in every module."""
    ranks = {
        module: sum(layer.r[name] for name in adapters if layer.has_adapter(name)) for module, layer in layers.items()
    }
    rank = max(ranks.values())
    pattern = {} if config.core else {f"^{re.escape(module)}$": r for module, r in ranks.items() if r != rank}
    residual_sides = {
        module: sorted({side for name in adapters for side in layer.residual_sides(name)})
        for module, layer in layers.items()
    }
    combined = replace(
        config,
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=sorted(layers),
        rests={module: sides for module, sides in residual_sides.items() if sides},
        modules_to_save=None,
        start="zero",
    )
    combined.inference_mode = True
    return combined


def _combine_residuals(layer: EigenLoraxLayer, scalings: Mapping[str, float], adapter_name: str) -> None:
    """Write the residuals of adapters into a combined adapter, in the same order as their coefficients."""
    down, up = layer.residuals_of(adapter_name)
    start = 0
    for name, scaling in scalings.items():
        end = start + layer.r[name]
        adapter_down, adapter_up = layer.residuals_of(name)
        if down is not None and adapter_down is not None:
            down[start:end] = adapter_down
        if up is not None and adapter_up is not None:
            up[:, start:end] = scaling * adapter_up
        start = end


def _extend_coefficients(model: nn.Module, adapter_name: str) -> None:
    """Pad an adapter's coefficients to all components of its subspace, if that has grown since it was saved."""
    config, layers = _config(model, adapter_name), _layers(model, adapter_name).values()
    if config.embed_subspace or config.n_extra or config.n_gradient:
        return
    for layer in layers:
        layer.extend_coefficients(adapter_name)
        config.subspace_fingerprint = layer.subspace_of[adapter_name]


def _check_unmerged(layers: Mapping[str, EigenLoraxLayer]) -> None:
    """Raise `OptionError` if adapters are merged: a change of their coefficients would not reach the base weights."""
    merged = sorted({adapter for layer in layers.values() for adapter in layer.merged_adapters})
    if merged:
        raise OptionError(f"adapters are merged: {', '.join(merged)}. Call unmerge_adapter() first.")


def _read_lora(source: Source) -> Adapter:
    adapter = source if isinstance(source, Adapter) else formats.read_adapter(os.fspath(source))
    if adapter.carried:
        raise OptionError(
            f"the LoRA {adapter.name!r} has tensors that coefficients cannot express, such as "
            f"{min(adapter.carried)!r}. Load it as a LoRA with PEFT."
        )
    return adapter


def _project(layer: EigenLoraxLayer, adapter_name: str, factors: LoRAFactors) -> tuple[dict[str, Tensor], ModuleError]:
    """Project a LoRA on the bases of a layer.

    The layer's scaling is a constant in a compiled model, so the up factor is multiplied by the ratio of the two
    scalings.

    Returns:
        Tensors by the last part of their key in the adapter's file, and the error of the projection.
    """
    bases = ModuleBases(*(Basis(basis.cpu(), torch.zeros(0), energy=1.0) for basis in layer.bases_of(adapter_name)))
    projected = projection.project(factors, bases)
    ratio = factors.scaling / layer.scaling[adapter_name]
    if adapter_name in layer.eigenlorax_core:
        error = metrics.module_error(factors, projected, bases)
        return {keys.CORE: (ratio * projected.up @ projected.down).float()}, error
    inside = projection.reconstruct(projected, bases)
    down_buffer, up_buffer = layer.residuals_of(adapter_name)
    down_residual = None if down_buffer is None else factors.down.double() - inside.down
    up_residual = None if up_buffer is None else factors.up.double() - inside.up
    with_residual = replace(projected, down_residual=down_residual, up_residual=up_residual)
    tensors = {
        keys.COEFFICIENTS["down"]: projected.down,
        keys.COEFFICIENTS["up"]: ratio * projected.up,
        keys.RESIDUALS["down"]: down_residual,
        keys.RESIDUALS["up"]: None if up_residual is None else ratio * up_residual,
    }
    stored = {suffix: tensor.float().contiguous() for suffix, tensor in tensors.items() if tensor is not None}
    return stored, metrics.module_error(factors, with_residual, bases)


def _state_dict(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return the adapter's tensors by their keys in a file, whether or not PEFT wraps the model."""
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {keys.MODEL_PREFIX + key.removeprefix(keys.MODEL_PREFIX): tensor.detach() for key, tensor in tensors.items()}


def _load_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str) -> None:
    """Load tensors under the keys of `_state_dict`."""
    prefix = "" if isinstance(model, PeftModel) else keys.MODEL_PREFIX
    tensors = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items()}
    set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)


def _is_update(key: str) -> bool:
    return key.rpartition(".")[2] in (*keys.COEFFICIENTS.values(), keys.CORE, *keys.RESIDUALS.values())


def _is_basis(key: str) -> bool:
    return key.rpartition(".")[2] in keys.BASIS_TENSORS


def _layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, EigenLoraxLayer]:
    """Return the adapted layers by module name; only the layers that have the adapter, if one is named."""
    return {
        name.removeprefix(keys.MODEL_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, EigenLoraxLayer) and (adapter_name is None or module.has_adapter(adapter_name))
    }


def _config(model: nn.Module, adapter_name: str) -> EigenLoraxConfig:
    """Return the config of an adapter; raise `AdapterNameError` if the model has no such EigenLoRAx adapter."""
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, EigenLoraxConfig):
        names = [name for name in configs if isinstance(configs[name], EigenLoraxConfig)]
        raise AdapterNameError(
            f"the model has no EigenLoRAx adapter {adapter_name!r}.{suggestion(adapter_name, names)} It has: "
            f"{', '.join(sorted(names)) or 'none'}."
        )
    return config
