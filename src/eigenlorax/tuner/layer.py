"""The layer: a linear one with coefficients over two frozen bases beside it.

The input is multiplied by the frozen basis first: what is kept for backward is k wide, and not the layer's input.
"""

import math
import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr
from peft.utils.other import transpose
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from ..mixing import arrange
from ..subspace import Coefficients, ModuleBases
from .config import EigenLoraxConfig
from .starts import Start


class EigenLoraxLayer(BaseTunerLayer):
    """What an adapted layer holds, by adapter; and the bases, by the fingerprint of their subspace."""

    adapter_layer_names = ("eigenlorax_down", "eigenlorax_up", "eigenlorax_core")
    other_param_names = ("r", "lora_alpha", "use_rslora", "scaling", "eigenlorax_dropout", "subspace_of", "sizes_of")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.scaling: dict[str, float] = {}
        self.subspace_of: dict[str, str] = {}
        # on how many components (down, up) each has coefficients: the first ones, where its subspace has grown since
        self.sizes_of: dict[str, tuple[int, int]] = {}
        self.eigenlorax_dropout = nn.ModuleDict({})
        self.eigenlorax_down = nn.ParameterDict({})
        self.eigenlorax_up = nn.ParameterDict({})
        self.eigenlorax_core = nn.ParameterDict({})
        # (k_down, in) and (k_up, out), one pair a subspace, however many adapters use it
        self.eigenlorax_basis_down = BufferDict({}, persistent=False)
        self.eigenlorax_basis_up = BufferDict({}, persistent=False)
        # the same for adapters that are saved with their subspace, one pair an adapter: part of the state dict
        self.eigenlorax_embedded_down = BufferDict({}, persistent=True)
        self.eigenlorax_embedded_up = BufferDict({}, persistent=True)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged_scaling: dict[str, float] = {}
        self.cast_input_dtype_enabled = True
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.kwargs = kwargs

    def update_layer(
        self,
        adapter_name: str,
        bases: ModuleBases,
        fingerprint: str,
        start: Start,
        *,
        config: EigenLoraxConfig,
        r: int,
        lora_alpha: float,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter: its coefficients as `start` gives them, and its bases unless they are here already."""
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.set_scale(adapter_name, 1.0)
        dropout = nn.Dropout(p=config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.eigenlorax_dropout[adapter_name] = dropout
        self._place_bases(adapter_name, bases, fingerprint, config.embed_subspace)
        coefficients = start.coefficients(r, self.scaling[adapter_name])
        if config.core:
            (core,) = coefficients
            self.sizes_of[adapter_name] = core.shape[1], core.shape[0]
            self.eigenlorax_core[adapter_name] = nn.Parameter(core)
        else:
            down, up = coefficients
            self.sizes_of[adapter_name] = down.shape[1], up.shape[0]
            self.eigenlorax_down[adapter_name] = nn.Parameter(down)
            self.eigenlorax_up[adapter_name] = nn.Parameter(up)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def hold(self, adapter_name: str, bases: ModuleBases, fingerprint: str, coefficients: Coefficients) -> None:
        """Add an adapter to run and not to train: its coefficients as they are, on bases that may be here already.

        It is not active yet. Coefficients may be on the first components of bases that have grown since.
        """
        self.r[adapter_name] = coefficients.rank
        self.lora_alpha[adapter_name] = coefficients.scaling * coefficients.rank
        self.use_rslora[adapter_name] = False
        self.set_scale(adapter_name, 1.0)
        self.eigenlorax_dropout[adapter_name] = nn.Identity()
        self._place_bases(adapter_name, bases, fingerprint, embed=False)
        self.sizes_of[adapter_name] = coefficients.down.shape[1], coefficients.up.shape[0]
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for target, part in ((self.eigenlorax_down, coefficients.down), (self.eigenlorax_up, coefficients.up)):
            # rounded to no narrower dtype than the pack's
            wide = torch.promote_types(part.dtype, dtype) if dtype.is_floating_point else part.dtype
            target[adapter_name] = nn.Parameter(part.to(device, wide), requires_grad=False)

    def _place_bases(self, adapter_name: str, bases: ModuleBases, fingerprint: str, embed: bool) -> None:
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        self.subspace_of[adapter_name] = fingerprint
        if embed:
            targets, key = (self.eigenlorax_embedded_down, self.eigenlorax_embedded_up), adapter_name
        else:
            targets, key = (self.eigenlorax_basis_down, self.eigenlorax_basis_up), fingerprint
        for target, basis in zip(targets, (bases.down, bases.up), strict=True):
            if key not in target:
                # rounding the basis to the dtype of a half-precision model would be another basis
                dtype = torch.promote_types(basis.components.dtype, torch.float32)
                target[key] = basis.components.to(device=_real(device), dtype=dtype)

    def bases_of(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """(k_down, in) and (k_up, out), orthonormal rows: those that the adapter has coefficients on."""
        if adapter_name in self.eigenlorax_embedded_down:
            down, up = self.eigenlorax_embedded_down[adapter_name], self.eigenlorax_embedded_up[adapter_name]
        else:
            key = self.subspace_of[adapter_name]
            down, up = self.eigenlorax_basis_down[key], self.eigenlorax_basis_up[key]
        k_down, k_up = self.sizes_of[adapter_name]
        return down[:k_down], up[:k_up]

    def widen(self, adapter_name: str) -> None:
        """Give an adapter coefficients on all components that its subspace has now: zeros on those that came since."""
        key = self.subspace_of[adapter_name]
        if adapter_name in self.eigenlorax_embedded_down or key not in self.eigenlorax_basis_down:
            return
        now = len(self.eigenlorax_basis_down[key]), len(self.eigenlorax_basis_up[key])
        more_down, more_up = (size - old for size, old in zip(now, self.sizes_of[adapter_name], strict=True))
        self.sizes_of[adapter_name] = now
        for parts, room in (
            (self.eigenlorax_down, (0, more_down)),
            (self.eigenlorax_up, (0, 0, 0, more_up)),
            (self.eigenlorax_core, (0, more_down, 0, more_up)),
        ):
            if adapter_name in parts and any(room):
                old = parts[adapter_name]
                parts[adapter_name] = nn.Parameter(pad(old.detach(), room), requires_grad=old.requires_grad)

    def has_adapter(self, adapter_name: str) -> bool:
        return adapter_name in self.eigenlorax_down or adapter_name in self.eigenlorax_core

    def core_of(self, adapter_name: str) -> Tensor:
        """(k_up, k_down): the update in the bases, without the scaling."""
        if adapter_name in self.eigenlorax_core:
            return self.eigenlorax_core[adapter_name]
        return self.eigenlorax_up[adapter_name] @ self.eigenlorax_down[adapter_name]

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter, and its bases if no other adapter uses them."""
        super().delete_adapter(adapter_name)
        for embedded in (self.eigenlorax_embedded_down, self.eigenlorax_embedded_up):
            if adapter_name in embedded:
                del embedded[adapter_name]
        for bases in (self.eigenlorax_basis_down, self.eigenlorax_basis_up):
            for key in set(bases) - set(self.subspace_of.values()):
                del bases[key]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scaling of an adapter to `scale` times that of its config."""
        if adapter in self.r:
            divisor = math.sqrt(self.r[adapter]) if self.use_rslora[adapter] else self.r[adapter]
            self.scaling[adapter] = scale * self.lora_alpha[adapter] / divisor

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of all active adapters."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of all active adapters; without a number, set it back to that of their config."""
        for adapter in self.active_adapters:
            if adapter in self.scaling and scale is not None:
                self.scaling[adapter] /= scale
            elif adapter in self.scaling:
                self.set_scale(adapter, 1.0)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Every adapter is a LoRA in the terms of a basis."""
        return True


class Linear(nn.Module, EigenLoraxLayer):
    """A linear layer, `Conv1D`, or a quantised one that PEFT has a backend for."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, fan_in_fan_out: bool = False, **kwargs: Any) -> None:
        super().__init__()
        EigenLoraxLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out
        self._active_adapter = adapter_name

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update, in the shape of the layer's weight. Computed in float32 at least."""
        down_basis, up_basis = self.bases_of(adapter)
        core = self.core_of(adapter)
        dtype = torch.promote_types(core.dtype, torch.float32)
        down_basis, up_basis = (basis.to(core.device, dtype) for basis in (down_basis, up_basis))
        delta = up_basis.mT @ (self.scaling[adapter] * core.to(dtype)) @ down_basis
        return transpose(delta, self.fan_in_fan_out)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add updates to the layer's weight. `safe_merge`: only if the sum is finite everywhere."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if not self.has_adapter(adapter):
                continue
            weight = self.get_base_weight()
            merged = weight.clone() if safe_merge else weight
            merged += self.get_delta_weight(adapter).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            self.set_base_weight(merged)
            self.merged_adapters.append(adapter)
            self._merged_scaling[adapter] = self.scaling[adapter]

    def unmerge(self) -> None:
        """Take merged updates out of the layer's weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if self.has_adapter(adapter):
                weight = self.get_base_weight()
                # what was added is taken out, though the scaling may have been changed since
                now, self.scaling[adapter] = self.scaling[adapter], self._merged_scaling.pop(adapter)
                weight -= self.get_delta_weight(adapter).to(weight.dtype)
                self.scaling[adapter] = now
                self.set_base_weight(weight)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        self._check_adapter_names(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or (adapter_names is None and self.merged):
            return result
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if adapter_names is not None:
            return self._add_mixed(result, x, adapter_names)
        for adapter in self.active_adapters:
            if self.has_adapter(adapter):
                result = result + self._update(adapter, x)
        return result.to(dtype)

    def _update(self, adapter: str, x: Tensor) -> Tensor:
        down_basis, up_basis = self.bases_of(adapter)
        factors = self.factors_of(adapter)
        hidden = self._cast_input_dtype(self.eigenlorax_dropout[adapter](x), factors[0].dtype)
        hidden = linear(hidden, down_basis.to(hidden.dtype))
        for factor in factors:
            hidden = linear(hidden, factor)
        return (hidden * self.scaling[adapter]) @ up_basis.to(hidden.dtype)

    def factors_of(self, adapter: str) -> tuple[Tensor, ...]:
        """What the projected input is multiplied with, one after the other."""
        if adapter in self.eigenlorax_core:
            return (self.eigenlorax_core[adapter],)
        return self.eigenlorax_down[adapter], self.eigenlorax_up[adapter]

    def _add_mixed(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        """Each row of the batch with the adapter that it names; "__base__" is none.

        What has coefficients on the same components is multiplied with these at once; adapters of one shape have
        theirs multiplied in one product of batches. Dropout has no part in it: in training, mixed batches are refused.
        """
        result = result.clone()
        by_bases: dict[tuple[Any, ...], dict[tuple[torch.Size, ...], list[int]]] = {}
        for row, adapter in enumerate(adapter_names):
            if adapter != "__base__" and self.has_adapter(adapter):
                key = adapter if adapter in self.eigenlorax_embedded_down else self.subspace_of[adapter]
                shape = tuple(factor.shape for factor in self.factors_of(adapter))
                by_bases.setdefault((key, *self.sizes_of[adapter]), {}).setdefault(shape, []).append(row)
        for by_shape in by_bases.values():
            rows = [row for places in by_shape.values() for row in places]
            names = [adapter_names[row] for row in rows]
            down_basis, up_basis = self.bases_of(names[0])
            hidden = self._cast_input_dtype(x[rows], self.factors_of(names[0])[0].dtype)
            hidden = linear(hidden, down_basis.to(hidden.dtype)).reshape(len(rows), -1, len(down_basis))
            parts, start = [], 0
            for places in by_shape.values():
                end = start + len(places)
                parts.append(self._mixed_coefficients(hidden[start:end], names[start:end]))
                start = end
            update = torch.cat(parts) @ up_basis.to(hidden.dtype)
            result[rows] += update.view(len(rows), *result.shape[1:]).to(result.dtype)
        return result

    def _mixed_coefficients(self, hidden: Tensor, adapter_names: list[str]) -> Tensor:
        """Projected rows (n, t, k_down), each with the coefficients of its adapter, all of one shape: (n, t, k_up)."""
        distinct = list(dict.fromkeys(adapter_names))
        groups, order = arrange([distinct.index(name) for name in adapter_names])
        owners, order = [distinct[group] for group in groups], order.to(hidden.device)
        hidden = order.gather(hidden)
        for factors in zip(*map(self.factors_of, owners), strict=True):
            hidden = torch.bmm(hidden, torch.stack(factors).mT)
        scalings = torch.tensor([self.scaling[name] for name in owners], dtype=hidden.dtype, device=hidden.device)
        return order.scatter(hidden * scalings[:, None, None])

    def _check_adapter_names(self, x: Tensor, adapter_names: list[str] | None) -> None:
        if adapter_names is None:
            return
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def __repr__(self) -> str:
        return "eigenlorax." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def _real(device: torch.device | None) -> torch.device | None:
    """Where a basis goes beside a layer that is on no device yet: it has no second chance to be loaded."""
    return torch.device("cpu") if device is not None and device.type == "meta" else device
