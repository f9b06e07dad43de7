"""How many components each side of each module needs, so that no adapter loses more than was asked for.

A *cell* is a pair (k_down, k_up) of one module. It costs bytes, and of every adapter it loses a share of the squared
norm. Wanted is one cell of each module, together as cheap as can be. How they are found, and what is promised, is in
docs/method.md. Nothing here knows of files or packs.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..codec.storage.base import Storage
from ..core import metrics, projection
from ..core.adapter import LoRAFactors, ModuleSpec, delta_square
from ..core.exact_fit import ExactFit, SidePair, fit_module
from ..core.fit_options import FitOptions
from ..core.subspace import ModuleBases
from ..errors import NonFiniteError, OptionError
from . import knapsack
from .knapsack import Menu

Cell = tuple[int, int]
Report = Callable[[str, int, int], None]

SPECTRA = "choosing sizes: spectra"
TRIALS = "choosing sizes: trial fits"
SEARCHING = "choosing sizes: search"
ROUNDS = 40
LEAST_ROUNDS = 4
WORK = 60_000.0
"""What rounds may cost, in units of about a millisecond; more if `LEAST_ROUNDS` of them do."""
SEARCH = 10_000.0
"""The same of the exhaustive search, where few modules and small ones make one possible."""
LEAST_CAUTION, MOST_CAUTION = 0.9, 2.0
"""Bounds of the factor by which predicted losses are raised, or lowered."""
ENOUGH = 0.001
"""A share of the bytes that is not worth another round."""
TABLE_BYTES = 2**26
NOTHING: Cell = (0, 0)


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter in one module. trained: whether its update there is not zero."""

    adapter: str
    factors: LoRAFactors
    trained: bool


Read = Callable[[], Sequence[Member]]


@dataclass(frozen=True, slots=True)
class Setting:
    """How modules are fitted and stored. weights: 1 / ‖delta weight‖ of every adapter that takes part in the fit."""

    options: FitOptions
    weights: Mapping[str, float]
    storage: Storage
    coefficient_storage: Storage
    device: torch.device

    def fit(self, members: Sequence[Member], k: Cell | None) -> ModuleBases:
        """The bases of a module, from the adapters that have trained it."""
        return fit_module(*self._trained(members), self.options, k)

    def stack(self, members: Sequence[Member], worth: Mapping[str, float] | None = None) -> ExactFit:
        """The adapters that have trained a module, as `fit` stacks them.

        worth: how much each of them counts beside its weight; then the weighting is that of the updates.
        """
        factors, weights = self._trained(members)
        if worth is None:
            return ExactFit(factors, weights, self.options)
        extra = [math.sqrt(worth[member.adapter]) for member in members if member.trained]
        scaled = [weight * more for weight, more in zip(weights, extra, strict=True)]
        return ExactFit(factors, scaled, replace(self.options, weighting="delta"))

    def _trained(self, members: Sequence[Member]) -> tuple[list[LoRAFactors], list[float]]:
        trained = [member for member in members if member.trained]
        return [_on(m.factors, self.device) for m in trained], [self.weights[m.adapter] for m in trained]


def _on(factors: LoRAFactors, device: torch.device) -> LoRAFactors:
    return replace(factors, down=factors.down.to(device), up=factors.up.to(device))


@dataclass(frozen=True, slots=True)
class Known:
    """A cell that was fitted: what it really costs, and each adapter's share that is lost, (n,)."""

    price: int
    losses: np.ndarray


class Module:
    """One module: its cells, what they cost and, by a fit without sweeps or by fits that were made, what they lose."""

    def __init__(self, name: str, read: Read, setting: Setting, most: int) -> None:
        self.name, self._read, self._setting = name, read, setting
        self._index = {adapter: index for index, adapter in enumerate(setting.weights)}
        members = read()
        self._prices = prices(_specs(members), setting)
        stack = setting.stack(members)
        whole = stack.full_spectrum()
        self.full: Cell = (whole[0].k, whole[1].k)
        self.cells = [
            NOTHING,
            *((down, up) for down in _steps(self.full[0], most) for up in _steps(self.full[1], most)),
        ]
        self.at = {cell: index for index, cell in enumerate(self.cells)}
        self.prices = np.array([self.price(cell) for cell in self.cells], dtype=np.float64)
        self.table = self._nested(members, stack, whole)
        rows = min(stack.down.rows.shape[0], max(stack.down.rows.shape[1], stack.up.rows.shape[1]))
        # six eigenproblems, and some thirty small products an adapter
        self.work = 6 * (1 + 3e-7 * rows**3) + 1.5 * len(members)
        self.known = {NOTHING: Known(0, self.table[0])}

    def price(self, cell: Cell) -> int:
        """Bytes of the components and of every adapter's coefficients."""
        return cell[0] * self._prices[0] + cell[1] * self._prices[1]

    def _nested(self, members: Sequence[Member], stack: ExactFit, whole: SidePair) -> np.ndarray:
        """What every cell loses of every adapter, (c, n), if the bases are those of the first spectra."""
        table = np.zeros((len(self.cells), len(self._index)))
        down, up = np.array(self.cells).T
        for member, kept in _kept(members, stack, whole):
            weight = self._setting.weights[member.adapter] ** 2
            total = weight * delta_square(member.factors)
            lost = total - weight * kept.table(np.unique(down), np.unique(up))
            rows, columns = (np.searchsorted(np.unique(k), k) for k in (down, up))
            table[:, self._index[member.adapter]] = np.maximum(lost[rows, columns], 0.0)
        return table

    def evaluate(
        self,
        cells: Sequence[Cell],
        members: Sequence[Member] | None = None,
        stack: ExactFit | None = None,
        whole: SidePair | None = None,
    ) -> None:
        """Fit these cells as `fit` will, and measure what is lost after rounding."""
        unknown = [cell for cell in cells if cell not in self.known]
        if not unknown:
            return
        members = members if members is not None else self._read()
        stack = stack or self._setting.stack(members)
        whole = whole or stack.full_spectrum()
        for cell in unknown:
            self.known[cell] = self._fitted(cell, members, stack, whole)

    def _fitted(self, cell: Cell, members: Sequence[Member], stack: ExactFit, whole: SidePair) -> Known:
        exact = stack.fit(whole, cell)
        stored = self._setting.storage.round_bases(exact)
        before, dual = metrics.unrounded_bases(exact, stored), projection.dual_components(stored)
        losses = np.zeros(len(self._index))
        for member in members:
            if member.adapter not in self._index:
                continue
            try:
                coefficients = projection.project(member.factors, stored, self._setting.coefficient_storage.dtype, dual)
            except NonFiniteError as error:
                if cell == self.full:
                    raise NonFiniteError(f"adapter {member.adapter!r}, module {self.name}: {error}") from error
                # the little of this adapter that lies in so few directions cannot be stored
                losses[:] = np.inf
                break
            lost = metrics.module_error(member.factors, coefficients, stored, before).squared_error
            losses[self._index[member.adapter]] = lost * self._setting.weights[member.adapter] ** 2
        return Known(self.price((exact.down.k, exact.up.k)), losses)

    def menu(self, caution: float) -> Menu:
        """What is known, and for all other cells what the table says, corrected by how far it was off nearby.

        caution: a factor for what is not known.
        """
        tried = [cell for cell in self.known if cell not in (NOTHING, self.full)]
        prices, losses = self.prices.copy(), self.table.copy()
        if tried:
            said = self.table[[self.at[cell] for cell in tried]]
            found = np.array([self.known[cell].losses for cell in tried])
            ratios = np.where(said > 1e-12, found / np.maximum(said, 1e-12), 1.0).clip(0.2, 5.0)
            logs, places = np.log(np.array(self.cells[1:])), np.log(np.array(tried))
            distance = np.abs(logs[:, None] - places[None]).sum(axis=2)
            losses[1:] *= ratios[distance.argmin(axis=1)]
        losses[1:] *= caution
        for cell, known in self.known.items():
            prices[self.at[cell]], losses[self.at[cell]] = known.price, known.losses
        return Menu(prices, losses)

    def least(self, worth: Mapping[str, float]) -> np.ndarray:
        """The least that any bases of each cell's size can lose of all adapters together, weighted by `worth`, (c,).

        By Eckart and Young on one side alone; what was fitted is known.
        """
        sigmas = [side.singular_values for side in self._setting.stack(self._read(), worth).full_spectrum()]
        tails = [np.append(s.square().flip(0).cumsum(0).flip(0).cpu().numpy(), 0.0) for s in sigmas]
        down, up = np.array(self.cells).T
        of_down, of_up = (tail[np.minimum(k, len(tail) - 1)] for tail, k in zip(tails, (down, up), strict=True))
        # a hair lower, for the last bits of the spectra
        least: np.ndarray = np.maximum(of_down, of_up) * (1 - 1e-9)
        weights = np.array([worth[adapter] for adapter in self._index])
        for cell, known in self.known.items():
            least[self.at[cell]] = float(known.losses @ weights)
        return least

    def measured(self) -> tuple[list[Cell], Menu]:
        """The cells that were fitted, and those alone."""
        cells = sorted(self.known)
        prices = np.array([self.known[cell].price for cell in cells], dtype=np.float64)
        return cells, Menu(prices, np.array([self.known[cell].losses for cell in cells]))


def _steps(rank: int, most: int) -> list[int]:
    """Numbers of components to look at, up to the rank: all, or ever wider steps."""
    if rank <= most:
        return list(range(1, rank + 1))
    return sorted({round(step) for step in np.geomspace(1, rank, most)})


@dataclass(frozen=True, slots=True)
class Kept:
    """‖U D Vᵀ‖² of one adapter's update in a module, for any number of leading directions on each side.

    down, up: Gram matrices of the projected factors, flat, (k + 1, r²), of the first 0, 1, … directions.
    """

    down: np.ndarray
    up: np.ndarray
    scaling: float

    @classmethod
    def of(cls, down: Tensor, up: Tensor, scaling: float) -> "Kept":
        """From the coordinates of the factors' rows in each direction, (r, k) of both sides."""
        return cls(_grams(down), _grams(up), scaling)

    def table(self, down: np.ndarray, up: np.ndarray) -> np.ndarray:
        """For every number of directions in `down` with every one in `up`."""
        found: np.ndarray = self.scaling**2 * (self.down[down] @ self.up[up].T)
        return found

    def diagonal(self, down: np.ndarray, up: np.ndarray) -> np.ndarray:
        """For one number in `down` with one in `up`, pair by pair."""
        found: np.ndarray = self.scaling**2 * (self.down[down] * self.up[up]).sum(axis=1)
        return found


def _grams(rows: Tensor) -> np.ndarray:
    zero = torch.zeros(1, rows.shape[0] ** 2, dtype=torch.float64)
    found: np.ndarray = torch.cat([zero, torch.einsum("ik,jk->kij", rows, rows).flatten(1).cumsum(0)]).numpy()
    return found


def _kept(members: Sequence[Member], stack: ExactFit, whole: SidePair) -> Iterable[tuple[Member, Kept]]:
    """Of each adapter that has trained a module, what the bases of the first spectra keep."""
    trained = [member for member in members if member.trained]
    for member, *blocks in zip(trained, stack.down.blocks, stack.up.blocks, strict=True):
        down, up = (side.projection[block].cpu() for side, block in zip(whole, blocks, strict=True))
        yield member, Kept.of(down, up, member.factors.scaling)


def prices(specs: Sequence[ModuleSpec], setting: Setting) -> tuple[int, int]:
    """Bytes of one more component on each side (down, up): its own, and those of every adapter's coefficients."""
    coefficients = sum(spec.rank for spec in specs) * setting.coefficient_storage.number_bytes
    widths = specs[0].in_features, specs[0].out_features
    down, up = (round(width * setting.storage.number_bytes + coefficients) for width in widths)
    return down, up


def lora_bytes(specs: Sequence[ModuleSpec], setting: Setting) -> int:
    """What a module's factors take as LoRAs, in the narrower of the two storages' dtypes."""
    width = min(setting.storage.lora_itemsize, setting.coefficient_storage.lora_itemsize)
    return width * sum(spec.rank * (spec.in_features + spec.out_features) for spec in specs)


def _specs(members: Sequence[Member]) -> list[ModuleSpec]:
    return [member.factors.spec for member in members]


def choose(reads: Mapping[str, Read], setting: Setting, report: Report) -> dict[str, Cell]:
    """The components (down, up) of each module with which every adapter's delta error is at most `max_error`.

    reads: of every module that some adapter has trained, its adapters' factors, read anew at each call.
    """
    assert setting.options.max_error is not None
    # a hair below, for the last bits of the sum that the record makes of it
    bound = setting.options.max_error**2 * (1 - 1e-12)
    stored = (setting.storage.dtype, setting.coefficient_storage.dtype)
    rounding = sum(torch.finfo(dtype).eps for dtype in stored)
    most = int(math.sqrt(TABLE_BYTES / (8 * len(setting.weights) * len(reads))))
    modules = []
    for done, (name, read) in enumerate(reads.items()):
        report(SPECTRA, done, len(reads))
        modules.append(Module(name, read, setting, max(24, min(most, 160))))
    report(SPECTRA, len(reads), len(reads))
    full = [module.full for module in modules]
    best: list[Cell] | None = None
    if setting.options.max_error < 16 * rounding:
        best = _evaluated(modules, full, bound, setting)
    caution, budget = 1.0, WORK
    worth = np.ones(len(setting.weights))
    for turn in range(ROUNDS):
        menus = [module.menu(caution) for module in modules]
        worth = knapsack.multipliers(menus, bound)
        start = [module.at[cell] for module, cell in zip(modules, best or full, strict=True)]
        picks = knapsack.good(menus, bound, worth, start)
        cells = [module.cells[pick] for module, pick in zip(modules, picks, strict=True)]
        fresh = [at for at, (module, cell) in enumerate(zip(modules, cells, strict=True)) if cell not in module.known]
        if best is not None and knapsack.price(menus, picks) > (1 - ENOUGH) * _price(modules, best):
            fresh = []
        for at in fresh:
            report(TRIALS, turn * len(reads) + at, ROUNDS * len(reads))
            modules[at].evaluate([cells[at]])
        budget -= sum(modules[at].work for at in fresh)
        if all(cell in module.known for module, cell in zip(modules, cells, strict=True)):
            losses = _losses(modules, cells)
            if (losses <= bound).all() and (best is None or _price(modules, cells) < _price(modules, best)):
                best = cells
        if turn + 1 >= LEAST_ROUNDS and budget < 0:
            break
        if not fresh:
            # nothing better is in sight: look where the predictions may be too high
            caution = 1.0 if caution > 1.0 else caution - 0.02
            if caution < LEAST_CAUTION:
                break
        elif caution == 1.0 and (losses > bound).any():
            caution = _caution(modules, cells, menus, picks, fresh)
        else:
            caution = 1.0
    if best is None:
        best = _evaluated(modules, full, bound, setting)
    report(TRIALS, ROUNDS * len(reads), ROUNDS * len(reads))
    best = _searched(modules, best, bound, worth, setting, report)
    return {module.name: cell for module, cell in zip(modules, best, strict=True)}


def _caution(
    modules: Sequence[Module], cells: Sequence[Cell], menus: Sequence[Menu], picks: Sequence[int], fresh: Sequence[int]
) -> float:
    """By how much more than predicted was lost in the modules that were tried, of the adapter that lost most.

    Whoever picks what looks cheap picks what is predicted too low.
    """
    worst = int(_losses(modules, cells).argmax())
    found = sum(float(modules[at].known[cells[at]].losses[worst]) for at in fresh)
    said = sum(float(menus[at].losses[picks[at], worst]) for at in fresh)
    return min(max(found / said, 1.0), MOST_CAUTION) if said > 0 else 1.0


def _evaluated(modules: Sequence[Module], full: list[Cell], bound: float, setting: Setting) -> list[Cell]:
    """`full`, every direction of every module, if no adapter loses too much even so."""
    for module, cell in zip(modules, full, strict=True):
        module.evaluate([cell])
    _check_reachable(_losses(modules, full), bound, setting)
    return full


@dataclass(frozen=True, slots=True)
class Glance:
    """One module at a glance: by bases without sweeps or rounding, with as many components on both sides.

    ranks, prices: of both sides (down, up); prices in bytes of one more component, and lora_bytes those of the LoRAs.
    kept, totals: of each adapter, ‖P_U D P_V‖² by number of components, (k + 1, n), and ‖D‖², (n,), both weighted.
    """

    ranks: Cell
    prices: tuple[int, int]
    lora_bytes: int
    kept: np.ndarray
    totals: np.ndarray


def _glance(read: Read, setting: Setting) -> Glance:
    members = read()
    stack = setting.stack(members)
    whole = stack.full_spectrum()
    ranks = whole[0].k, whole[1].k
    steps = np.arange(max(ranks) + 1)
    index = {adapter: at for at, adapter in enumerate(setting.weights)}
    kept, totals = np.zeros((len(steps), len(index))), np.zeros(len(index))
    for member, square in _kept(members, stack, whole):
        weight = setting.weights[member.adapter] ** 2
        both = [np.minimum(steps, rank) for rank in ranks]
        kept[:, index[member.adapter]] = weight * square.diagonal(*both)
        totals[index[member.adapter]] = weight * delta_square(member.factors)
    specs = _specs(members)
    return Glance(ranks, prices(specs, setting), lora_bytes(specs, setting), kept, totals)


def smallest(reads: Mapping[str, Read], setting: Setting, error: float) -> tuple[int, float]:
    """The least number of components, one for every side, with which every adapter's delta error is about `error` at
    most in these modules, and the bytes of components and coefficients that takes, as a share of the LoRAs' own.

    An estimate: by bases without sweeps or rounding.
    """
    modules = [_glance(read, setting) for read in reads.values()]
    steps = range(max(len(one.kept) for one in modules))
    kept = np.array([sum(one.kept[min(k, len(one.kept) - 1)] for one in modules) for k in steps])
    totals = np.sum([one.totals for one in modules], axis=0)
    there = totals > 0
    lost = np.sqrt(np.maximum(1 - kept[:, there] / totals[there], 0.0)).max(axis=1)
    k = int(np.flatnonzero(lost <= max(error, lost[-1]))[0])
    stored = sum(min(k, rank) * price for one in modules for rank, price in zip(one.ranks, one.prices, strict=True))
    return k, stored / sum(one.lora_bytes for one in modules)


def _losses(modules: Sequence[Module], cells: Sequence[Cell]) -> np.ndarray:
    found: np.ndarray = np.sum([m.known[cell].losses for m, cell in zip(modules, cells, strict=True)], axis=0)
    return found


def _price(modules: Sequence[Module], cells: Sequence[Cell]) -> int:
    return sum(module.known[cell].price for module, cell in zip(modules, cells, strict=True))


def _check_reachable(losses: np.ndarray, bound: float, setting: Setting) -> None:
    """`OptionError` if some adapter loses more than it may though no direction is left out."""
    worst = int(losses.argmax())
    if losses[worst] > bound:
        error = math.sqrt(losses[worst])
        stored = (setting.storage.dtype, setting.coefficient_storage.dtype)
        wider = "float64" if torch.float32 in stored else "float32"
        raise OptionError(
            f"max_error={setting.options.max_error:g} cannot be reached: with every direction kept, adapter "
            f"{list(setting.weights)[worst]!r} has a delta error of {error:.2g}, which is rounding. Store the pack in "
            f"a wider dtype (dtype={wider!r}, --dtype {wider}), or ask for max_error={_above(error):g}."
        )


def _above(error: float) -> float:
    """Two digits, not below `error`."""
    scale = 10.0 ** (1 - math.floor(math.log10(error)))
    return math.ceil(error * scale) / scale


def _searched(
    modules: Sequence[Module],
    best: list[Cell],
    bound: float,
    worth: np.ndarray,
    setting: Setting,
    report: Report,
) -> list[Cell]:
    """The best selection there is, where all cells that may be part of it can be fitted; else the one given."""
    if sum(len(module.cells) for module in modules) > 20_000:
        return best
    by_name = dict(zip(setting.weights, worth.tolist(), strict=True))
    least = [module.least(by_name) for module in modules]
    room = bound * float(worth.sum()) * (1 + 1e-9)
    below = float(_price(modules, best))
    may = knapsack.promising([module.prices for module in modules], least, room, below)
    fresh = [
        [cell for cell, flag in zip(module.cells, flags, strict=True) if flag and cell not in module.known]
        for module, flags in zip(modules, may, strict=True)
    ]
    if sum(len(cells) * module.work for module, cells in zip(modules, fresh, strict=True)) > SEARCH:
        return best
    for done, (module, cells) in enumerate(zip(modules, fresh, strict=True)):
        report(SEARCHING, done, len(modules))
        module.evaluate(cells)
    report(SEARCHING, len(modules), len(modules))
    measured = [module.measured() for module in modules]
    picks = knapsack.cheapest([menu for _, menu in measured], bound, worth, below)
    return [cells[pick] for (cells, _), pick in zip(measured, picks, strict=True)] if picks is not None else best
