"""The tuner: finds the modules of a model that the subspace has, and puts coefficients beside them."""

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
from ..core import convolution, keys, module_patterns
from ..core.subspace import Subspace
from ..errors import FormatError, ModuleNameError, OptionError, RankWarning
from ..formats import coefficients
from . import names, starts
from . import reference as references
from .adapted import AdaptedLayer, wrap_layer
from .config import EigenLoraxConfig
from .layer import EigenLoraxLayer
from .reference import Embedded, Reference
from .starts import Cores, Start
from .supported_modules import in_out_features, is_supported

_FSDP = "_fsdp_wrapped_module."
"""What FSDP puts into names of modules, and takes out of those of tensors."""


class EigenLoraxModel(BaseTuner):
    """Coefficients over a frozen subspace, on linear layers and convolutions of a model (arXiv 2502.04700).

    Args:
        model (`torch.nn.Module`): The model to be adapted.
        config ([`EigenLoraxConfig`]): The configuration.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`): Create empty coefficients on the meta device; bases are always real.
    """

    prefix = "eigenlorax_"
    tuner_layer_cls = EigenLoraxLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_adapter_config(self, peft_config: EigenLoraxConfig, model_config: dict[str, Any]) -> EigenLoraxConfig:
        """Everything that can be wrong is found here, before a layer is touched."""
        references.check_whole(peft_config)
        reference = references.resolve(peft_config)
        if peft_config.target_modules is None:
            shared = self._shared_modules(reference, peft_config)
            if not shared:
                raise ModuleNameError(
                    f"the model has none of the modules of the subspace {reference.fingerprint[:12]}…. It is a "
                    "different base model; `eigenlorax inspect` says which one the pack belongs to."
                )
            peft_config.target_modules = set(shared)
        peft_config = _maybe_include_all_linear_layers(peft_config, self.model)
        modules = dict(self._base_modules())
        names.follow(
            peft_config,
            modules,
            lambda: {n: reference.place(n, peft_config) for n, module in modules.items() if is_supported(module)},
            self._check_target_module_exists,
        )
        targets = {n: module for n, module in modules.items() if self._check_target_module_exists(peft_config, n)}
        for name, module in targets.items():
            if why := convolution.unsupported_reason(module):
                raise TypeError(f"module {name} is {why}: it is not supported. Keep it out with exclude_modules.")
        targets = {name: module for name, module in targets.items() if is_supported(module)}
        sizes = [reference.bases(name, peft_config, *in_out_features(module)) for name, module in targets.items()]
        references.note_kernels(peft_config, {name: convolution.kernel_of(module) for name, module in targets.items()})
        references.note_rests(peft_config, targets)
        largest = max([peft_config.r, *peft_config.rank_pattern.values()])
        smallest = min((min(bases.down.k, bases.up.k) for bases in sizes), default=largest)
        trained = not peft_config.inference_mode and not peft_config.rests
        if trained and sizes and not any(min(bases.down.k, bases.up.k) for bases in sizes):
            raise OptionError(
                "the subspace has no direction in any of these modules, so that nothing of them would be trained: its "
                "pack was made for an error or a size, and no direction saved bytes. Fit one to train on, with "
                "n_components=32 (-k 32), or add random directions (n_extra=32)."
            )
        if smallest < largest and not (peft_config.core or peft_config.inference_mode):
            warnings.warn(
                f"r={largest} is more than the {smallest} components of a module: the rank of its update is at "
                "most that.",
                RankWarning,
                stacklevel=2,
            )
        references.check_extra(peft_config, reference)
        references.check_base_model(reference, getattr(self.model, "name_or_path", None))
        self._reference: Reference | Embedded | None = reference
        self._cores: Cores | None = starts.cores(peft_config, reference)
        return peft_config

    def _shared_modules(self, reference: Reference | Embedded, config: EigenLoraxConfig) -> list[str]:
        """The layers of the model that the subspace has, in the layers that the config asks for."""
        shared = [
            name
            for name, module in self._base_modules()
            if is_supported(module) and reference.place(name, config) is not None
        ]
        # PEFT looks at layers_to_transform only where a target is less than a whole name
        by_suffix = copy.copy(config)
        by_suffix.target_modules = {name.rpartition(".")[2] for name in shared}
        wanted = [name for name in shared if self._check_target_module_exists(by_suffix, name)]
        if shared and not wanted:
            raise OptionError(
                f"none of the {len(shared)} modules of the subspace is left by "
                f"exclude_modules={config.exclude_modules} and layers_to_transform={config.layers_to_transform}."
            )
        return wanted

    def _base_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules of the model by name, without what is inside of adapted ones; their base layers for ours."""
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
        """As in PEFT; what was found out about the subspace is let go afterwards, with the pack that it is from."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._reference = self._cores = None

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
        assert self._reference is not None
        assert self._cores is not None
        bases = self._reference.bases(current_key, peft_config, *in_out_features(base_layer))
        place = self._reference.place(current_key, peft_config)
        assert place is not None
        k_down, k_up = self._reference.sizes(place, bases)
        core = self._cores(place, bases)
        start = Start(
            kind=peft_config.start,
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
        if layer is not target and (serving := next((one.serving for one in self._layers()), None)) is not None:
            layer.serve(serving.dtype)
        layer.update_layer(
            adapter_name,
            bases,
            self._reference.fingerprint,
            start,
            config=peft_config,
            r=module_patterns.ModulePatterns(ranks).value(current_key, peft_config.r),
            lora_alpha=module_patterns.ModulePatterns(alphas).value(current_key, peft_config.lora_alpha),
            residual_sides=peft_config.rests.get(current_key, ()),
            inference_mode=peft_config.inference_mode,
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
        """The coefficients, what is beside them, and the bases where the config says that they are saved too."""
        config.check_saving(adapter_name)
        found: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        own = _own_layers(model, adapter_name)
        for layer in own.values():
            layer.check_decoded()
        config.rests = {
            name: layer.residual_sides(adapter_name) for name, layer in own.items() if layer.has_residual(adapter_name)
        }
        config.embedded_shapes = {}
        if not config.embed_subspace:
            # of an adapter that was loaded with its subspace
            found = {key: value for key, value in found.items() if ".eigenlorax_embedded_" not in key}
        else:
            for wrapped, module in model.named_modules():
                if isinstance(module, EigenLoraxLayer) and module.has_adapter(adapter_name):
                    name, bases = wrapped.replace(_FSDP, ""), module.bases_of(adapter_name)
                    for side, basis in zip(keys.SIDES, bases, strict=True):
                        found[f"{name}.eigenlorax_embedded_{side}.{adapter_name}"] = _narrowed(basis)
                    config.embedded_shapes[name.removeprefix(keys.MODEL_PREFIX)] = [len(basis) for basis in bases]
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As in PEFT, after coefficients that are stored in another way became floats, and modules that transformers
        has renamed got the model's names."""
        own = _own_layers(model, adapter_name)
        named = names.of_the_model(_plain(state_dict, config, own), own)
        _check_rests(own, adapter_name, named)
        config.coefficient_dtype = None
        for layer in own.values():
            layer.undecoded.pop(adapter_name, None)
        found: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, named)
        return found

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Give `adapter_names`, one a row of the batch, to every layer for the time of one call."""
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
        # generation repeats each row of the decoder's batch once a beam; an encoder sees the batch as it was given
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


def _own_layers(model: nn.Module, adapter_name: str) -> dict[str, EigenLoraxLayer]:
    """The layers that have an adapter, by the names of their modules in the base model."""
    return {
        name.replace(_FSDP, "").removeprefix(keys.MODEL_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, EigenLoraxLayer) and module.has_adapter(adapter_name)
    }


def _plain(
    state_dict: Mapping[str, Tensor], config: EigenLoraxConfig, layers: Mapping[str, EigenLoraxLayer]
) -> dict[str, Tensor]:
    """Coefficients as floats, however the adapter's file has them."""

    @cache
    def reference() -> Reference | Embedded:
        return references.resolve(config)

    def slots() -> dict[str, ModuleSlot]:
        # a coded adapter is read by the subspace's names of modules, which its own may not be any more
        own = coefficients.slots({**config.to_dict(), "target_modules": list(layers)}, "the adapter's config")
        return {
            name: replace(slot, subspace_module=reference().place(name, config) or name) for name, slot in own.items()
        }

    def subspace() -> Subspace:
        found = reference()
        assert isinstance(found, Reference)
        return found.before or found.subspace

    return as_float_tensors(state_dict, slots, subspace)


def _check_rests(layers: Mapping[str, EigenLoraxLayer], adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """`FormatError` unless the rests of an adapter's file are those that its config has told of: PEFT would pass by
    what has no room, and leave zeros where there is room for something."""
    sides = {part: side for side, part in keys.RESIDUALS.items()}
    there = {(keys.module_of_key(key), sides[part]) for key in state_dict if (part := key.rpartition(".")[2]) in sides}
    room = {(name, side) for name, layer in layers.items() for side in layer.residual_sides(adapter_name)}
    for module, side in sorted(there ^ room, key=str):
        has, lacks = ("file", "config") if (module, side) in there else ("config", "file")
        raise FormatError(
            f"the adapter's {has} has a rest of the {side} side of {module}, and its {lacks} does not: they do not "
            "belong together. Save the adapter again, or take it from its pack."
        )


def _narrowed(basis: Tensor) -> Tensor:
    """The same numbers in the narrowest dtype that holds them."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        if torch.equal(basis.to(dtype).to(basis.dtype), basis):
            return basis.to(dtype)
    return basis


def _pass_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder model."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return None
    encoder: nn.Module = model.get_encoder()
    return encoder


def _fan_in_fan_out(base_layer: nn.Module, config: EigenLoraxConfig) -> bool:
    """Whether the layer's weight is (in, out). A config that says otherwise is corrected, as in LoRA."""
    wanted = isinstance(base_layer, Conv1D)
    if config.fan_in_fan_out != wanted:
        kind = "Conv1D" if wanted else "torch.nn.Linear"
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is `{kind}`. Setting "
            f"fan_in_fan_out to {wanted}.",
            stacklevel=2,
        )
        config.fan_in_fan_out = wanted
    return wanted
