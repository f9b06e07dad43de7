"""The state of an adapted layer: the coefficients and residuals of its adapters, and which of them are active.

The bases are in `layer_bases`, the forward pass and merging in `forward`.
"""

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn.functional import pad

from ..core import convolution, keys
from ..core.coefficients import Coefficients
from ..core.subspace import ModuleBases
from ..errors import FormatError, OptionError
from .blend import Blend
from .config import EigenLoraxConfig
from .initial_coefficients import InitialCoefficients
from .layer_bases import LayerWithBases
from .supported_modules import in_out_features


class EigenLoraxLayer(LayerWithBases):
    """Coefficients by adapter name, on the bases of `LayerWithBases`."""

    _active_adapter: str | list[str]
    # List all names of layers that may contain adapter weights
    adapter_layer_names = ("eigenlorax_down", "eigenlorax_up", "eigenlorax_core")
    # All names of other parameters that may contain adapter-related parameters. The buffers of residuals keep the names
    # that they have in the state dict.
    other_param_names = (
        "r",
        "lora_alpha",
        "use_rslora",
        "scaling",
        "eigenlorax_dropout",
        "subspace_of",
        "n_components",
        "eigenlorax_down_rest",
        "eigenlorax_up_rest",
        "undecoded",
        "n_gradient",
        "gradients_ready",
    )

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer)
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.scaling: dict[str, float] = {}
        # storage dtype of adapters whose file does not store floats, until they are decoded
        self.undecoded: dict[str, str] = {}
        # (down, up) gradient components of adapters that have some, and whether they are there or zeros in their place
        self.n_gradient: dict[str, tuple[int, int]] = {}
        self.gradients_ready: dict[str, bool] = {}
        self.eigenlorax_dropout = nn.ModuleDict({})
        # Actual trainable parameters: (r, k_down) and (k_up, r), or one (k_up, k_down)
        self.eigenlorax_down = nn.ParameterDict({})
        self.eigenlorax_up = nn.ParameterDict({})
        self.eigenlorax_core = nn.ParameterDict({})
        # (r, in) and (out, r), the residuals of adapters that have one
        self.eigenlorax_down_rest = BufferDict({}, persistent=True)
        self.eigenlorax_up_rest = BufferDict({}, persistent=True)
        # (k_up, k_down), the sum of the active cores of each subspace, if the layer serves
        self.eigenlorax_blend = BufferDict({}, persistent=False)
        # "down" (rows, in) and "up" (out, rows), the active adapters with a residual as one LoRA
        self.eigenlorax_factors = BufferDict({}, persistent=False)
        self.serving: Blend | None = None
        # Mark the weight as unmerged
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged_scaling: dict[str, float] = {}
        self.cast_input_dtype_enabled = True
        self.in_features, self.out_features = in_out_features(self.get_base_layer())
        self.kwargs = kwargs

    def update_layer(
        self,
        adapter_name: str,
        bases: ModuleBases,
        fingerprint: str,
        start: InitialCoefficients,
        *,
        config: EigenLoraxConfig,
        r: int,
        lora_alpha: float,
        residual_sides: Collection[str] = (),
        n_gradient: tuple[int, int] | None = None,
    ) -> None:
        """
        Add an adapter with its initial coefficients, and its bases unless the layer has them already.

        Args:
            adapter_name (`str`):
                The name of the adapter.
            bases (`ModuleBases`):
                The bases of the layer's module.
            fingerprint (`str`):
                The fingerprint of the subspace, under which the bases are shared by adapters.
            start (`InitialCoefficients`):
                The initial coefficients.
            config (`EigenLoraxConfig`):
                The configuration of the adapter.
            r (`int`), lora_alpha (`float`):
                Rank and alpha of this layer.
            residual_sides (`Collection[str]`):
                The sides, "down" or "up", on which the adapter has a residual. It is zero until it is loaded.
            n_gradient (`tuple`, *optional*):
                The numbers of gradient components (down, up) among the components of `bases`, the last ones, which are
                zero until they are computed or loaded. The bases then belong to the adapter alone.
        """
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.set_scale(adapter_name, 1.0)
        dropout = nn.Dropout(p=config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.eigenlorax_dropout[adapter_name] = dropout
        serving_dtype = self.serving.dtype if self.serving is not None else None
        embed = config.embed_subspace or n_gradient is not None
        self.add_bases(adapter_name, bases, fingerprint, embed=embed, dtype=serving_dtype)
        if n_gradient is not None:
            self.n_gradient[adapter_name] = n_gradient
            self.gradients_ready[adapter_name] = False
        if config.coefficient_dtype is not None:
            self.undecoded[adapter_name] = config.coefficient_dtype
        coefficients = start.coefficients(r, self.scaling[adapter_name])
        if config.core:
            (core,) = coefficients
            self.n_components[adapter_name] = core.shape[1], core.shape[0]
            self.eigenlorax_core[adapter_name] = nn.Parameter(core)
        else:
            down, up = coefficients
            self.n_components[adapter_name] = down.shape[1], up.shape[0]
            self.eigenlorax_down[adapter_name] = nn.Parameter(down)
            self.eigenlorax_up[adapter_name] = nn.Parameter(up)
            if "down" in residual_sides:
                self.eigenlorax_down_rest[adapter_name] = torch.zeros(r, self.in_features)
            if "up" in residual_sides:
                self.eigenlorax_up_rest[adapter_name] = torch.zeros(self.out_features, r)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if adapter_name in self.active_adapters or self.bases_key(adapter_name)[0] not in self.eigenlorax_blend:
            self.blend()

    def add_for_inference(
        self, adapter_name: str, bases: ModuleBases, fingerprint: str, coefficients: Coefficients
    ) -> None:
        """
        Add a frozen adapter with its coefficients as they are. It is not active yet; call `blend` afterwards.

        Args:
            adapter_name (`str`):
                The name of the adapter.
            bases (`ModuleBases`):
                The bases of the layer's module. They may have more components than the coefficients, if the subspace
                has grown since.
            fingerprint (`str`):
                The name under which the bases are shared by adapters.
            coefficients (`Coefficients`):
                The coefficients and residuals of the adapter.
        """
        self.r[adapter_name] = coefficients.rank
        self.lora_alpha[adapter_name] = coefficients.scaling * coefficients.rank
        self.use_rslora[adapter_name] = False
        self.scaling[adapter_name] = coefficients.scaling
        basis_dtype = self.serving.dtype if self.serving is not None else None
        self.add_bases(adapter_name, bases, fingerprint, embed=False, dtype=basis_dtype)
        self.n_components[adapter_name] = coefficients.down.shape[1], coefficients.up.shape[0]
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        layer_dtype = self.dtype
        for target, factor in ((self.eigenlorax_down, coefficients.down), (self.eigenlorax_up, coefficients.up)):
            # coefficients are never stored in a narrower dtype than the pack's
            wide = torch.promote_types(factor.dtype, layer_dtype) if layer_dtype is not None else factor.dtype
            target[adapter_name] = nn.Parameter(factor.to(device, wide), requires_grad=False)
        for target, side in ((self.eigenlorax_down_rest, "down"), (self.eigenlorax_up_rest, "up")):
            if (residual := coefficients.residual(side)) is not None:
                # a residual is as large as a LoRA, so it gets the dtype that a LoRA would have
                dtype = basis_dtype if basis_dtype not in (None, torch.int8) else layer_dtype
                target[adapter_name] = residual.to(device, dtype or torch.promote_types(residual.dtype, torch.float32))

    def extend_coefficients(self, adapter_name: str) -> None:
        """Give an adapter zero coefficients on the components by which its subspace has grown."""
        key = self.subspace_of[adapter_name]
        if adapter_name in self.eigenlorax_embedded_down or key not in self.eigenlorax_basis_down:
            return
        k_down, k_up = len(self.eigenlorax_basis_down[key]), len(self.eigenlorax_basis_up[key])
        old_k_down, old_k_up = self.n_components[adapter_name]
        self.n_components[adapter_name] = k_down, k_up
        for factors, padding in (
            (self.eigenlorax_down, (0, k_down - old_k_down)),
            (self.eigenlorax_up, (0, 0, 0, k_up - old_k_up)),
            (self.eigenlorax_core, (0, k_down - old_k_down, 0, k_up - old_k_up)),
        ):
            if adapter_name in factors and any(padding):
                factor = factors[adapter_name]
                factors[adapter_name] = nn.Parameter(pad(factor.detach(), padding), requires_grad=factor.requires_grad)
        self.blend()

    def has_adapter(self, adapter_name: str) -> bool:
        """Return whether the layer has coefficients of an adapter."""
        return adapter_name in self.eigenlorax_down or adapter_name in self.eigenlorax_core

    def check_decoded(self) -> None:
        """Raise `FormatError` if a loader has not decoded the coefficients of an adapter."""
        for name, stored in self.undecoded.items():
            raise FormatError(
                f"adapter {name!r} stores its coefficients as {stored}, which its loader did not decode: transformers' "
                "load_adapter supports floats only. Load it with PeftModel.from_pretrained, or `eigenlorax export` it."
            )

    def check_gradients(self, adapter_names: Iterable[str] | None = None) -> None:
        """Raise `OptionError` if the gradient components of an adapter were neither computed nor loaded.

        Args:
            adapter_names (`Iterable[str]`, *optional*):
                The names of the adapters. Default: the active adapters.
        """
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if not self.gradients_ready.get(name, True):
                raise OptionError(
                    f"adapter {name!r} has no gradient components yet. For a new adapter, call "
                    "eigenlorax.tuner.initialize_gradient_components(model, batches) before training; load a trained "
                    "one with PeftModel.from_pretrained."
                )

    def has_residual(self, adapter_name: str) -> bool:
        """Return whether an adapter has a residual on either side."""
        return adapter_name in self.eigenlorax_down_rest or adapter_name in self.eigenlorax_up_rest

    def residuals_of(self, adapter_name: str) -> tuple[Tensor | None, Tensor | None]:
        """Return the residuals (r, in) and (out, r) of an adapter's two factors, each None if it is zero."""
        return _entry(self.eigenlorax_down_rest, adapter_name), _entry(self.eigenlorax_up_rest, adapter_name)

    def residual_sides(self, adapter_name: str) -> list[str]:
        """Return the sides, "down" and "up", on which an adapter has a residual."""
        residuals = zip(keys.SIDES, self.residuals_of(adapter_name), strict=True)
        return [side for side, residual in residuals if residual is not None]

    def lora_factors_of(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return an adapter of two factors as the factors (r, in) and (out, r) of a LoRA, in float32 or wider.

        The scaling is not applied.
        """
        down, up = self.eigenlorax_down[adapter_name], self.eigenlorax_up[adapter_name]
        dtype = torch.promote_types(down.dtype, torch.float32)
        down_basis, up_basis = (basis.to(down.device, dtype) for basis in self.bases_of(adapter_name))
        down_residual, up_residual = self.residuals_of(adapter_name)
        down, up = down.to(dtype) @ down_basis, up_basis.mT @ up.to(dtype)
        return down if down_residual is None else down + down_residual, up if up_residual is None else up + up_residual

    def core_of(self, adapter_name: str) -> Tensor:
        """Return the core (k_up, k_down), the update in terms of the bases without the scaling."""
        if adapter_name in self.eigenlorax_core:
            return self.eigenlorax_core[adapter_name]
        return self.eigenlorax_up[adapter_name] @ self.eigenlorax_down[adapter_name]

    def factors_of(self, adapter_name: str) -> tuple[Tensor, Tensor | None]:
        """Return the coefficients (r, k_down) and (k_up, r), or a core (k_up, k_down) and None."""
        if adapter_name in self.eigenlorax_core:
            return self.eigenlorax_core[adapter_name], None
        return self.eigenlorax_down[adapter_name], self.eigenlorax_up[adapter_name]

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and its bases if no other adapter uses them."""
        super().delete_adapter(adapter_name)
        self.delete_unused_bases()
        self.blend()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scaling of an adapter to `scale` times the scaling of its config."""
        if adapter in self.r:
            divisor = math.sqrt(self.r[adapter]) if self.use_rslora[adapter] else self.r[adapter]
            self.scaling[adapter] = scale * self.lora_alpha[adapter] / divisor
            self._blend_if_changed()

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of all active adapters by `scale`."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale
        self._blend_if_changed()

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of all active adapters by `scale`; None resets it to the scaling of the config."""
        for adapter in self.active_adapters:
            if adapter in self.scaling and scale is not None:
                self.scaling[adapter] /= scale
            elif adapter in self.scaling:
                self.set_scale(adapter, 1.0)
        self._blend_if_changed()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters, as in PEFT. Adapters that were added for inference stay frozen."""
        if self.eigenlorax_dropout:
            super().set_adapter(adapter_names, inference_mode=inference_mode)
        else:
            self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._blend_if_changed()

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all adapters, as in PEFT."""
        super().enable_adapters(enabled)
        self._blend_if_changed()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def serve(self, dtype: torch.dtype | None = None) -> None:
        """
        Serve the active adapters from one core per subspace outside of training.

        The cores are buffers that are filled in place when other adapters become active. The forward pass reads the
        buffers only, so that a compiled model is not compiled again; coefficients get no gradients. Adapters with a
        residual are one LoRA that is filled in the same way.

        Args:
            dtype (`torch.dtype`, *optional*):
                Dtype of the bases, unless they are embedded. `torch.int8` stores 8 bits per entry and a scale per row.
                By default they are unchanged.
        """
        self.check_gradients(self.gradients_ready)
        if self.serving is None:
            self.register_load_state_dict_post_hook(_blend_after_loading)
        self.serving = Blend(dtype)
        if dtype is not None:
            self.convert_bases(dtype)
        # a new layer is in training mode even if its model is not
        self.train(self.base_layer.training)
        self.blend()

    def blend(self) -> None:
        """Fill the buffers of a serving layer. Call this after writing to coefficients."""
        if self.serving is not None:
            self.serving.fill(self)

    def _blend_if_changed(self) -> None:
        if self.serving is not None:
            self.serving.fill_if_changed(self)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel size of a convolution; () for a linear layer."""
        return convolution.kernel_size(self.get_base_layer())


def _entry(buffers: BufferDict, name: str) -> Tensor | None:
    if name not in buffers:
        return None
    tensor: Tensor = buffers[name]
    return tensor


def _blend_after_loading(layer: EigenLoraxLayer, incompatible_keys: Any) -> None:
    layer.blend()
