"""What an adapted layer computes: its output, with one adapter, several or one a row; its weight, when they are merged.

The input is multiplied by the frozen basis first: what is kept for backward is k wide, and not the layer's input.
Adapters that are active together on one pair of bases have both products in common.
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import quantization_extra_repr
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn.functional import linear

from ..core import convolution
from ..core.batched_update import group_rows
from .layer import EigenLoraxLayer

_NOTHING = nn.Identity()


class Adapted(nn.Module, EigenLoraxLayer):
    """All that linear layers and convolutions have in common; they differ in four products."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        EigenLoraxLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name

    def train(self, mode: bool = True) -> "Adapted":
        """As in torch. What was trained is served afterwards."""
        super().train(mode)
        self.blend()
        return self

    @abstractmethod
    def _onto(self, x: Tensor, basis: Tensor) -> Tensor:
        """The layer's input as its weight would see it, multiplied with rows (k, in)."""

    @abstractmethod
    def _times(self, hidden: Tensor, matrix: Tensor) -> Tensor:
        """What `_onto` gave, k wide, multiplied with a matrix (m, k)."""

    @abstractmethod
    def _rows(self, hidden: Tensor) -> Tensor:
        """What `_onto` gave for n rows of a batch as (n, t, k)."""

    @abstractmethod
    def _like(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """(n, t, out) in the shape of the layer's output, which has `shape` for one row."""

    @abstractmethod
    def _as_weight(self, delta: Tensor) -> Tensor:
        """An update (out, in) in the shape of the layer's weight."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update, in the shape of the layer's weight. Computed in float32 at least."""
        self.check_read()
        if self.has_residual(adapter):
            down, up = self.plain_factors(adapter)
            return self._as_weight(up @ (self.scaling[adapter] * down))
        down_basis, up_basis = self.bases_of(adapter)
        core = self.core_of(adapter)
        dtype = torch.promote_types(core.dtype, torch.float32)
        down_basis, up_basis = (basis.to(core.device, dtype) for basis in (down_basis, up_basis))
        delta = up_basis.mT @ (self.scaling[adapter] * core.to(dtype)) @ down_basis
        return self._as_weight(delta)

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
        self.check_read()
        adapter_names = kwargs.pop("adapter_names", None)
        if self.serving is not None and adapter_names is None and not self.training and not self.merged_adapters:
            return self._serve(x, *args, **kwargs)
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
        for adapters in self._sharing():
            result = result + self._update(adapters, x)
        return result.to(dtype)

    def _serve(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output with the cores that are there now. What is read here, a compiled model is compiled anew for."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for key, blend in self.eigenlorax_blend.items():
            down_basis, up_basis = self.bases_at(key)
            hidden = self._cast_input_dtype(x, down_basis.dtype)
            hidden = self._onto(hidden, down_basis.to(hidden.dtype))
            hidden = self._times(hidden.to(blend.dtype), blend)
            result = result + self._times(hidden.to(up_basis.dtype), up_basis.mT)
        if "down" in self.eigenlorax_factors:
            down, up = self.eigenlorax_factors["down"], self.eigenlorax_factors["up"]
            hidden = self._cast_input_dtype(x, down.dtype)
            result = result + self._times(self._onto(hidden, down.to(hidden.dtype)), up.to(hidden.dtype))
        return result.to(dtype)

    def _sharing(self) -> list[list[str]]:
        """The active adapters, those together that can have the products with their bases in common."""
        found: dict[tuple[Any, ...], list[str]] = {}
        for adapter in self.active_adapters:
            if self.has_adapter(adapter):
                dropout = self._dropout(adapter)
                # each has zeros of its own in the input
                alone = adapter if isinstance(dropout, nn.Dropout) and dropout.training else None
                key = (*self.bases_key(adapter), self.factors_of(adapter)[0].dtype, alone)
                found.setdefault(key, []).append(adapter)
        return list(found.values())

    def _dropout(self, adapter: str) -> nn.Module:
        """What is done to the layer's input for an adapter: nothing, for one that is held."""
        if adapter in self.eigenlorax_dropout:
            return self.eigenlorax_dropout[adapter]
        return _NOTHING

    def _update(self, adapters: Sequence[str], x: Tensor) -> Tensor:
        """The sum of the updates of adapters that share their bases."""
        first = adapters[0]
        down_basis, up_basis = self.bases_of(first)
        x = self._cast_input_dtype(self._dropout(first)(x), self.factors_of(first)[0].dtype)
        projected = self._onto(x, down_basis.to(x.dtype))
        total: Tensor | None = None
        beside: Tensor | None = None
        for adapter in adapters:
            factor, *others = self.factors_of(adapter)
            down_residual, up_residual = self.rests_of(adapter)
            hidden = self._times(projected, factor)
            if down_residual is not None:
                hidden = hidden + self._onto(x, down_residual.to(x.dtype))
            if up_residual is not None:
                more = self._times(hidden, up_residual.to(hidden.dtype)) * self.scaling[adapter]
                beside = more if beside is None else beside + more
            for factor in others:
                hidden = self._times(hidden, factor)
            hidden = hidden * self.scaling[adapter]
            total = hidden if total is None else total + hidden
        assert total is not None
        update = self._times(total, up_basis.mT.to(total.dtype))
        return update if beside is None else update + beside

    def _add_mixed(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        """Each row of the batch with the adapter that it names; "__base__" is none.

        What has coefficients on the same components is multiplied with these at once; adapters of one shape have
        theirs multiplied in one product of batches. What has a rest is as wide as a LoRA, and multiplied one adapter
        after the other. Dropout has no part in it: in training, mixed batches are refused.
        """
        result = result.clone()
        by_bases: dict[tuple[Any, ...], dict[tuple[torch.Size, ...], list[int]]] = {}
        with_rest: dict[str, list[int]] = {}
        for row, adapter in enumerate(adapter_names):
            if self.has_residual(adapter):
                with_rest.setdefault(adapter, []).append(row)
            elif adapter != "__base__" and self.has_adapter(adapter):
                shape = tuple(factor.shape for factor in self.factors_of(adapter))
                by_bases.setdefault(self.bases_key(adapter), {}).setdefault(shape, []).append(row)
        for by_shape in by_bases.values():
            rows = [row for places in by_shape.values() for row in places]
            names = [adapter_names[row] for row in rows]
            down_basis, up_basis = self.bases_of(names[0])
            hidden = self._cast_input_dtype(x[rows], self.factors_of(names[0])[0].dtype)
            hidden = self._rows(self._onto(hidden, down_basis.to(hidden.dtype)))
            parts, start = [], 0
            for places in by_shape.values():
                end = start + len(places)
                parts.append(self._mixed_coefficients(hidden[start:end], names[start:end]))
                start = end
            update = torch.cat(parts) @ up_basis.to(hidden.dtype)
            result[rows] += self._like(update, result.shape[1:]).to(result.dtype)
        for name, rows in with_rest.items():
            result[rows] += self._update([name], x[rows]).to(result.dtype)
        return result

    def _mixed_coefficients(self, hidden: Tensor, adapter_names: list[str]) -> Tensor:
        """Projected rows (n, t, k_down), each with the coefficients of its adapter, all of one shape: (n, t, k_up)."""
        distinct = list(dict.fromkeys(adapter_names))
        groups, order = group_rows([distinct.index(name) for name in adapter_names])
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


class Linear(Adapted):
    """A linear layer, `Conv1D`, or a quantised one that PEFT has a backend for."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, fan_in_fan_out: bool = False, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out

    def _onto(self, x: Tensor, basis: Tensor) -> Tensor:
        return linear(x, basis)

    def _times(self, hidden: Tensor, matrix: Tensor) -> Tensor:
        return linear(hidden, matrix)

    def _rows(self, hidden: Tensor) -> Tensor:
        return hidden.reshape(len(hidden), math.prod(hidden.shape[1:-1]), hidden.shape[-1])

    def _like(self, rows: Tensor, shape: torch.Size) -> Tensor:
        return rows.reshape(len(rows), *shape)

    def _as_weight(self, delta: Tensor) -> Tensor:
        return transpose(delta, self.fan_in_fan_out)


class Conv(Adapted):
    """A convolution, of one, two or three dimensions: rows of the down basis are convolved, all else is pointwise."""

    def _onto(self, x: Tensor, basis: Tensor) -> Tensor:
        return convolution.convolve(self.get_base_layer(), x, basis)

    def _times(self, hidden: Tensor, matrix: Tensor) -> Tensor:
        return convolution.apply_pointwise(hidden, matrix, len(self.kernel))

    def _rows(self, hidden: Tensor) -> Tensor:
        return hidden.flatten(2).mT

    def _like(self, rows: Tensor, shape: torch.Size) -> Tensor:
        return rows.mT.reshape(len(rows), *shape)

    def _as_weight(self, delta: Tensor) -> Tensor:
        return delta.reshape(self.get_base_layer().weight.shape)
