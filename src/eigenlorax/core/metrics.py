"""What was lost: errors of updates by r × r products, none of which forms an out × in matrix. Float64 throughout."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import chunks, linalg
from . import subspace as spaces
from .adapter import LoRAFactors
from .chunks import Chunk, CoefficientChunk
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


@dataclass(frozen=True, slots=True)
class Unrounded:
    """The bases of a module before they were rounded, with what the errors of all its adapters need of them.

    down_gram, up_gram: Gram matrices, (2k, 2k), of the rows before rounding on top of what rounding took from them.
    """

    duals: Duals
    down_gram: Tensor
    up_gram: Tensor


def unrounded(exact: ModuleBases, stored: ModuleBases) -> Unrounded:
    """What `module_error` needs of `exact`, of which `stored` is the rounding."""

    def gram(side: str) -> Tensor:
        rows, other = (bases.side(side).components.to(torch.float64) for bases in (exact, stored))
        both = torch.cat([rows, rows - other])
        return both @ both.mT

    return Unrounded(spaces.duals(exact), gram("down"), gram("up"))


def module_error(
    factors: LoRAFactors, coefficients: Coefficients, bases: ModuleBases, exact: Unrounded | None = None
) -> ModuleError:
    """What `coefficients` in `bases`, both as stored, lose of `factors`, which may have another rank.

    exact: of the bases before they were rounded; where they are not at hand, the rounding measured is that of the
    coefficients alone. With a rest nothing is left out for its direction: all that is lost is rounding.
    """
    if coefficients.has_rest:
        lost = _difference_square(factors, spaces.reconstruct(coefficients, bases))
        return ModuleError(spaces.delta_square(factors), lost, lost)
    down, up = _of_rank(coefficients.down, coefficients.up, factors.spec.rank)
    found = CoefficientChunk(down[None], up[None], torch.ones(1, dtype=torch.float64))
    own_down, own_up = _of_rank(factors.down, factors.up, down.shape[0])
    factors = replace(factors, down=own_down, up=own_up)
    wide = spaces.balanced(chunks.chunk([factors], [0.0]), coefficients.down.dtype)
    return module_errors(wide, found, bases, exact)[0]


def _of_rank(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same products of (at least) so many rows and columns, filled up with zeros."""
    more = max(rank - down.shape[-2], 0)
    return pad(down, (0, 0, 0, more)), pad(up, (0, more))


def _difference_square(one: LoRAFactors, other: LoRAFactors) -> float:
    """‖D − D'‖² of updates of any two ranks and gauges; as exact as the larger of the two norms allows."""
    rank = max(one.spec.rank, other.spec.rank)
    sides = []
    for each in (one, other):
        down, up = _of_rank(each.down.double(), each.up.double(), rank)
        sides += [each.scaling * up, down]
    return float(linalg.difference_square(*sides))


def module_errors(
    wide: Chunk,
    coefficients: CoefficientChunk,
    bases: ModuleBases,
    exact: Unrounded | None = None,
    before: CoefficientChunk | None = None,
) -> list[ModuleError]:
    """`module_error` for several adapters at a time, as `subspace.balanced` gives them.

    before: the coefficients before they were rounded, in the bases before that, where these are not projections.
    """
    rank, dtype = max(wide.down.shape[1], coefficients.down.shape[1]), wide.down.dtype
    down, up = _of_rank(wide.down, wide.up.mT, rank)
    c_down, c_up = _of_rank(coefficients.down, coefficients.up, rank)
    stored_down = c_down.to(dtype) @ bases.down.components.to(dtype)
    stored_up = (c_up.mT.to(dtype) @ bases.up.components.to(dtype)).mT
    exact = exact or unrounded(bases, bases)
    if before is None:
        down_dual, up_dual = (dual.to(dtype) for dual in exact.duals)
        e_down, e_up = down @ down_dual.mT, up_dual @ up
    else:
        e_down, e_up = _of_rank(before.down, before.up, rank)
    square = wide.scaling.square()
    found = (
        square * linalg.product_square(up, down),
        square * linalg.difference_square(up, down, stored_up, stored_down),
        square * _rounding_square(e_down.double(), e_up.double(), c_down.double(), c_up.double(), exact),
    )
    return [ModuleError(*values) for values in zip(*(value.tolist() for value in found), strict=True)]


def _rounding_square(e_down: Tensor, e_up: Tensor, c_down: Tensor, c_up: Tensor, exact: Unrounded) -> Tensor:
    """‖UᵀE_up·E_down·V − U'ᵀC_up·C_down·V'‖² of bases U, V, coefficients E before, and U', V', C after rounding.

    Both factors are written in the rows before rounding and what rounding took from them, (n, 2k, r), so that no
    product is wider than that; and as in `linalg.difference_square`, no two large numbers are subtracted.
    """
    left = torch.cat([torch.cat([e_up - c_up, c_up], dim=2), torch.cat([c_up, -c_up], dim=2)], dim=1)
    right = torch.cat(
        [
            torch.cat([e_down, torch.zeros_like(e_down)], dim=2),
            torch.cat([e_down - c_down, c_down], dim=2),
        ],
        dim=1,
    )
    square = ((left.mT @ exact.up_gram @ left) * (right @ exact.down_gram @ right.mT)).sum((1, 2))
    return square.clamp_min(0)


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
        lost += one.scaling**2 * float(linalg.difference_square(left, right, other_left, other_right))
    return math.sqrt(lost / total) if total else 0.0
