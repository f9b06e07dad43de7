"""Conversion of LoRA factors to coefficients in a module's bases and back, and their balancing by powers of two."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import NonFiniteError
from . import basis
from .adapter import LoRAFactors
from .batch import ModuleBatch, factor_norms, has_safe_squares, project_rows, stack_factors
from .coefficients import CoefficientBatch, Coefficients, pad_coefficients
from .subspace import ModuleBases

DualComponents = tuple[Float[Tensor, "k_down n_in"], Float[Tensor, "k_up n_out"]]
"""Rows (down, up) by which factors are multiplied to project them (`basis.dual_components`)."""
# Smallest ratio of a factor's norm to a dtype's smallest normal number. With it, entries a thousand times smaller than
# the largest one still have all their digits.
_DIGIT_HEADROOM = 2.0**20


def dual_components(bases: ModuleBases) -> DualComponents:
    """Return the rows that `project` multiplies by. Compute them once where many adapters share the bases."""
    return basis.dual_components(bases.down), basis.dual_components(bases.up)


def project(
    factors: LoRAFactors, bases: ModuleBases, dtype: torch.dtype = torch.float64, dual: DualComponents | None = None
) -> Coefficients:
    """Project a module's update on its bases: C_A = A·Vᵀ and C_B = U·B, rounded to `dtype`.

    The result is the best approximation of the update whose rows are in the span of V and whose columns are in the span
    of U. Where `dtype` is too narrow, a power of two moves from one factor to the other (`balance_batch`).

    Args:
        factors: The update.
        bases: Bases of the same module.
        dtype: Dtype of the coefficients.
        dual: `dual_components(bases)`. Default: computed here.

    Raises:
        ShapeError: The factors have another width than the bases.
        NonFiniteError: `dtype` cannot represent the coefficients.
    """
    # a batch of one, so that there is one implementation; the weight matters in a fit alone
    batch = balance_batch(stack_factors([factors], [0.0]), dtype)
    projected = project_batch(batch, bases, dtype, dual)
    return Coefficients(projected.down[0], projected.up[0], factors.scaling, factors.kernel)


def project_batch(
    batch: ModuleBatch, bases: ModuleBases, dtype: torch.dtype = torch.float64, dual: DualComponents | None = None
) -> CoefficientBatch:
    """Project a batch of balanced adapters (`balance_batch`) like `project`.

    Error messages do not name the adapter.
    """
    exact = {}
    for side, rows in zip(("down", "up"), dual or dual_components(bases), strict=True):
        basis.check_width(batch.rows(side).shape[2], bases.side(side))
        exact[side] = project_rows(batch, side, rows.mT.to(batch.down.dtype))
    down, up = exact["down"], exact["up"].mT
    rounded = CoefficientBatch(down.to(dtype).contiguous(), up.to(dtype).contiguous(), batch.scaling)
    check_rounded_batch(CoefficientBatch(down, up, batch.scaling), rounded)
    return rounded


def check_rounded_batch(exact: CoefficientBatch, rounded: CoefficientBatch) -> None:
    """Raise `NonFiniteError` if rounding to the dtype of `rounded` overflowed, or made most coefficients zero."""
    check_rounding(exact.down, rounded.down)
    check_rounding(exact.up, rounded.up)


def check_rounding(exact: Float[Tensor, "n a b"], rounded: Float[Tensor, "n a b"]) -> None:
    """Raise `NonFiniteError` if rounding made a matrix infinite, or reduced its norm by more than half.

    Norms shrink that much only where numbers fall below the smallest subnormal number of the dtype and become zero.
    """
    wider = f"Store them as {'float32' if rounded.dtype.itemsize < 4 else 'float64'}."
    exact_norm, rounded_norm = (
        torch.linalg.vector_norm(matrices, dim=(1, 2), dtype=torch.float64) for matrices in (exact, rounded)
    )
    # NaN and infinity fail this test and are caught by the next one
    vanished = (exact_norm > 0) & (rounded_norm < exact_norm / 2)
    if bool(vanished.any()):
        raise NonFiniteError(
            f"coefficients of norm {float(exact_norm[vanished][0]):.1e} vanish in {rounded.dtype}, whose smallest "
            f"number is {torch.finfo(rounded.dtype).smallest_normal:.1e}. {wider}"
        )
    if not bool(rounded.isfinite().all()):
        raise NonFiniteError(
            f"coefficients up to {float(exact.abs().max()):.1e} exceed {rounded.dtype}, whose largest number is "
            f"{torch.finfo(rounded.dtype).max:.1e}. {wider}"
        )


def balance_batch(batch: ModuleBatch, dtype: torch.dtype, products: torch.dtype = torch.float64) -> ModuleBatch:
    """Return the same updates in factors whose coefficients fit `dtype`.

    (2^-e A, 2^e B) is the same update for any e, and multiplying by a power of two is exact. So a factor that is too
    large or too small for `dtype` gives a power of two to the other factor (`balance_exponents`).

    Args:
        batch: The updates, in any dtype.
        dtype: Dtype of the coefficients that will be computed from the result.
        products: Dtype of the result. float32 suffices where factors, components and coefficients are all narrower;
            the result is float64 all the same where float32 cannot hold the squares of the numbers.
    """
    wide = batch.to(products)
    norms = torch.cat([factor_norms(wide, side) for side in ("down", "up")])
    if products == torch.float32 and not has_safe_squares(norms.double().square()):
        wide = batch.to(torch.float64)
    powers = balance_exponents(wide, dtype).exp2().to(wide.down.dtype)[:, None, None]
    # usual case: saves two copies of the factors
    if bool((powers == 1).all()):
        return wide
    return replace(wide, down=wide.down / powers, up=wide.up * powers)


def balance_exponents(batch: ModuleBatch, dtype: torch.dtype) -> Float[Tensor, " n"]:
    """Return the exponent e of each adapter so that 2^-e·A and 2^e·B both fit `dtype`; 0 where they fit as they are.

    A factor fits if its norm is below half the largest number of `dtype`, and its entries keep their digits
    (`_DIGIT_HEADROOM`). Otherwise e makes both norms equal, as nearly as a power of two can.

    Args:
        batch: Factors in a dtype that can hold their squares.
        dtype: Dtype of the coefficients.
    """
    info = torch.finfo(dtype)
    down, up = (factor_norms(batch, side) for side in ("down", "up"))
    fits = [(info.tiny * _DIGIT_HEADROOM < norm) & (norm < info.max / 2) for norm in (down, up)]
    # √(‖A‖ / ‖B‖), rounded to a power of two in the exponent
    return torch.where((fits[0] & fits[1]) | (down == 0) | (up == 0), 1.0, down / up).log2().div(2).round()


def reconstruct(coefficients: Coefficients, bases: ModuleBases, dtype: torch.dtype = torch.float64) -> LoRAFactors:
    """Return the factors of an ordinary LoRA: A = C_A·V and B = Uᵀ·C_B, plus the residuals where they are stored.

    Rank, scaling and kernel are unchanged, and no decomposition is needed.
    """
    down = basis.reconstruct(coefficients.down, bases.down)
    up = basis.reconstruct(coefficients.up.mT, bases.up).mT
    if coefficients.down_residual is not None:
        down = down + coefficients.down_residual
    if coefficients.up_residual is not None:
        up = up + coefficients.up_residual
    # `up` was computed as rows, and safetensors stores contiguous tensors only
    return LoRAFactors(down.to(dtype), up.to(dtype).contiguous(), coefficients.scaling, coefficients.kernel)


def widen_coefficients(coefficients: Coefficients, bases: ModuleBases) -> Coefficients:
    """Return the same update in bases that have grown since: zeros for the components that came later."""
    return pad_coefficients(coefficients, bases.down.k, bases.up.k)
