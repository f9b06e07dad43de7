"""LoRA factors in a narrower dtype: rounded where the dtype has digits for them, and what that loses of the update.

Only a product means something, so a row of `down` may be scaled by 2^e and the column of `up` that it is multiplied
with by 2^−e. That is exact, and moves numbers out of the range in which a dtype has few digits or none.
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
"""The relative error of a whole update above which a `RoundingWarning` is given."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """Factors after rounding, and squared norms: of the update before, after, and of the difference."""

    factors: LoRAFactors
    before: float
    after: float
    lost: float


def balance(factors: LoRAFactors, dtype: torch.dtype) -> LoRAFactors:
    """Return the same update in factors of which `dtype` keeps more, float64; the factors as they are where it keeps
    their digits.

    Float16 has no digits below 6e-8 and few below 6e-5, where `up` is after a short training.
    """
    info = torch.finfo(dtype)
    down, up = factors.down.to(torch.float64), factors.up.to(torch.float64)
    sizes = torch.stack([down.square().mean(1), up.square().mean(0)]).sqrt()
    largest = torch.maximum(down.abs().amax(1), up.abs().amax(0))
    outside = (sizes > 0).all(0) & ((sizes.amin(0) < info.tiny) | (largest > info.max))
    if not bool(outside.any()):
        return factors
    powers = torch.where(outside, (sizes[1] / sizes[0]).log2() / 2, 0.0).round().exp2()
    found = replace(factors, down=down * powers[:, None], up=up / powers)
    plain, other = round_factors(factors, dtype), round_factors(found, dtype)
    # not what rounding costs at any size
    needed = not plain.lost <= info.eps**2 * plain.before
    return found if needed and not other.lost > plain.lost / 4 else factors


def round_factors(factors: LoRAFactors, dtype: torch.dtype) -> Rounded:
    """Round factors as they are, and measure what that loses; infinite where the dtype ends below a number."""
    exact = factors.up.to(torch.float64), factors.down.to(torch.float64)
    kept = replace(factors, down=factors.down.to(dtype), up=factors.up.to(dtype).contiguous())
    wide = kept.up.to(torch.float64), kept.down.to(torch.float64)
    square = factors.scaling**2
    before, after = (square * float(linalg.product_square(*pair)) for pair in (exact, wide))
    is_finite = bool(kept.down.isfinite().all()) and bool(kept.up.isfinite().all())
    lost = square * float(linalg.difference_square(*exact, *wide)) if is_finite else math.inf
    return Rounded(kept, before, after, lost)


def narrow(factors: LoRAFactors, dtype: torch.dtype) -> LoRAFactors:
    """Return the factors in `dtype`, balanced where that keeps more of the update."""
    found = balance(factors, dtype)
    return replace(found, down=found.down.to(dtype), up=found.up.to(dtype).contiguous())


def narrow_checked(factors: LoRAFactors, dtype: torch.dtype, where: str) -> Rounded:
    """Return the factors in `dtype` with what that loses. `NonFiniteError` where the dtype ends below a number of them,
    or where nothing or less than half of the update is left. where: adapter and module, for the message."""
    found = round_factors(balance(factors, dtype), dtype)
    if math.isinf(found.lost):
        raise NonFiniteError(
            f"adapter {where}: its factors are too large for {dtypes.name(dtype)}. Take a wider dtype."
        )
    if found.after < found.before / 4:
        raise NonFiniteError(
            f"adapter {where}: its update of norm {math.sqrt(found.before):.1e} vanishes in {dtypes.name(dtype)}, where"
            f" numbers below {torch.finfo(dtype).tiny:.1e} lose their digits. {_remedy(dtype)}"
        )
    return found


def narrow_adapter(
    name: str, modules: Mapping[str, LoRAFactors], dtype: torch.dtype
) -> Iterator[tuple[str, LoRAFactors]]:
    """Yield each module of an adapter with its factors in `dtype`, `checked`; at the end, warn where the update as a
    whole has lost more than `WARN_ABOVE`."""
    before = lost = 0.0
    for module, factors in modules.items():
        found = narrow_checked(factors, dtype, f"{name!r}, module {module}")
        before, lost = before + found.before, lost + found.lost
        yield module, found.factors
    if lost > WARN_ABOVE**2 * before:
        warnings.warn(
            f"adapter {name!r}: rounding to {dtypes.name(dtype)} changes its update by {math.sqrt(lost / before):.2g} "
            f"of its norm. {_remedy(dtype)}",
            RoundingWarning,
            stacklevel=4,
        )


def _remedy(dtype: torch.dtype) -> str:
    """Name dtypes that keep more."""
    wider = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}
    return f"Take {wider.get(dtype, 'float64')}."
