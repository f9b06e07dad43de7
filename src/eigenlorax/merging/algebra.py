"""Sums and projections of adapters. Results are adapters, exact up to the rounding of their factors in float32.

Factors are joined, so that the rank of a result is the sum of ranks, or are cut to a wished rank.
"""

import math
from collections.abc import Sequence

import torch

from ..core.adapter import Adapter, LoRAFactors, delta_square
from ..core.options import to_float
from ..errors import OptionError
from .coordinates import common_coordinates, from_core, merged_factors
from .derived import check_adapters, check_combinable, checked_rank, checked_weights, derived_adapter
from .methods import weighted_sum


def scale(adapter: Adapter, factor: float, *, name: str | None = None) -> Adapter:
    """Return an adapter whose update is `factor` times as large. Its head is unchanged.

    Args:
        adapter: The adapter.
        factor: Any finite number; negative numbers turn the update around.
        name: Name of the result. Default: that of the adapter.

    Example:
        >>> half = eigenlorax.scale(eigenlorax.read_adapter("adapters/a"), 0.5)
        >>> half.ranks
        (3,)
    """
    check_adapters([adapter])
    factor = to_float("factor", factor)
    if not math.isfinite(factor):
        raise OptionError(f"factor must be finite, got {factor}.")
    modules = {
        module: LoRAFactors(factors.down, factors.up, factor * factors.scaling, factors.kernel)
        for module, factors in adapter.modules.items()
    }
    return derived_adapter(name or adapter.name, modules, [adapter], head=adapter)


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    rank: int | None = None,
    name: str = "combined",
    same_base: bool = False,
) -> Adapter:
    """Return the weighted sum of adapters, with the head of the first.

    Args:
        adapters: Two or more adapters of one base model.
        weights: One weight for each adapter.
        rank: Rank of the result, which keeps the largest singular components. Default: as many as the sum has.
        name: Name of the result.
        same_base: Accept adapters that name different base models.

    Raises:
        BaseModelError, ShapeError, FormatError, OptionError: As `merge`.

    Example:
        >>> a, b = (eigenlorax.read_adapter(f"adapters/{name}") for name in ("a", "b"))
        >>> eigenlorax.combine([a, b], [1.0, -0.5]).ranks
        (6,)
    """
    check_combinable(adapters, same_base)
    if not adapters:
        raise OptionError("combine needs at least one adapter, got none.")
    numbers = checked_weights(weights, adapters)
    if rank is not None:
        rank = checked_rank(rank, adapters)
    modules = {}
    for module in sorted({module for adapter in adapters for module in adapter.specs}):
        updates = [adapter.modules.get(module) for adapter in adapters]
        coordinates = common_coordinates(updates)
        joined = sum(len(update.down) for update in updates if update is not None)
        total = from_core(weighted_sum(coordinates.cores, numbers), coordinates)
        modules[module] = merged_factors(total, joined if rank is None else rank, updates)
    return derived_adapter(name, modules, adapters, head=adapters[0])


def subtract(
    adapter: Adapter, other: Adapter, *, rank: int | None = None, name: str | None = None, same_base: bool = False
) -> Adapter:
    """Return the difference of two updates: what `adapter` has beyond `other`, with the head of `adapter`.

    To unlearn a task (task arithmetic, arXiv 2212.04089), subtract its adapter from another one, or `scale` it by −1
    for the base model.

    Args:
        adapter: The adapter.
        other: The one that is taken away.
        rank, same_base: As for `combine`.
        name: Name of the result. Default: that of `adapter`.

    Example:
        >>> a, b = (eigenlorax.read_adapter(f"adapters/{name}") for name in ("a", "b"))
        >>> eigenlorax.subtract(a, b, rank=4).ranks
        (4,)
    """
    check_adapters([adapter, other])
    return combine([adapter, other], [1.0, -1.0], rank=rank, name=name or adapter.name, same_base=same_base)


def interpolate(
    first: Adapter,
    second: Adapter,
    position: float,
    *,
    rank: int | None = None,
    name: str | None = None,
    same_base: bool = False,
) -> Adapter:
    """Return (1 − position) · first + position · second, such as an adapter between two versions.

    Heads of one task can be interpolated by other means; the result has that of the nearer adapter.

    Args:
        first: Adapter at position 0.
        second: Adapter at position 1.
        position: Any number; outside of 0 to 1 it extrapolates.
        rank, same_base: As for `combine`.
        name: Name of the result. Default: that of the nearer adapter.

    Example:
        >>> a, b = (eigenlorax.read_adapter(f"adapters/{name}") for name in ("a", "b"))
        >>> eigenlorax.interpolate(a, b, 0.25).name
        'a'
    """
    check_adapters([first, second])
    position = to_float("position", position)
    ordered = [(first, 1.0 - position), (second, position)]
    if position > 0.5:
        ordered.reverse()
    adapters, weights = zip(*ordered, strict=True)
    return combine(adapters, weights, rank=rank, name=name or adapters[0].name, same_base=same_base)


def orthogonalize(
    adapter: Adapter, against: Adapter, *, rank: int | None = None, name: str | None = None, same_base: bool = False
) -> Adapter:
    """Return an adapter without its component along another one: their updates are orthogonal afterwards.

    The update minus its orthogonal projection, D − ⟨D, E⟩ / ‖E‖² · E, where updates of all modules are one vector.

    Args:
        adapter: The adapter D.
        against: The adapter E, whose update is not zero.
        rank, same_base: As for `combine`.
        name: Name of the result. Default: that of `adapter`.

    Raises:
        OptionError: The update of `against` is zero.

    Example:
        >>> a, b = (eigenlorax.read_adapter(f"adapters/{name}") for name in ("a", "b"))
        >>> eigenlorax.orthogonalize(a, b).ranks
        (6,)
    """
    check_combinable([adapter, against], same_base)
    square = sum(delta_square(factors) for factors in against.modules.values())
    if not square:
        raise OptionError(f"the update of {against.name!r} is zero: nothing can be orthogonal to it.")
    shared = [module for module in adapter.specs if module in against.specs]
    product = sum(_inner_product(adapter.modules[module], against.modules[module]) for module in shared)
    return combine(
        [adapter, against],
        [1.0, -product / square],
        rank=rank,
        name=name or adapter.name,
        same_base=same_base,
    )


def project_out(adapter: Adapter, against: Adapter, *, name: str | None = None, same_base: bool = False) -> Adapter:
    """Return an adapter that shares neither inputs nor outputs with another one, module by module.

    D becomes (1 − P) · D · (1 − Q), with the orthogonal projections P and Q on the columns and rows of the other
    update. Stronger than `orthogonalize`: no output of one adapter lies in the span of the other's, and no input that
    the other one reads is read. Modules that `against` lacks are unchanged. Ranks do not grow.

    Args:
        adapter: The adapter D.
        against: The other adapter.
        same_base: Accept adapters that name different base models.
        name: Name of the result. Default: that of `adapter`.

    Example:
        >>> a, b = (eigenlorax.read_adapter(f"adapters/{name}") for name in ("a", "b"))
        >>> eigenlorax.project_out(a, b).ranks
        (3,)
    """
    check_combinable([adapter, against], same_base)
    modules = {}
    for module, factors in adapter.modules.items():
        if module not in against.specs:
            modules[module] = factors
            continue
        other = common_coordinates([against.modules[module]])
        components = from_core(other.cores[0], other)
        inputs, outputs = components.right[: components.rank], components.left[:, : components.rank]
        down, up = factors.down.to(torch.float64), factors.up.to(torch.float64)
        down = down - (down @ inputs.mT) @ inputs
        up = up - outputs @ (outputs.mT @ up)
        modules[module] = LoRAFactors(down.float(), up.float(), factors.scaling, factors.kernel)
    return derived_adapter(name or adapter.name, modules, [adapter], head=adapter)


def _inner_product(first: LoRAFactors, second: LoRAFactors) -> float:
    """Return ⟨first, second⟩ of two updates of one module."""
    cores = common_coordinates([first, second]).cores
    return float((cores[0] * cores[1]).sum())
