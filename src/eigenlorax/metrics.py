"""What was lost: errors of updates by r × r products, none of which forms an out × in matrix. Float64 throughout."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import linalg
from . import subspace as spaces
from .adapter import LoRAFactors
from .subspace import Coefficients, Duals, ModuleBases


@dataclass(frozen=True, slots=True)
class ModuleError:
    """Squared norms of one module of one adapter: of its update, of what the pack loses of it, and of what rounding
    alone changes in the reconstruction."""

    total: float
    lost: float
    rounding: float


@dataclass(frozen=True, slots=True)
class AdapterError:
    """Relative errors of a whole adapter, √(Σ‖D − D̂‖² / Σ‖D‖²) over the modules the subspace holds.

    delta_error: of the reconstruction from what is stored, rounding included.
    rounding_error: between that and the reconstruction without rounding, on the same scale.
    """

    delta_error: float
    rounding_error: float


def module_error(
    factors: LoRAFactors,
    coefficients: Coefficients,
    bases: ModuleBases,
    exact_bases: ModuleBases | None = None,
    exact_dual: Duals | None = None,
) -> ModuleError:
    """What `coefficients` in `bases`, both as stored, lose of `factors`.

    exact_bases: the bases before they were rounded, with their `spaces.duals`; where they are not at hand, the rounding
    measured is that of the coefficients alone.
    """
    shift = spaces.balance(factors, coefficients.down.dtype)
    down = factors.down.to(torch.float64) * 2.0**-shift
    up = factors.up.to(torch.float64) * 2.0**shift
    ideal = LoRAFactors(down, up, factors.scaling)
    exact_bases = exact_bases or bases
    exact = spaces.reconstruct(spaces.project(ideal, exact_bases, dual=exact_dual), exact_bases)
    stored = spaces.reconstruct(coefficients, bases)
    square = factors.scaling**2
    return ModuleError(
        total=spaces.delta_square(factors),
        lost=square * linalg.difference_square(up, down, stored.up, stored.down),
        rounding=square * linalg.difference_square(exact.up, exact.down, stored.up, stored.down),
    )


def adapter_error(modules: Iterable[ModuleError]) -> AdapterError:
    """The errors of a whole adapter from those of its modules; zero for an update that is zero."""
    modules = list(modules)
    total = math.fsum(m.total for m in modules)
    if total == 0:
        return AdapterError(0.0, 0.0)
    return AdapterError(
        delta_error=math.sqrt(math.fsum(m.lost for m in modules) / total),
        rounding_error=math.sqrt(math.fsum(m.rounding for m in modules) / total),
    )


def delta_error(original: LoRAFactors, other: LoRAFactors) -> float:
    """‖D − D'‖ / ‖D‖ of two updates of any ranks, scalings and gauges."""
    left = torch.cat([_up(original), -_up(other)], dim=1)
    right = torch.cat([original.down.to(torch.float64), other.down.to(torch.float64)])
    total = spaces.delta_square(original)
    return math.sqrt(max(linalg.product_square(left, right), 0.0) / total) if total else 0.0


def _up(factors: LoRAFactors) -> Tensor:
    return factors.scaling * factors.up.to(torch.float64)
