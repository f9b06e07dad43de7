"""Measurements with the original adapters, module by module. One module of all adapters is in memory at a time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from ..codec.storage.table import storage_by_name
from ..core.adapter import LoRAFactors
from ..core.batch import ModuleBatch, delta_squares, pad_factors
from ..core.coefficients import Coefficients
from ..core.fit_options import FitOptions
from ..core.progress import Progress
from ..core.projection import widen_coefficients
from ..core.subspace import ModuleBases
from ..pack.pack import Pack
from ..pack.packed_adapter import PackedAdapter
from . import refits
from .analysis import crowded, losses, null, per_adapter
from .analysis.left_out import Kept
from .analysis.pairs import Pairs
from .chance import NullSums
from .originals import Originals
from .refits import Members, RefitOptions, Side

LEFT_OUT_WORK = 1.2e12
"""Maximum number of multiplications for fits without an adapter: a quarter of a minute on one core."""
LEFT_OUT_MIN = 8
"""Minimum number of adapters that are left out, however long it takes."""
LEFT_OUT_MAX = 32
"""Maximum number of adapters that are left out by default: the standard error of the mean is small by then."""
NULL_WORK = LEFT_OUT_WORK / 16
"""Maximum number of multiplications for fits of the null model."""
MULTIPLICATIONS_PER_SECOND = 1.3e10
"""On one core of a server, for the mixture of products and decompositions that a report takes."""
GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Numbers of components at which errors are measured, up to the largest number that the collection allows."""

CHUNK = 2**20
"""Number of elements of factors that are measured at a time; larger batches exceed the cache and are slower."""

_EIGEN_COST = 15.0
"""Multiplications of a symmetric eigenproblem of size n, divided by n³."""
_TINY = torch.finfo(torch.float64).tiny


@dataclass(slots=True)
class Measured:
    """Sums over modules of squared norms and squared errors. `measure` adds each module.

    There are n trained adapters, f adapters in the fit, s adapters that are left out, and g numbers of components.

    Attributes:
        names: Names of the n adapters.
        fitted: Indices in `names` of the adapters of the fit.
        chosen: Indices in `fitted` of the adapters that are left out.
        grid: Numbers of components, ascending.
        total: ‖D‖² of each adapter, (n,).
        random: Squared norm that random bases of the pack's size keep, (n,).
        null: Sums of the null model.
        left_out_kept: Squared norm that the bases of the other adapters keep, (s,).
        left_out_by_k: The same for each number of components, (s, g).
        chance: Expected squared norm that equally many random components keep, (s,).
        chance_by_k: The same for each number of components, (s, g).
        by_k: Squared norm that a fit with each number of components keeps, (f, g).
        random_by_k: Expected squared norm that random components keep, (f, g).
        down_squared_error, up_squared_error: Squared errors of A and of B, (n,).
        down_total, up_total: Squared norms of A and of B, (n,).
        rounded: Squared errors of the factors rounded to a number of bits, (n,), by bits.
        pairs: Inner products of all pairs of adapters.
        errors: Delta error of each adapter, by module.
        weighted: Weighted delta error of the fit, by module.
        factor_errors: Root mean square errors of A and of B, by module.
        singular: For each module, the numbers of one component and the squared singular values, (n, r).
        sides: Measurements of both sides, by module.
        exact: True if the fits without an adapter include sweeps in every module.
    """

    names: list[str]
    fitted: list[int]
    chosen: list[int]
    grid: list[int]
    total: Tensor
    random: Tensor
    null: NullSums
    left_out_kept: Tensor
    left_out_by_k: Tensor
    chance: Tensor
    chance_by_k: Tensor
    by_k: Tensor
    random_by_k: Tensor
    down_squared_error: Tensor
    down_total: Tensor
    up_squared_error: Tensor
    up_total: Tensor
    rounded: dict[int, Tensor]
    pairs: Pairs
    errors: dict[str, list[float | None]] = field(default_factory=dict)
    weighted: dict[str, float] = field(default_factory=dict)
    factor_errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    singular: list[tuple[int, Tensor]] = field(default_factory=list)
    sides: dict[str, tuple[Side, Side]] = field(default_factory=dict)
    exact: bool = True


@dataclass(frozen=True, slots=True)
class _Collection:
    """Inputs of the measurements of all modules.

    Attributes:
        pack: The pack.
        packed: Its adapters, by name.
        originals: The original adapters.
        options: Options with which the pack was fitted.
        weights: 1 / ‖D‖ of each original adapter; 0 if its update is zero.
        seed: Seed of all random choices.
    """

    pack: Pack
    packed: Mapping[str, PackedAdapter]
    originals: Originals
    options: FitOptions
    weights: list[float]
    seed: int

    @property
    def names(self) -> list[str]:
        return list(self.originals.adapters)


@dataclass(frozen=True, slots=True)
class _Module:
    """One module of all adapters.

    Attributes:
        name: Name of the module in the subspace.
        bases: Bases of the pack.
        factors: Factors of each original adapter; None if it does not have the module.
        batch: The same factors, padded.
        squares: ‖D‖² of each adapter, (n,).
        squared_errors: ‖D − D̂‖² of each adapter in the pack, (n,).
    """

    name: str
    bases: ModuleBases
    factors: Sequence[LoRAFactors | None]
    batch: ModuleBatch
    squares: Tensor
    squared_errors: Tensor


def measure(
    pack: Pack,
    packed: Mapping[str, PackedAdapter],
    originals: Originals,
    seed: int,
    sample: int | None,
    progress: Progress,
) -> Measured:
    """Measure everything that needs the original adapters.

    Args:
        pack: The pack.
        packed: Its adapters, by name.
        originals: The original adapters.
        seed: Seed of all random choices.
        sample: Number of adapters to leave out of the fit; None chooses it by `LEFT_OUT_WORK`.
        progress: Callback with the arguments (stage, done, total).
    """
    totals = [
        math.fsum(scan.delta_squares[module] for module in packed[name].subspace_names)
        for name, scan in ((name, originals.scans[name]) for name in originals.adapters)
    ]
    weights = [total**-0.5 if total > 0 else 0.0 for total in totals]
    collection = _Collection(pack, packed, originals, options_of(pack), weights, seed)
    measured = _empty(collection, sample)
    modules = list(pack.subspace.modules.items())
    for done, (module, bases) in enumerate(modules):
        progress("measuring modules", done, len(modules))
        # one generator per module, so that its figures do not depend on the other modules
        _add_module(measured, collection, module, bases, torch.Generator().manual_seed(seed + 1 + done))
    progress("measuring modules", len(modules), len(modules))
    return measured


def options_of(pack: Pack) -> FitOptions:
    """Return the options with which the pack was fitted."""
    return FitOptions(**{field.name: getattr(pack.fit_info, field.name) for field in fields(FitOptions)})


def _empty(collection: _Collection, sample: int | None) -> Measured:
    """Choose sizes and the adapters to leave out, and return sums of zero."""
    pack, names = collection.pack, collection.names
    fitted = [index for index, name in enumerate(names) if collection.packed[name].record.in_fit]
    rows = _trained_rows(collection, [names[index] for index in fitted])
    max_rank = max((min(n, *pack.subspace.modules[module].shape) for module, n in rows.items()), default=1)
    largest_k = max(
        (basis.n_fitted for bases in pack.subspace.modules.values() for basis in (bases.down, bases.up)), default=0
    )
    grid = sorted(
        {k for k in GRID if k < max_rank} | {max_rank} | ({largest_k} if 0 < largest_k <= max_rank else set())
    )
    if sample is None:
        work = sum(_left_out_work(n, pack.subspace.modules[module].shape, largest_k) for module, n in rows.items())
        sample = min(max(LEFT_OUT_MIN, int(LEFT_OUT_WORK / max(work, 1))), LEFT_OUT_MAX)
    generator = torch.Generator().manual_seed(collection.seed)
    # a single adapter cannot be left out
    count = min(sample, len(fitted)) if len(fitted) > 1 else 0
    chosen = sorted(torch.randperm(len(fitted), generator=generator)[:count].tolist())
    draws = null.draws(sum(bool(n) for n in rows.values()), NULL_WORK / max(_fit_work(rows, pack), 1))

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64)

    n, n_fitted, n_sizes = len(names), len(fitted), len(grid)
    return Measured(
        names=names,
        fitted=fitted,
        chosen=chosen,
        grid=grid,
        total=zeros(n),
        random=zeros(n),
        down_squared_error=zeros(n),
        down_total=zeros(n),
        up_squared_error=zeros(n),
        up_total=zeros(n),
        null=NullSums.of(draws, n_fitted, count, n_sizes),
        left_out_kept=zeros(count),
        left_out_by_k=zeros(count, n_sizes),
        chance=zeros(count),
        chance_by_k=zeros(count, n_sizes),
        by_k=zeros(n_fitted, n_sizes),
        random_by_k=zeros(n_fitted, n_sizes),
        rounded={8: zeros(n), 4: zeros(n)},
        pairs=Pairs.of(n),
    )


def _trained_rows(collection: _Collection, names: Sequence[str]) -> dict[str, int]:
    """Return the summed ranks of the adapters that trained each module, by module of the subspace."""
    rows = dict.fromkeys(collection.pack.subspace.modules, 0)
    for name in names:
        for own, module in collection.packed[name].subspace_names.items():
            if collection.originals.scans[name].delta_squares[own] > 0:
                rows[module] += collection.originals.adapters[name].specs[own].rank
    return rows


def _left_out_work(rows: int, shape: tuple[int, int], k: int) -> float:
    """Estimate the multiplications of leaving one adapter out of a module."""
    if crowded.is_crowded(rows):
        # one eigenproblem per side
        return (
            2 * _EIGEN_COST * min(rows, *shape, crowded.required_components(max(refits.MAX_CROWDED_COMPONENTS, k))) ** 3
        )
    # bases without sweeps, and two sweeps
    return 6 * _EIGEN_COST * min(rows, *shape) ** 3


def _fit_work(rows: Mapping[str, int], pack: Pack) -> float:
    """Estimate the multiplications of a fit of all modules."""
    return sum(6 * _EIGEN_COST * min(n, *pack.subspace.modules[module].shape) ** 3 for module, n in rows.items())


def _module_rows(pack: Pack, packed: Mapping[str, PackedAdapter]) -> dict[str, int]:
    """Return the summed ranks of all adapters, by module of the subspace."""
    rows = dict.fromkeys(pack.subspace.modules, 0)
    for adapter in packed.values():
        for own, coefficients in adapter.coefficients.items():
            rows[adapter.subspace_names[own]] += coefficients.rank
    return rows


def largest(pack: Pack, packed: Mapping[str, PackedAdapter]) -> int:
    """Return the largest number of elements that the factors of all adapters have in one module."""
    rows = _module_rows(pack, packed)
    return max((rows[module] * sum(bases.shape) for module, bases in pack.subspace.modules.items()), default=0)


def seconds(pack: Pack) -> float:
    """Estimate the seconds that `measure` takes on one core, from the pack's records alone."""
    # as if every adapter had all modules: only reading all adapters would tell
    n = sum(max(record.ranks, default=0) for record in pack.records.values() if not record.untrained)
    work = 0.0
    for module in pack.info.modules:
        for d in pack.subspace.modules[module].shape:
            work += n**2 * d / 2 + 2 * n * d**2 + 60.0 * min(n, d) ** 3
    return work / MULTIPLICATIONS_PER_SECOND


def _add_module(
    measured: Measured, collection: _Collection, name: str, bases: ModuleBases, generator: torch.Generator
) -> None:
    factors = [_factors(collection, adapter, name) for adapter in measured.names]
    coefficients = [coefficients_at(collection.packed[adapter], name, bases) for adapter in measured.names]
    n_out, n_in = bases.shape
    batch = pad_factors(factors, n_in, n_out)
    squares = delta_squares(batch)
    squared_errors, singular, factor_shares = [], [], []
    step = max(1, CHUNK // max(1, batch.down.shape[1] * (n_in + n_out)))
    for start in range(0, len(batch), step):
        chunk = slice(start, start + step)
        part = batch.select(range(len(batch))[chunk])
        stored = losses.stored(part, factors[chunk], coefficients[chunk], bases)
        measured.down_squared_error[chunk] += stored.down
        measured.down_total[chunk] += stored.down_total
        measured.up_squared_error[chunk] += stored.up
        measured.up_total[chunk] += stored.up_total
        balanced = per_adapter.balanced(part)
        for bits, sums in measured.rounded.items():
            sums[chunk] += losses.rounded_squares(balanced, bits)
        squared_errors.append(stored.delta)
        shares = stored.down / stored.down_total.clamp_min(_TINY), stored.up / stored.up_total.clamp_min(_TINY)
        factor_shares.append(torch.stack(shares, dim=1))
        singular.append(losses.singular_squares(part))
    measured.total += squares
    measured.singular.append((n_in + n_out, torch.cat(singular)))
    in_fit = [index for index in measured.fitted if factors[index] is not None]
    if in_fit and storage_by_name(collection.pack.coefficient_storage).keeps_factors:
        down, up = torch.cat(factor_shares)[in_fit].mean(0).sqrt().tolist()
        measured.factor_errors[name] = (down, up)
    module = _Module(name, bases, factors, batch, squares, torch.cat(squared_errors))
    relative = torch.where(squares > 0, (module.squared_errors / squares.clamp_min(_TINY)).sqrt(), math.nan)
    measured.errors[name] = [None if math.isnan(error) else error for error in relative.tolist()]
    measured.pairs.add(batch)
    random = (losses.random_rows(side.n_fitted, side.dimension, generator) for side in (bases.down, bases.up))
    measured.random += losses.kept(batch, *random)
    _add_fit(measured, collection, module, generator)


def _add_fit(measured: Measured, collection: _Collection, module: _Module, generator: torch.Generator) -> None:
    """Refit one module to the adapters that trained it: other sizes, fits without an adapter, and the null model."""
    # members: indices in `fitted`; indices: the same adapters in `names`
    members = [member for member, index in enumerate(measured.fitted) if module.squares[index] > 0]
    if not members:
        measured.sides[module.name] = (Side(), Side())
        return
    indices = [measured.fitted[member] for member in members]
    weights = torch.tensor([collection.weights[index] for index in indices], dtype=torch.float64)
    squared_errors, total = (weights.square() * squares[indices] for squares in (module.squared_errors, module.squares))
    measured.weighted[module.name] = float((squared_errors.sum() / total.sum()).sqrt())
    row_of_member = {member: row for row, member in enumerate(members)}
    chosen = [member for member in measured.chosen if member in row_of_member]
    trained = Members(module.batch.select(indices), weights)
    k = (module.bases.down.n_fitted, module.bases.up.n_fitted)
    # if one basis has no component, the reconstruction is zero
    k = k if all(k) else (0, 0)
    options = collection.options
    refit = refits.refit_module(
        trained,
        RefitOptions(
            options,
            k,
            # for an error bound or a size, a fit without the adapter would choose other numbers of components
            fixed=(options.n_components, options.energy) == (None, None) or k == (0, 0),
            grid=measured.grid,
            chosen=[row_of_member[member] for member in chosen],
            draws=measured.null.draws,
        ),
        generator,
    )
    measured.by_k[members] += refit.by_k
    measured.sides[module.name] = refit.sides
    # expected share of the squared norm in k random components of each side
    shares = [math.prod(min(k, dimension) / dimension for dimension in module.bases.shape) for k in measured.grid]
    measured.random_by_k[members] += module.squares[indices][:, None] * torch.tensor(shares, dtype=torch.float64)
    rows = [measured.chosen.index(member) for member in chosen]
    _add_left_out(measured, refit.left_out, rows, module)
    measured.null.add(refit.null, members, rows, generator)
    measured.exact &= not trained.crowded


def _add_left_out(measured: Measured, kept: Kept, rows: Sequence[int], module: _Module) -> None:
    """Add squared norms kept of adapters left out, whose indices in `measured.chosen` are `rows`."""
    squares = module.squares[[measured.fitted[measured.chosen[row]] for row in rows]]
    dimensions = module.bases.down.dimension, module.bases.up.dimension
    measured.left_out_kept[rows] += kept.fitted
    measured.left_out_by_k[rows] += kept.by_k
    measured.chance[rows] += null.expected(squares, kept.sizes, dimensions)
    for column, k in enumerate(measured.grid):
        sizes = [(min(k, down), min(k, up)) for down, up in kept.max_components]
        measured.chance_by_k[rows, column] += null.expected(squares, sizes, dimensions)


def _factors(collection: _Collection, adapter: str, module: str) -> LoRAFactors | None:
    own = own_name(collection.packed[adapter], module)
    return collection.originals.adapters[adapter].modules[own] if own is not None else None


def own_name(packed: PackedAdapter, module: str) -> str | None:
    """Return the adapter's own name for a module of the subspace; None if it does not have the module."""
    if packed.subspace_names.get(module) == module:
        return module
    return next((own for own, in_subspace in packed.subspace_names.items() if in_subspace == module), None)


def coefficients_at(packed: PackedAdapter, module: str, bases: ModuleBases) -> Coefficients | None:
    """Return an adapter's coefficients in a module of the subspace, padded to the current size of its bases."""
    own = own_name(packed, module)
    return widen_coefficients(packed.coefficients[own], bases) if own is not None else None
