"""What an adapted layer holds: the coefficients of each adapter, and the bases that they are on.

What is computed with them is in `adapted`.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from ..core import convolution, keys
from ..core.coefficients import Coefficients
from ..core.int8_rows import Int8Rows, quantise_rows
from ..core.subspace import ModuleBases
from ..errors import FormatError
from .config import EigenLoraxConfig
from .starts import Start


class EigenLoraxLayer(BaseTunerLayer):
    """What an adapted layer holds, by adapter; and the bases, by the fingerprint of their subspace."""

    _active_adapter: str | list[str]
    adapter_layer_names = ("eigenlorax_down", "eigenlorax_up", "eigenlorax_core")
    other_param_names = (
        "r",
        "lora_alpha",
        "use_rslora",
        "scaling",
        "eigenlorax_dropout",
        "subspace_of",
        "sizes_of",
        "eigenlorax_down_rest",
        "eigenlorax_up_rest",
        "unread",
    )

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
        # adapters whose file has coefficients in another way than as floats, and what that is called, until it is read
        self.unread: dict[str, str] = {}
        self.eigenlorax_dropout = nn.ModuleDict({})
        self.eigenlorax_down = nn.ParameterDict({})
        self.eigenlorax_up = nn.ParameterDict({})
        self.eigenlorax_core = nn.ParameterDict({})
        # (r, in) and (out, r): what the bases do not hold of an adapter's two factors, where it has any of that
        self.eigenlorax_down_rest = BufferDict({}, persistent=True)
        self.eigenlorax_up_rest = BufferDict({}, persistent=True)
        # (k_down, in) and (k_up, out), one pair a subspace, however many adapters use it
        self.eigenlorax_basis_down = BufferDict({}, persistent=False)
        self.eigenlorax_basis_up = BufferDict({}, persistent=False)
        # (k, 1): of bases that are kept in 8 bits
        self.eigenlorax_scales_down = BufferDict({}, persistent=False)
        self.eigenlorax_scales_up = BufferDict({}, persistent=False)
        # the same for adapters that are saved with their subspace, one pair an adapter: part of the state dict
        self.eigenlorax_embedded_down = BufferDict({}, persistent=True)
        self.eigenlorax_embedded_up = BufferDict({}, persistent=True)
        # (k_up, k_down), one a subspace: what is active now, where the layer serves
        self.eigenlorax_blend = BufferDict({}, persistent=False)
        # "down" (rows, in) and "up" (out, rows): the same of adapters with a rest, as factors of one LoRA
        self.eigenlorax_factors = BufferDict({}, persistent=False)
        self.serving: Serving | None = None
        self._blended: tuple[Any, ...] = ()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged_scaling: dict[str, float] = {}
        self.cast_input_dtype_enabled = True
        self.in_features, self.out_features = sizes_of(self.get_base_layer())
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
        rests: Collection[str] = (),
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter: its coefficients as `start` gives them, and its bases unless they are here already.

        rests: the sides that it has a rest on, which is zero until it is loaded.
        """
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.set_scale(adapter_name, 1.0)
        dropout = nn.Dropout(p=config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.eigenlorax_dropout[adapter_name] = dropout
        self._place_bases(adapter_name, bases, fingerprint, config.embed_subspace)
        if config.coefficient_dtype is not None:
            self.unread[adapter_name] = config.coefficient_dtype
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
            if "down" in rests:
                self.eigenlorax_down_rest[adapter_name] = torch.zeros(r, self.in_features)
            if "up" in rests:
                self.eigenlorax_up_rest[adapter_name] = torch.zeros(self.out_features, r)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)
        if adapter_name in self.active_adapters or self.bases_key(adapter_name)[0] not in self.eigenlorax_blend:
            self.blend()

    def hold(self, adapter_name: str, bases: ModuleBases, fingerprint: str, coefficients: Coefficients) -> None:
        """Add an adapter to run and not to train: its coefficients as they are, on bases that may be here already.

        It is not active yet, and is served after the next `blend`. Coefficients may be on the first components of bases
        that have grown since.
        """
        self.r[adapter_name] = coefficients.rank
        self.lora_alpha[adapter_name] = coefficients.scaling * coefficients.rank
        self.use_rslora[adapter_name] = False
        self.scaling[adapter_name] = coefficients.scaling
        self._place_bases(adapter_name, bases, fingerprint, embed=False)
        self.sizes_of[adapter_name] = coefficients.down.shape[1], coefficients.up.shape[0]
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        own = self.dtype
        for target, part in ((self.eigenlorax_down, coefficients.down), (self.eigenlorax_up, coefficients.up)):
            # rounded to no narrower dtype than the pack's
            wide = torch.promote_types(part.dtype, own) if own is not None else part.dtype
            target[adapter_name] = nn.Parameter(part.to(device, wide), requires_grad=False)
        served = self.serving.dtype if self.serving is not None else None
        for rests, side in ((self.eigenlorax_down_rest, "down"), (self.eigenlorax_up_rest, "up")):
            if (rest := coefficients.residual(side)) is not None:
                # as large as a LoRA, and so in the dtype that one would have
                narrow = served if served not in (None, torch.int8) else own
                rests[adapter_name] = rest.to(device, narrow or torch.promote_types(rest.dtype, torch.float32))

    def _place_bases(self, adapter_name: str, bases: ModuleBases, fingerprint: str, embed: bool) -> None:
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        self.subspace_of[adapter_name] = fingerprint
        if embed:
            targets, key = (self.eigenlorax_embedded_down, self.eigenlorax_embedded_up), adapter_name
        else:
            targets, key = (self.eigenlorax_basis_down, self.eigenlorax_basis_up), fingerprint
        served = self.serving.dtype if self.serving is not None and not embed else None
        for target, scales, basis in zip(targets, self._scales, (bases.down, bases.up), strict=True):
            if key not in target:
                # rounding the basis to the dtype of a half-precision model would be another basis
                dtype = served or torch.promote_types(basis.components.dtype, torch.float32)
                _keep(target, scales, key, basis.components.to(device=_real(device)), dtype)

    def bases_of(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """(k_down, in) and (k_up, out), orthonormal rows: those that the adapter has coefficients on."""
        key, k_down, k_up = self.bases_key(adapter_name)
        down, up = self.bases_at(key)
        return down[:k_down], up[:k_up]

    def bases_at(self, key: str) -> tuple[Tensor, Tensor]:
        """The same whole: those of the adapter that has them embedded, or those of the subspace, of this name.

        What is kept in 8 bits is made wide, in the dtype of the layer, for as long as the caller holds it.
        """
        if key in self.eigenlorax_embedded_down:
            return self.eigenlorax_embedded_down[key], self.eigenlorax_embedded_up[key]
        down, up = self.eigenlorax_basis_down[key], self.eigenlorax_basis_up[key]
        if key in self.eigenlorax_scales_down:
            dtype = self.dtype or torch.float32
            down = Int8Rows(down, self.eigenlorax_scales_down[key]).wide(dtype)
            up = Int8Rows(up, self.eigenlorax_scales_up[key]).wide(dtype)
        return down, up

    @property
    def _scales(self) -> tuple[BufferDict, BufferDict]:
        return self.eigenlorax_scales_down, self.eigenlorax_scales_up

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
        self.blend()

    def has_adapter(self, adapter_name: str) -> bool:
        return adapter_name in self.eigenlorax_down or adapter_name in self.eigenlorax_core

    def check_read(self) -> None:
        """`FormatError` where the coefficients of an adapter are not those of its file: a loader has passed them by."""
        for name, stored in self.unread.items():
            raise FormatError(
                f"adapter {name!r} has its coefficients as {stored}, which what loaded it has passed by: transformers' "
                "own load_adapter reads floats alone. Load it by PeftModel.from_pretrained, or `eigenlorax export` it."
            )

    def has_residual(self, adapter_name: str) -> bool:
        """Whether there is more to an adapter's update than its coefficients."""
        return adapter_name in self.eigenlorax_down_rest or adapter_name in self.eigenlorax_up_rest

    def rests_of(self, adapter_name: str) -> tuple[Tensor | None, Tensor | None]:
        """(r, in) and (out, r), what the bases do not hold of the two factors; None where there is nothing."""
        down, up = self.eigenlorax_down_rest, self.eigenlorax_up_rest
        return _among(down, adapter_name), _among(up, adapter_name)

    def sides_with_rest(self, adapter_name: str) -> list[str]:
        """Of "down" and "up", those with a rest."""
        return [side for side, rest in zip(keys.SIDES, self.rests_of(adapter_name), strict=True) if rest is not None]

    def plain_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """(r, in) and (out, r): those of the ordinary LoRA that an adapter of two factors is, in float32 at least, and
        without the scaling."""
        down, up = self.factors_of(adapter_name)
        dtype = torch.promote_types(down.dtype, torch.float32)
        down_basis, up_basis = (basis.to(down.device, dtype) for basis in self.bases_of(adapter_name))
        down_residual, up_residual = self.rests_of(adapter_name)
        down, up = down.to(dtype) @ down_basis, up_basis.mT @ up.to(dtype)
        return down if down_residual is None else down + down_residual, up if up_residual is None else up + up_residual

    def core_of(self, adapter_name: str) -> Tensor:
        """(k_up, k_down): what of the update is in the bases, without the scaling."""
        if adapter_name in self.eigenlorax_core:
            return self.eigenlorax_core[adapter_name]
        return self.eigenlorax_up[adapter_name] @ self.eigenlorax_down[adapter_name]

    def factors_of(self, adapter: str) -> tuple[Tensor, ...]:
        """What the projected input is multiplied with, one after the other."""
        if adapter in self.eigenlorax_core:
            return (self.eigenlorax_core[adapter],)
        return self.eigenlorax_down[adapter], self.eigenlorax_up[adapter]

    def bases_key(self, adapter_name: str) -> tuple[str, int, int]:
        """The same for adapters that have coefficients on the same components."""
        embedded = adapter_name in self.eigenlorax_embedded_down
        return adapter_name if embedded else self.subspace_of[adapter_name], *self.sizes_of[adapter_name]

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter, and its bases if no other adapter uses them."""
        super().delete_adapter(adapter_name)
        for embedded in (self.eigenlorax_embedded_down, self.eigenlorax_embedded_up):
            if adapter_name in embedded:
                del embedded[adapter_name]
        for bases in (self.eigenlorax_basis_down, self.eigenlorax_basis_up, *self._scales):
            for key in set(bases) - set(self.subspace_of.values()):
                del bases[key]
        self.blend()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scaling of an adapter to `scale` times that of its config."""
        if adapter in self.r:
            divisor = math.sqrt(self.r[adapter]) if self.use_rslora[adapter] else self.r[adapter]
            self.scaling[adapter] = scale * self.lora_alpha[adapter] / divisor
            self._blend_anew()

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of all active adapters."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale
        self._blend_anew()

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of all active adapters; without a number, set it back to that of their config."""
        for adapter in self.active_adapters:
            if adapter in self.scaling and scale is not None:
                self.scaling[adapter] /= scale
            elif adapter in self.scaling:
                self.set_scale(adapter, 1.0)
        self._blend_anew()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT. Adapters that are held are not made trainable."""
        if self.eigenlorax_dropout:
            super().set_adapter(adapter_names, inference_mode=inference_mode)
        else:
            self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._blend_anew()

    def enable_adapters(self, enabled: bool) -> None:
        """As in PEFT."""
        super().enable_adapters(enabled)
        self._blend_anew()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Every adapter is a LoRA in the terms of a basis."""
        return True

    def serve(self, dtype: torch.dtype | None = None) -> None:
        """Serve from now on: outside of training, what is active is one core a subspace, whichever adapters that is.

        The core is a buffer, filled anew in place when something else becomes active. The layer reads that tensor and
        nothing else, so that a compiled model stays as it is; nothing is trained by what it computes in this way.
        Adapters with a rest are a LoRA that is filled in the same way. It has as many rows as were active at one time,
        and as the largest of them has.

        dtype: that of the bases from now on, unless they are embedded; None leaves them as they are, and torch.int8 is
        a scale for each row and 8 bits for each number.
        """
        if self.serving is None:
            self.register_load_state_dict_post_hook(_blend_what_was_loaded)
        self.serving = Serving(dtype)
        if dtype is not None:
            # a tensor that is made within inference mode could never be trained with again
            with torch.inference_mode(False), torch.no_grad():
                for key in list(self.eigenlorax_basis_down):
                    kept = self.eigenlorax_basis_down, self.eigenlorax_basis_up
                    for bases, scales, rows in zip(kept, self._scales, self.bases_at(key), strict=True):
                        if bases[key].dtype != dtype:
                            _keep(bases, scales, key, rows, dtype)
        # one that was put into a model that is not being trained thinks that it is
        self.train(self.base_layer.training)
        self.blend()

    def blend(self) -> None:
        """Fill the cores that are served, where there are any: after coefficients were changed by hand, too."""
        if self.serving is None:
            return
        embedded = self.eigenlorax_embedded_down
        places = {
            name: name if name in embedded else key
            for name, key in self.subspace_of.items()
            if not self.has_residual(name)
        }
        active = [] if self._disable_adapters else [name for name in self.active_adapters if self.has_adapter(name)]
        for key in set(self.eigenlorax_blend) - set(places.values()):
            del self.eigenlorax_blend[key]
        # what is made within inference mode could not be written outside of it
        with torch.inference_mode(False), torch.no_grad():
            for key in dict.fromkeys(places.values()):
                down, up = self.bases_at(key)
                if key not in self.eigenlorax_blend:
                    dtype = torch.promote_types(up.dtype, torch.float32)
                    self.eigenlorax_blend[key] = torch.zeros(len(up), len(down), dtype=dtype, device=up.device)
                self.eigenlorax_blend[key].zero_()
            for name in active:
                if name in places:
                    self._add_to(self.eigenlorax_blend[places[name]], name)
            self._fill_factors([name for name in active if name not in places])
        self._blended = self._what_is_active()

    def _add_to(self, blend: Tensor, adapter_name: str) -> None:
        """Add an adapter's core, in the dtype of the blend, to the first components of it."""
        factors, scaling = self.factors_of(adapter_name), self.scaling[adapter_name]
        # what is not loaded yet is on no device
        if factors[0].is_meta:
            return
        k_down, k_up = self.sizes_of[adapter_name]
        down, *up = (factor.to(blend) for factor in factors)
        if up:
            blend[:k_up, :k_down].addmm_(up[0], down, alpha=scaling)
        else:
            blend[:k_up, :k_down].add_(down, alpha=scaling)

    def _fill_factors(self, active: Sequence[str]) -> None:
        """Fill the LoRA of adapters with a rest with these; there is none where no adapter has one."""
        ranks = {name: self.r[name] for name in self.subspace_of if self.has_residual(name)}
        there = self.eigenlorax_factors
        if not ranks:
            there.clear()
            return
        rows = max(sum(ranks[name] for name in active), *ranks.values())
        if "down" not in there or len(there["down"]) < rows:
            _, example = self.bases_of(next(iter(ranks)))
            there["down"] = example.new_zeros(rows, self.in_features)
            there["up"] = example.new_zeros(self.out_features, rows)
        down, up = there["down"].zero_(), there["up"].zero_()
        start = 0
        for name in active:
            end = start + ranks[name]
            # what is not loaded yet is on no device
            if not self.eigenlorax_down[name].is_meta:
                own_down, own_up = self.plain_factors(name)
                down[start:end], up[:, start:end] = own_down, self.scaling[name] * own_up
            start = end

    def _blend_anew(self) -> None:
        """`blend`, unless the same adapters are active with the same scalings as the last time."""
        if self.serving is not None and self._what_is_active() != self._blended:
            self.blend()

    def _what_is_active(self) -> tuple[Any, ...]:
        return self._disable_adapters, tuple(
            (name, self.scaling[name]) for name in self.active_adapters if self.has_adapter(name)
        )

    @property
    def dtype(self) -> torch.dtype | None:
        """That which the layer itself computes in; None where its weight does not say."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return dtype if dtype is not None and dtype.is_floating_point else None

    @property
    def kernel(self) -> tuple[int, ...]:
        """That of a convolution; () of a linear layer."""
        return convolution.kernel_of(self.get_base_layer())


@dataclass(frozen=True, slots=True)
class Serving:
    """That a layer serves. dtype: of its bases, torch.int8 too; None for what they are loaded in."""

    dtype: torch.dtype | None


def _among(rests: BufferDict, adapter_name: str) -> Tensor | None:
    if adapter_name not in rests:
        return None
    rest: Tensor = rests[adapter_name]
    return rest


def _keep(bases: BufferDict, scales: BufferDict, key: str, rows: Tensor, dtype: torch.dtype) -> None:
    """Let a layer have a basis (k, d) in a dtype."""
    if key in scales:
        del scales[key]
    if dtype == torch.int8:
        found = quantise_rows(rows)
        bases[key], scales[key] = found.codes, found.scales
    else:
        bases[key] = rows.to(dtype)


def _blend_what_was_loaded(layer: EigenLoraxLayer, incompatible: Any) -> None:
    layer.blend()


def is_supported(module: nn.Module) -> bool:
    """Whether a layer of a model can have coefficients: a linear one, quantised ones too, or a convolution."""
    if isinstance(module, nn.Linear | Conv1D) or convolution.is_supported(module):
        return True
    backend = resolve_quantization_backend(module)
    return backend is not None and backend.layer_type == "linear"


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """The lengths of rows on both sides: (in, out); of a convolution (channels in · kernel, channels out)."""
    if isinstance(module, convolution.CONVOLUTIONS):
        return convolution.row_sizes(module)
    in_features, out_features = _get_in_out_features(module)
    return in_features, out_features


def _real(device: torch.device | None) -> torch.device | None:
    """Where a basis goes beside a layer that is on no device yet: it has no second chance to be loaded."""
    return torch.device("cpu") if device is not None and device.type == "meta" else device
