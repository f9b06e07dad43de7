"""Encode a collection of adapters in as few bytes as an error bound allows, module by module.

First all modules are surveyed (`rate_allocation`). Then bases are quantised, and for each adapter the largest step size
is searched for with which its measured delta error stays within the bound (`step_sizes`). The stages of one module are
in `module_stages`; they may run in other processes. This module does not know of files or packs.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from . import clusters, module_stages
from .adapter_codes import AdapterCodes
from .encoding_rounds import EncodingRounds
from .module_stages import BasisPair, Energies, ModuleSurvey, QuantisedModule
from .module_updates import ModuleUpdates
from .quantised_basis import QuantisedBasis
from .rate_allocation import RateSurvey
from .stage_runner import StageRunner
from .step_sizes import as_written, search_step_sizes, strict_bound

SURVEY, BASES = "choosing bytes: survey", "choosing bytes: bases"
"""Stages that are reported to a progress callback, beside that of `encoding_rounds`."""
GOOD_ERROR = 0.97, 1.03
"""Mean error with the planned step sizes, relative to the planned error, where a plan was good; else it is revised."""
MAX_REVISIONS = 3
"""Number of revisions of a plan."""
GOOD_REACH = 0.9, 1.3
"""Mean step size that was found, relative to the planned one, where a plan was good; else further plans are tried."""
STRICTER_SHARES = (0.98, 0.95, 0.9, 0.8)
"""Shares of an error bound that are planned for in its place."""
MAX_WORSE = 2
"""Number of further plans without a gain after which no more are tried."""
SMALLEST_TRIED, LARGEST_TRIED = 1e-6, 0.999
"""Errors between which the bytes of the collection are estimated."""
COMPARED_MODULES = 4
"""Number of modules by which adapters are compared for clusters, and plans for the whole collection."""
STEEP = 2.0
"""Slope of bytes over error, in logarithms of both, from which estimates can be wrong by a factor of two.

The rate of a Gaussian source has this slope at an error of 0.6, and a smaller one at smaller errors.
"""
MAX_STEEP_ERROR = 0.5
"""Error above which bytes fall steeply for every collection."""
MIN_SAVING = 0.97
"""Share of bytes below which more clusters are taken: a pack of several clusters is harder to add to."""

Item = TypeVar("Item")


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
class _PlannedBases:
    """Quantised bases for a planned error.

    Attributes:
        error: The planned error.
        bases: Bases (down, up) by module and cluster.
        energies: Energies by module.
        step_sizes: Planned step size of each adapter, absolute.
        errors: Relative error of each adapter with it.
    """

    error: float
    bases: Mapping[tuple[str, int], BasisPair]
    energies: Mapping[str, Energies]
    step_sizes: Float[Tensor, " n"]
    errors: Float[Tensor, " n"]

    def deviation(self, bound: float) -> float:
        """Return the geometric mean of the errors relative to an error bound."""
        return float((self.errors / bound).clamp_min(1e-9).log2().mean().exp2())


@dataclass(frozen=True, slots=True)
class _EncodedPlan:
    """Quantised bases, and all adapters measured in them with the largest step sizes within an error bound.

    Attributes:
        planned: The bases.
        encoding: The adapters.
        reach: Geometric mean of the step sizes relative to the planned ones.
        bits: Bits of bases and adapters in a file, estimated.
    """

    planned: _PlannedBases
    encoding: EncodingRounds
    reach: float
    bits: float


@dataclass(frozen=True, slots=True)
class RatePoint:
    """A point of the rate–distortion curve: an error bound, and about how many bytes the collection takes for it."""

    error: float
    bytes: int


def is_steep(points: Sequence[RatePoint]) -> bool:
    """Return whether the bytes fall fast somewhere on a curve of two points or more, so that estimates are rough.

    That is where adapters differ from what they have in common by about the error bound: below it each needs a
    residual, above it none does. An estimate interpolates between the two. Points without bytes or error are left out.
    """
    positive = [point for point in points if point.bytes > 0 and point.error > 0]
    ordered = sorted(positive, key=lambda point: point.error)
    return any(
        math.log(point.bytes / later.bytes) > STEEP * (math.log(later.error) - math.log(point.error))
        for point, later in pairwise(ordered)
        if later.error <= MAX_STEEP_ERROR
    )


class CollectionEncoder:
    """The modules of a collection, surveyed once, that can then be encoded for any error bound.

    Args:
        modules: Updates of all modules.
        norms: Norm of each adapter over all modules, none of which is 0.
        step_sizes: Step sizes to survey, relative to the norms.
        runner: Runs the stages of each module.
        groups: Cluster of each adapter. One cluster by default.
    """

    def __init__(
        self,
        modules: Sequence[ModuleUpdates],
        norms: Float[Tensor, " n"],
        step_sizes: Sequence[float],
        runner: StageRunner,
        groups: Sequence[int] | None = None,
    ) -> None:
        self.groups = list(groups) if groups is not None else [0] * len(norms)
        self._unclustered = modules
        self.modules = [updates for module in modules for updates in module.split(self.groups)]
        self.norms = norms
        self.runner = runner
        self._curve: tuple[np.ndarray, np.ndarray] | None = None
        self.survey = RateSurvey(len(norms), step_sizes)
        self._sides, self._squares = [], []
        surveyed: Iterator[ModuleSurvey] = runner.run_stage(
            SURVEY,
            [
                partial(module_stages.survey, module, runner.held, norms[module.indices], sorted(step_sizes))
                for module in self.modules
            ],
        )
        for module, module_survey in zip(self.modules, surveyed, strict=True):
            self.survey.add(module_survey.estimates, module.indices.tolist())
            self._sides.append(module_survey.sides)
            self._squares.append(module_survey.squares)

    def in_clusters(self, step_sizes: Sequence[float], groups: Sequence[int] | None) -> "CollectionEncoder":
        """Return the same collection, surveyed anew in clusters; arguments as those of the class."""
        return CollectionEncoder(self._unclustered, self.norms, step_sizes, self.runner, groups)

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
        encoding = plan.encoding
        codes = encoding.encode()
        adapters = [
            AdapterCodes(step_size, cluster, modules)
            for step_size, cluster, modules in zip(encoding.step_sizes.tolist(), self.groups, codes, strict=True)
        ]
        bases = self._concatenated(plan.planned.bases)
        return EncodedCollection(bases, plan.planned.energies, adapters, encoding.errors.tolist())

    def _best_plan(self, bound: float) -> _EncodedPlan:
        """Return bases, and the adapters encoded in them, none of which exceeds the bound."""
        if self._trial is None:
            return self._compare_plans(bound)
        # a few modules tell which planned error is best
        share = self._trial._compare_plans(bound).planned.error / bound
        return self._encoded_plan(self._planned_bases(share * bound), bound)

    @cached_property
    def _trial(self) -> "CollectionEncoder | None":
        """The encoder of a few modules; None if there are few, or none that all adapters have trained."""
        n, counts = len(self.norms), Counter[str]()
        for module in self.modules:
            counts[module.name] += len(module.sources)
        common = [name for name, count in counts.items() if count == n]
        if len(counts) <= 2 * COMPARED_MODULES or not common:
            return None
        chosen = _spread(common, COMPARED_MODULES)
        squares = torch.zeros_like(self.norms)
        for module, module_squares in zip(self.modules, self._squares, strict=True):
            if module.name in chosen:
                squares.index_add_(0, module.indices, module_squares)
        whole = [module for module in self._unclustered if module.name in chosen]
        grid = self.survey.step_sizes.tolist()
        return CollectionEncoder(whole, squares.sqrt(), grid, self.runner, self.groups)

    def _compare_plans(self, bound: float) -> _EncodedPlan:
        """Encode the collection by several plans, and return the one of the fewest bits."""
        original = self._planned_bases(bound)
        revised = self._revised_bases(original, bound)
        best = self._encoded_plan(revised, bound)
        if revised is not original:
            candidate = self._encoded_plan(original, bound)
            if candidate.bits >= best.bits:
                return best
            best = candidate
        if GOOD_REACH[0] < best.reach < GOOD_REACH[1]:
            return best
        # Errors jump here, as where adapters nearly coincide. What a plan's components lack of the bound costs each
        # adapter a residual, where one more component for all would do.
        worse = 0
        for share in STRICTER_SHARES:
            candidate = self._encoded_plan(self._planned_bases(share * bound), bound)
            worse = worse + 1 if candidate.bits >= best.bits else 0
            best = min(best, candidate, key=lambda plan: plan.bits)
            if worse == MAX_WORSE:
                break
        return best

    def _revised_bases(self, best: _PlannedBases, bound: float) -> _PlannedBases:
        """Return bases whose planned step sizes give about the error bound, as far as plans can be revised.

        Bases that are finer than the bound asks for take bytes that coarser coefficients do not give back. Bases that
        are too coarse for it cost each adapter a residual.
        """
        finer, coarser = (best, None) if best.deviation(bound) < 1 else (None, best)
        for _ in range(MAX_REVISIONS):
            if GOOD_ERROR[0] < best.deviation(bound) < GOOD_ERROR[1]:
                break
            error = best.error / best.deviation(bound)
            if finer is not None and coarser is not None:
                # log–log interpolation
                share = math.log(finer.deviation(bound)) / math.log(finer.deviation(bound) / coarser.deviation(bound))
                error = finer.error * (coarser.error / finer.error) ** share
            best = self._planned_bases(error)
            finer, coarser = (best, coarser) if best.deviation(bound) < 1 else (finer, best)
        return best if finer is None or best.deviation(bound) < GOOD_ERROR[1] else finer

    def _encoded_plan(self, planned: _PlannedBases, bound: float) -> _EncodedPlan:
        """Search for the step sizes that meet the bound itself, with the bases of a plan."""
        encoding = EncodingRounds(self.modules, self.norms, self.runner, planned.bases, bound)
        step_sizes, _ = search_step_sizes(encoding.measure, planned.step_sizes, planned.errors, bound)
        encoding.complete(step_sizes)
        reach = float((step_sizes / planned.step_sizes).log2().mean().exp2())
        bits = sum(basis.bits() for pair in planned.bases.values() for basis in pair) + float(encoding.bits.sum())
        return _EncodedPlan(planned, encoding, reach, bits)

    def _planned_bases(self, error: float) -> _PlannedBases:
        """Plan for an error, and quantise the bases of all modules."""
        error = min(error, LARGEST_TRIED)
        plan = self.survey.plan(error)
        # rounded to what can be written before anything is measured, so that the errors are those of the file
        step_sizes = as_written(torch.from_numpy(plan.step_sizes) * self.norms)
        bases: dict[tuple[str, int], BasisPair] = {}
        energies: dict[str, Energies] = {}
        squared_errors = torch.zeros_like(step_sizes)
        quantised: Iterator[QuantisedModule] = self.runner.run_stage(
            BASES,
            [
                partial(
                    module_stages.quantise,
                    module,
                    self.runner.held,
                    sides,
                    self.norms[module.indices],
                    step_sizes[module.indices],
                    module_candidates,
                )
                for module, sides, module_candidates in zip(self.modules, self._sides, plan.k, strict=True)
            ],
        )
        for module, outcome in zip(self.modules, quantised, strict=True):
            bases[module.key] = outcome.bases
            squared_errors.index_add_(0, module.indices, outcome.squared_errors)
            total = energies.get(module.name, (0.0, 0.0, 0.0))
            square, down, up = (before + more for before, more in zip(total, outcome.energies, strict=True))
            energies[module.name] = square, down, up
        return _PlannedBases(error, bases, energies, step_sizes, squared_errors.sqrt() / self.norms)

    def _concatenated(self, bases: Mapping[tuple[str, int], BasisPair]) -> dict[str, BasisPair]:
        """Return the bases of each module, those of its clusters one after the other."""
        n_clusters, concatenated = max(self.groups) + 1, {}
        for name, shape in {module.name: module.shape for module in self.modules}.items():
            # a cluster none of whose adapters has trained the module keeps its place, by an empty basis
            empty = QuantisedBasis.empty(shape[1]), QuantisedBasis.empty(shape[0])
            pairs = [bases.get((name, cluster), empty) for cluster in range(n_clusters)]
            down, up = (QuantisedBasis.concatenate(list(side)) for side in zip(*pairs, strict=True))
            concatenated[name] = down, up
        return concatenated


def split_into_clusters(whole: CollectionEncoder, error: float) -> CollectionEncoder:
    """Return the collection in as many clusters as take fewest bytes, by estimate, with this error bound."""
    groups = best_groups(whole, error)
    return whole if groups is None else whole.in_clusters(whole.survey.step_sizes.tolist(), groups)


def best_groups(whole: CollectionEncoder, error: float) -> list[int] | None:
    """Return the cluster of each adapter for `split_into_clusters`; None if one cluster is best."""
    n = len(whole.norms)
    # similarities of different modules add up only if all adapters have trained them
    compared = [module for module in whole.modules if len(module.sources) == n]
    if n < 2 * clusters.MIN_GROUP or not compared:
        return None
    sampled = clusters.sample_adapters(n)
    # a few modules, evenly spaced over the depth of the model, tell groups apart
    calls = [
        partial(module_stages.similarities, module, whole.runner.held, whole.norms, sampled)
        for module in _spread(compared, COMPARED_MODULES)
    ]
    similarity = torch.zeros(n, len(sampled), dtype=torch.float64)
    for module_similarity in whole.runner.run(calls):
        similarity += module_similarity
    candidates = clusters.candidate_groupings(similarity, sampled)
    if not candidates:
        return None
    # clusters are compared by estimates alone; three step sizes around the planned one are enough to compare groupings
    grid = whole.survey.step_sizes
    middle = int(np.abs(np.log(grid) - np.log(whole.survey.plan(error).step_sizes).mean()).argmin())
    near = grid[max(middle - 1, 0) : middle + 2].tolist()

    def estimated_bits(groups: list[int] | None) -> float:
        return whole.in_clusters(near, groups).survey.plan(error).bits

    # one cluster is estimated with the same few step sizes, so that the estimates compare
    best, limit = None, MIN_SAVING * estimated_bits(None)
    for groups in candidates:
        if (bits := estimated_bits(groups)) < limit:
            best, limit = groups, MIN_SAVING * bits
    return best


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return some of the items, evenly spaced."""
    chosen = np.unique(np.linspace(0, len(items) - 1, count).round().astype(int))
    return [items[at] for at in chosen.tolist()]
