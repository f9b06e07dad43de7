"""Encode a collection of adapters in as few bytes as an error bound allows, module by module.

First all modules are surveyed (`rate_allocation`). Then bases are quantised, and for each adapter the largest step size
is searched for with which its measured delta error stays within the bound (`step_sizes`). This module does not know of
files or packs.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..core import linalg
from . import clusters, singular_codes
from .adapter_codes import AdapterCodes, ModuleCodes
from .module_updates import ModuleUpdates
from .quantised_basis import QuantisedBasis, quantise_basis
from .rate_allocation import ModuleStatistics, RatePlan, RateSurvey
from .step_sizes import as_written, search_step_sizes, strict_bound
from .svd_batch import SvdBatch

SURVEY, BASES, STEP_SIZES, WRITING = (
    "choosing bytes: survey",
    "choosing bytes: bases",
    "choosing bytes: steps",
    "choosing bytes: writing",
)
"""Stages that are reported to a progress callback."""
GOOD_REACH = 0.9, 1.3
"""Mean step size that was found, relative to the planned one, where a plan was good; else further plans are tried."""
STRICTER_SHARES = (0.98, 0.95, 0.9, 0.8)
"""Shares of an error bound that are planned for in its place."""
SMALLEST_TRIED, LARGEST_TRIED = 1e-6, 0.999
"""Errors between which the bytes of the collection are estimated."""
MAX_HELD_BYTES = 2**30
"""Bytes of singular components that are kept in memory between rounds; beyond that, factors are read anew."""
COMPARED_MODULES = 4
"""Number of modules by which adapters are compared for clusters."""
MIN_SAVING = 0.97
"""Share of bytes below which more clusters are taken: a pack of several clusters is harder to add to."""

Progress = Callable[[str, int, int], None]
"""Called with the stage, and the numbers of modules that are done and in all."""
BasisPair = tuple[QuantisedBasis, QuantisedBasis]
"""The bases of a module, (down, up)."""
Energies = tuple[float, float, float]
"""Squared norm of a module's updates, relative to those of whole adapters, and its parts in the two bases' spans."""


@dataclass(frozen=True, slots=True)
class EncodedCollection:
    """An encoded collection.

    Attributes:
        bases: Bases (down, up) by module, those of all clusters concatenated.
        energies: Energies by module.
        adapters: Codes of each adapter, without the modules that it has not trained.
        errors: Relative Frobenius error of each adapter over all modules.
    """

    bases: Mapping[str, BasisPair]
    energies: Mapping[str, Energies]
    adapters: Sequence[AdapterCodes]
    errors: Sequence[float]


@dataclass(frozen=True, slots=True)
class _QuantisedPlan:
    """Quantised bases, and the largest step sizes within the error bound.

    Attributes:
        bases: Bases (down, up) by module and cluster.
        energies: Energies by module.
        step_sizes: Quantisation step size of each adapter, absolute.
        errors: Relative error of each adapter.
        reach: Geometric mean of the step sizes relative to the planned ones.
    """

    bases: Mapping[tuple[str, int], BasisPair]
    energies: dict[str, Energies]
    step_sizes: Float[Tensor, " n"]
    errors: Float[Tensor, " n"]
    reach: float


@dataclass(frozen=True, slots=True)
class RatePoint:
    """A point of the rate–distortion curve: an error bound, and about how many bytes the collection takes for it."""

    error: float
    bytes: int


class CollectionEncoder:
    """The modules of a collection, surveyed once, that can then be encoded for any error bound.

    Args:
        modules: Updates of all modules.
        norms: Norm of each adapter over all modules, none of which is 0.
        step_sizes: Step sizes to survey, relative to the norms.
        progress: Called while modules are worked on.
        groups: Cluster of each adapter. One cluster by default.
        whole: The same collection in one cluster, whose singular components are used again if it holds them.
    """

    def __init__(
        self,
        modules: Sequence[ModuleUpdates],
        norms: Float[Tensor, " n"],
        step_sizes: Sequence[float],
        progress: Progress,
        groups: Sequence[int] | None = None,
        whole: "CollectionEncoder | None" = None,
    ) -> None:
        self.groups = list(groups) if groups is not None else [0] * len(norms)
        self.modules = [updates for module in modules for updates in module.split(self.groups)]
        self.norms = norms
        self._progress = progress
        # singular components have about as many numbers as the factors, in float64
        size = 8 * sum(module.numbers for module in modules)
        # an SVD of every module in every round would take most of the time
        self._held: dict[tuple[str, int], SvdBatch] | None = {} if size <= MAX_HELD_BYTES else None
        self._held_statistics: dict[tuple[str, int], ModuleStatistics] = {}
        # clusters are compared while the whole collection is held
        self._free_bytes = MAX_HELD_BYTES - size if whole is None else 0
        self._whole = whole
        self._curve: tuple[np.ndarray, np.ndarray] | None = None
        self.survey = RateSurvey(len(norms), step_sizes)
        for module, updates in self._each_module(SURVEY):
            self.survey.add(self._statistics(module, updates), module.indices.tolist())

    def _each_module(self, stage: str) -> Iterator[tuple[ModuleUpdates, SvdBatch]]:
        for done, module in enumerate(self.modules):
            self._progress(stage, done, len(self.modules))
            yield module, self.svd_batch(module)
        self._progress(stage, len(self.modules), len(self.modules))

    def _statistics(self, module: ModuleUpdates, updates: SvdBatch) -> ModuleStatistics:
        """Return the statistics of a module, and hold them while there is memory: a decomposition takes long."""
        if module.key in self._held_statistics:
            return self._held_statistics[module.key]
        statistics = ModuleStatistics.of(updates, 1 / self.norms[module.indices])
        if statistics.nbytes <= self._free_bytes:
            self._held_statistics[module.key] = statistics
            self._free_bytes -= statistics.nbytes
        return statistics

    def svd_batch(self, module: ModuleUpdates) -> SvdBatch:
        """Return the singular components of a module's updates, and hold them if all modules' fit in memory."""
        if self._held is not None and module.key in self._held:
            return self._held[module.key]
        updates = self._from_whole(module)
        if updates is None:
            updates = SvdBatch.of([source.read() for source in module.sources])
        if self._held is not None:
            self._held[module.key] = updates
        return updates

    def _from_whole(self, module: ModuleUpdates) -> SvdBatch | None:
        """Select the updates of a cluster from the unclustered collection, if that holds them."""
        if self._whole is None or self._whole._held is None or (module.name, 0) not in self._whole._held:
            return None
        (unclustered,) = (candidate for candidate in self._whole.modules if candidate.name == module.name)
        # the SVD of an update does not depend on its cluster
        rows = {source.index: row for row, source in enumerate(unclustered.sources)}
        return self._whole._held[module.name, 0].select([rows[source.index] for source in module.sources])

    def frontier(self, errors: Sequence[float]) -> list[RatePoint]:
        """Estimate the bytes that each error bound takes."""
        return [RatePoint(error, round(self.survey.plan(error).bits / 8)) for error in errors]

    def error_for_bytes(self, limit: float) -> float:
        """Return the error bound that is estimated to take so many bytes."""
        if self._curve is None:
            errors = np.exp(np.linspace(math.log(SMALLEST_TRIED), math.log(LARGEST_TRIED), 65))
            sizes = np.array([point.bytes for point in self.frontier(errors.tolist())])
            # estimates may rise with the error by a little; interpolation needs them to fall
            self._curve = np.log(errors), np.log(np.maximum(np.minimum.accumulate(sizes), 1))
        errors, sizes = self._curve
        return float(np.exp(np.interp(math.log(max(limit, 1)), sizes[::-1], errors[::-1])))

    def estimated_bytes(self, error: float) -> float:
        """Return about how many bytes an error bound takes, at least 1."""
        return float(max(self.frontier([error])[0].bytes, 1))

    def encode(self, error: float) -> EncodedCollection:
        """Encode the collection so that every adapter's delta error is at most `error`.

        `OptionError` if that is too small for integers of 32 bits.
        """
        plan = self._best_plan(strict_bound(error))
        codes: list[dict[str, ModuleCodes]] = [{} for _ in self.norms]
        for module, updates in self._each_module(WRITING):
            step_sizes = plan.step_sizes[module.indices]
            for rows, batch in singular_codes.encode_in_batches(updates, step_sizes, *plan.bases[module.key]):
                for position, row in enumerate(rows):
                    codes[module.sources[row].index][module.name] = ModuleCodes.of(batch, position)
        adapters = [
            AdapterCodes(step_size, cluster, modules)
            for step_size, cluster, modules in zip(plan.step_sizes.tolist(), self.groups, codes, strict=True)
        ]
        return EncodedCollection(self._concatenated(plan.bases), plan.energies, adapters, plan.errors.tolist())

    def _best_plan(self, bound: float) -> _QuantisedPlan:
        """Return bases, and step sizes with which no adapter exceeds the bound."""
        plan = self._quantised_plan(bound, bound)
        if GOOD_REACH[0] < plan.reach < GOOD_REACH[1]:
            return plan
        # Errors jump here, as where adapters nearly coincide. What a plan's components lack of the bound costs each
        # adapter a residual, where one more component for all would do.
        candidates = [plan, *(self._quantised_plan(share * bound, bound) for share in STRICTER_SHARES)]
        return min(candidates, key=self._measured_bits)

    def _quantised_plan(self, planned_error: float, bound: float) -> _QuantisedPlan:
        """Plan for an error that is at most the bound, and search for the step sizes that meet the bound itself."""
        plan = self.survey.plan(planned_error)
        # rounded to what can be written before anything is measured, so that the errors are those of the file
        planned = as_written(torch.from_numpy(plan.step_sizes) * self.norms)
        bases, energies, errors = self._quantise_bases(plan, planned)
        step_sizes, errors = search_step_sizes(partial(self._measure_errors, bases), planned, errors, bound)
        reach = float((step_sizes / planned).log2().mean().exp2())
        return _QuantisedPlan(bases, energies, step_sizes, errors, reach)

    def _measured_bits(self, plan: _QuantisedPlan) -> float:
        """Return about how many bits the bases and adapters of a plan take."""
        bits = sum(basis.bits() for pair in plan.bases.values() for basis in pair)
        for module, updates in self._each_module(STEP_SIZES):
            step_sizes = plan.step_sizes[module.indices]
            bits += float(singular_codes.measure_updates(updates, step_sizes, *plan.bases[module.key])[0].sum())
        return bits

    def _concatenated(self, bases: Mapping[tuple[str, int], BasisPair]) -> dict[str, BasisPair]:
        """Return the bases of each module, those of its clusters one after the other."""
        n_clusters, concatenated = max(self.groups) + 1, {}
        for name, shape in {module.name: module.shape for module in self.modules}.items():
            # a cluster none of whose adapters has trained the module keeps its place, by an empty basis
            pairs = [bases.get((name, cluster), _empty_pair(shape)) for cluster in range(n_clusters)]
            down, up = (QuantisedBasis.concatenate(list(side)) for side in zip(*pairs, strict=True))
            concatenated[name] = down, up
        return concatenated

    def _quantise_bases(
        self, plan: RatePlan, step_sizes: Tensor
    ) -> tuple[dict[tuple[str, int], BasisPair], dict[str, Energies], Float[Tensor, " n"]]:
        """Return the quantised bases of all modules, the energies in them, and the errors of the adapters with them."""
        bases: dict[tuple[str, int], BasisPair] = {}
        energies: dict[str, Energies] = {}
        squared_errors = torch.zeros_like(step_sizes)
        for candidates, (module, updates) in zip(plan.k, self._each_module(BASES), strict=True):
            indices = module.indices
            statistics = self._statistics(module, updates) if max(map(max, candidates)) else None
            # the estimate may be wrong: no basis at all is tried, too
            pairs = (
                _quantise_pair(updates, statistics, step_sizes[indices], k, module.shape)
                for k in dict.fromkeys([*candidates, (0, 0)])
            )
            bases[module.key], module_errors = _cheapest_pair(updates, step_sizes[indices], pairs)
            squared_errors.index_add_(0, indices, module_errors)
            energy = _energies(updates, self.norms[indices], bases[module.key])
            total = energies.get(module.name, (0.0, 0.0, 0.0))
            energies[module.name] = total[0] + energy[0], total[1] + energy[1], total[2] + energy[2]
        return bases, energies, squared_errors.sqrt() / self.norms

    def _measure_errors(
        self, bases: Mapping[tuple[str, int], BasisPair], step_sizes: Tensor, needed: Tensor
    ) -> Float[Tensor, " n"]:
        """Return the delta errors of the adapters in the mask `needed` with these step sizes."""
        squared_errors = torch.zeros_like(step_sizes)
        for module, updates in self._each_module(STEP_SIZES):
            rows = [row for row, source in enumerate(module.sources) if needed[source.index]]
            if rows:
                indices = module.indices[rows]
                # early rounds ask for all adapters, and selecting them would copy the batch
                if len(rows) < len(module.sources):
                    updates = updates.select(rows)
                _, module_errors = singular_codes.measure_updates(updates, step_sizes[indices], *bases[module.key])
                squared_errors.index_add_(0, indices, module_errors)
        return squared_errors.sqrt() / self.norms


def _empty_pair(shape: tuple[int, int]) -> BasisPair:
    return QuantisedBasis.empty(shape[1]), QuantisedBasis.empty(shape[0])


def _quantise_pair(
    updates: SvdBatch,
    statistics: ModuleStatistics | None,
    step_sizes: Tensor,
    k: tuple[int, int],
    shape: tuple[int, int],
) -> BasisPair:
    """Quantise the k = (k_down, k_up) leading components of both sides, as finely as these step sizes ask."""
    if statistics is None or not max(k):
        return _empty_pair(shape)
    squared_lengths = (updates.s / step_sizes[:, None]).flatten().square()
    pair = []
    for side, count in zip((statistics.down, statistics.up), k, strict=True):
        energy = torch.from_numpy(side.energies[:, :count]).mul(squared_lengths[:, None]).sum(0)
        pair.append(quantise_basis(side.components[:count], energy.sqrt(), energy))
    return pair[0], pair[1]


def _cheapest_pair(
    updates: SvdBatch, step_sizes: Tensor, pairs: Iterable[BasisPair]
) -> tuple[BasisPair, Float[Tensor, " n"]]:
    """Return the pair of bases of the least rate–distortion cost, and the squared errors of the updates with it."""
    best: tuple[float, BasisPair, Tensor] | None = None
    for pair in pairs:
        bits, squared_errors = singular_codes.measure_updates(updates, step_sizes, *pair)
        cost = float(singular_codes.rate_distortion_cost(bits, squared_errors, step_sizes).sum())
        cost += sum(basis.bits() for basis in pair)
        if best is None or cost < best[0]:
            best = cost, pair, squared_errors
    assert best is not None
    return best[1], best[2]


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


def split_into_clusters(
    whole: CollectionEncoder, modules: Sequence[ModuleUpdates], error: float, progress: Progress
) -> CollectionEncoder:
    """Return the collection in as many clusters as take fewest bytes, by estimate, with this error bound."""
    n = len(whole.norms)
    # similarities of different modules add up only if all adapters have trained them
    compared = [module for module in whole.modules if len(module.sources) == n]
    if n < 2 * clusters.MIN_GROUP or not compared:
        return whole
    sampled = clusters.sample_adapters(n)
    similarity = torch.zeros(n, len(sampled), dtype=torch.float64)
    # a few modules, evenly spaced over the depth of the model, tell groups apart
    for at in np.unique(np.linspace(0, len(compared) - 1, COMPARED_MODULES).round().astype(int)).tolist():
        similarity += clusters.similarities(whole.svd_batch(compared[at]), 1 / whole.norms, sampled)
    candidates = clusters.candidate_groupings(similarity, sampled)
    if not candidates:
        return whole
    # clusters are compared by estimates alone; three step sizes around the planned one are enough to compare groupings
    grid = whole.survey.step_sizes
    middle = int(np.abs(np.log(grid) - np.log(whole.survey.plan(error).step_sizes).mean()).argmin())
    near = grid[max(middle - 1, 0) : middle + 2].tolist()

    def estimated_bits(groups: list[int] | None) -> float:
        return CollectionEncoder(modules, whole.norms, near, progress, groups, whole).survey.plan(error).bits

    # one cluster is estimated with the same few step sizes, so that the estimates compare
    best, limit = None, MIN_SAVING * estimated_bits(None)
    for groups in candidates:
        if (bits := estimated_bits(groups)) < limit:
            best, limit = groups, MIN_SAVING * bits
    if best is None:
        return whole
    return CollectionEncoder(modules, whole.norms, grid.tolist(), progress, best, whole)
