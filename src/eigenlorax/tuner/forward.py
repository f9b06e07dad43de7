"""Adapted layers: the output of a layer with one adapter, several adapters, or one adapter per row; and merging.

The input is multiplied by the frozen down basis first, so that autograd stores an activation of width k instead of
the layer's input. Active adapters on the same bases share both products with the bases.
"""

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from ..core.convolution import CONVOLUTIONS, Convolution
from ..core.layer_update import (
    LayerBases,
    LayerCoefficients,
    LayerResidual,
    add_grouped_update,
    add_product,
    add_scaled,
    apply_coefficients,
    in_output_shape,
    project,
)
from ..core.row_groups import group_rows
from .layer import EigenLoraxLayer

_NO_DROPOUT = nn.Identity()


class AdaptedLayer(nn.Module, EigenLoraxLayer):
    """Base class of adapted linear layers and convolutions."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        EigenLoraxLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name

    def train(self, mode: bool = True) -> "AdaptedLayer":
        """Set the training mode. A serving layer then uses the coefficients that were trained."""
        super().train(mode)
        self.blend()
        return self

    @property
    def convolution(self) -> Convolution | None:
        """The base layer if it is a convolution."""
        base_layer = self.get_base_layer()
        return base_layer if isinstance(base_layer, CONVOLUTIONS) else None

    @abstractmethod
    def _in_weight_shape(self, delta: Tensor) -> Tensor:
        """Reshape an update (out, in) to the shape of the layer's weight."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """
        Compute the delta weight for the given adapter, in float32 or wider.

        Args:
            adapter (`str`):
                The name of the adapter for which the delta weight should be computed.

        Returns:
            `torch.Tensor`: The update, scaling included, in the shape of the layer's weight.
        """
        self.check_decoded()
        self.check_gradients([adapter])
        if self.has_residual(adapter):
            down, up = self.lora_factors_of(adapter)
            return self._in_weight_shape(up @ (self.scaling[adapter] * down))
        down_basis, up_basis = self.bases_of(adapter)
        core = self.core_of(adapter)
        dtype = torch.promote_types(core.dtype, torch.float32)
        down_basis, up_basis = (basis.to(core.device, dtype) for basis in (down_basis, up_basis))
        delta = up_basis.mT @ (self.scaling[adapter] * core.to(dtype)) @ down_basis
        return self._in_weight_shape(delta)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Merge the active adapter weights into the base weights.

        Args:
            safe_merge (`bool`, *optional*):
                If True, merge into a copy of the weights first and raise `ValueError` if the result has NaNs or
                infinities. Defaults to `False`.
            adapter_names (`List[str]`, *optional*):
                The names of the adapters to merge. If None, all active adapters are merged.
        """
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
        """Unmerge all merged adapters from the base weights."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if self.has_adapter(adapter):
                weight = self.get_base_weight()
                # with the scaling at the time of merging, which may have changed since
                scaling, self.scaling[adapter] = self.scaling[adapter], self._merged_scaling.pop(adapter)
                weight -= self.get_delta_weight(adapter).to(weight.dtype)
                self.scaling[adapter] = scaling
                self.set_base_weight(weight)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.check_decoded()
        adapter_names = kwargs.pop("adapter_names", None)
        if self.serving is not None and adapter_names is None and not self.training and not self.merged_adapters:
            return self._serve(x, *args, **kwargs)
        self._check_adapter_names(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or (adapter_names is None and self.merged):
            return result
        self.check_gradients(adapter_names)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if adapter_names is not None:
            return self._add_mixed(result, x, adapter_names)
        for adapters in self._adapters_by_bases():
            result = self._add_update(result, x, adapters)
        return result

    def _serve(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the output from the blended cores.

        A compiled graph is recompiled when a Python attribute that is read here changes, so this reads buffers only.
        """
        result: Tensor = self.base_layer(x, *args, **kwargs)
        dtype, convolution = result.dtype, self.convolution
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for key, core in self.eigenlorax_blend.items():
            down_basis, up_basis = self.bases_at(key)
            hidden = self._cast_input_dtype(x, down_basis.dtype)
            hidden = project(hidden, down_basis.to(hidden.dtype), convolution)
            hidden = linear(hidden.to(core.dtype), core)
            update = linear(hidden.to(up_basis.dtype), up_basis.mT)
            result = result + in_output_shape(update, result.shape, convolution)
        if "down" in self.eigenlorax_factors:
            down, up = self.eigenlorax_factors["down"], self.eigenlorax_factors["up"]
            hidden = self._cast_input_dtype(x, down.dtype)
            update = linear(project(hidden, down.to(hidden.dtype), convolution), up.to(hidden.dtype))
            result = result + in_output_shape(update, result.shape, convolution)
        return result.to(dtype)

    def _adapters_by_bases(self) -> list[list[str]]:
        """Return the active adapters, grouped by the products with the bases that they can share."""
        groups: dict[tuple[Any, ...], list[str]] = {}
        for adapter in self.active_adapters:
            if self.has_adapter(adapter):
                dropout = self._dropout(adapter)
                # each adapter has its own dropout mask, so adapters cannot share their input
                mask_owner = adapter if isinstance(dropout, nn.Dropout) and dropout.training else None
                key = (*self.bases_key(adapter), self.factors_of(adapter)[0].dtype, mask_owner)
                groups.setdefault(key, []).append(adapter)
        return list(groups.values())

    def _dropout(self, adapter: str) -> nn.Module:
        """Return the dropout of an adapter; adapters for inference have none."""
        if adapter in self.eigenlorax_dropout:
            return self.eigenlorax_dropout[adapter]
        return _NO_DROPOUT

    def _add_update(self, output: Tensor, x: Tensor, adapters: Sequence[str]) -> Tensor:
        """Add the updates of adapters that share their bases to the output of the layer."""
        down_basis, up_basis = self.bases_of(adapters[0])
        x = self._dropout(adapters[0])(x)
        dtype = self.factors_of(adapters[0])[0].dtype if self.cast_input_dtype_enabled else x.dtype
        projected = project(x, down_basis.to(dtype), self.convolution)
        in_basis = []
        for adapter in adapters:
            residual = LayerResidual(*self._residuals_in(dtype, adapter))
            hidden, residual_update = apply_coefficients(
                projected, x, self.factors_of(adapter), residual, self.convolution
            )
            in_basis.append(hidden * self.scaling[adapter])
            if residual_update is not None:
                output = add_scaled(output, residual_update, self.scaling[adapter], convolution=self.convolution)
        total = sum(in_basis[1:], start=in_basis[0])
        return add_product(output, total, up_basis.to(total.dtype), convolution=self.convolution)

    def _residuals_in(self, dtype: torch.dtype, adapter: str) -> tuple[Tensor | None, Tensor | None]:
        down, up = self.residuals_of(adapter)
        return None if down is None else down.to(dtype), None if up is None else up.to(dtype)

    def _add_mixed(self, output: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        """Add to each row of the batch the update of its own adapter; "__base__" adds nothing.

        Rows of adapters on the same components share the products with the bases. Dropout is not applied, because
        mixed batches raise an error in training.
        """
        output = output.clone()
        rows_by_bases: dict[tuple[Any, ...], list[int]] = {}
        for row, adapter in enumerate(adapter_names):
            if self.has_adapter(adapter):
                key = (*self.bases_key(adapter), adapter in self.eigenlorax_core)
                rows_by_bases.setdefault(key, []).append(row)
        for rows in rows_by_bases.values():
            names = [adapter_names[row] for row in rows]
            distinct = list(dict.fromkeys(names))
            owners, groups = group_rows([distinct.index(name) for name in names])
            output[rows] = add_grouped_update(
                output[rows],
                x[rows],
                LayerBases(*self.bases_of(names[0]), self.convolution),
                self._stack_coefficients([distinct[owner] for owner in owners], names),
                groups.to(x.device),
            )
        return output

    def _stack_coefficients(self, groups: Sequence[str], rows: Sequence[str]) -> LayerCoefficients:
        """Stack the coefficients of adapters on the same bases, padded to the largest rank.

        Args:
            groups: The adapter of each group of rows.
            rows: The adapter of each row.
        """
        first_down = self.factors_of(groups[0])[0]
        scalings = first_down.new_tensor([self.scaling[name] for name in groups])[:, None, None]
        if groups[0] in self.eigenlorax_core:
            cores = torch.stack([self.eigenlorax_core[name] for name in groups])
            return LayerCoefficients(cores * scalings, None, 1.0)
        factors = [(self.eigenlorax_down[name], self.eigenlorax_up[name]) for name in groups]
        rank = max(len(down) for down, _ in factors)
        downs = torch.stack([pad(down, (0, 0, 0, rank - len(down))) for down, _ in factors])
        ups = torch.stack([pad(up, (0, rank - up.shape[1])) for _, up in factors])
        residuals = []
        for name in dict.fromkeys(rows):
            if self.has_residual(name):
                indices = [row for row, row_name in enumerate(rows) if row_name == name]
                down, up = self._residuals_in(downs.dtype, name)
                residuals.append(
                    LayerResidual(down, up, torch.tensor(indices, device=downs.device), self.scaling[name])
                )
        return LayerCoefficients(downs, ups * scalings, 1.0, tuple(residuals))

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


class Linear(AdaptedLayer):
    """An adapted linear layer: `torch.nn.Linear`, `Conv1D`, or a quantised layer with a backend in PEFT."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, fan_in_fan_out: bool = False, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out

    def _in_weight_shape(self, delta: Tensor) -> Tensor:
        return transpose(delta, self.fan_in_fan_out)


class Conv(AdaptedLayer):
    """An adapted convolution with one, two or three dimensions."""

    def _in_weight_shape(self, delta: Tensor) -> Tensor:
        return delta.reshape(self.get_base_layer().weight.shape)


def wrap_layer(target: nn.Module, adapter_name: str, fan_in_fan_out: bool = False, **kwargs: Any) -> AdaptedLayer:
    """
    Wrap a supported module, or a layer of another PEFT method around one, in an adapted layer without adapters.

    Args:
        target (`torch.nn.Module`):
            The module to wrap.
        adapter_name (`str`):
            The name of the active adapter.
        fan_in_fan_out (`bool`):
            Whether the weight of a linear layer is stored as (in, out).
        kwargs:
            The result of `get_quantization_kwargs` for the model.
    """
    base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base_layer, CONVOLUTIONS):
        return Conv(target, adapter_name, **kwargs)
    return Linear(target, adapter_name, fan_in_fan_out, **kwargs)
