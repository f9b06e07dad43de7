"""The initial coefficients of a module, as the `start` of a config specifies them.

Every start except random ones is a core (k_up, k_down), the update in terms of the two bases. It is used as it is if
coefficients are cores, and otherwise factored to the rank by a truncated SVD.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import formats
from ..core import convolution, metrics, module_names, projection
from ..core.adapter import Adapter
from ..core.coefficients import Coefficients
from ..core.options import suggestion
from ..core.projection import widen_coefficients
from ..core.subspace import ModuleBases
from ..errors import ModuleNameError, OptionError, ProjectionWarning, ShapeError
from ..pack import basis_adapters
from ..pack.pack import Pack
from ..pack.packed_adapter import PackedAdapter
from .config import EigenLoraxConfig
from .resolve import EmbeddedSubspace, ResolvedSubspace

InitialCore = Callable[[str, ModuleBases], Tensor | None]
"""Function of a module's name in the subspace and its bases.

It returns scaling · C_up C_down, (k_up, k_down) float64; None if that is zero.
"""

# Relative error that rounding to float32 explains.
_ROUNDING_ERROR = 1e-5


@dataclass(frozen=True, slots=True)
class InitialCoefficients:
    """The start of one module: random coefficients, or the coefficients of a core.

    Attributes:
        start: The `start` of the config.
        k_down: Number of components of the down side.
        k_up: Number of components of the up side.
        core: Core with the scaling, (k_up, k_down); None for a random start or the zero update.
        as_core: Whether the coefficients are one core.
        init_weights: False for random coefficients of which none is zero.
    """

    start: str
    k_down: int
    k_up: int
    core: Tensor | None
    as_core: bool
    init_weights: bool

    def coefficients(self, r: int, scaling: float) -> tuple[Tensor, ...]:
        """Return the coefficients (r, k_down) and (k_up, r), or one core (k_up, k_down), without the scaling."""
        if self.as_core:
            return (self._scaled_core(scaling),)
        if self.start == "uniform":
            return torch.rand(r, self.k_down) - 0.5, torch.rand(self.k_up, r) - 0.5
        if self.core is not None and scaling:
            return factor_core(self.core / scaling, r)
        # like LoRA: one random factor, scaled for outputs of unit variance, and one of zeros
        down = torch.randn(r, self.k_down) / math.sqrt(max(self.k_down, 1))
        up = torch.zeros(self.k_up, r) if self.init_weights else torch.randn(self.k_up, r)
        return down, up

    def _scaled_core(self, scaling: float) -> Tensor:
        if self.start == "uniform":
            return torch.rand(self.k_up, self.k_down) - 0.5
        if self.core is not None and scaling:
            return (self.core / scaling).float()
        shape = self.k_up, self.k_down
        return torch.zeros(shape) if self.init_weights else torch.randn(shape) / math.sqrt(max(self.k_down, 1))


def factor_core(core: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the factors (r, k_down) and (k_up, r), float32, of the best approximation of rank `r` of a core.

    The factors have equal norms, so that both are trained at the same rate. Rows beyond the rank of the core are zero.
    """
    u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
    rank = min(r, len(sigma))
    roots = sigma[:rank].sqrt()
    down = torch.zeros(r, core.shape[1], dtype=core.dtype)
    up = torch.zeros(core.shape[0], r, dtype=core.dtype)
    down[:rank], up[:, :rank] = roots[:, None] * vh[:rank], u[:, :rank] * roots
    return down.float(), up.float()


def initial_core(config: EigenLoraxConfig, resolved: ResolvedSubspace | EmbeddedSubspace) -> InitialCore:
    """Return the function that gives the initial core of each module.

    Adapters and files are read, and errors raised, before a layer of the model is changed.
    """
    if config.start in ("zero", "uniform") or isinstance(resolved, EmbeddedSubspace):
        return lambda subspace_name, bases: None
    if config.start == "mean":
        return _mean_core(resolved, config)
    pack = resolved.pack
    if pack is not None and config.start in pack.names:
        return _packed_core(_read_adapters(pack, [config.start], resolved, config.start), resolved, config.start)
    if Path(config.start).is_dir():
        return _projected_core(formats.read_adapter(config.start), resolved, config)
    names = pack.names if pack is not None else []
    listing = ", ".join(names[:12]) + (" …" if len(names) > 12 else "")
    available = listing if pack is not None else "none, since no pack is open"
    near = suggestion(config.start, [*names, "zero", "mean", "uniform"])
    raise OptionError(
        f"start={config.start!r} is neither 'zero', 'mean' nor 'uniform', nor the folder of a LoRA, nor an adapter of "
        f"the pack.{near} Adapters of the pack: {available}."
    )


def _mean_core(resolved: ResolvedSubspace, config: EigenLoraxConfig) -> InitialCore:
    pack = resolved.pack
    trained = [name for name, record in pack.records.items() if not record.untrained] if pack is not None else []
    if pack is None or not trained:
        raise OptionError("start='mean' needs a pack with trained adapters. Pass it as subspace='pack/'.")
    return _packed_core(_read_adapters(pack, trained, resolved, config.start), resolved, config.start)


def _read_adapters(pack: Pack, names: Sequence[str], resolved: ResolvedSubspace, start: str) -> list[PackedAdapter]:
    """Return adapters as coefficients in the subspace, projected with a warning if that is the basis of the pack."""
    if resolved.fingerprint in pack.info.lineage or pack.basis is None:
        return [pack.packed(name) for name in names]
    projected = [basis_adapters.project(pack, name) for name in names]
    worst = max(projected, key=lambda packed: packed.record.delta_error)
    warnings.warn(
        f"start={start!r}: training starts from projections on the pack's basis. The error of {worst.name!r} is then "
        f"at most {worst.record.delta_error:.4f} (delta error).",
        ProjectionWarning,
        stacklevel=2,
    )
    return projected


def _packed_core(adapters: list[PackedAdapter], resolved: ResolvedSubspace, start: str) -> InitialCore:
    """Return the mean core of adapters of a pack, zero at components that were added after them."""
    _warn_of_residuals(adapters, resolved, start)

    def core(subspace_name: str, bases: ModuleBases) -> Tensor | None:
        total: Tensor | None = None
        for adapter in adapters:
            for module, coefficients in adapter.coefficients.items():
                if adapter.subspace_names[module] == subspace_name:
                    wide = _without_residual(widen_coefficients(coefficients, bases), bases)
                    adapter_core = coefficients.scaling * wide.up.double() @ wide.down.double()
                    total = adapter_core if total is None else total + adapter_core
        return None if total is None else total / len(adapters)

    return core


def _without_residual(coefficients: Coefficients, bases: ModuleBases) -> Coefficients:
    if not coefficients.has_residual:
        return coefficients
    # a residual may not be orthogonal to the bases, so it is projected instead of dropped
    return projection.project(projection.reconstruct(coefficients, bases), bases)


def _warn_of_residuals(adapters: list[PackedAdapter], resolved: ResolvedSubspace, start: str) -> None:
    """Warn if adapters have residuals, from which training cannot start: residuals are not trained."""
    errors = {
        adapter.name: _error_without_residual(adapter, resolved)
        for adapter in adapters
        if any(coefficients.has_residual for coefficients in adapter.coefficients.values())
    }
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        which = f"{len(errors)} of {len(adapters)} adapters have" if len(adapters) > 1 else "it has"
        warnings.warn(
            f"start={start!r}: {which} a residual outside the subspace, {errors[worst]:.4f} of the update of "
            f"{worst!r} (delta error). Training starts without it.",
            ProjectionWarning,
            stacklevel=2,
        )


def _error_without_residual(packed: PackedAdapter, resolved: ResolvedSubspace) -> float:
    """Return the delta error of an adapter's projection on the bases."""
    errors = []
    for module, coefficients in packed.coefficients.items():
        bases = resolved.subspace.modules[packed.subspace_names[module]]
        factors = projection.reconstruct(coefficients, bases)
        errors.append(metrics.module_error(factors, projection.project(factors, bases), bases))
    return metrics.adapter_error(errors).delta_error


def _projected_core(adapter: Adapter, resolved: ResolvedSubspace, config: EigenLoraxConfig) -> InitialCore:
    """Return the core of a LoRA's projection on the subspace, and warn of its relative error."""
    kernels = {resolved.subspace_name(module, config): tuple(kernel) for module, kernel in config.kernels.items()}
    subspace_names = module_names.resolve_all(adapter.specs, resolved.subspace.modules)
    modules = {subspace_name: module for module, subspace_name in subspace_names.items() if subspace_name is not None}
    if not modules:
        raise ModuleNameError(
            f"start={adapter.name!r} has none of the modules of the subspace: it belongs to another base model, or "
            "has other modules."
        )
    errors = []
    for subspace_name, module in modules.items():
        factors, bases = adapter.modules[module], resolved.subspace.modules[subspace_name]
        if (factors.spec.out_features, factors.spec.in_features) != bases.shape:
            raise ShapeError(
                f"start={adapter.name!r}, module {module}: (out, in) is "
                f"{(factors.spec.out_features, factors.spec.in_features)}, and {bases.shape} in the subspace. It is "
                "a LoRA of another base model."
            )
        kernel = kernels.get(subspace_name, factors.kernel)
        if not convolution.kernels_match(factors.kernel, kernel):
            raise ShapeError(
                f"start={adapter.name!r}, module {module}: its kernel is {factors.kernel}, and {kernel} in the model. "
                "It is a LoRA of another base model."
            )
        errors.append(metrics.module_error(factors, projection.project(factors, bases), bases))
    missing = set(adapter.specs) - set(modules.values())
    error = metrics.adapter_error(errors).delta_error
    if missing or error > _ROUNDING_ERROR:
        elsewhere = f", and the subspace lacks {len(missing)} of its modules" if missing else ""
        warnings.warn(
            f"start={adapter.name!r} is not in the subspace: its relative error (delta error) is "
            f"{error:.4f}{elsewhere}. Training starts from its projection.",
            ProjectionWarning,
            stacklevel=2,
        )

    def core(subspace_name: str, bases: ModuleBases) -> Tensor | None:
        if subspace_name not in modules:
            return None
        coefficients = projection.project(adapter.modules[modules[subspace_name]], bases)
        return coefficients.scaling * coefficients.up @ coefficients.down

    return core
