"""Rate allocation: numbers of components per module and side, and a quantisation step size per adapter.

For a grid of step sizes, each module estimates, before anything is encoded, about how many bits it takes with the best
numbers of components, and the squared error of each adapter. An adapter has the same step size in all modules, and all
decisions use the same price of squared error (`dead_zone.BITS_PER_SQUARED_ERROR`): so one bit more buys the same
everywhere, in coefficients, residuals and components alike. docs/concepts/codec.md, "Where the bits go".
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..core import krylov, linalg
from . import dead_zone
from .dead_zone import BITS_PER_SQUARED_ERROR
from .singular_codes import OVERHEAD
from .svd_batch import SvdBatch

MAX_COMPONENTS = 512
"""Largest number of components per side that is considered."""
DENSE_SIZE = 2048
"""Number of rows, or their width, up to which all components are computed at once, by a dense decomposition."""
RESOLUTION = {torch.float32: 1e-3, torch.float64: linalg.GRAM_RESOLUTION}
"""Singular values, relative to the largest one, that a Gram matrix of this dtype resolves."""
MAX_CORE_RANKS = 3
"""Number of components, in ranks of the adapters, up to which cores are considered."""
BINS = 4
"""Bins of row norms, to an octave: rows of one bin share their cost."""
# with growing distances: around the best number of components, the cost hardly changes
_COMPONENT_COUNTS = (
    *(0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64),
    *(80, 96, 112, 128, 160, 192, 256, 320, 384, 448),
)


@dataclass(frozen=True)
class SideStatistics:
    """The leading common components of one side of a module, and how much of each row lies along them.

    Components are held as combinations of the rows where there are fewer rows than columns, which takes less memory.

    Attributes:
        directions: The components, (k, d), or the combinations of rows that they are, (k, rows).
        energies: Squared coordinates of the unit singular vectors of all adapters.
        dimension: Width d of the side.
        has_combinations: Whether `directions` are combinations of rows.
    """

    directions: Float[Tensor, "k m"]
    energies: Float[np.ndarray, "rows k"]
    dimension: int
    has_combinations: bool

    @cached_property
    def row_energies(self) -> Float[np.ndarray, " rows"]:
        """Sum of the energies of each row."""
        sums: np.ndarray = self.energies.sum(1)
        return sums

    def leading(self, count: int) -> "SideStatistics":
        """Return the first `count` components with the energies on them."""
        directions, energies = self.directions[:count].clone(), self.energies[:, :count].copy()
        return SideStatistics(directions, energies, self.dimension, self.has_combinations)

    def components(self, rows: Float[Tensor, "rows d"], count: int) -> Float[Tensor, "k d"]:
        """Return the first `count` components as orthonormal rows, from the unit singular vectors of all adapters."""
        leading = self.directions[:count].to(rows.dtype)
        return linalg.orthonormalised(leading @ rows if self.has_combinations else leading)


@dataclass(frozen=True, slots=True)
class ModuleStatistics:
    """Summary of a module's updates, all that the rate allocation needs.

    Attributes:
        down: Statistics of the down side.
        up: Statistics of the up side.
        lengths: Singular values, relative to the norms of their adapters over all modules.
        owners: Adapter of each singular value.
        n: Number of adapters.
    """

    down: SideStatistics
    up: SideStatistics
    lengths: Float[np.ndarray, " rows"]
    owners: np.ndarray
    n: int

    @classmethod
    def of(cls, updates: SvdBatch, weights: Float[Tensor, " n"]) -> "ModuleStatistics":
        """Summarise the updates of a module.

        Args:
            updates: Updates of the module. Components are computed in their dtype.
            weights: 1 / ‖update‖ of their adapters over all modules.
        """
        # relative to the adapter's norm: then one step size means about the same error for all adapters
        lengths = updates.s * weights[:, None]
        n, rank = lengths.shape
        down, up = (_side_statistics(updates.rows(side), lengths.to(updates.dtype)) for side in ("down", "up"))
        return cls(down, up, lengths.flatten().numpy(), np.repeat(np.arange(n), rank), n)

    @property
    def rank(self) -> int:
        """The maximum number of singular components of an adapter."""
        return len(self.lengths) // self.n


def _side_statistics(vectors: Float[Tensor, "n r d"], lengths: Float[Tensor, "n r"]) -> SideStatistics:
    rows, scale = vectors.flatten(0, 1), lengths.flatten()[:, None]
    n_rows, dimension = rows.shape
    if n_rows > min(dimension, DENSE_SIZE):
        components = _leading_components(rows * scale)
        return SideStatistics(components, (rows @ components.mT).square().numpy(), dimension, has_combinations=False)
    sigma, vectors = _leading_eigenvectors(scale * linalg.symmetric_product(rows) * scale.mT)
    # the coordinates of the rows themselves, without a product with them: W·Σ = diag(lengths)·rows·Cᵀ
    # rows of which only rounding errors are left have no direction, and the quotient would overflow
    floor = torch.finfo(scale.dtype).eps * scale.max() if len(scale) else 0.0
    coordinates = torch.where(scale > floor, vectors * sigma / scale, 0.0)
    energies = coordinates.square()
    # rounding errors of rows that are nearly zero
    energies = energies / energies.sum(1, keepdim=True).clamp_min(1)
    return SideStatistics((vectors / sigma).mT * scale.mT, energies.numpy(), dimension, has_combinations=True)


def _leading_eigenvectors(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular values that a Gram matrix resolves, at most `MAX_COMPONENTS`, and its eigenvectors."""
    squares, vectors = linalg.descending_eigh(gram)
    sigma = squares.clamp_min(0).sqrt()
    k = min(MAX_COMPONENTS, int((sigma > RESOLUTION[gram.dtype] * sigma[0]).sum()))
    return sigma[:k], vectors[:, :k]


def _leading_components(rows: Tensor) -> Tensor:
    """Return the leading right singular vectors of rows, by iteration where a dense decomposition would take long."""
    if min(rows.shape) <= DENSE_SIZE:
        return _leading_eigenvectors(rows.mT @ rows)[1].mT.contiguous()
    # a fixed seed, since equal input must give equal bytes
    start = torch.randn(rows.shape[1], MAX_COMPONENTS, generator=torch.Generator().manual_seed(0), dtype=rows.dtype)
    square = float(rows.square().sum())
    leading = krylov.leading_eigenvectors(
        lambda columns: rows.mT @ (rows @ columns), start, MAX_COMPONENTS, tolerance=1e-3 * square
    )
    return linalg.orthonormal_rows(leading.vectors.mT)


@dataclass(frozen=True, slots=True)
class RateEstimate:
    """The estimated cost of a module at one step size.

    Attributes:
        k: Numbers of components, (k_down, k_up).
        basis_bits: Bits of both bases.
        bits: Bits of each adapter.
        squared_errors: Squared error of each adapter. While estimates are compared, in units of the squared step size;
            as `estimate_rate` returns it, relative to the squared norm of the adapter.
    """

    k: tuple[int, int]
    basis_bits: float
    bits: np.ndarray
    squared_errors: np.ndarray

    @property
    def cost(self) -> float:
        """The rate–distortion cost in bits, of squared errors in units of the squared step size."""
        return self.basis_bits + float((self.bits + BITS_PER_SQUARED_ERROR * self.squared_errors).sum())


def component_counts(largest: int) -> list[int]:
    """Return the numbers of components to compare, from 0 to `largest`, with growing distances."""
    return [*(k for k in _COMPONENT_COUNTS if k < largest), largest]


def estimate_rate(module: ModuleStatistics, step_size: float) -> RateEstimate:
    """Estimate the cost of a module with the best numbers of components.

    Args:
        module: Statistics of the module.
        step_size: Step size of every adapter, relative to the adapter's norm.

    Returns:
        The estimate, in bits, with squared errors relative to the squared norms of the adapters.
    """
    costs = _ModuleCosts.of(module, step_size)
    best = costs.with_components(costs.best_counts())
    for down_index, k in enumerate(costs.down.counts):
        # the same number on both sides: all pairs would be quadratic in the number of counts
        if k and k in costs.up.counts and k <= MAX_CORE_RANKS * module.rank:
            candidate = costs.with_cores((down_index, costs.up.counts.index(k)))
            if candidate.cost < best.cost:
                best = candidate
    return replace(best, squared_errors=best.squared_errors * step_size**2)


@dataclass(frozen=True, slots=True)
class _SideCosts:
    """Costs of one side's rows for every number of components in `counts`.

    Attributes:
        counts: Numbers of components, ascending.
        basis_bits: Bits of the basis.
        bits: Bits of each row.
        squared_errors: Squared error of each row, in squared step sizes.
        costs: Rate–distortion cost of each row, in bits.
        inside: Share of each row's square in the leading components, as they will be quantised.
        energy: Mean square of the rows on each component.
    """

    counts: list[int]
    basis_bits: Float[np.ndarray, " counts"]
    bits: Float[np.ndarray, "rows counts"]
    squared_errors: Float[np.ndarray, "rows counts"]
    costs: Float[np.ndarray, "rows counts"]
    inside: Float[np.ndarray, "rows counts"]
    energy: Float[np.ndarray, " k"]

    @classmethod
    def of(cls, side: SideStatistics, lengths: np.ndarray) -> "_SideCosts":
        """Estimate the costs of rows of these lengths, in step sizes."""
        counts = component_counts(side.energies.shape[1])
        squares = lengths**2
        squared_importance = squares.astype(side.energies.dtype) @ side.energies
        importance = np.sqrt(squared_importance)
        # the step size of a row is the inverse of its importance (`quantise_basis`), so that its d numbers, of a unit
        # row, have this standard deviation in step sizes
        basis_bits, basis_errors = dead_zone.gaussian_cost(importance / side.dimension**0.5)
        # the quantisation error of a component is an error of everything that its coefficients represent
        noise = np.minimum(side.dimension * basis_errors / np.maximum(importance**2, 1e-300), 1.0)
        energy = squared_importance / len(squares)
        bits, errors = _coefficient_costs(squares * side.row_energies, energy, counts)
        is_leading = np.arange(len(noise))[:, None] < np.array(counts)
        inside = side.energies @ ((1 - noise)[:, None] * is_leading).astype(side.energies.dtype)
        residuals = squares[:, None] * np.maximum(1 - inside, 0.0)
        # a residual is modelled as d Gaussian numbers of equal variance
        residual_bits, residual_errors = dead_zone.gaussian_cost(np.sqrt(residuals / side.dimension))
        residual_bits, residual_errors = residual_bits * side.dimension, residual_errors * side.dimension
        # the encoder leaves residuals out that cost more than their squared error is worth
        pays = residual_bits + BITS_PER_SQUARED_ERROR * residual_errors < BITS_PER_SQUARED_ERROR * residuals
        bits = bits + np.where(pays, residual_bits, 0.0)
        errors = errors + np.where(pays, residual_errors, residuals)
        costs = bits + BITS_PER_SQUARED_ERROR * errors
        return cls(
            counts, side.dimension * _sums_of_leading(basis_bits[None], counts)[0], bits, errors, costs, inside, energy
        )


def _coefficient_costs(squares: np.ndarray, energy: np.ndarray, counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return bits and squared error of the coefficients of each row, (rows, counts).

    Each row is assumed to have the mean distribution of energy over the components. Rows of about the same norm then
    have the same cost, which is looked up once.

    Args:
        squares: Squared norms of the coefficients of each row, (rows,).
        energy: Mean squares of the coefficients over the rows, (k,).
        counts: Numbers of components.
    """
    if not len(energy):
        return np.zeros((len(squares), 1)), np.zeros((len(squares), 1))
    bits, errors, bin_of_row = _gaussian_costs(np.sqrt(squares / energy.sum()), np.sqrt(energy))
    return _sums_of_leading(bits, counts)[bin_of_row], _sums_of_leading(errors, counts)[bin_of_row]


def _gaussian_costs(norms: np.ndarray, spread: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return bits and squared errors, (bins, k), of Gaussian numbers whose rows have about the same norm.

    Args:
        norms: Factor of each row, (rows,).
        spread: Standard deviations of the numbers of a row, (k,), to be multiplied by its factor.

    Returns:
        Bits and squared errors, and the bin of each row.
    """
    bins, bin_of_row = np.unique(np.round(BINS * np.log2(np.maximum(norms, 1e-6))), return_inverse=True)
    bits, errors = dead_zone.gaussian_cost(2.0 ** (bins / BINS)[:, None] * spread[None])
    return bits, errors, bin_of_row


def _sums_of_leading(costs: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Sum costs per component, (…, k), over the leading components of each count, (…, counts)."""
    return np.concatenate([np.zeros((len(costs), 1)), costs.cumsum(1)], axis=1)[:, counts]


@dataclass(frozen=True, slots=True)
class _ModuleCosts:
    """Costs of both sides of a module at one step size.

    Methods take the indices, (down, up), of numbers of components in `counts`, and return squared errors in squared
    step sizes.

    Attributes:
        module: Statistics of the module.
        lengths: Singular values in step sizes.
        down: Costs of the down side.
        up: Costs of the up side.
    """

    module: ModuleStatistics
    lengths: Float[np.ndarray, " rows"]
    down: _SideCosts
    up: _SideCosts

    @classmethod
    def of(cls, module: ModuleStatistics, step_size: float) -> "_ModuleCosts":
        """Estimate the costs of all singular components."""
        lengths = module.lengths / step_size
        return cls(module, lengths, _SideCosts.of(module.down, lengths), _SideCosts.of(module.up, lengths))

    def best_counts(self) -> tuple[int, int]:
        """Return the best count of each side, without cores."""
        # a singular component that costs more than its squared error is worth is left out
        limit = BITS_PER_SQUARED_ERROR * self.lengths**2
        sides, best = (self.down, self.up), [0, 0]
        # the best count of one side depends little on the other's: not all pairs of counts are compared
        for turn in (0, 1, 0):
            opposite = sides[1 - turn].costs[:, [best[1 - turn]]]
            costs = np.minimum(sides[turn].costs + opposite + OVERHEAD, limit[:, None]).sum(0)
            best[turn] = int((costs + sides[turn].basis_bits).argmin())
        return best[0], best[1]

    def with_components(self, at: tuple[int, int]) -> RateEstimate:
        """Estimate the cost if all adapters are written as singular components."""
        down, up = at
        bits = self.down.bits[:, down] + self.up.bits[:, up] + OVERHEAD
        errors = self.down.squared_errors[:, down] + self.up.squared_errors[:, up]
        squares = self.lengths**2
        pays = bits + BITS_PER_SQUARED_ERROR * errors < BITS_PER_SQUARED_ERROR * squares
        return RateEstimate(
            (self.down.counts[down], self.up.counts[up]),
            float(self.down.basis_bits[down] + self.up.basis_bits[up]),
            self._by_adapter(np.where(pays, bits, 0.0)),
            self._by_adapter(np.where(pays, errors, squares)),
        )

    def with_cores(self, at: tuple[int, int]) -> RateEstimate:
        """Estimate the cost if each adapter for which that is better has a core between the bases."""
        components = self.with_components(at)
        squares = self.lengths**2
        # the square of a rank-1 term within both spans is the product of its shares on the two sides
        represented = self._by_adapter(squares * self.down.inside[:, at[0]] * self.up.inside[:, at[1]])
        # the numbers of a core are modelled as Gaussian, with variances in proportion to their components' energies
        shares = []
        for side, k in zip((self.down, self.up), components.k, strict=True):
            shares.append(side.energy[:k] / max(float(side.energy[:k].sum()), 1e-300))
        spread = np.sqrt(np.outer(*shares)).flatten()
        bits, errors, bin_of_row = _gaussian_costs(np.sqrt(represented), spread)
        bits = bits.sum(1)[bin_of_row] + OVERHEAD
        errors = errors.sum(1)[bin_of_row] + self._by_adapter(squares) - represented
        costs = bits + BITS_PER_SQUARED_ERROR * errors
        with_core = costs < components.bits + BITS_PER_SQUARED_ERROR * components.squared_errors
        return replace(
            components,
            bits=np.where(with_core, bits, components.bits),
            squared_errors=np.where(with_core, errors, components.squared_errors),
        )

    def _by_adapter(self, values: np.ndarray) -> np.ndarray:
        """Sum bits or squared errors of singular components, (n · r,), over each adapter: (n,)."""
        return np.bincount(self.module.owners, values, self.module.n)


@dataclass(frozen=True, slots=True)
class RatePlan:
    """Step sizes and numbers of components for an error.

    Attributes:
        step_sizes: Step size of each adapter, relative to its norm, (n,).
        k: Candidates for (k_down, k_up) of each module: those of the surveyed step size next to the adapters' mean, and
            of the next smaller and larger one.
        bits: Bits of the whole collection, estimated.
    """

    step_sizes: np.ndarray
    k: list[list[tuple[int, int]]]
    bits: float


class RateSurvey:
    """Estimates of all modules at a grid of step sizes, from which a plan for any error is interpolated.

    Each module is added once.

    Args:
        n: Number of adapters.
        step_sizes: Step sizes of the grid, relative to the norms of the adapters.
    """

    def __init__(self, n: int, step_sizes: Sequence[float]) -> None:
        self.step_sizes = np.array(sorted(step_sizes))
        self._bits, self._squared_errors = np.zeros((len(step_sizes), n)), np.zeros((len(step_sizes), n))
        self._basis_bits = np.zeros(len(step_sizes))
        self._k: list[list[tuple[int, int]]] = []
        self._members: list[list[int]] = []

    def add(self, estimates: Sequence[RateEstimate], members: Sequence[int]) -> None:
        """Add a module by its estimates, one for each step size; its adapters have the indices `members`."""
        for row, estimate in enumerate(estimates):
            self._bits[row, list(members)] += estimate.bits
            self._squared_errors[row, list(members)] += estimate.squared_errors
            self._basis_bits[row] += estimate.basis_bits
        self._k.append([estimate.k for estimate in estimates])
        self._members.append(list(members))

    def plan(self, error: float) -> RatePlan:
        """Choose step sizes and numbers of components for a delta error of every adapter."""
        logs = np.log2(self.step_sizes)
        # an error may fall as the step size grows, where the number of components changes; `np.interp` needs an order
        errors = np.maximum.accumulate(np.log2(np.maximum(self._squared_errors, 1e-300)), axis=0)
        # each adapter by its own curve; the curves are of squared errors, whose logarithm is 2 · log(error)
        chosen = np.array([np.interp(2 * np.log2(error), column, logs) for column in errors.T])
        bits = sum(float(np.interp(x, logs, column)) for x, column in zip(chosen, self._bits.T, strict=True))
        basis_bits = float(np.interp(float(chosen.mean()), logs, self._basis_bits))
        # all adapters of a module share its components: their number is that for the mean of their step sizes
        nearest = [int(np.abs(logs - chosen[members].mean()).argmin()) for members in self._members]
        k = [counts[max(index - 1, 0) : index + 2] for counts, index in zip(self._k, nearest, strict=True)]
        return RatePlan(2.0**chosen, k, bits + basis_bits)
