"""The figures of a whole collection, gathered module by module: what is in memory is one module of all adapters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import subspace as spaces
from ..adapter import LoRAFactors
from ..analysis import losses, spectra
from ..analysis.left_out import is_exact, left_out
from ..analysis.pairs import Pairs
from ..analysis.stack import Stack, squares, stack, stack_coefficients
from ..basis import chooser
from ..fitting import Progress
from ..pack import Pack
from ..packed import PackedAdapter
from ..subspace import Coefficients, FitOptions, ModuleBases, ModuleStack
from .data import SPECTRUM
from .originals import Originals

LEFT_OUT_WORK = 3e11
"""Work that is put into fits without an adapter, in multiplications: seconds on one core."""
LEFT_OUT_LEAST = 8
"""Adapters that are left out at least, however much work each of them is."""
GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True, slots=True)
class Side:
    """What was measured of one side of one module; see `SideFigures`."""

    null: list[float]
    angles: list[float]
    halves_overlap: float | None


@dataclass(slots=True)
class Measured:
    """Sums over modules, one number an adapter, in the order of `names`; filled by `measure`.

    fitted: places in `names` of the adapters of the fit. chosen: places in `fitted` of those that were left out of it.
    grid: sizes of `by_k`, `random_by_k` and `left_out_by_k`.
    """

    names: list[str]
    fitted: list[int]
    chosen: list[int]
    grid: list[int]
    total: Tensor
    lost: Tensor
    random: Tensor
    null_lost: Tensor
    left_out_kept: Tensor
    left_out_by_k: Tensor
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
    fit = pack.fit_info
    return FitOptions(fit.n_components, fit.energy, fit.weighting, fit.sweeps, fit.max_error)


def _empty(setting: Setting, names: list[str], fitted: list[int], sample: int | None) -> Measured:
    pack = setting.pack
    rows = _rows(setting, [names[place] for place in fitted])
    most = max((min(n, *pack.subspace.modules[module].shape) for module, n in rows.items()), default=1)
    sizes = {basis.k - basis.n_extra for bases in pack.subspace.modules.values() for basis in (bases.down, bases.up)}
    grid = sorted({k for k in GRID if k < most} | {most} | {k for k in (max(sizes, default=0),) if 0 < k <= most})
    if sample is None:
        work = sum(_work(n, pack.subspace.modules[module].shape) for module, n in rows.items())
        sample = max(LEFT_OUT_LEAST, int(LEFT_OUT_WORK / max(work, 1)))
    generator = torch.Generator().manual_seed(setting.seed)
    # a collection of one has no others
    count = min(sample, len(fitted)) if len(fitted) > 1 else 0
    chosen = sorted(torch.randperm(len(fitted), generator=generator)[:count].tolist())

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64)

    n = len(names)
    return Measured(
        names=names,
        fitted=fitted,
        chosen=chosen,
        grid=grid,
        **{name: zeros(n) for name in ("total", "lost", "random", "down_lost", "down_total", "up_lost", "up_total")},
        null_lost=zeros(len(fitted)),
        left_out_kept=zeros(count),
        left_out_by_k=zeros(count, len(grid)),
        by_k=zeros(len(fitted), len(grid)),
        random_by_k=zeros(len(fitted), len(grid)),
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


def _work(rows: int, shape: tuple[int, int]) -> float:
    """Multiplications of leaving one adapter out of one module: six eigenproblems, or four where rows are many."""
    if is_exact(rows, shape):
        return 6 * 15.0 * rows**3
    return 2 * 15.0 * sum(d**3 for d in shape)


def _add(found: Measured, setting: Setting, module: str, bases: ModuleBases, number: int) -> None:
    factors = [_factors(setting, name, module) for name in found.names]
    coefficients = [coefficients_at(setting.packed[name], module) for name in found.names]
    n_out, n_in = bases.shape
    one = stack(factors, n_in, n_out)
    square = squares(one)
    found.total += square
    stored = losses.stored(one, factors, coefficients, bases)
    found.lost += stored.delta
    found.down_lost += stored.down
    found.down_total += stored.down_total
    found.up_lost += stored.up
    found.up_total += stored.up_total
    relative = torch.where(
        square > 0, (stored.delta / square.clamp_min(torch.finfo(square.dtype).tiny)).sqrt(), math.nan
    )
    found.errors[module] = [None if math.isnan(value) else value for value in relative.tolist()]
    for bits, lost in found.rounded.items():
        lost += losses.rounded_squares(one, bits)
    found.singular.append((n_in + n_out, losses.singular_squares(one)))
    found.pairs.add(one)
    generator = torch.Generator().manual_seed(setting.seed + 1 + number)
    most = max(found.grid[-1], bases.down.k, bases.up.k)
    random = [
        losses.random_rows(min(most, side.dimension), side.dimension, generator) for side in (bases.down, bases.up)
    ]
    found.random += losses.kept(one, random[0][: bases.down.k], random[1][: bases.up.k])
    _add_fit(found, setting, module, bases, one.of(found.fitted), factors, random, generator)


def _add_fit(
    found: Measured,
    setting: Setting,
    module: str,
    bases: ModuleBases,
    one: Stack,
    factors: Sequence[LoRAFactors | None],
    random: Sequence[Tensor],
    generator: torch.Generator,
) -> None:
    """The part that is about the adapters of the fit: its spectrum, null, halves, other sizes, and adapters left out."""
    square = squares(one)
    weights = torch.tensor([setting.weights[place] for place in found.fitted], dtype=torch.float64)
    # places in `fitted` of the adapters that have trained the module
    members = [place for place, value in enumerate(square.tolist()) if value > 0]
    k = (bases.down.k - bases.down.n_extra, bases.up.k - bases.up.n_extra)
    if not members:
        found.sides[module] = (Side([], [], None), Side([], [], None))
        return
    lost = torch.tensor([found.errors[module][place] or 0.0 for place in found.fitted]).double().square() * square
    shares = weights.square() * lost, weights.square() * square
    found.weighted[module] = float((shares[0].sum() / shares[1].sum()).sqrt())
    trained = [factors[found.fitted[place]] for place in members]
    weighted = ([f for f in trained if f is not None], [float(weights[place]) for place in members])
    few = one.of(members)
    everyone = ModuleStack(*weighted, setting.options)
    first = everyone.first(chooser(found.grid[-1], None))
    found.by_k[members] += losses.kept_by_k(few, first[0].components(), first[1].components(), found.grid)
    found.random_by_k[members] += losses.kept_by_k(few, random[0], random[1], found.grid)
    null = spectra.gaussian_like(weighted[0], generator)
    null_stack = ModuleStack(null, weighted[1], setting.options)
    null_first = null_stack.first(chooser(max(*k, 1), None))
    null_bases = null_stack.fit(null_first, k)
    null_few = stack(list(null), bases.down.dimension, bases.up.dimension)
    null_kept = losses.kept(null_few, null_bases.down.components, null_bases.up.components)
    found.null_lost[members] += (squares(null_few) - null_kept).clamp_min(0)
    order = torch.randperm(len(members), generator=generator).tolist()
    half = len(order) // 2
    angles = spectra.halves(weighted, sorted(order[:half]), sorted(order[half:]), k)
    down, up = (
        Side(
            null=spectra.shares(leading.singular_values, SPECTRUM),
            angles=spectra.degrees(cosines),
            halves_overlap=float(cosines.square().mean()) if len(cosines) else None,
        )
        for leading, cosines in zip(null_first, angles, strict=True)
    )
    found.sides[module] = (down, up)
    asked = [place for place in found.chosen if place in set(members)]
    rows = [found.chosen.index(place) for place in asked]
    if not asked:
        return
    size = k if setting.options.max_error is not None or k == (0, 0) else None
    kept = left_out(weighted, few, [members.index(place) for place in asked], setting.options, bases, size, found.grid)
    found.left_out_kept[rows] += kept.fitted
    found.left_out_by_k[rows] += kept.by_k
    found.exact &= is_exact(sum(few.ranks), bases.shape)


def _factors(setting: Setting, name: str, module: str) -> LoRAFactors | None:
    own = own_name(setting.packed[name], module)
    return setting.originals.adapters[name].modules[own] if own is not None else None


def own_name(packed: PackedAdapter, module: str) -> str | None:
    """What an adapter calls a module of the subspace; None if it has none there."""
    if packed.places.get(module) == module:
        return module
    return next((own for own, place in packed.places.items() if place == module), None)


def coefficients_at(packed: PackedAdapter, module: str) -> Coefficients | None:
    """An adapter's coefficients in a module of the subspace."""
    own = own_name(packed, module)
    return packed.coefficients[own] if own is not None else None


def as_packed(pack: Pack, packed: Sequence[PackedAdapter], progress: Progress) -> Pairs:
    """All pairs of adapters as they come back, from their coefficients alone."""
    found = Pairs.of(len(packed))
    for done, (module, bases) in enumerate(pack.subspace.modules.items()):
        progress("comparing coefficients", done, len(pack.info.modules))
        found.add(stack_coefficients([coefficients_at(one, module) for one in packed], bases.down.k, bases.up.k))
    progress("comparing coefficients", len(pack.info.modules), len(pack.info.modules))
    return found


def energies(
    pack: Pack,
    packed: Mapping[str, PackedAdapter],
    originals: Originals,
    groups: Mapping[str, Sequence[str]],
    k: int,
    progress: Progress,
) -> dict[str, tuple[float, float, float, float]]:
    """Energy that k directions keep of some of the adapters: of A, of B, and of both sides of the updates; means over
    the modules."""
    sums: dict[str, list[tuple[float, float, float, float]]] = {who: [] for who in groups}
    everybody = {name for names in groups.values() for name in names}
    for done, module in enumerate(pack.info.modules):
        progress("weighing shared starts", done, len(pack.info.modules))
        factors = {}
        for name in sorted(everybody):
            own = own_name(packed[name], module)
            if own is not None and originals.scans[name].delta_squares[own] > 0:
                factors[name] = originals.adapters[name].modules[own]
        for who, names in groups.items():
            members = [factors[name] for name in names if name in factors]
            if members:
                weights = [spaces.delta_square(one) ** -0.5 for one in members]
                weighted = (members, weights)
                sums[who].append(
                    (*spectra.energy(weighted, (k, k), "factors"), *spectra.energy(weighted, (k, k), "delta"))
                )
    progress("weighing shared starts", len(pack.info.modules), len(pack.info.modules))
    found = {}
    for who, rows in sums.items():
        a, b, c, d = (math.fsum(column) / len(rows) for column in zip(*rows, strict=True))
        found[who] = (a, b, c, d)
    return found
