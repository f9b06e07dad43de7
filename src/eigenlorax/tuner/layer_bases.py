"""The frozen bases of an adapted layer, which its adapters share, in floats or in 8 bits per entry."""

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..core.int8_rows import dequantise, quantise_rows
from ..core.subspace import ModuleBases


class LayerWithBases(BaseTunerLayer):
    """Layer with bases, by the fingerprint of their subspace or by the name of an adapter with embedded bases."""

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.subspace_of: dict[str, str] = {}
        # (down, up) components that each adapter has coefficients on: fewer than the bases have if the subspace has
        # grown since
        self.n_components: dict[str, tuple[int, int]] = {}
        # (k_down, in) and (k_up, out), one pair per subspace
        self.eigenlorax_basis_down = BufferDict({}, persistent=False)
        self.eigenlorax_basis_up = BufferDict({}, persistent=False)
        # (k, 1), the scale of each row of bases that are stored in 8 bits
        self.eigenlorax_scales_down = BufferDict({}, persistent=False)
        self.eigenlorax_scales_up = BufferDict({}, persistent=False)
        # bases of adapters that are saved with their subspace, one pair per adapter: part of the state dict
        self.eigenlorax_embedded_down = BufferDict({}, persistent=True)
        self.eigenlorax_embedded_up = BufferDict({}, persistent=True)

    def add_bases(
        self, adapter_name: str, bases: ModuleBases, fingerprint: str, *, embed: bool, dtype: torch.dtype | None
    ) -> None:
        """
        Store the bases of an adapter, unless they are shared and the layer has them already.

        Args:
            adapter_name (`str`):
                The name of the adapter.
            bases (`ModuleBases`):
                The bases of the layer's module.
            fingerprint (`str`):
                The fingerprint of the subspace, under which the bases are shared by adapters.
            embed (`bool`):
                Whether the bases belong to the adapter alone, and are saved with it.
            dtype (`torch.dtype`, *optional*):
                Dtype of shared bases. Default: their own dtype, at least float32.
        """
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if device is not None and device.type == "meta":
            # the loader fills coefficients on the meta device later, but never bases
            device = torch.device("cpu")
        self.subspace_of[adapter_name] = fingerprint
        if embed:
            targets, key, dtype = (self.eigenlorax_embedded_down, self.eigenlorax_embedded_up), adapter_name, None
        else:
            targets, key = (self.eigenlorax_basis_down, self.eigenlorax_basis_up), fingerprint
        for target, scales, basis in zip(targets, self._scales, (bases.down, bases.up), strict=True):
            if key not in target:
                # rounding the basis to the dtype of a half-precision model would give another basis
                stored_dtype = dtype or torch.promote_types(basis.components.dtype, torch.float32)
                _store_basis(target, scales, key, basis.components.to(device=device), stored_dtype)

    def bases_of(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return the bases (k_down, in) and (k_up, out) of the components that the adapter has coefficients on."""
        key, k_down, k_up = self.bases_key(adapter_name)
        down, up = self.bases_at(key)
        return down[:k_down], up[:k_up]

    def bases_at(self, key: str) -> tuple[Tensor, Tensor]:
        """
        Return the bases (k_down, in) and (k_up, out) with all their components.

        Bases in 8 bits are converted to the layer's dtype on each call.

        Args:
            key (`str`):
                The name of an adapter with an embedded subspace, or the fingerprint of a subspace.
        """
        if key in self.eigenlorax_embedded_down:
            return self.eigenlorax_embedded_down[key], self.eigenlorax_embedded_up[key]
        down, up = self.eigenlorax_basis_down[key], self.eigenlorax_basis_up[key]
        if key in self.eigenlorax_scales_down:
            dtype = self.dtype or torch.float32
            down = dequantise(down, self.eigenlorax_scales_down[key], dtype)
            up = dequantise(up, self.eigenlorax_scales_up[key], dtype)
        return down, up

    @property
    def _scales(self) -> tuple[BufferDict, BufferDict]:
        return self.eigenlorax_scales_down, self.eigenlorax_scales_up

    def bases_key(self, adapter_name: str) -> tuple[str, int, int]:
        """Return a key that is equal for adapters with coefficients on the same components."""
        embedded = adapter_name in self.eigenlorax_embedded_down
        return adapter_name if embedded else self.subspace_of[adapter_name], *self.n_components[adapter_name]

    def convert_bases(self, dtype: torch.dtype) -> None:
        """Store all shared bases in another dtype; `torch.int8` stores 8 bits per entry and a scale per row."""
        # a tensor made in inference mode could never be used in training again
        with torch.inference_mode(False), torch.no_grad():
            for key in list(self.eigenlorax_basis_down):
                targets = self.eigenlorax_basis_down, self.eigenlorax_basis_up
                for bases, scales, rows in zip(targets, self._scales, self.bases_at(key), strict=True):
                    if bases[key].dtype != dtype:
                        _store_basis(bases, scales, key, rows, dtype)

    def delete_unused_bases(self) -> None:
        """Delete the bases that no adapter has coefficients on."""
        for embedded in (self.eigenlorax_embedded_down, self.eigenlorax_embedded_up):
            for name in set(embedded) - set(self.subspace_of):
                del embedded[name]
        for bases in (self.eigenlorax_basis_down, self.eigenlorax_basis_up, *self._scales):
            for key in set(bases) - set(self.subspace_of.values()):
                del bases[key]

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the layer's weight; None if it is not a floating-point dtype."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return dtype if dtype is not None and dtype.is_floating_point else None


def _store_basis(bases: BufferDict, scales: BufferDict, key: str, rows: Tensor, dtype: torch.dtype) -> None:
    """Store a basis (k, d) in a dtype, with its scales if that is `torch.int8`."""
    if key in scales:
        del scales[key]
    if dtype == torch.int8:
        quantised = quantise_rows(rows)
        bases[key], scales[key] = quantised.codes, quantised.scales
    else:
        bases[key] = rows.to(dtype)
