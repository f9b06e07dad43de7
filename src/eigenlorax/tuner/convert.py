"""What PEFT reserves for LoRA, in our own words: export and import, swapping, scaling and combining adapters.

All of it works on coefficients: k × r products, no decomposition.
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
# What is lost where nothing but float32 rounds.
_ROUNDING = 1e-5


def to_lora(model: nn.Module, adapter_name: str = "default") -> Adapter:
    """An adapter of a model as an ordinary LoRA, heads and trained biases included; `write_adapter` saves it.

    Coefficients give rank r, a core gives min(k_down, k_up). The scaling is the one that is in force.
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
    heads = {key: value.cpu() for key, value in _state(model, adapter_name).items() if not _is_ours(key)}
    return coefficients.lora(adapter_name, modules, heads, asdict(config))


def from_lora(
    model: nn.Module,
    source: Source,
    adapter_name: str = "default",
    *,
    subspace: "str | os.PathLike[str] | Pack",
    **fields: Any,
) -> PeftModel:
    """The model with one more adapter: a LoRA, projected on a subspace, with its heads.

    Ranks, alphas, task type and saved modules are the LoRA's; `fields` are other ones of `EigenLoraxConfig`. A warning
    says how much of the update the subspace does not hold.
    """
    adapter = _read(source)
    theirs = {"r": 8, "lora_alpha": 8, "bias": "none", **adapter.config}
    if not adapter.config:
        first = next(iter(adapter.specs.values()))
        theirs |= {"r": first.rank, "lora_alpha": first.scaling * first.rank}
    taken = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "task_type", "modules_to_save")
    config = EigenLoraxConfig(
        subspace=subspace,
        **{
            **{field: theirs[field] for field in taken if theirs.get(field) is not None},
            "bias": theirs["bias"].replace("lora_only", "eigenlorax_only"),
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
    """Put another adapter in the place of one, in place, so that a compiled model stays compiled; its `delta_error`.

    source: a LoRA, such as `pack.adapter("sst2")` or a folder, of the same ranks. Modules that it lacks get zeros.
    Of an adapter of the same subspace nothing is lost; of another one, a warning says how much. What is outside of the
    subspace has a place in modules where the adapter had a rest. One whose subspace has grown since it was saved gets
    coefficients on all of it first, for which a compiled model is compiled once more.
    """
    _config(model, adapter_name)
    adapter = _read(source)
    layers = _layers(model, adapter_name)
    _check_unmerged(layers)
    _widen(model, adapter_name)
    state = _state(model, adapter_name)
    places = module_names.resolve_all(adapter.specs, layers)
    lacking = sorted(module for module, place in places.items() if place is None)
    if lacking:
        raise ModuleNameError(f"module {lacking[0]!r} of {adapter.name!r} has no coefficients in {adapter_name!r}.")
    new: dict[str, Tensor] = {key: torch.zeros_like(value) for key, value in state.items() if _is_update(key)}
    errors: list[ModuleError] = []
    for module, place in places.items():
        assert place is not None
        layer, factors = layers[place], adapter.modules[module]
        if not convolution.kernels_match(factors.kernel, layer.kernel):
            raise ShapeError(
                f"module {module}: the kernel of {adapter.name!r} is {factors.kernel}, and that of the model "
                f"{layer.kernel}. It is an adapter of another base model."
            )
        found, error = _projected(layer, adapter_name, factors)
        errors.append(error)
        for part, value in found.items():
            new[f"{keys.MODEL_PREFIX}{place}.{part}"] = value
    new |= {key: value for key, value in adapter.heads.items() if key in state}
    for key, value in new.items():
        if state[key].shape != value.shape:
            raise ShapeError(
                f"{key} is {tuple(state[key].shape)} in the model and {tuple(value.shape)} in {adapter.name!r}: "
                "adapters can be swapped if their ranks and heads have the same shapes."
            )
    inside = isinstance(model, PeftModel)
    loaded = {key if inside else key.removeprefix(keys.MODEL_PREFIX): value for key, value in {**state, **new}.items()}
    set_peft_model_state_dict(model, loaded, adapter_name=adapter_name)
    lost = metrics.adapter_error(errors).delta_error
    if lost > _ROUNDING:
        warnings.warn(
            f"{adapter.name!r} lies outside the subspace with {lost:.4f} of its update (delta error), and loses that.",
            ProjectionWarning,
            stacklevel=2,
        )
    return lost


@contextmanager
def scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """All active adapters with their scaling multiplied by `factor`, for the length of the block."""
    factor, layers = to_float("factor", factor), _layers(model)
    _check_unmerged(layers)
    before = {name: dict(layer.scaling) for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.scale_layer(factor)
        yield
    finally:
        for name, layer in layers.items():
            layer.scaling.update(before[name])
            layer.blend()


def combine(model: PeftModel, adapters: Mapping[str, float] | Sequence[str], adapter_name: str) -> None:
    """One more adapter, the weighted sum Σ weight · update of others of one subspace: exact, of the sum of their ranks.

    A list of names gives their mean. Heads are not combined: those of the new adapter are as PEFT starts them.
    """
    weights = dict(adapters) if isinstance(adapters, Mapping) else {name: 1 / len(adapters) for name in adapters}
    if not weights:
        raise OptionError("no adapter was named to combine.")
    configs = {name: _config(model, name) for name in weights}
    for name in weights:
        # those of an earlier time of one subspace
        _widen(model, name)
    first = next(iter(configs.values()))
    if len({(c.subspace_fingerprint, c.n_extra, c.extra_seed, c.core) for c in configs.values()}) > 1:
        raise OptionError(
            f"adapters {', '.join(sorted(weights))} differ in their subspace, or only some of them are cores: their "
            "coefficients cannot be added."
        )
    layers = {name: layer for name, layer in _layers(model).items() if any(map(layer.has_adapter, weights))}
    ranks = {name: sum(layer.r[one] for one in weights if layer.has_adapter(one)) for name, layer in layers.items()}
    rank = max(ranks.values())
    # alpha = r in every module: a scaling of 1
    pattern = {} if first.core else {f"^{re.escape(name)}$": one for name, one in ranks.items() if one != rank}
    config = replace(
        first,
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=sorted(layers),
        rests={
            name: sides
            for name, layer in layers.items()
            if (sides := sorted({side for one in weights for side in layer.residual_sides(one)}))
        },
        modules_to_save=None,
        start="zero",
    )
    config.inference_mode = True
    model.add_adapter(adapter_name, config)
    with torch.no_grad():
        for layer in layers.values():
            parts = [(one, weight * layer.scaling[one]) for one, weight in weights.items() if layer.has_adapter(one)]
            if first.core:
                cores = [weight * layer.eigenlorax_core[one] for one, weight in parts]
                layer.eigenlorax_core[adapter_name].copy_(torch.stack(cores).sum(dim=0))
            else:
                layer.eigenlorax_down[adapter_name].copy_(torch.cat([layer.eigenlorax_down[one] for one, _ in parts]))
                ups = [weight * layer.eigenlorax_up[one] for one, weight in parts]
                layer.eigenlorax_up[adapter_name].copy_(torch.cat(ups, dim=1))
                _combine_rests(layer, parts, adapter_name)
            layer.blend()


def _combine_rests(layer: EigenLoraxLayer, parts: Sequence[tuple[str, float]], adapter_name: str) -> None:
    """Put the rests of adapters beside each other, as their coefficients are; parts: their names and weights."""
    down, up = layer.residuals_of(adapter_name)
    start = 0
    for one, weight in parts:
        end = start + layer.r[one]
        own_down, own_up = layer.residuals_of(one)
        if down is not None and own_down is not None:
            down[start:end] = own_down
        if up is not None and own_up is not None:
            up[:, start:end] = weight * own_up
        start = end


def _widen(model: nn.Module, adapter_name: str) -> None:
    """Let an adapter have coefficients on all of its subspace, if that has grown since the adapter was saved."""
    config, layers = _config(model, adapter_name), _layers(model, adapter_name).values()
    if config.embed_subspace or config.n_extra:
        return
    for layer in layers:
        layer.extend_coefficients(adapter_name)
        config.subspace_fingerprint = layer.subspace_of[adapter_name]


def _check_unmerged(layers: Mapping[str, EigenLoraxLayer]) -> None:
    """What is merged is in the base model's weights, where no change of coefficients or scaling reaches it."""
    merged = sorted({adapter for layer in layers.values() for adapter in layer.merged_adapters})
    if merged:
        raise OptionError(f"adapters are merged: {', '.join(merged)}. Call unmerge_adapter() first.")


def _read(source: Source) -> Adapter:
    adapter = source if isinstance(source, Adapter) else formats.read_adapter(os.fspath(source))
    if adapter.carried:
        raise OptionError(
            f"the LoRA {adapter.name!r} has tensors that coefficients cannot express, such as "
            f"{min(adapter.carried)!r}: let PEFT load it as it is."
        )
    return adapter


def _projected(
    layer: EigenLoraxLayer, adapter_name: str, factors: LoRAFactors
) -> tuple[dict[str, Tensor], ModuleError]:
    """A LoRA's coefficients for a layer, by the names they are saved under, and what they lose of it.

    The layer's scaling stays as it is, since a compiled model has it built in: the factors take the difference.
    """
    bases = ModuleBases(*(Basis(basis.cpu(), torch.zeros(0), energy=1.0) for basis in layer.bases_of(adapter_name)))
    found = projection.project(factors, bases)
    ratio = factors.scaling / layer.scaling[adapter_name]
    if adapter_name in layer.eigenlorax_core:
        error = metrics.module_error(factors, found, bases)
        return {keys.CORE: (ratio * found.up @ found.down).float()}, error
    inside = projection.reconstruct(found, bases)
    down_room, up_room = layer.residuals_of(adapter_name)
    down_rest = None if down_room is None else factors.down.double() - inside.down
    up_rest = None if up_room is None else factors.up.double() - inside.up
    whole = replace(found, down_residual=down_rest, up_residual=up_rest)
    parts = {
        keys.COEFFICIENTS["down"]: found.down,
        keys.COEFFICIENTS["up"]: ratio * found.up,
        keys.RESIDUALS["down"]: down_rest,
        keys.RESIDUALS["up"]: None if up_rest is None else ratio * up_rest,
    }
    kept = {name: value.float().contiguous() for name, value in parts.items() if value is not None}
    return kept, metrics.module_error(factors, whole, bases)


def _state(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The adapter's tensors under the keys they are saved under."""
    found = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {keys.MODEL_PREFIX + key.removeprefix(keys.MODEL_PREFIX): value.detach() for key, value in found.items()}


def _is_ours(key: str) -> bool:
    return _is_update(key) or key.rpartition(".")[2] in keys.EMBEDDED.values()


def _is_update(key: str) -> bool:
    return key.rpartition(".")[2] in (*keys.COEFFICIENTS.values(), keys.CORE, *keys.RESIDUALS.values())


def _layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, EigenLoraxLayer]:
    """The adapted layers by module name; those that have the adapter, where one is named."""
    return {
        name.removeprefix(keys.MODEL_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, EigenLoraxLayer) and (adapter_name is None or module.has_adapter(adapter_name))
    }


def _config(model: nn.Module, adapter_name: str) -> EigenLoraxConfig:
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, EigenLoraxConfig):
        ours = [name for name, one in configs.items() if isinstance(one, EigenLoraxConfig)]
        raise AdapterNameError(
            f"the model has no EigenLoRAx adapter {adapter_name!r}.{suggestion(adapter_name, ours)} It has: "
            f"{', '.join(sorted(ours)) or 'none'}."
        )
    return config
