"""Where training starts: the first coefficients of a module, as a config asks for them.

Every start but the two random ones is a core, the update in the two bases, which is exact where coefficients are cores
and is factored to the rank otherwise.
"""

import math
import warnings
from collections.abc import Callable
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
from ..pack.packed_adapter import PackedAdapter
from .config import EigenLoraxConfig
from .reference import Embedded, Reference

Cores = Callable[[str, ModuleBases], Tensor | None]
"""Module name in the subspace and its bases → scaling · C_up C_down, (k_up, k_down) float64; None where it is zero."""


@dataclass(frozen=True, slots=True)
class Start:
    """The start of one module: random, or from a core."""

    kind: str
    k_down: int
    k_up: int
    core: Tensor | None
    as_core: bool
    init_weights: bool

    def coefficients(self, r: int, scaling: float) -> tuple[Tensor, ...]:
        """Down (r, k_down) and up (k_up, r), or one core (k_up, k_down)."""
        if self.as_core:
            return (self._core(scaling),)
        if self.kind == "uniform":
            return torch.rand(r, self.k_down) - 0.5, torch.rand(self.k_up, r) - 0.5
        if self.core is not None and scaling:
            return factored(self.core / scaling, r)
        down = torch.randn(r, self.k_down) / math.sqrt(max(self.k_down, 1))
        up = torch.zeros(self.k_up, r) if self.init_weights else torch.randn(self.k_up, r)
        return down, up

    def _core(self, scaling: float) -> Tensor:
        if self.kind == "uniform":
            return torch.rand(self.k_up, self.k_down) - 0.5
        if self.core is not None and scaling:
            return (self.core / scaling).float()
        shape = self.k_up, self.k_down
        return torch.zeros(shape) if self.init_weights else torch.randn(shape) / math.sqrt(max(self.k_down, 1))


def factored(core: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Down (r, k_down) and up (k_up, r), float32, of equal norms, whose product is the best one of rank r of `core`."""
    u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
    kept = min(r, len(sigma))
    roots = sigma[:kept].sqrt()
    down = torch.zeros(r, core.shape[1], dtype=core.dtype)
    up = torch.zeros(core.shape[0], r, dtype=core.dtype)
    down[:kept], up[:, :kept] = roots[:, None] * vh[:kept], u[:, :kept] * roots
    return down.float(), up.float()


def cores(config: EigenLoraxConfig, reference: Reference | Embedded) -> Cores:
    """Where the cores of a start come from; found before any layer is touched."""
    if config.start in ("zero", "uniform") or isinstance(reference, Embedded):
        return lambda place, bases: None
    if config.start == "mean":
        return _mean(reference, config)
    pack = reference.pack
    if pack is not None and config.start in pack.names:
        return _of_packed([pack.packed(config.start)], reference, config.start)
    if Path(config.start).is_dir():
        return _projected(formats.read_adapter(config.start), reference, config)
    names = pack.names if pack is not None else []
    known = ", ".join(names[:12]) if pack is not None else "none: no pack is at hand"
    near = suggestion(config.start, [*names, "zero", "mean", "uniform"])
    raise OptionError(
        f"start={config.start!r} is neither 'zero', 'mean' nor 'uniform', nor the folder of a LoRA, nor an adapter of "
        f"the pack.{near} Those are: {known}."
    )


def _mean(reference: Reference, config: EigenLoraxConfig) -> Cores:
    pack = reference.pack
    trained = [name for name, record in pack.records.items() if not record.untrained] if pack is not None else []
    if pack is None or not trained:
        raise OptionError("start='mean' needs a pack with adapters: pass subspace='pack/', the pack they are in.")
    return _of_packed([pack.packed(name) for name in trained], reference, config.start)


def _of_packed(adapters: list[PackedAdapter], reference: Reference, start: str) -> Cores:
    """The mean update of adapters of a pack, without what is beside the bases; zero on directions that came after
    them."""
    _warn_of_rests(adapters, reference, start)

    def core(place: str, bases: ModuleBases) -> Tensor | None:
        total: Tensor | None = None
        for adapter in adapters:
            for module, coefficients in adapter.coefficients.items():
                if adapter.places[module] == place:
                    wide = _inside(widen_coefficients(coefficients, bases), bases)
                    one = coefficients.scaling * wide.up.double() @ wide.down.double()
                    total = one if total is None else total + one
        return None if total is None else total / len(adapters)

    return core


def _inside(coefficients: Coefficients, bases: ModuleBases) -> Coefficients:
    """What of an update with a rest is in the bases: a rest need not be orthogonal to them."""
    return (
        projection.project(projection.reconstruct(coefficients, bases), bases)
        if coefficients.has_residual
        else coefficients
    )


def _warn_of_rests(adapters: list[PackedAdapter], reference: Reference, start: str) -> None:
    """Warn of what training cannot start from: it would have to be trained too."""
    lost = {
        one.name: _outside(one, reference) for one in adapters if any(c.has_residual for c in one.coefficients.values())
    }
    if lost:
        worst = max(lost, key=lambda name: lost[name])
        which = f"{len(lost)} of {len(adapters)} adapters have" if len(adapters) > 1 else "it has"
        warnings.warn(
            f"start={start!r}: {which} a rest outside the subspace, {lost[worst]:.4f} of the update of {worst!r} "
            "(delta error). Training starts without that.",
            ProjectionWarning,
            stacklevel=2,
        )


def _outside(packed: PackedAdapter, reference: Reference) -> float:
    """How much of an adapter's update is outside of the bases: the delta error of what is inside."""
    errors = []
    for module, coefficients in packed.coefficients.items():
        bases = reference.subspace.modules[packed.places[module]]
        whole = projection.reconstruct(coefficients, bases)
        errors.append(metrics.module_error(whole, projection.project(whole, bases), bases))
    return metrics.adapter_error(errors).delta_error


def _projected(adapter: Adapter, reference: Reference, config: EigenLoraxConfig) -> Cores:
    """The projection of a LoRA on the subspace."""
    kernels = {reference.place(module, config): tuple(kernel) for module, kernel in config.kernels.items()}
    places = module_names.resolve_all(adapter.specs, reference.subspace.modules)
    modules = {place: module for module, place in places.items() if place is not None}
    if not modules:
        raise ModuleNameError(
            f"start={adapter.name!r} has none of the modules of the subspace: it is a LoRA of another base model, or "
            "of other modules."
        )
    lost = []
    for place, module in modules.items():
        factors, bases = adapter.modules[module], reference.subspace.modules[place]
        if (factors.spec.out_features, factors.spec.in_features) != bases.shape:
            raise ShapeError(
                f"start={adapter.name!r}, module {module}: (out, in) is "
                f"{(factors.spec.out_features, factors.spec.in_features)}, and {bases.shape} in the subspace. It is "
                "a LoRA of another base model."
            )
        kernel = kernels.get(place, factors.kernel)
        if not convolution.kernels_match(factors.kernel, kernel):
            raise ShapeError(
                f"start={adapter.name!r}, module {module}: its kernel is {factors.kernel}, and {kernel} in the model. "
                "It is a LoRA of another base model."
            )
        lost.append(metrics.module_error(factors, projection.project(factors, bases), bases))
    lacking = sorted(set(adapter.specs) - set(modules.values()))
    error = metrics.adapter_error(lost).delta_error
    if lacking or error > 1e-5:
        elsewhere = f", and all of {len(lacking)} modules that the subspace lacks" if lacking else ""
        warnings.warn(
            f"start={adapter.name!r}: {error:.4f} of its update lies outside the subspace (delta error){elsewhere}. "
            "Training starts without that.",
            ProjectionWarning,
            stacklevel=2,
        )

    def core(place: str, bases: ModuleBases) -> Tensor | None:
        if place not in modules:
            return None
        found = projection.project(adapter.modules[modules[place]], bases)
        return found.scaling * found.up @ found.down

    return core
