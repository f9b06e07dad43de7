"""`EigenLoraxModel`, the tuner, which wraps the modules of a model that have bases in the subspace."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..codec.storage.base import ModuleSlot
from ..codec.storage.table import as_float_tensors
from ..codec.tensor_codes import References, decode_heads
from ..core import convolution, keys, module_patterns
from ..core.subspace import Subspace
from ..errors import FormatError, ModuleNameError, OptionError, RankWarning
from ..formats import coefficients
from . import gradient_bases, renaming, resolve
from .config import EigenLoraxConfig
from .forward import AdaptedLayer, wrap_layer
from .initial_coefficients import InitialCoefficients, InitialCore, initial_core
from .layer import EigenLoraxLayer
from .parents import Parent
from .resolve import EmbeddedSubspace, ResolvedSubspace
from .supported_modules import in_out_features, is_supported

_FSDP = "_fsdp_wrapped_module."
"""Part of module names that FSDP adds. Names of tensors do not have it."""


class EigenLoraxModel(BaseTuner):
    """
    Creates an EigenLoRAx model from a pretrained model: coefficients over a frozen subspace.

    Paper: https://huggingface.co/papers/2502.04700.

    Args:
        model (`torch.nn.Module`): The model to be adapted.
        config ([`EigenLoraxConfig`]): The configuration.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`): Create empty coefficients on the meta device. Bases are never on it.

    Raises:
        ModuleNameError: The model lacks the modules of the subspace.
        OptionError: The subspace cannot be found, or has no components to train.

    Example:
        >>> import eigenlorax, peft
        >>> peft_model = peft.get_peft_model(model, eigenlorax.EigenLoraxConfig(subspace="lm-pack/", r=4))
        >>> isinstance(peft_model.base_model, eigenlorax.EigenLoraxModel)
        True
    """

    prefix = "eigenlorax_"
    tuner_layer_cls = EigenLoraxLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_adapter_config(self, peft_config: EigenLoraxConfig, model_config: dict[str, Any]) -> EigenLoraxConfig:
        """Complete and check the config. All errors are raised here, before a layer of the model is changed."""
        resolve.check_not_carried(peft_config)
        resolved = resolve.resolve_subspace(peft_config)
        resolve.expand_residual_sides(peft_config, resolved)
        if peft_config.target_modules is None:
            shared = self._shared_modules(resolved, peft_config)
            if not shared and resolved.pack is None and peft_config.subspace_fingerprint is None:
                raise OptionError(
                    f"n_gradient={peft_config.n_gradient} without a pack needs target_modules: the names of the "
                    "modules to adapt, or 'all-linear'. Or pass a pack as subspace=."
                )
            if not shared:
                raise ModuleNameError(
                    f"the model has none of the modules of the subspace {resolved.fingerprint[:12]}…. It is a "
                    "different base model; `eigenlorax inspect` prints the base model of the pack."
                )
            peft_config.target_modules = set(shared)
        peft_config = _maybe_include_all_linear_layers(peft_config, self.model)
        modules = dict(self._base_modules())
        renaming.rename_targets(
            peft_config,
            modules,
            lambda: {n: resolved.subspace_name(n, peft_config) for n, m in modules.items() if is_supported(m)},
            self._check_target_module_exists,
        )
        targets = {n: module for n, module in modules.items() if self._check_target_module_exists(peft_config, n)}
        for name, module in targets.items():
            if reason := convolution.unsupported_reason(module):
                raise TypeError(f"module {name} is {reason}. Exclude it with exclude_modules.")
        targets = {name: module for name, module in targets.items() if is_supported(module)}
        sizes = [resolved.bases(name, peft_config, *in_out_features(module)) for name, module in targets.items()]
        resolve.record_kernels(peft_config, {name: convolution.kernel_size(module) for name, module in targets.items()})
        resolve.rename_residuals(peft_config, targets)
        largest = max([peft_config.r, *peft_config.rank_pattern.values()])
        smallest = min((min(bases.down.k, bases.up.k) + peft_config.n_gradient for bases in sizes), default=largest)
        trained = not (peft_config.inference_mode or peft_config.rests or peft_config.n_gradient)
        if trained and sizes and not any(min(bases.down.k, bases.up.k) for bases in sizes):
            raise OptionError(
                "the subspace has no component in any of these modules, so there is nothing to train: its pack was "
                "fitted for an error bound or a size, and components saved no bytes. Fit the pack with a basis for "
                "training, basis=32 (--basis 32), or for training alone, purpose='training' (--for training); or add "
                "random components (n_extra=32)."
            )
        if smallest < largest and not (peft_config.core or peft_config.inference_mode):
            warnings.warn(
                f"r={largest} (--rank) is larger than the {smallest} components of a module, so the rank of its update "
                f"is at most {smallest}: a higher rank trains more numbers for the same updates.",
                RankWarning,
                stacklevel=2,
            )
        resolve.check_added_components(peft_config, resolved)
        resolve.check_base_model(resolved, getattr(self.model, "name_or_path", None))
        self._resolved: ResolvedSubspace | EmbeddedSubspace | None = resolved
        self._initial_core: InitialCore | None = initial_core(peft_config, resolved)
        return peft_config

    def _shared_modules(self, resolved: ResolvedSubspace | EmbeddedSubspace, config: EigenLoraxConfig) -> list[str]:
        """Return the modules that the model and the subspace have in common and that the config does not exclude."""
        shared = [
            name
            for name, module in self._base_modules()
            if is_supported(module) and resolved.subspace_name(name, config) is not None
        ]
        # PEFT applies layers_to_transform only to targets that are not full names
        by_suffix = copy.copy(config)
        by_suffix.target_modules = {name.rpartition(".")[2] for name in shared}
        selected = [name for name in shared if self._check_target_module_exists(by_suffix, name)]
        if shared and not selected:
            raise OptionError(
                f"none of the {len(shared)} modules of the subspace is selected by "
                f"exclude_modules={config.exclude_modules} and layers_to_transform={config.layers_to_transform}."
            )
        return selected

    def _base_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules of the model that can be targets, without those inside of adapted layers.

        For a layer that this method has adapted, the base layer is yielded.
        """
        inside: tuple[str, ...] = ()
        for name, module in self.model.named_modules():
            if name.startswith(inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, f"{name}.")
                if isinstance(module, EigenLoraxLayer):
                    yield name, module.get_base_layer()
            else:
                yield name, module

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, as in PEFT, and release the pack that it was read from."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._resolved = self._initial_core = None

    def _create_and_replace(
        self,
        peft_config: EigenLoraxConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not is_supported(base_layer):
            raise TypeError(
                f"Target module {current_key}, {target}, is not supported. Only `torch.nn.Linear` (quantised or not), "
                "`transformers.pytorch_utils.Conv1D` and `torch.nn.Conv1d`, `Conv2d` and `Conv3d` are."
            )
        assert self._resolved is not None
        assert self._initial_core is not None
        bases = self._resolved.bases(current_key, peft_config, *in_out_features(base_layer))
        subspace_name = self._resolved.subspace_name(current_key, peft_config)
        core = self._initial_core(subspace_name, bases) if subspace_name is not None else None
        n_gradient = None
        if peft_config.n_gradient and isinstance(self._resolved, ResolvedSubspace):
            bases, n_gradient = gradient_bases.reserve_rows(bases, peft_config.n_gradient)
            core = gradient_bases.pad_core(core, n_gradient)
        k_down, k_up = self._resolved.n_components(subspace_name, bases)
        start = InitialCoefficients(
            start=peft_config.start,
            k_down=k_down,
            k_up=k_up,
            core=core[:k_up, :k_down] if core is not None else None,
            as_core=peft_config.core,
            init_weights=peft_config.init_weights,
        )
        ranks, alphas = peft_config.rank_pattern, peft_config.alpha_pattern
        layer = (
            target if isinstance(target, AdaptedLayer) else self._wrap(peft_config, adapter_name, target, base_layer)
        )
        if (
            layer is not target
            and (serving := next((existing.serving for existing in self._layers()), None)) is not None
        ):
            layer.serve(serving.dtype)
        layer.update_layer(
            adapter_name,
            bases,
            self._resolved.fingerprint,
            start,
            config=peft_config,
            r=module_patterns.ModulePatterns(ranks).value(current_key, peft_config.r),
            lora_alpha=module_patterns.ModulePatterns(alphas).value(current_key, peft_config.lora_alpha),
            residual_sides=peft_config.rests.get(current_key, ()),
            n_gradient=n_gradient,
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                # a further adapter is not trainable until it is the active one
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _wrap(
        self, config: EigenLoraxConfig, adapter_name: str, target: nn.Module, base_layer: nn.Module
    ) -> AdaptedLayer:
        fan_in_fan_out = not convolution.is_supported(base_layer) and _fan_in_fan_out(base_layer, config)
        return wrap_layer(target, adapter_name, fan_in_fan_out, **get_quantization_kwargs(self.model))

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Return the coefficients and residuals, and the bases if the config embeds them."""
        config.check_saving(adapter_name)
        tensors: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        layers = _layers_with(model, adapter_name)
        for layer in layers.values():
            layer.check_decoded()
            layer.check_gradients([adapter_name])
        config.rests = {
            name: layer.residual_sides(adapter_name)
            for name, layer in layers.items()
            if layer.has_residual(adapter_name)
        }
        config.embedded_shapes = {}
        # the adapter may have been loaded with an embedded subspace
        tensors = {key: tensor for key, tensor in tensors.items() if ".eigenlorax_embedded_" not in key}
        for wrapped_name, module in model.named_modules():
            if not (isinstance(module, EigenLoraxLayer) and module.has_adapter(adapter_name)):
                continue
            name, saved = wrapped_name.replace(_FSDP, ""), {}
            if config.embed_subspace:
                bases = module.bases_of(adapter_name)
                saved = {keys.EMBEDDED[side]: _to_narrowest_dtype(b) for side, b in zip(keys.SIDES, bases, strict=True)}
                config.embedded_shapes[name.removeprefix(keys.MODEL_PREFIX)] = [len(basis) for basis in bases]
            elif config.n_gradient:
                saved = gradient_bases.saved_tensors(module, adapter_name)
            tensors |= {f"{name}.{suffix}.{adapter_name}": tensor for suffix, tensor in saved.items()}
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Decode coefficients that are not stored as floats, and rename modules that transformers has renamed."""
        layers = _layers_with(model, adapter_name)
        renamed = renaming.rename_state_dict(_decode(state_dict, config, layers), layers)
        _check_residuals(layers, adapter_name, renamed)
        renamed = gradient_bases.decode_tensors(layers, adapter_name, renamed)
        config.coefficient_dtype, config.parent = None, {}
        for layer in layers.values():
            layer.undecoded.pop(adapter_name, None)
            layer.gradients_ready.pop(adapter_name, None)
        tensors: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)
        return tensors

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names`, one per row of the batch, to every layer during one call."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        adapters = {name for layer in self._layers() for name in layer.subspace_of}
        unknown = set(adapter_names) - adapters - {"__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        beams = kwargs.get("num_beams") or 1
        # generation repeats each row of the decoder's batch for every beam, but not the rows of an encoder
        repeated = [name for name in adapter_names for _ in range(beams)]
        encoder = _encoder(self.model) if beams > 1 else None
        inside_encoder = set(encoder.modules()) if encoder is not None else set()
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_names, adapter_names=adapter_names if module in inside_encoder else repeated),
                with_kwargs=True,
            )
            for module in self.model.modules()
            if isinstance(module, EigenLoraxLayer | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _layers(self) -> Iterator[EigenLoraxLayer]:
        return (module for module in self.model.modules() if isinstance(module, EigenLoraxLayer))


def _layers_with(model: nn.Module, adapter_name: str) -> dict[str, EigenLoraxLayer]:
    """Return the layers that have an adapter, by the names of their modules in the base model."""
    return {
        name.replace(_FSDP, "").removeprefix(keys.MODEL_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, EigenLoraxLayer) and module.has_adapter(adapter_name)
    }


def _decode(
    state_dict: Mapping[str, Tensor], config: EigenLoraxConfig, layers: Mapping[str, EigenLoraxLayer]
) -> dict[str, Tensor]:
    """Return an adapter's tensors with coefficients as floats, whatever dtype the file stores them in."""

    @cache
    def resolved() -> ResolvedSubspace | EmbeddedSubspace:
        return resolve.resolve_subspace(config)

    def slots() -> dict[str, ModuleSlot]:
        # an entropy-coded adapter is read by the subspace's module names, which may differ from its own names
        by_module = coefficients.slots({**config.to_dict(), "target_modules": list(layers)}, "the adapter's config")
        return {
            name: replace(slot, subspace_module=resolved().subspace_name(name, config) or name)
            for name, slot in by_module.items()
        }

    def subspace() -> Subspace:
        reference = resolved()
        assert isinstance(reference, ResolvedSubspace)
        return reference.saved_subspace or reference.subspace

    parent = Parent.of(config)
    if parent is not None:
        state_dict = parent.with_codes(state_dict, resolved().pack)
    if keys.CODED_HEADS in state_dict:
        pack = resolved().pack
        references = pack.reference_tensors if pack is not None else References()
        state_dict = decode_heads(state_dict, references)
    return as_float_tensors(state_dict, slots, subspace)


def _check_residuals(
    layers: Mapping[str, EigenLoraxLayer], adapter_name: str, state_dict: Mapping[str, Tensor]
) -> None:
    """Raise `FormatError` if the residuals in an adapter's file differ from the list in its config.

    PEFT would ignore a residual that no layer expects, and leave a missing one at zero.
    """
    sides = {suffix: side for side, suffix in keys.RESIDUALS.items()}
    in_file = {
        (keys.module_of_key(key), sides[suffix]) for key in state_dict if (suffix := key.rpartition(".")[2]) in sides
    }
    in_config = {(name, side) for name, layer in layers.items() for side in layer.residual_sides(adapter_name)}
    for module, side in sorted(in_file ^ in_config, key=str):
        has, lacks = ("file", "config") if (module, side) in in_file else ("config", "file")
        raise FormatError(
            f"the adapter's {has} has a residual of the {side} side of {module}, but its {lacks} does not: they do not "
            "belong together. Save the adapter again, or load it from its pack."
        )


def _to_narrowest_dtype(basis: Tensor) -> Tensor:
    """Return the same numbers in the narrowest floating-point dtype that represents them exactly."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        if torch.equal(basis.to(dtype).to(basis.dtype), basis):
            return basis.to(dtype)
    return basis


def _pass_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _encoder(model: nn.Module) -> nn.Module | None:
    """Return the encoder of an encoder-decoder model; None for any other model."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return None
    encoder: nn.Module = model.get_encoder()
    return encoder


def _fan_in_fan_out(base_layer: nn.Module, config: EigenLoraxConfig) -> bool:
    """Return whether the layer's weight is (in, out). Correct a config that states the opposite, as LoRA does."""
    fan_in_fan_out = isinstance(base_layer, Conv1D)
    if config.fan_in_fan_out != fan_in_fan_out:
        kind = "Conv1D" if fan_in_fan_out else "torch.nn.Linear"
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is `{kind}`. Setting "
            f"fan_in_fan_out to {fan_in_fan_out}.",
            stacklevel=2,
        )
        config.fan_in_fan_out = fan_in_fan_out
    return fan_in_fan_out
