"""Measurements with the original adapters, module by module. One module of all adapters is in memory at a time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..codec.storage.table import storage_by_name
from ..core.adapter import LoRAFactors
from ..core.batch import ModuleBatch, delta_squares, in_row_spaces, pad_factors
from ..core.coefficients import Coefficients
from ..core.fit_options import FitOptions
from ..core.progress import Progress
from ..core.projection import widen_coefficients
from ..core.subspace import ModuleBases
from ..pack.pack import Pack
from ..pack.packed_adapter import PackedAdapter
from . import refits
from .analysis import losses, null, per_adapter
from .analysis.left_out import Kept
from .analysis.pairs import Pairs
from .chance import NullSums
from .measured import Measured, SampledMeasurements
from .module_sample import ModuleSample, ModuleSize, jackknife_groups
from .originals import Originals
from .refits import Members, RefitOptions, Side

NULL_WORK = 7.5e10
"""Maximum number of multiplications for fits of the null model."""
GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Numbers of components at which errors are measured, up to the largest number that the collection allows."""

CHUNK = 2**20
"""Number of elements of factors that are measured at a time; larger batches exceed the cache and are slower."""

_EIGEN_COST = 15.0
"""Multiplications of a symmetric eigenproblem of size n, divided by n³."""
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, slots=True)
class _Collection:
    """Inputs of the measurements of all modules.

    Attributes:
        pack: The pack.
        packed: Its adapters, by name.
        originals: The original adapters.
        options: Options with which the pack was fitted.
        weights: 1 / ‖D‖ of each original adapter; 0 if its update is zero.
    """

    pack: Pack
    packed: Mapping[str, PackedAdapter]
    originals: Originals
    options: FitOptions
    weights: list[float]

    @property
    def names(self) -> list[str]:
        return list(self.originals.adapters)


@dataclass(frozen=True, slots=True)
class _Module:
    """One module of all adapters.

    Attributes:
        name: Name of the module in the subspace.
        bases: Bases of the pack.
        batch: Factors of each original adapter.
        narrow: The same factors in coordinates of the span of all rows.
        squares: ‖D‖² of each adapter, (n,).
        squared_errors: ‖D − D̂‖² of each adapter in the pack, (n,).
    """

    name: str
    bases: ModuleBases
    batch: ModuleBatch
    narrow: ModuleBatch
    squares: Tensor
    squared_errors: Tensor


def measure(
    pack: Pack,
    packed: Mapping[str, PackedAdapter],
    originals: Originals,
    seed: int,
    sample: ModuleSample,
    progress: Progress,
) -> SampledMeasurements:
    """Measure everything that needs the original adapters.

    Args:
        pack: The pack.
        packed: Its adapters, by name.
        originals: The original adapters.
        seed: Seed of all random choices.
        sample: Modules to measure, and the number of adapters to leave out of the fit.
        progress: Callback with the arguments (stage, done, total).
    """
    totals = [
        math.fsum(scan.delta_squares[module] for module in packed[name].subspace_names)
        for name, scan in ((name, originals.scans[name]) for name in originals.adapters)
    ]
    weights = [total**-0.5 if total > 0 else 0.0 for total in totals]
    collection = _Collection(pack, packed, originals, options_of(pack), weights)
    group_of = dict.fromkeys(sample.modules, 0) if sample.is_whole else jackknife_groups(sample.modules)
    groups = [_empty(collection, sample, seed) for _ in range(1 + max(group_of.values(), default=0))]
    done = 0
    for index, (module, bases) in enumerate(pack.subspace.modules.items()):
        if module not in group_of:
            continue
        progress("measuring modules", done, len(sample.modules))
        # one generator per module, so that its figures do not depend on the other modules
        generator = torch.Generator().manual_seed(seed + 1 + index)
        _add_module(groups[group_of[module]], collection, module, bases, generator)
        done += 1
    progress("measuring modules", done, done)
    return SampledMeasurements.of(groups, sample, [math.sqrt(total) for total in totals])


def module_sizes(pack: Pack, packed: Mapping[str, PackedAdapter]) -> dict[str, ModuleSize]:
    """Return the size of each module of the subspace."""
    rows = _module_rows(pack, packed)
    return {name: ModuleSize(rows[name], bases.shape) for name, bases in pack.subspace.modules.items()}


def largest_k(pack: Pack) -> int:
    """Return the largest number of components of the pack's bases."""
    bases = (basis for module in pack.subspace.modules.values() for basis in (module.down, module.up))
    return max((basis.n_fitted for basis in bases), default=0)


def options_of(pack: Pack) -> FitOptions:
    """Return the options with which the pack was fitted."""
    return FitOptions(**{field.name: getattr(pack.fit_info, field.name) for field in fields(FitOptions)})


def _empty(collection: _Collection, sample: ModuleSample, seed: int) -> Measured:
    """Choose numbers of components and the adapters to leave out, and return sums of zero."""
    pack, names = collection.pack, collection.names
    fitted = [index for index, name in enumerate(names) if collection.packed[name].record.in_fit]
    rows = _trained_rows(collection, [names[index] for index in fitted])
    max_rank = max((min(n, *pack.subspace.modules[module].shape) for module, n in rows.items()), default=1)
    k_of_pack = largest_k(pack)
    grid = sorted(
        {k for k in GRID if k < max_rank} | {max_rank} | ({k_of_pack} if 0 < k_of_pack <= max_rank else set())
    )
    generator = torch.Generator().manual_seed(seed)
    # a single adapter cannot be left out
    count = min(sample.left_out, len(fitted)) if len(fitted) > 1 else 0
    chosen = sorted(torch.randperm(len(fitted), generator=generator)[:count].tolist())
    rows = {module: rows[module] for module in sample.modules}
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
    module = _Module(name, bases, batch, in_row_spaces(batch), squares, torch.cat(squared_errors))
    relative = torch.where(squares > 0, (module.squared_errors / squares.clamp_min(_TINY)).sqrt(), math.nan)
    measured.errors[name] = [None if math.isnan(error) else error for error in relative.tolist()]
    measured.pairs.add(module.narrow, (n_in, n_out))
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
        module.narrow.select(indices),
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
