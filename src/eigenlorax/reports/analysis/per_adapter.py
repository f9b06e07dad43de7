"""Baselines that store each adapter separately: truncated by SVD, rounded to few bits, or both.

Each method is tuned to an error bound or a size, so that a pack is compared with the best result of the method. A
collection is a mapping from module names to batches, which are read one after the other. Sizes are bytes of tensors. An
adapter whose update is zero takes no bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...core.adapter import LoRAFactors
from ...core.batch import ModuleBatch, delta_squares, gram_roots, pad_factors
from .bytes import Number
from .losses import pair_bytes, rounded_rows

BITS = (16, 8, 6, 5, 4, 3, 2)
"""Bits per number of a factor that are tried; 16 is float16."""
ROUNDED, CUT, CUT_BY_ENERGY, BOTH = "rounded", "truncated", "truncated by energy", "truncated and rounded"
_BISECTIONS = 40
_BUDGET_USED = 0.998
"""Minimum share of the allowed bytes at which the bisection over errors stops."""
_CHUNK = 2**18
"""Number of elements of factors that are decomposed at a time; larger batches exceed the cache and are slower."""
_SMALLEST_RELATIVE_SIGMA = 1e-7


@dataclass(frozen=True, slots=True)
class Point:
    """Size and relative errors of a collection stored with one method.

    Attributes:
        stored_bytes: Bytes of all adapters.
        worst: Largest delta error of a trained adapter.
        mean: Mean delta error of the trained adapters.
        settings: Parameters of the method.
    """

    stored_bytes: int
    worst: float
    mean: float
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, stored_bytes: int, squared_errors: Tensor, total: Tensor, settings: Mapping[str, Any] | None = None
    ) -> "Point":
        """Compute relative errors from squared errors and squared norms `total`, both (n,)."""
        trained = total > 0
        errors = (squared_errors[trained].clamp_min(0) / total[trained]).sqrt()
        worst, mean = (float(errors.max()), float(errors.mean())) if len(errors) else (0.0, 0.0)
        return cls(stored_bytes, worst, mean, settings or {})


@dataclass(frozen=True, slots=True)
class Tables:
    """Squared errors and sizes of n adapters for every rank and number of bits, computed once for all targets.

    Attributes:
        squared_errors: By bits, for each module: ‖D − D'‖² of each adapter with 0, 1, …, r components, (n, r + 1).
        costs: By bits, for each module: bytes of one component.
        ranks: For each module: rank of each adapter, (n,).
        totals: For each module: ‖D‖² of each adapter, (n,).
    """

    squared_errors: Mapping[int, list[Float[Tensor, "n _"]]]
    costs: Mapping[int, list[int]]
    ranks: list[Tensor]
    totals: list[Float[Tensor, " n"]]

    @property
    def total(self) -> Float[Tensor, " n"]:
        """‖D‖² over all modules."""
        return torch.stack(self.totals).sum(0)

    def of_module(self, index: int) -> "Tables":
        """Return the tables of one module."""
        return Tables(
            {bits: [by_module[index]] for bits, by_module in self.squared_errors.items()},
            {bits: [by_module[index]] for bits, by_module in self.costs.items()},
            [self.ranks[index]],
            [self.totals[index]],
        )


def tables(modules: Mapping[str, ModuleBatch], bits: Sequence[int] = BITS) -> Tables:
    """Measure every adapter at every rank and number of bits.

    The factors of each update are its singular vectors times the square roots of the singular values.

    Args:
        modules: Factors of all adapters, by module.
        bits: Numbers of bits to measure.
    """
    squared_errors: dict[int, list[Tensor]] = {width: [] for width in bits}
    costs: dict[int, list[int]] = {width: [] for width in bits}
    ranks, totals = [], []
    for name in modules:
        # each access may read the module from files
        module = modules[name]
        n_out, n_in = module.up.shape[2], module.down.shape[2]
        step = max(1, _CHUNK // max(1, module.down.shape[1] * (n_in + n_out)))
        chunks = [
            _errors_by_rank(module.select(range(start, min(start + step, len(module)))), bits)
            for start in range(0, len(module), step)
        ]
        totals.append(torch.cat([total for total, _, _ in chunks]))
        ranks.append(torch.cat([rank for _, rank, _ in chunks]))
        for width in bits:
            squared_errors[width].append(torch.cat([table[width] for _, _, table in chunks]))
            costs[width].append(pair_bytes(n_out, n_in, width))
    return Tables(squared_errors, costs, ranks, totals)


def singular_rows(
    module: ModuleBatch,
) -> tuple[Float[Tensor, "n r n_in"], Float[Tensor, "n r n_out"], Float[Tensor, "n r"]]:
    """Return each update's right and left singular vectors as rows, and its singular values, descending.

    Rows are 0 where the singular value is 0, except for rounding.
    """
    # down = R₁Q₁ and up = R₂Q₂ through roots of r × r Gram matrices: R₂ᵀR₁ has the singular values of the update
    down_root, up_root = gram_roots(module.down), gram_roots(module.up)
    left, sigma, right = torch.linalg.svd(up_root @ down_root)
    nonzero = (sigma > _SMALLEST_RELATIVE_SIGMA * sigma[:, :1]) & (sigma > 0)
    inverse = torch.where(nonzero, 1 / sigma.where(nonzero, torch.ones_like(sigma)), 0.0)[:, :, None]
    # v = Dᵀu / σ, u = Dv / σ, with u and v in the coordinates of the factors' rows
    down = inverse * ((left.mT @ up_root) @ module.down)
    up = inverse * ((right @ down_root) @ module.up)
    return down, up, sigma * nonzero


def balanced(module: ModuleBatch) -> ModuleBatch:
    """Return the same updates with singular vectors times square roots of singular values as factors, largest first.

    Rounding has the smallest error on such factors. Removing the last rows truncates the update.
    """
    down, up, sigma = singular_rows(module)
    root = sigma.sqrt()[:, :, None]
    return replace(module, down=root * down, up=root * up)


def _errors_by_rank(module: ModuleBatch, bits: Sequence[int]) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Return ‖D‖² and the rank of each adapter, and, by bits, ‖D − D'‖² with 0, 1, …, r components, (n, r + 1)."""
    factors, total, tables_by_bits = balanced(module), delta_squares(module), {}
    for width in bits:
        down, up = rounded_rows(factors.down, width), rounded_rows(factors.up, width)
        inner = ((module.down @ down.mT) * (module.up @ up.mT)).sum(1)
        # ‖Σ_{j<s} of the rounded components‖² for every s, by a two-dimensional running sum
        norms = ((down @ down.mT) * (up @ up.mT)).cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2)
        squared_errors = total[:, None] - 2 * inner.cumsum(1) + norms
        tables_by_bits[width] = torch.cat([total[:, None], squared_errors.clamp_min(0)], dim=1)
    return total, (factors.down.abs().amax(2) > 0).sum(1), tables_by_bits


def at_error(measured: Tables, error: float) -> dict[str, Point | None]:
    """Tune each method to an error bound.

    Every adapter gets its own number of bits, its own rank, or its own rank in each module.

    Args:
        measured: Squared errors and sizes.
        error: Relative error that no adapter may exceed.

    Returns:
        The fewest bytes, by method; None for a method that cannot reach the error.
    """
    by_bits = {bits: _ranks_by_gain(measured, bits, error).choice for bits in measured.squared_errors}
    return {
        ROUNDED: _cheapest([_full_rank(measured, bits, error) for bits in measured.squared_errors], measured.total),
        CUT: _cheapest([_one_rank(measured, 16, error)], measured.total),
        CUT_BY_ENERGY: _cheapest([by_bits[16]], measured.total),
        BOTH: _cheapest(list(by_bits.values()), measured.total),
    }


Choice = tuple[Float[Tensor, " n"], Float[Tensor, " n"]]
"""Bytes of each adapter, inf if it cannot reach the error bound, and its squared error."""


def _square_bound(measured: Tables, error: float) -> Tensor:
    # the margin accepts an error that equals the bound except for rounding
    return error**2 * measured.total * (1 + 1e-12)


def _bytes_by_rank(measured: Tables, bits: int) -> Tensor:
    """Return the bytes of each adapter with 0, 1, …, r components per module, at most its rank in each, (n, r + 1)."""
    counts = torch.arange(max(table.shape[1] for table in measured.squared_errors[bits]))
    by_module = [
        torch.minimum(counts, rank[:, None]) * cost
        for rank, cost in zip(measured.ranks, measured.costs[bits], strict=True)
    ]
    return torch.stack(by_module).sum(0).to(torch.float64)


def _full_rank(measured: Tables, bits: int, error: float) -> Choice:
    """Round adapters without truncating them."""
    squared_errors = torch.stack([table[:, -1] for table in measured.squared_errors[bits]]).sum(0)
    cost = _bytes_by_rank(measured, bits)[:, -1]
    return cost.masked_fill(squared_errors > _square_bound(measured, error), math.inf), squared_errors


def _one_rank(measured: Tables, bits: int, error: float) -> Choice:
    """Truncate all modules of an adapter to the same rank."""
    width = max(table.shape[1] for table in measured.squared_errors[bits])
    extended = [
        torch.cat([table, table[:, -1:].expand(-1, width - table.shape[1])], dim=1)
        for table in measured.squared_errors[bits]
    ]
    squared_errors = torch.stack(extended).sum(0)
    exceeds = squared_errors > _square_bound(measured, error)[:, None]
    cost, rank = _bytes_by_rank(measured, bits).masked_fill(exceeds, math.inf).min(1)
    return cost, squared_errors.gather(1, rank[:, None])[:, 0]


@dataclass(frozen=True, slots=True)
class _Selection:
    """Selection of components for each adapter.

    Attributes:
        choice: Bytes and squared error of each adapter.
        kept: True for each component that an adapter keeps, (n, d). The d components are sorted by module, and the
            largest of a module first.
    """

    choice: Choice
    kept: Tensor


def _ranks_by_gain(measured: Tables, bits: int, error: float) -> _Selection:
    """Choose a rank for each module of each adapter.

    Components are taken in the order of squared norm per byte until the error is within the bound. The last one is then
    replaced by the cheapest component with which the error is within the bound.
    """
    gains, costs, priorities, firsts = [], [], [], []
    for table, component_cost in zip(measured.squared_errors[bits], measured.costs[bits], strict=True):
        module_gain = table[:, :-1] - table[:, 1:]
        gains.append(module_gain)
        costs.append(torch.full((module_gain.shape[1],), float(component_cost), dtype=torch.float64))
        # the running minimum prevents that a component is taken before a larger one of its module
        priorities.append(module_gain.cummin(1)[0] / component_cost)
        firsts.append(torch.arange(module_gain.shape[1]) == 0)
    gain, cost, first = torch.cat(gains, dim=1), torch.cat(costs), torch.cat(firsts)
    order = torch.cat(priorities, dim=1).argsort(dim=1, descending=True, stable=True)
    remaining = measured.total[:, None] - gain.gather(1, order).cumsum(1)
    bound = _square_bound(measured, error)
    is_within = remaining <= bound[:, None]
    last = torch.where(is_within.any(1), is_within.int().argmax(1), gain.shape[1])[:, None]
    before_last = torch.where(last > 0, remaining.gather(1, (last - 1).clamp(0)), measured.total[:, None])
    position = order.argsort(dim=1)
    next_larger = torch.where(first, -1, position.roll(1, dims=1))
    candidates = (position >= last) & (next_larger < last) & (before_last - gain <= bound[:, None])
    last_cost, last_index = cost.masked_fill(~candidates, math.inf).min(1)
    spent = (cost * (position < last)).sum(1) + last_cost
    squared_errors = (before_last - gain.gather(1, last_index[:, None]))[:, 0]
    drops_all = measured.total <= bound
    kept = ((position < last) | (torch.arange(len(cost)) == last_index[:, None])) & ~drops_all[:, None]
    choice = torch.where(drops_all, 0.0, spent), torch.where(drops_all, measured.total, squared_errors)
    return _Selection(choice, kept)


@dataclass(frozen=True, slots=True)
class Cut:
    """Collection in which every adapter is truncated and rounded separately.

    Attributes:
        point: Size and errors.
        bits: Bits per number of each adapter, (n,).
        ranks: Number of components of each adapter in each module, (modules, n).
    """

    point: Point
    bits: Tensor
    ranks: Tensor


def at_size(measured: Tables, limit: Number) -> Cut:
    """Truncate and round adapters with the smallest common error bound at which they take at most `limit` bytes.

    The bound is found by bisection, until nearly all bytes are used. Any limit can be reached, because nothing is
    stored at an error of 1.
    """
    low, high, best = 0.0, 1.0, _cut(measured, 1.0)
    assert best is not None
    for _ in range(_BISECTIONS):
        if best.point.stored_bytes >= _BUDGET_USED * limit:
            break
        middle = (low + high) / 2
        candidate = _cut(measured, middle)
        if candidate is not None and candidate.point.stored_bytes <= limit:
            high, best = middle, candidate
        else:
            low = middle
    return best


def _cut(measured: Tables, error: float) -> Cut | None:
    """Truncate and round every adapter to an error bound; return None if one of them cannot reach it."""
    selections = [_ranks_by_gain(measured, bits, error) for bits in measured.squared_errors]
    point = _cheapest([selection.choice for selection in selections], measured.total)
    if point is None:
        return None
    chosen = torch.stack([selection.choice[0] for selection in selections]).argmin(0)
    kept = torch.stack([selection.kept for selection in selections])[chosen, torch.arange(len(chosen))]
    widths = [table.shape[1] - 1 for table in next(iter(measured.squared_errors.values()))]
    ranks = torch.stack([module_kept.sum(1) for module_kept in torch.split(kept, widths, dim=1)])
    return Cut(point, torch.tensor(list(measured.squared_errors))[chosen], ranks)


def cut(factors: LoRAFactors, rank: int, bits: int) -> LoRAFactors:
    """Return the leading components of an update, rounded, as a LoRA of unchanged shape.

    Args:
        factors: Factors of the update.
        rank: Number of components to keep. The remaining rows of the factors become 0.
        bits: Bits per number of the rounded factors.

    Returns:
        Factors in float32, which represents the rounded numbers exactly.
    """
    if factors.scaling == 0:
        return factors
    single = balanced(pad_factors([factors], factors.down.shape[1], factors.up.shape[0]))
    down, up = (rounded_rows(rows, bits)[0] for rows in (single.down, single.up))
    down[rank:], up[rank:] = 0, 0
    return replace(factors, down=down.float(), up=(up / factors.scaling).mT.float().contiguous())


def _cheapest(choices: Sequence[Choice], total: Tensor) -> Point | None:
    """Store each adapter with its cheapest choice; return None if an adapter cannot reach the error bound."""
    costs, squared_errors = (torch.stack(tensors) for tensors in zip(*choices, strict=True))
    cost, chosen = costs.min(0)
    cost = torch.where(total > 0, cost, 0.0)
    if torch.isinf(cost).any():
        return None
    return Point.of(int(cost.sum()), squared_errors.gather(0, chosen[None])[0], total)
