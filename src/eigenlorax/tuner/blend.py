"""The active adapters of a serving layer, summed into one core per subspace.

The cores are buffers that are overwritten in place when another adapter becomes active, so a compiled model, which
reads only the buffers, is not compiled again.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layer import EigenLoraxLayer


class Blend:
    """Updates of the buffers of a serving layer when its active adapters or their scalings change.

    Args:
        dtype: Dtype of the layer's bases, including torch.int8; None for the dtype in which they are loaded.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self._blended: tuple[Any, ...] = ()

    def fill_if_changed(self, layer: "EigenLoraxLayer") -> None:
        """Fill the buffers unless the same adapters are active with the same scalings as at the last call."""
        if _active_scalings(layer) != self._blended:
            self.fill(layer)

    def fill(self, layer: "EigenLoraxLayer") -> None:
        """Fill the cores of all subspaces of a layer, and the LoRA factors of adapters with a residual."""
        embedded = layer.eigenlorax_embedded_down
        bases_keys = {
            name: name if name in embedded else key
            for name, key in layer.subspace_of.items()
            if not layer.has_residual(name)
        }
        active = [name for name, _ in _active_scalings(layer)]
        for key in set(layer.eigenlorax_blend) - set(bases_keys.values()):
            del layer.eigenlorax_blend[key]
        # a tensor made in inference mode could not be written to outside of it
        with torch.inference_mode(False), torch.no_grad():
            for key in dict.fromkeys(bases_keys.values()):
                down, up = layer.bases_at(key)
                if key not in layer.eigenlorax_blend:
                    dtype = torch.promote_types(up.dtype, torch.float32)
                    layer.eigenlorax_blend[key] = torch.zeros(len(up), len(down), dtype=dtype, device=up.device)
                layer.eigenlorax_blend[key].zero_()
            for name in active:
                if name in bases_keys:
                    _add_core(layer.eigenlorax_blend[bases_keys[name]], layer, name)
            _fill_factors(layer, [name for name in active if name not in bases_keys])
        self._blended = _active_scalings(layer)


def _active_scalings(layer: "EigenLoraxLayer") -> tuple[tuple[str, float], ...]:
    """Return the active adapters with their scalings; none if adapters are disabled."""
    if layer.disable_adapters:
        return ()
    return tuple((name, layer.scaling[name]) for name in layer.active_adapters if layer.has_adapter(name))


def _add_core(blend: Tensor, layer: "EigenLoraxLayer", adapter_name: str) -> None:
    """Add an adapter's scaled core, in the dtype of the blend, at the components that the adapter uses."""
    down, up = layer.factors_of(adapter_name)
    # coefficients that are not loaded yet are on the meta device
    if down.is_meta:
        return
    k_down, k_up = layer.n_components[adapter_name]
    core, scaling = blend[:k_up, :k_down], layer.scaling[adapter_name]
    if up is None:
        core.add_(down.to(blend), alpha=scaling)
    else:
        core.addmm_(up.to(blend), down.to(blend), alpha=scaling)


def _fill_factors(layer: "EigenLoraxLayer", active: Sequence[str]) -> None:
    """Fill the LoRA factors with the active adapters that have a residual, one below the other."""
    ranks = {name: layer.r[name] for name in layer.subspace_of if layer.has_residual(name)}
    buffers = layer.eigenlorax_factors
    if not ranks:
        buffers.clear()
        return
    # at least as many rows as the largest adapter, so that switching adapters does not change the shape
    rows = max(sum(ranks[name] for name in active), *ranks.values())
    if "down" not in buffers or len(buffers["down"]) < rows:
        _, up_basis = layer.bases_of(next(iter(ranks)))
        buffers["down"] = up_basis.new_zeros(rows, layer.in_features)
        buffers["up"] = up_basis.new_zeros(layer.out_features, rows)
    down, up = buffers["down"].zero_(), buffers["up"].zero_()
    start = 0
    for name in active:
        end = start + ranks[name]
        if not layer.eigenlorax_down[name].is_meta:
            adapter_down, adapter_up = layer.lora_factors_of(name)
            down[start:end], up[:, start:end] = adapter_down, layer.scaling[name] * adapter_up
        start = end
