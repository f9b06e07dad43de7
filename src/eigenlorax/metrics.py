"""What was lost: errors of updates by r × r products, none of which forms an out × in matrix. Float64 throughout."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

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


def rounding_error(exact: Mapping[str, LoRAFactors], rounded: Mapping[str, LoRAFactors]) -> float:
    """√(Σ‖D − D'‖² / Σ‖D‖²) over modules whose factors differ by rounding alone."""
    lost = total = 0.0
    for module in exact:
        one, other = exact[module], rounded[module]
        total += spaces.delta_square(one)
        left, right, other_left, other_right = (t.to(torch.float64) for t in (one.up, one.down, other.up, other.down))
        lost += one.scaling**2 * linalg.difference_square(left, right, other_left, other_right)
    return math.sqrt(lost / total) if total else 0.0
