"""The figures of a whole collection, gathered module by module: what is in memory is one module of all adapters."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from ..codec.storage.table import storage_by_name
from ..core import projection
from ..core.adapter import LoRAFactors
from ..core.batch import ModuleBatch, coefficients_as_batch, delta_squares, pad_factors
from ..core.coefficients import Coefficients
from ..core.fit_options import FitOptions
from ..core.projection import widen_coefficients
from ..core.subspace import ModuleBases
from ..fitting.fit import Progress
from ..pack.pack import Pack
from ..pack.packed_adapter import PackedAdapter
from . import refits
from .analysis import crowded, losses, null, per_adapter
from .analysis.pairs import Pairs, products
from .chance import NullSums
from .originals import Originals
from .refits import Asked, Members, Side

LEFT_OUT_WORK = 1.2e12
"""Work that is put into fits without an adapter, in multiplications: a quarter of a minute on one core."""
LEFT_OUT_LEAST = 8
"""Adapters that are left out at least, however much work each of them is."""
LEFT_OUT_ENOUGH = 32
"""And at most, unless more are asked for: the standard error of the mean is small by then."""
NULL_WORK = LEFT_OUT_WORK / 16
"""Likewise, work that is put into fits of the null model."""
MULTIPLICATIONS = 2.5e10
"""A second's, all in all."""
GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)

CHUNK = 2**20
"""Numbers of adapters that are looked at together: more would not stay in a cache."""


@dataclass(slots=True)
class Measured:
    """Sums over modules, one number an adapter, in the order of `names`; filled by `measure`.

    fitted: places in `names` of the adapters of the fit. chosen: places in `fitted` of those that were left out of it.
    grid: sizes of `by_k`, `random_by_k` and `left_out_by_k`. chance, chance_by_k: what is to be expected of those that
    were left out in as many random directions.
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
    down_lost: Tensor
    down_total: Tensor
    up_lost: Tensor
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
class Setting:
    """What all modules have in common."""

    pack: Pack
    packed: Mapping[str, PackedAdapter]
    originals: Originals
    options: FitOptions
    weights: list[float]
    seed: int


def measure(
    pack: Pack,
    packed: Mapping[str, PackedAdapter],
    originals: Originals,
    seed: int,
    sample: int | None,
    progress: Progress,
) -> Measured:
    """Everything that needs the originals. sample: adapters to leave out; by `LEFT_OUT_WORK` where it is None."""
    names = list(originals.adapters)
    fitted = [place for place, name in enumerate(names) if packed[name].record.in_fit]
    totals = [
        math.fsum(originals.scans[name].delta_squares[module] for module in packed[name].places) for name in names
    ]
    options = options_of(pack)
    setting = Setting(pack, packed, originals, options, [t**-0.5 if t > 0 else 0.0 for t in totals], seed)
    found = _empty(setting, names, fitted, sample)
    modules = list(pack.subspace.modules.items())
    for done, (module, bases) in enumerate(modules):
        progress("measuring modules", done, len(modules))
        _add(found, setting, module, bases, done)
    progress("measuring modules", len(modules), len(modules))
    return found


def options_of(pack: Pack) -> FitOptions:
    """How the pack was fitted."""
    return FitOptions(**{field.name: getattr(pack.fit_info, field.name) for field in fields(FitOptions)})


def _empty(setting: Setting, names: list[str], fitted: list[int], sample: int | None) -> Measured:
    pack = setting.pack
    rows = _rows(setting, [names[place] for place in fitted])
    most = max((min(n, *pack.subspace.modules[module].shape) for module, n in rows.items()), default=1)
    sizes = {basis.n_fitted for bases in pack.subspace.modules.values() for basis in (bases.down, bases.up)}
    grid = sorted({k for k in GRID if k < most} | {most} | {k for k in (max(sizes, default=0),) if 0 < k <= most})
    work = sum(_work(n, pack.subspace.modules[module].shape, max(sizes, default=0)) for module, n in rows.items())
    if sample is None:
        sample = min(max(LEFT_OUT_LEAST, int(LEFT_OUT_WORK / max(work, 1))), LEFT_OUT_ENOUGH)
    generator = torch.Generator().manual_seed(setting.seed)
    # a collection of one has no others
    count = min(sample, len(fitted)) if len(fitted) > 1 else 0
    chosen = sorted(torch.randperm(len(fitted), generator=generator)[:count].tolist())

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64)

    n, own, g = len(names), len(fitted), len(grid)
    draws = null.draws(sum(bool(n) for n in rows.values()), NULL_WORK / max(_null_work(rows, pack), 1))
    return Measured(
        names=names,
        fitted=fitted,
        chosen=chosen,
        grid=grid,
        total=zeros(n),
        random=zeros(n),
        down_lost=zeros(n),
        down_total=zeros(n),
        up_lost=zeros(n),
        up_total=zeros(n),
        null=NullSums.of(draws, own, count, g),
        left_out_kept=zeros(count),
        left_out_by_k=zeros(count, g),
        chance=zeros(count),
        chance_by_k=zeros(count, g),
        by_k=zeros(own, g),
        random_by_k=zeros(own, g),
        rounded={8: zeros(n), 4: zeros(n)},
        pairs=Pairs.of(n),
    )


def _rows(setting: Setting, names: Sequence[str]) -> dict[str, int]:
    """Rows of each module's stack, by its name in the subspace."""
    rows = dict.fromkeys(setting.pack.subspace.modules, 0)
    for name in names:
        for module, place in setting.packed[name].places.items():
            if setting.originals.scans[name].delta_squares[module] > 0:
                rows[place] += setting.originals.adapters[name].specs[module].rank
    return rows


def _work(rows: int, shape: tuple[int, int], k: int) -> float:
    """Multiplications, roughly, of leaving one adapter out of one module: an eigenproblem a side, or three."""
    if crowded.is_crowded(rows):
        return 2 * 15.0 * min(rows, *shape, crowded.most(max(refits.LEFT_OUT_MOST, k))) ** 3
    return 6 * 15.0 * min(rows, *shape) ** 3


def _null_work(rows: Mapping[str, int], pack: Pack) -> float:
    """The same of a fit of all modules."""
    return sum(6 * 15.0 * min(n, *pack.subspace.modules[module].shape) ** 3 for module, n in rows.items())


def _module_rows(pack: Pack, packed: Mapping[str, PackedAdapter]) -> dict[str, int]:
    """The ranks of all adapters of each module, summed."""
    rows = dict.fromkeys(pack.subspace.modules, 0)
    for one in packed.values():
        for own, coefficients in one.coefficients.items():
            rows[one.places[own]] += coefficients.rank
    return rows


def largest(pack: Pack, packed: Mapping[str, PackedAdapter]) -> int:
    """The most numbers that the factors of all adapters have in one module."""
    rows = _module_rows(pack, packed)
    return max((rows[module] * sum(bases.shape) for module, bases in pack.subspace.modules.items()), default=0)


def seconds(pack: Pack, packed: Mapping[str, PackedAdapter]) -> float:
    """How long `measure` will take on one core of a laptop; roughly."""
    rows = _module_rows(pack, packed)
    work = 0.0
    for module, bases in pack.subspace.modules.items():
        n = rows[module]
        for d in bases.shape:
            work += n**2 * d / 2 + 2 * n * d**2 + 60.0 * min(n, d) ** 3
    return work / MULTIPLICATIONS


def _add(found: Measured, setting: Setting, module: str, bases: ModuleBases, number: int) -> None:
    factors = [_factors(setting, name, module) for name in found.names]
    coefficients = [coefficients_at(setting.packed[name], module, bases) for name in found.names]
    n_out, n_in = bases.shape
    one = pad_factors(factors, n_in, n_out)
    square = delta_squares(one)
    found.total += square
    lost, singular, factor_lost = [], [], []
    step = max(1, CHUNK // max(1, one.down.shape[1] * (n_in + n_out)))
    for start in range(0, len(one), step):
        some = slice(start, start + step)
        part = one.select(range(len(one))[some])
        stored = losses.stored(part, factors[some], coefficients[some], bases)
        found.down_lost[some] += stored.down
        found.down_total[some] += stored.down_total
        found.up_lost[some] += stored.up
        found.up_total[some] += stored.up_total
        balanced = per_adapter.balanced(part)
        for bits, sums in found.rounded.items():
            sums[some] += losses.rounded_squares(balanced, bits)
        lost.append(stored.delta)
        tiny = torch.finfo(torch.float64).tiny
        shares = stored.down / stored.down_total.clamp_min(tiny), stored.up / stored.up_total.clamp_min(tiny)
        factor_lost.append(torch.stack(shares, dim=1))
        singular.append(losses.singular_squares(part))
    delta = torch.cat(lost)
    found.singular.append((n_in + n_out, torch.cat(singular)))
    in_fit = [place for place in found.fitted if factors[place] is not None]
    if in_fit and storage_by_name(setting.pack.coefficient_storage).keeps_factors:
        down, up = torch.cat(factor_lost)[in_fit].mean(0).sqrt().tolist()
        found.factor_errors[module] = (down, up)
    relative = torch.where(square > 0, (delta / square.clamp_min(tiny)).sqrt(), math.nan)
    found.errors[module] = [None if math.isnan(value) else value for value in relative.tolist()]
    found.pairs.add(one)
    generator = torch.Generator().manual_seed(setting.seed + 1 + number)
    random = (losses.random_rows(side.n_fitted, side.dimension, generator) for side in (bases.down, bases.up))
    found.random += losses.kept(one, *random)
    _add_fit(found, setting, module, bases, one, factors, square, delta, generator)


def _add_fit(
    found: Measured,
    setting: Setting,
    module: str,
    bases: ModuleBases,
    one: ModuleBatch,
    factors: Sequence[LoRAFactors | None],
    square: Tensor,
    lost: Tensor,
    generator: torch.Generator,
) -> None:
    """What is about the adapters of the fit alone. square, lost: ‖D‖² of all adapters, and what is lost of it."""
    # places in `fitted` of the adapters that have trained the module, and in `names`
    members = [place for place, at in enumerate(found.fitted) if square[at] > 0]
    there = [found.fitted[place] for place in members]
    k = (bases.down.n_fitted, bases.up.n_fitted)
    # of an update in two bases, one of which has no row, nothing is left
    k = k if all(k) else (0, 0)
    if not members:
        nothing = Side()
        found.sides[module] = (nothing, nothing)
        return
    weights = torch.tensor([setting.weights[at] for at in there], dtype=torch.float64)
    shares = weights.square() * lost[there], weights.square() * square[there]
    found.weighted[module] = float((shares[0].sum() / shares[1].sum()).sqrt())
    rank = {place: row for row, place in enumerate(members)}
    asked = [place for place in found.chosen if place in rank]
    trained = Members([f for f in (factors[at] for at in there) if f is not None], one.select(there), weights)
    refit = refits.of(
        trained,
        Asked(
            setting.options,
            k,
            # else an adapter's bound or budget would have to be met anew without it
            fixed=(setting.options.n_components, setting.options.energy) == (None, None) or k == (0, 0),
            grid=found.grid,
            chosen=[rank[place] for place in asked],
            draws=found.null.draws,
        ),
        generator,
    )
    found.by_k[members] += refit.by_k
    found.sides[module] = refit.sides
    # of independent random directions, so many of so many
    sides = bases.down, bases.up
    chance = [math.prod(min(k, side.dimension) / side.dimension for side in sides) for k in found.grid]
    found.random_by_k[members] += square[there][:, None] * torch.tensor(chance, dtype=torch.float64)
    rows = [found.chosen.index(place) for place in asked]
    kept, dimensions = refit.left_out, (bases.down.dimension, bases.up.dimension)
    found.left_out_kept[rows] += kept.fitted
    found.left_out_by_k[rows] += kept.by_k
    asked_squares = square[[found.fitted[place] for place in asked]]
    found.chance[rows] += null.expected(asked_squares, kept.sizes, dimensions)
    for column, k_column in enumerate(found.grid):
        sizes = [(min(k_column, down), min(k_column, up)) for down, up in kept.most]
        found.chance_by_k[rows, column] += null.expected(asked_squares, sizes, dimensions)
    found.null.add(refit.null, members, rows, generator)
    found.exact &= not trained.crowded


def _factors(setting: Setting, name: str, module: str) -> LoRAFactors | None:
    own = own_name(setting.packed[name], module)
    return setting.originals.adapters[name].modules[own] if own is not None else None


def own_name(packed: PackedAdapter, module: str) -> str | None:
    """What an adapter calls a module of the subspace; None if it has none there."""
    if packed.places.get(module) == module:
        return module
    return next((own for own, place in packed.places.items() if place == module), None)


def coefficients_at(packed: PackedAdapter, module: str, bases: ModuleBases) -> Coefficients | None:
    """An adapter's coefficients in a module of the subspace, as wide as its bases are now."""
    own = own_name(packed, module)
    return widen_coefficients(packed.coefficients[own], bases) if own is not None else None


def as_packed(pack: Pack, packed: Sequence[PackedAdapter], progress: Progress) -> Pairs:
    """All pairs of adapters as they come back, from their coefficients alone where there is no rest."""
    found = Pairs.of(len(packed))
    for one, dimensions in _coefficients(pack, packed, progress):
        found.add(one, dimensions)
    return found


def products_as_packed(pack: Pack, packed: Sequence[PackedAdapter], progress: Progress) -> Tensor:
    """Inner products of their updates alone, (n, n)."""
    found = torch.zeros(len(packed), len(packed), dtype=torch.float64)
    for one, _ in _coefficients(pack, packed, progress):
        found += products(one)
    return found


def _coefficients(
    pack: Pack, packed: Sequence[PackedAdapter], progress: Progress
) -> Iterator[tuple[ModuleBatch, tuple[int, int]]]:
    """Of every module, the adapters as they come back, and the dimensions (down, up) of the spaces they may lie in."""
    for done, (module, bases) in enumerate(pack.subspace.modules.items()):
        progress("comparing coefficients", done, len(pack.info.modules))
        found = [coefficients_at(one, module, bases) for one in packed]
        paired = pack.cores == "diagonal"
        if paired or bases.down.payload is not None or any(one is not None and one.has_residual for one in found):
            # rows that go in pairs, or were rounded to integers, are not orthonormal, and rests are not in a basis
            n_out, n_in = bases.shape
            has_residual = any(one is not None and one.has_residual for one in found)
            dimensions = (n_in, n_out) if has_residual else (bases.down.k, bases.up.k)
            yield (
                pad_factors(
                    [None if one is None else projection.reconstruct(one, bases) for one in found], n_in, n_out
                ),
                dimensions,
            )
        else:
            yield coefficients_as_batch(found, bases.down.k, bases.up.k), (bases.down.k, bases.up.k)
    progress("comparing coefficients", len(pack.info.modules), len(pack.info.modules))
