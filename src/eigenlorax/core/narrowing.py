"""LoRA factors in a narrower dtype, and the error of rounding them.

Only the product of the factors has meaning, so a row of `down` may be scaled by 2^e and the matching column of `up` by
2^-e. That is exact, and moves entries out of the range in which the dtype has few digits, or none.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from ..errors import NonFiniteError, RoundingWarning
from . import dtypes, linalg
from .adapter import LoRAFactors

WARN_ABOVE = 0.01
"""Relative error of a whole update above which a `RoundingWarning` is given."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """Factors after rounding, with the error of rounding.

    Attributes:
        factors: The rounded factors.
        square: ‖D‖² of the update before rounding.
        rounded_square: ‖D'‖² of the update after rounding.
        squared_error: ‖D − D'‖²; infinite where an entry overflowed.
    """

    factors: LoRAFactors
    square: float
    rounded_square: float
    squared_error: float


def balance(factors: LoRAFactors, dtype: torch.dtype) -> LoRAFactors:
    """Return the same update in float64 factors that have a smaller error after rounding to `dtype`.

    float16 has no digits below 6e-8 and few below 6e-5, where entries of `up` are after a short training. Where
    balancing gains nothing, the factors are returned as they are.
    """
    info = torch.finfo(dtype)
    down, up = factors.down.to(torch.float64), factors.up.to(torch.float64)
    # per row of `down` and matching column of `up`, since each pair can be scaled by itself
    rms = torch.stack([down.square().mean(1), up.square().mean(0)]).sqrt()
    largest = torch.maximum(down.abs().amax(1), up.abs().amax(0))
    is_out_of_range = (rms > 0).all(0) & ((rms.amin(0) < info.tiny) | (largest > info.max))
    if not bool(is_out_of_range.any()):
        return factors
    # equal root mean squares on both sides, up to the rounding to a power of two
    powers = torch.where(is_out_of_range, (rms[1] / rms[0]).log2() / 2, 0.0).round().exp2()
    balanced = replace(factors, down=down * powers[:, None], up=up / powers)
    plain, scaled = round_factors(factors, dtype), round_factors(balanced, dtype)
    # Rounding costs eps at any scale, so only a larger error is a reason to change the factors. Negated comparisons,
    # because the error is infinite or NaN where an entry overflowed.
    is_inexact = not plain.squared_error <= info.eps**2 * plain.square
    return balanced if is_inexact and not scaled.squared_error > plain.squared_error / 4 else factors


def round_factors(factors: LoRAFactors, dtype: torch.dtype) -> Rounded:
    """Round factors without balancing, and measure the error."""
    exact = factors.up.to(torch.float64), factors.down.to(torch.float64)
    rounded = replace(factors, down=factors.down.to(dtype), up=factors.up.to(dtype).contiguous())
    wide = rounded.up.to(torch.float64), rounded.down.to(torch.float64)
    scaling_square = factors.scaling**2
    square, rounded_square = (scaling_square * float(linalg.product_square(*pair)) for pair in (exact, wide))
    is_finite = bool(rounded.down.isfinite().all()) and bool(rounded.up.isfinite().all())
    squared_error = scaling_square * float(linalg.difference_square(*exact, *wide)) if is_finite else math.inf
    return Rounded(rounded, square, rounded_square, squared_error)


def narrow(factors: LoRAFactors, dtype: torch.dtype) -> LoRAFactors:
    """Return the factors in `dtype`, balanced where that keeps more of the update."""
    balanced = balance(factors, dtype)
    return replace(balanced, down=balanced.down.to(dtype), up=balanced.up.to(dtype).contiguous())


def narrow_checked(factors: LoRAFactors, dtype: torch.dtype, where: str) -> Rounded:
    """Return the balanced factors in `dtype`, with their error.

    Args:
        factors: The factors.
        dtype: Dtype to round to.
        where: Adapter and module, for the message.

    Raises:
        NonFiniteError: An entry is NaN, Inf, or too large for the dtype; or less than half of the update's norm
            remains.
    """
    if not all(factor.isfinite().all() for factor in factors.weights):
        raise NonFiniteError(f"adapter {where}: its factors have NaN or Inf. Train or export it again.")
    rounded = round_factors(balance(factors, dtype), dtype)
    if math.isinf(rounded.squared_error):
        raise NonFiniteError(f"adapter {where}: its factors are too large for {dtypes.name(dtype)}. Use a wider dtype.")
    if rounded.rounded_square < rounded.square / 4:
        raise NonFiniteError(
            f"adapter {where}: its update of norm {math.sqrt(rounded.square):.1e} vanishes in {dtypes.name(dtype)}, "
            f"whose numbers below {torch.finfo(dtype).tiny:.1e} have fewer digits. {_remedy(dtype)}"
        )
    return rounded


def narrow_adapter(
    name: str, modules: Mapping[str, LoRAFactors], dtype: torch.dtype
) -> Iterator[tuple[str, LoRAFactors]]:
    """Yield each module of an adapter with its factors in `dtype`, as `narrow_checked` gives them.

    After the last module, warns if the relative error of the whole update is above `WARN_ABOVE`.
    """
    square = squared_error = 0.0
    for module, factors in modules.items():
        rounded = narrow_checked(factors, dtype, f"{name!r}, module {module}")
        square, squared_error = square + rounded.square, squared_error + rounded.squared_error
        yield module, rounded.factors
    if squared_error > WARN_ABOVE**2 * square:
        warnings.warn(
            f"adapter {name!r}: rounding to {dtypes.name(dtype)} changes its update by "
            f"{math.sqrt(squared_error / square):.2g} of its norm. {_remedy(dtype)}",
            RoundingWarning,
            stacklevel=4,
        )


def _remedy(dtype: torch.dtype) -> str:
    wider = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}
    return f"Use {wider.get(dtype, 'float64')}."


def with_scaling(factors: LoRAFactors, scaling: float, where: str) -> LoRAFactors:
    """Return the same update with another scaling: the up factor is multiplied, and rounded to the dtype of both.

    Args:
        factors: The factors.
        scaling: The other scaling, not 0.
        where: Module and adapter, for the error message.

    Raises:
        NonFiniteError: The up factor overflows the dtype.
    """
    if factors.scaling == scaling:
        return factors
    exact = replace(factors, up=factors.up.double() * (factors.scaling / scaling), scaling=scaling)
    return narrow_checked(exact, factors.spec.dtype, where).factors
