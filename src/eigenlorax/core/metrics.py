"""Relative errors of reconstructed updates, by r × r products: no out × in matrix is formed."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import linalg, projection
from .adapter import LoRAFactors, delta_square
from .batch import ModuleBatch, stack_factors
from .coefficients import CoefficientBatch, Coefficients
from .projection import DualComponents
from .subspace import ModuleBases


@dataclass(frozen=True, slots=True)
class ModuleError:
    """Squared Frobenius norms of one module of one adapter.

    Attributes:
        square: ‖D‖² of the update.
        squared_error: ‖D − D̂‖² of the reconstruction from what is stored, rounding included.
        squared_rounding: Squared norm of the part of the error that rounding alone causes.
    """

    square: float
    squared_error: float
    squared_rounding: float


@dataclass(frozen=True, slots=True)
class AdapterError:
    """Relative errors of a whole adapter, √(Σ‖D − D̂‖² / Σ‖D‖²) over the modules of the subspace.

    Attributes:
        delta_error: Relative error of the reconstruction from what is stored, rounding included.
        rounding_error: Relative difference between the reconstructions with and without rounding.
    """

    delta_error: float
    rounding_error: float


@dataclass(frozen=True, slots=True)
class UnroundedBases:
    """The parts of a module's bases before rounding that the errors of its adapters depend on.

    Attributes:
        duals: Rows that project on the unrounded bases.
        down_gram: Gram matrix of the down side's unrounded rows on top of their rounding errors, (2k, 2k).
        up_gram: The same Gram matrix of the up side.
    """

    duals: DualComponents
    down_gram: Tensor
    up_gram: Tensor


def unrounded_bases(exact: ModuleBases, stored: ModuleBases) -> UnroundedBases:
    """Return the parts of unrounded bases that `module_errors` needs.

    Args:
        exact: Bases before rounding.
        stored: The same bases after rounding.
    """

    def gram(side: str) -> Tensor:
        rows, rounded = (bases.side(side).components.to(torch.float64) for bases in (exact, stored))
        # rounded rows = rows − errors, so this Gram matrix gives all inner products of rows before and after rounding
        rows_and_errors = torch.cat([rows, rows - rounded])
        return rows_and_errors @ rows_and_errors.mT

    return UnroundedBases(projection.dual_components(exact), gram("down"), gram("up"))


def module_error(
    factors: LoRAFactors, coefficients: Coefficients, bases: ModuleBases, exact: UnroundedBases | None = None
) -> ModuleError:
    """Return the error of one module's coefficients.

    Args:
        factors: The original update, whose rank may differ from that of the coefficients.
        coefficients: Coefficients as stored.
        bases: Bases as stored.
        exact: The bases before rounding. Without them, `squared_rounding` covers the coefficients alone.
    """
    if coefficients.has_residual:
        # coefficients and residual represent the whole update, so all of the error is rounding
        squared_error = _update_difference_square(factors, projection.reconstruct(coefficients, bases))
        return ModuleError(delta_square(factors), squared_error, squared_error)
    # zero rows change no product, and both sides of a comparison need one rank
    down, up = _pad_rank(coefficients.down, coefficients.up, factors.spec.rank)
    stored = CoefficientBatch(down[None], up[None], torch.ones(1, dtype=torch.float64))
    factor_down, factor_up = _pad_rank(factors.down, factors.up, down.shape[0])
    factors = replace(factors, down=factor_down, up=factor_up)
    batch = projection.balance_batch(stack_factors([factors], [0.0]), coefficients.down.dtype)
    return module_errors(batch, stored, bases, exact)[0]


def _pad_rank(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors (…, r, n) and (…, m, r) with zeros for a rank of at least `rank`."""
    missing = max(rank - down.shape[-2], 0)
    return pad(down, (0, 0, 0, missing)), pad(up, (0, missing))


def _update_difference_square(left: LoRAFactors, right: LoRAFactors) -> float:
    """Return ‖D − D'‖² of two updates of any ranks, up to rounding in proportion to the larger norm."""
    rank = max(left.spec.rank, right.spec.rank)
    factors = []
    for update in (left, right):
        down, up = _pad_rank(update.down.double(), update.up.double(), rank)
        factors += [update.scaling * up, down]
    return float(linalg.difference_square(*factors))


def module_errors(
    batch: ModuleBatch,
    coefficients: CoefficientBatch,
    bases: ModuleBases,
    exact: UnroundedBases | None = None,
    before: CoefficientBatch | None = None,
) -> list[ModuleError]:
    """Return the error of each adapter of a batch, in one module.

    Args:
        batch: The original updates, balanced (`projection.balance_batch`).
        coefficients: Coefficients as stored.
        bases: Bases as stored.
        exact: The bases before rounding. Without them, `squared_rounding` covers the coefficients alone.
        before: The coefficients before rounding. Default: the projections on the unrounded bases.
    """
    # coefficients may be stored with another rank than the factors, and products need one rank
    rank, dtype = max(batch.down.shape[1], coefficients.down.shape[1]), batch.down.dtype
    down, up = _pad_rank(batch.down, batch.up.mT, rank)
    stored_down, stored_up = _pad_rank(coefficients.down, coefficients.up, rank)
    rebuilt_down = stored_down.to(dtype) @ bases.down.components.to(dtype)
    rebuilt_up = (stored_up.mT.to(dtype) @ bases.up.components.to(dtype)).mT
    exact = exact or unrounded_bases(bases, bases)
    if before is None:
        down_dual, up_dual = (dual.to(dtype) for dual in exact.duals)
        exact_down, exact_up = down @ down_dual.mT, up_dual @ up
    else:
        exact_down, exact_up = _pad_rank(before.down, before.up, rank)
    scaling_square = batch.scaling.square()
    rounding = _rounding_square(
        (exact_down.double(), exact_up.double()), (stored_down.double(), stored_up.double()), exact
    )
    # the scaling is known exactly, so it enters the squares alone
    squares = (
        scaling_square * linalg.product_square(up, down),
        scaling_square * linalg.difference_square(up, down, rebuilt_up, rebuilt_down),
        scaling_square * rounding,
    )
    return [ModuleError(*adapter) for adapter in zip(*(square.tolist() for square in squares), strict=True)]


def _rounding_square(before: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor], exact: UnroundedBases) -> Tensor:
    """Return ‖Uᵀ·E_up·E_down·V − U'ᵀ·C_up·C_down·V'‖² of each adapter.

    U, V and the coefficients E (`before`, down and up) are unrounded; U', V' and C (`stored`) are rounded.

    Both products are written in the unrounded rows and their rounding errors, (n, 2k, r), so that nothing is wider than
    that; and as in `linalg.difference_square`, no two large numbers are subtracted.
    """
    (e_down, e_up), (c_down, c_up) = before, stored
    # (E_up − C_up)·E_down + C_up·(E_down − C_down), each factor followed by its part along the rows' rounding errors
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
    """Return the relative errors of an adapter from the errors of its modules; zero where its update is zero."""
    modules = list(modules)
    # fsum rounds once, so that the result does not depend on the order of modules
    square = math.fsum(module.square for module in modules)
    if square == 0:
        return AdapterError(0.0, 0.0)
    return AdapterError(
        delta_error=math.sqrt(math.fsum(module.squared_error for module in modules) / square),
        rounding_error=math.sqrt(math.fsum(module.squared_rounding for module in modules) / square),
    )


def rounding_error(exact: Mapping[str, LoRAFactors], rounded: Mapping[str, LoRAFactors]) -> float:
    """Return √(Σ‖D − D'‖² / Σ‖D‖²) over modules whose factors differ by rounding alone."""
    squared_error = square = 0.0
    for module, before in exact.items():
        after = rounded[module]
        square += delta_square(before)
        factors = (tensor.to(torch.float64) for tensor in (before.up, before.down, after.up, after.down))
        squared_error += before.scaling**2 * float(linalg.difference_square(*factors))
    return math.sqrt(squared_error / square) if square else 0.0


def relative_distance(before: Mapping[str, LoRAFactors], after: Mapping[str, LoRAFactors]) -> float | None:
    """Return √(Σ‖D' − D‖² / Σ‖D‖²) from updates D to updates D' of the same modules; None if every D is zero."""
    squares = [
        (delta_square(factors), _update_difference_square(factors, after[module])) for module, factors in before.items()
    ]
    square, difference = (math.fsum(column) for column in zip(*squares, strict=True)) if squares else (0.0, 0.0)
    return math.sqrt(difference / square) if square else None
