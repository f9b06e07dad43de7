"""The stages of one module when a collection is encoded: survey, quantised bases, codes.

Each stage is a function of its arguments alone, so that any process may run it. `encoder` runs the stages of all
modules, and decides between them what all modules have in common: the step size of each adapter.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..core import linalg
from . import clusters, singular_codes
from .held_updates import HeldUpdates
from .module_updates import ModuleUpdates
from .packed_codes import PackedCodes
from .quantised_basis import QuantisedBasis, quantise_basis
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
class EncodedModule:
    """Codes of some of a module's updates.

    Attributes:
        bits: Bits of each update in a file, estimated.
        squared_errors: Squared error of each update, absolute.
        codes: Codes of the updates.
    """

    bits: Float[Tensor, " n"]
    squared_errors: Float[Tensor, " n"]
    codes: PackedCodes


def survey(
    module: ModuleUpdates, held: HeldUpdates, norms: Tensor, step_sizes: Sequence[float], error: float
) -> ModuleSurvey:
    """Estimate bits and errors of a module.

    Args:
        module: Updates of the module.
        held: Singular components in memory.
        norms: Norm over all modules of each adapter that has the module, (n,).
        step_sizes: Step sizes relative to the norms, ascending.
        error: Smallest error bound that the survey is for.
    """
    updates = held.svd_batch(module)
    statistics = ModuleStatistics.of(updates, 1 / norms, error)
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
    pairs = [_quantise_pair(updates, sides, step_sizes, k, module.shape) for k in dict.fromkeys([*candidates, (0, 0)])]
    bases, squared_errors = _cheapest_pair(updates, step_sizes, pairs)
    return QuantisedModule(bases, _energies(updates, norms, bases), squared_errors)


def encode(
    module: ModuleUpdates,
    held: HeldUpdates,
    bases: BasisPair,
    step_sizes: Tensor,
    rows: Sequence[int],
) -> EncodedModule:
    """Encode some updates of a module.

    Args:
        module: Updates of the module.
        held: Singular components in memory.
        bases: Quantised bases.
        step_sizes: Step size of each adapter that has the module, absolute, (n,).
        rows: Indices of the updates to encode.
    """
    updates = held.svd_batch(module)
    if len(rows) < len(updates):
        # early rounds ask for all adapters, and selecting them would copy the batch
        updates, step_sizes = updates.select(rows), step_sizes[list(rows)]
    bits, squared_errors = torch.zeros_like(step_sizes), torch.zeros_like(step_sizes)
    batches = []
    for indices, batch in singular_codes.encode_in_batches(updates, step_sizes, *bases):
        bits[indices], squared_errors[indices] = batch.bits, batch.squared_errors
        batches.append(PackedCodes.of(batch))
    return EncodedModule(bits, squared_errors, PackedCodes.join(batches))


def similarities(
    module: ModuleUpdates, held: HeldUpdates, norms: Tensor, sampled: Sequence[int]
) -> Float[Tensor, "n s"]:
    """Return the similarity of all adapters in a module with the sampled ones (`clusters.similarities`)."""
    return clusters.similarities(held.svd_batch(module), 1 / norms, sampled)


def _quantise_pair(
    updates: SvdBatch,
    sides: tuple[SideStatistics, SideStatistics],
    step_sizes: Tensor,
    k: tuple[int, int],
    shape: tuple[int, int],
) -> BasisPair:
    """Quantise the k = (k_down, k_up) leading components of both sides, as finely as these step sizes ask."""
    if not max(k):
        return QuantisedBasis.empty(shape[1]), QuantisedBasis.empty(shape[0])
    squared_lengths = (updates.s / step_sizes[:, None]).flatten().square()
    pair = []
    for side, count in zip(sides, k, strict=True):
        leading = side.leading(count)
        energy = squared_lengths @ torch.from_numpy(leading.energies).double()
        # estimates are content with float32, in which rows are not orthonormal to the last digit
        rows = linalg.orthonormal_rows(leading.components.double())
        pair.append(quantise_basis(rows, energy.sqrt(), energy))
    return pair[0], pair[1]


def _cheapest_pair(
    updates: SvdBatch, step_sizes: Tensor, pairs: Iterable[BasisPair]
) -> tuple[BasisPair, Float[Tensor, " n"]]:
    """Return the pair of bases of the least rate–distortion cost, measured on some of the updates, and all errors."""
    n, compared, compared_steps = len(updates), updates, step_sizes
    if n > MAX_COMPARED:
        indices = np.linspace(0, n - 1, MAX_COMPARED).round().astype(int).tolist()
        compared, compared_steps = updates.select(indices), step_sizes[indices]
    best: tuple[float, BasisPair, Tensor] | None = None
    for pair in pairs:
        bits, squared_errors = singular_codes.measure_updates(compared, compared_steps, *pair)
        cost = float(singular_codes.rate_distortion_cost(bits, squared_errors, compared_steps).sum())
        cost = cost * n / len(compared) + sum(basis.bits() for basis in pair)
        if best is None or cost < best[0]:
            best = cost, pair, squared_errors
    assert best is not None
    _, pair, squared_errors = best
    if n > MAX_COMPARED:
        _, squared_errors = singular_codes.measure_updates(updates, step_sizes, *pair)
    return pair, squared_errors


def _energies(updates: SvdBatch, norms: Tensor, bases: BasisPair) -> Energies:
    """Return the energies of a module's updates, given the norms (n,) of their adapters over all modules."""
    relative = updates.s / norms[:, None]
    inside = []
    for side, basis in zip(("down", "up"), bases, strict=True):
        if not basis.k:
            inside.append(0.0)
            continue
        coefficients = updates.rows(side) @ linalg.dual_rows(basis.rows.double()).mT
        # norms of unit rows in the span, weighted by singular values
        inside.append(float((coefficients * relative[..., None]).square().sum()))
    return float(relative.square().sum()), inside[0], inside[1]
