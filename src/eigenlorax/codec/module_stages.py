"""The stages of one module when a collection is encoded: survey, quantised bases, codes.

Each stage is a function of its arguments alone, so that any process may run it. `encoder` runs the stages of all
modules, and decides between them what all modules have in common: the step size of each adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import clusters, singular_codes
from .held_updates import HeldUpdates
from .module_updates import ModuleUpdates
from .packed_codes import PackedCodes
from .quantised_basis import BasisRows, QuantisedBasis, quantise_basis, surviving_rows
from .rate_allocation import ModuleStatistics, RateEstimate, SideStatistics, estimate_rate
from .svd_batch import SvdBatch

MAX_COMPARED = 32
"""Number of adapters, at most, on which the candidates for the bases of a module are compared."""

BasisPair = tuple[QuantisedBasis, QuantisedBasis]
"""The bases of a module, (down, up)."""
Energies = tuple[float, float, float]
"""Squared norm of a module's updates, relative to those of whole adapters, and its parts in the two bases' spans."""


@dataclass(frozen=True, slots=True)
class ModuleSurvey:
    """Estimates of a module, and the components that its bases may have.

    Attributes:
        estimates: An estimate for each step size.
        sides: Components of the two sides, (down, up), as many as an estimate has at most.
        squares: Squared norm of each update, absolute.
    """

    estimates: Sequence[RateEstimate]
    sides: tuple[SideStatistics, SideStatistics]
    squares: Float[Tensor, " n"]


@dataclass(frozen=True, slots=True)
class QuantisedModule:
    """Quantised bases of a module.

    Attributes:
        bases: The bases, (down, up).
        energies: Energies of the module's updates.
        squared_errors: Squared error of each adapter with the step sizes that the bases were chosen for, absolute.
    """

    bases: BasisPair
    energies: Energies
    squared_errors: Float[Tensor, " n"]


@dataclass(frozen=True, slots=True)
class MeasuredModule:
    """Bits and errors of some of a module's updates.

    Attributes:
        bits: Bits of each update in a file, estimated.
        squared_errors: Squared error of each update, absolute, but for rounding.
    """

    bits: Float[Tensor, " n"]
    squared_errors: Float[Tensor, " n"]


@dataclass(frozen=True, slots=True)
class EncodedModule:
    """Codes of some of a module's updates.

    Attributes:
        squared_errors: Squared error of each decoded update, absolute.
        codes: Codes of the updates.
    """

    squared_errors: Float[Tensor, " n"]
    codes: PackedCodes


def survey(module: ModuleUpdates, held: HeldUpdates, norms: Tensor, step_sizes: Sequence[float]) -> ModuleSurvey:
    """Estimate bits and errors of a module.

    Args:
        module: Updates of the module.
        held: Singular components in memory.
        norms: Norm over all modules of each adapter that has the module, (n,).
        step_sizes: Step sizes relative to the norms, ascending.
    """
    updates = held.svd_batch(module)
    statistics = ModuleStatistics.of(updates, 1 / norms)
    estimates = [estimate_rate(statistics, step_size) for step_size in step_sizes]
    down, up = (max(estimate.k[side] for estimate in estimates) for side in (0, 1))
    sides = statistics.down.leading(down), statistics.up.leading(up)
    return ModuleSurvey(estimates, sides, updates.s.square().sum(1))


def quantise(
    module: ModuleUpdates,
    held: HeldUpdates,
    sides: tuple[SideStatistics, SideStatistics],
    norms: Tensor,
    step_sizes: Tensor,
    candidates: Sequence[tuple[int, int]],
) -> QuantisedModule:
    """Quantise the bases of a module, with those numbers of components that cost least.

    Args:
        module: Updates of the module.
        held: Singular components in memory.
        sides: Components of the two sides, (down, up), from the survey.
        norms: Norm over all modules of each adapter that has the module, (n,).
        step_sizes: Planned step size of each of these adapters, absolute, (n,).
        candidates: Numbers of components, (down, up), to compare.
    """
    updates = held.svd_batch(module)
    # the estimate may be wrong: no basis at all is tried, too
    distinct = list(dict.fromkeys([*candidates, (0, 0)]))
    sides_of_bases = [
        _QuantisedSide.of(updates, name, side, step_sizes, max(counts))
        for name, side, counts in zip(("down", "up"), sides, zip(*distinct, strict=True), strict=True)
    ]
    counts, squared_errors = _cheapest_counts(updates, step_sizes, sides_of_bases, distinct)
    down, up = (side.leading(count) for side, count in zip(sides_of_bases, counts, strict=True))
    energies = _energies(updates, norms, (down.numbers, up.numbers))
    return QuantisedModule((down.basis, up.basis), energies, squared_errors)


def measure(
    module: ModuleUpdates, held: HeldUpdates, bases: BasisPair, step_sizes: Tensor, rows: Sequence[int]
) -> MeasuredModule:
    """Return bits and errors of some updates of a module.

    Args:
        module: Updates of the module.
        held: Singular components in memory.
        bases: Quantised bases.
        step_sizes: Step size of each adapter that has the module, absolute, (n,).
        rows: Indices of the updates to measure.
    """
    updates, step_sizes = _select(held.svd_batch(module), step_sizes, rows)
    down, up = (basis.numbers(updates.dtype) for basis in bases)
    return MeasuredModule(*singular_codes.measure_updates(updates, step_sizes, down, up))


def encode(
    module: ModuleUpdates, held: HeldUpdates, bases: BasisPair, step_sizes: Tensor, rows: Sequence[int]
) -> EncodedModule:
    """Encode some updates of a module; arguments as those of `measure`."""
    updates, step_sizes = _select(held.svd_batch(module), step_sizes, rows)
    squared_errors = torch.zeros_like(step_sizes)
    batches = []
    for indices, batch in singular_codes.encode_in_batches(updates, step_sizes, *bases):
        squared_errors[indices] = batch.squared_errors
        batches.append(PackedCodes.of(batch))
    return EncodedModule(squared_errors, PackedCodes.join(batches))


def similarities(
    module: ModuleUpdates, held: HeldUpdates, norms: Tensor, sampled: Sequence[int]
) -> Float[Tensor, "n s"]:
    """Return the similarity of all adapters in a module with the sampled ones (`clusters.similarities`)."""
    return clusters.similarities(held.svd_batch(module), 1 / norms, sampled)


def _select(updates: SvdBatch, step_sizes: Tensor, rows: Sequence[int]) -> tuple[SvdBatch, Tensor]:
    """Return some updates with their step sizes."""
    # early rounds ask for all adapters, and selecting them would copy the batch
    return (updates.select(rows), step_sizes[list(rows)]) if len(rows) < len(updates) else (updates, step_sizes)


@dataclass(frozen=True, slots=True)
class _QuantisedSide:
    """Quantised basis of one side, whose leading rows are the basis of fewer components.

    Attributes:
        basis: The basis.
        numbers: The same as numbers.
        bits: Bits of each row in a file.
        surviving: Number of rows that quantisation leaves of each number of components, (components + 1,).
    """

    basis: QuantisedBasis
    numbers: BasisRows
    bits: Float[Tensor, " k"]
    surviving: Int[Tensor, " counts"]

    @classmethod
    def of(cls, updates: SvdBatch, name: str, side: SideStatistics, step_sizes: Tensor, count: int) -> "_QuantisedSide":
        """Quantise the leading components of a side, "down" or "up", as finely as these step sizes ask."""
        rows = updates.rows(name).flatten(0, 1)
        squared_lengths = (updates.s / step_sizes[:, None]).flatten().square()
        energy = squared_lengths @ torch.from_numpy(side.energies[:, :count]).double()
        basis = quantise_basis(side.components(rows, count), energy.sqrt(), energy)
        survives = surviving_rows(energy.sqrt(), side.dimension)
        surviving = torch.cat([torch.zeros(1, dtype=torch.int64), survives.cumsum(0)])
        return cls(basis, basis.numbers(updates.dtype), basis.row_bits(), surviving)

    def leading(self, count: int) -> "_QuantisedSide":
        """Return the first `count` rows."""
        bits, surviving = self.bits[:count], self.surviving[: count + 1]
        return _QuantisedSide(self.basis.leading(count), self.numbers.leading(count), bits, surviving)


def _cheapest_counts(
    updates: SvdBatch, step_sizes: Tensor, sides: Sequence[_QuantisedSide], candidates: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], Float[Tensor, " n"]]:
    """Return the numbers of rows (down, up) of the least rate–distortion cost, and all errors.

    Costs are measured on some of the updates.
    """
    n, compared, compared_steps = len(updates), updates, step_sizes
    if n > MAX_COMPARED:
        indices = np.linspace(0, n - 1, MAX_COMPARED).round().astype(int).tolist()
        compared, compared_steps = updates.select(indices), step_sizes[indices]
    down, up = sides
    best: tuple[float, tuple[int, int], Tensor] | None = None
    for counts in dict.fromkeys((int(down.surviving[k_down]), int(up.surviving[k_up])) for k_down, k_up in candidates):
        numbers = down.numbers.leading(counts[0]), up.numbers.leading(counts[1])
        bits, squared_errors = singular_codes.measure_updates(compared, compared_steps, *numbers)
        cost = float(singular_codes.rate_distortion_cost(bits, squared_errors, compared_steps).sum())
        cost = cost * n / len(compared) + sum(
            float(side.bits[:count].sum()) for side, count in zip(sides, counts, strict=True)
        )
        if best is None or cost < best[0]:
            best = cost, counts, squared_errors
    assert best is not None
    _, counts, squared_errors = best
    if n > MAX_COMPARED:
        numbers = down.numbers.leading(counts[0]), up.numbers.leading(counts[1])
        _, squared_errors = singular_codes.measure_updates(updates, step_sizes, *numbers)
    return counts, squared_errors


def _energies(updates: SvdBatch, norms: Tensor, bases: tuple[BasisRows, BasisRows]) -> Energies:
    """Return the energies of a module's updates, given the norms (n,) of their adapters over all modules."""
    relative = updates.s / norms[:, None]
    inside = []
    for side, basis in zip(("down", "up"), bases, strict=True):
        coefficients = basis.coordinates(updates.rows(side))
        # norms of unit rows in the span, weighted by singular values
        inside.append(float((coefficients.to(torch.float64) * relative[..., None]).square().sum()))
    return float(relative.square().sum()), inside[0], inside[1]
