"""Relative errors of reconstructed updates, by r × r products: no out × in matrix is formed."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import linalg, projection
from .adapter import LoRAFactors, delta_square
from .batch import ModuleBatch, project_rows, stack_factors
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
    stored = CoefficientBatch(coefficients.down[None], coefficients.up[None], torch.ones(1, dtype=torch.float64))
    batch = projection.balance_batch(stack_factors([factors], [0.0]), coefficients.down.dtype)
    return module_errors(batch, stored, bases, exact)[0]


def _pad_rows(rows: Tensor, rank: int) -> Tensor:
    """Return rows (…, r, n) with zeros for a rank of at least `rank`, which change no product."""
    missing = rank - rows.shape[-2]
    # a copy would be made also where nothing is missing
    return linalg.append_zeros(rows, missing) if missing > 0 else rows


def _update_difference_square(left: LoRAFactors, right: LoRAFactors) -> float:
    """Return ‖D − D'‖² of two updates of any ranks, up to rounding in proportion to the larger norm."""
    rank = max(left.spec.rank, right.spec.rank)
    factors = []
    for update in (left, right):
        down, up = _pad_rows(update.down.double(), rank), _pad_rows(update.up.mT.double(), rank)
        factors += [update.scaling * up.mT, down]
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
    rank = max(batch.down.shape[1], coefficients.down.shape[1])
    rows = {side: _pad_rows(batch.rows(side), rank) for side in ("down", "up")}
    stored = {"down": _pad_rows(coefficients.down, rank), "up": _pad_rows(coefficients.up.mT, rank)}
    sides = {side: _SideErrors.of(rows[side], stored[side], bases.side(side).components) for side in rows}
    exact = exact or unrounded_bases(bases, bases)
    down_dual, up_dual = (dual.mT.to(batch.down.dtype) for dual in exact.duals)
    if before is None:
        unrounded = project_rows(batch, "down", down_dual), project_rows(batch, "up", up_dual)
    else:
        unrounded = before.down, before.up.mT
    exact_down, exact_up = (_pad_rows(matrices, rank) for matrices in unrounded)
    # the scaling is known exactly, so it enters the squares alone
    scaling_square = batch.scaling.square()
    squares = (
        scaling_square * _update_square(sides["up"], sides["down"]),
        scaling_square * _difference_square(sides["up"], sides["down"]),
        scaling_square * _rounding_square((exact_down, exact_up), (stored["down"], stored["up"]), exact),
    )
    return [ModuleError(*adapter) for adapter in zip(*(square.tolist() for square in squares), strict=True)]


@dataclass(frozen=True, slots=True)
class _SideErrors:
    """Rows R of each adapter on one side, their errors E, and the inner products of both.

    Attributes:
        rows: R, (n, r, d).
        errors: E, (n, r, d).
        row_gram: R·Rᵀ, (n, r, r) float64.
        mixed_gram: R·Eᵀ.
        error_gram: E·Eᵀ.
    """

    rows: Tensor
    errors: Tensor
    row_gram: Tensor
    mixed_gram: Tensor
    error_gram: Tensor

    @classmethod
    def of(cls, rows: Tensor, coefficients: Tensor, components: Tensor) -> "_SideErrors":
        """Compute the products in the dtype of the rows.

        Args:
            rows: Original rows, (n, r, d).
            coefficients: Coefficients of each row as stored, (n, r, k).
            components: Components as stored, (k, d).
        """
        flat, dtype = rows.flatten(0, 1), rows.dtype
        # one product for all adapters; `addmm` subtracts while it multiplies, so that no second matrix is written
        errors = torch.addmm(flat, coefficients.flatten(0, 1).to(dtype), components.to(dtype), alpha=-1)
        errors = errors.view(rows.shape)
        products = (rows @ rows.mT, rows @ errors.mT, errors @ errors.mT)
        return cls(rows, errors, *(product.to(torch.float64) for product in products))


def _update_square(up: _SideErrors, down: _SideErrors) -> Tensor:
    """Return ‖B·A‖² of each adapter."""
    terms = up.row_gram * down.row_gram
    square = terms.sum((1, 2))
    cancelled = linalg.is_cancelled(square, [terms], up.rows.dtype)
    if bool(cancelled.any()):
        square[cancelled] = linalg.triangular_product_square(up.rows[cancelled].mT, down.rows[cancelled])
    return square


def _difference_square(up: _SideErrors, down: _SideErrors) -> Tensor:
    """Return ‖B·A − B̂·Â‖² of each adapter, with B = B̂ + E_B and A = Â + E_A, as in `linalg.difference_square`.

    B·A − B̂·Â = E_B·A + B̂·E_A. The products with B̂ = B − E_B follow from those with B and E_B, and stand beside E_A, so
    that their rounding is small relative to what they are added to.
    """
    rebuilt_errors = up.mixed_gram.mT - up.error_gram
    rebuilt = up.row_gram - up.mixed_gram - rebuilt_errors
    terms = (up.error_gram * down.row_gram, 2 * rebuilt_errors * down.mixed_gram, rebuilt * down.error_gram)
    square = (terms[0] + terms[1] + terms[2]).sum((1, 2)).clamp_min(0)
    cancelled = linalg.is_cancelled(square, terms, up.rows.dtype)
    if bool(cancelled.any()):
        up_errors = up.errors[cancelled]
        columns = torch.cat([up_errors, up.rows[cancelled] - up_errors], dim=1).mT
        rows = torch.cat([down.rows[cancelled], down.errors[cancelled]], dim=1)
        square[cancelled] = linalg.triangular_product_square(columns, rows)
    return square


def _rounding_square(before: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor], exact: UnroundedBases) -> Tensor:
    """Return ‖Uᵀ·E_up·E_down·V − U'ᵀ·C_up·C_down·V'‖² of each adapter.

    U, V and the coefficients E (`before`, down and up) are unrounded; U', V' and C (`stored`) are rounded. All
    coefficients are rows, (n, r, k).

    Both products are written in the unrounded rows and their rounding errors, (n, r, 2k), so that nothing is wider than
    that; and as in `linalg.difference_square`, no two large numbers are subtracted.
    """
    # (E_up − C_up)·E_down + C_up·(E_down − C_down), each factor followed by its part along the rows' rounding errors
    (e_down, e_up), (c_down, c_up) = ((matrix.double() for matrix in pair) for pair in (before, stored))
    zeros = torch.zeros_like(e_down)
    left = torch.cat([torch.cat([e_up - c_up, c_up], dim=2), torch.cat([c_up, -c_up], dim=2)], dim=1)
    right = torch.cat([torch.cat([e_down, zeros], dim=2), torch.cat([e_down - c_down, c_down], dim=2)], dim=1)
    square = ((left @ exact.up_gram @ left.mT) * (right @ exact.down_gram @ right.mT)).sum((1, 2))
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
