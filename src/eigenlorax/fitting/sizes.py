"""Choice of the numbers of components per side and module for an error bound, in packs of floats: docs/method.md.

A candidate is a pair (k_down, k_up) of one module. It has a price in bytes, and a squared error for each adapter.
`choose` picks one candidate per module, as cheap as possible, with which every adapter stays within the bound. Errors
are predicted from one decomposition per module; the candidates that are picked are fitted and measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..core import metrics, projection
from ..core.adapter import delta_square
from ..core.exact_fit import ExactFit, SidePair
from ..errors import NonFiniteError, OptionError
from . import knapsack
from .knapsack import Choices
from .module_fitter import ComponentCounts, LoadModule, ModuleFitter, ModuleUpdate, Report, captured_norms

SPECTRA = "choosing sizes: spectra"
TRIALS = "choosing sizes: trial fits"
MAX_ROUNDS = 40
MIN_ROUNDS = 4
WORK_BUDGET = 60_000.0
"""Maximum work of all trial fits, in units of about a millisecond. The first `MIN_ROUNDS` rounds may exceed it."""
MIN_CAUTION, MAX_CAUTION = 0.9, 2.0
"""Limits of the factor on predicted errors."""
NEGLIGIBLE_SAVING = 0.001
"""Share of the bytes whose saving does not justify another round."""
TABLE_BYTES = 2**26
"""Maximum memory for the predicted errors of all modules."""
DROPPED: ComponentCounts = (0, 0)
"""The candidate of a module that is dropped."""


@dataclass(frozen=True, slots=True)
class MeasuredFit:
    """Measurements of a candidate that was fitted.

    Attributes:
        price: Bytes of components and coefficients.
        errors: Squared error of each adapter in this module, relative to the adapter's squared norm, (n,).
    """

    price: int
    errors: np.ndarray


class ModuleCandidates:
    """The candidates of one module, with their bytes and their predicted or measured errors.

    Args:
        name: Name of the module.
        load_module: Function that loads its updates.
        fitter: Options of the fit.
        max_counts: Maximum number of values of k per side.
    """

    def __init__(self, name: str, load_module: LoadModule, fitter: ModuleFitter, max_counts: int) -> None:
        self.name, self._load_module, self._fitter = name, load_module, fitter
        self._index = {adapter: index for index, adapter in enumerate(fitter.weights)}
        updates = load_module()
        self._component_bytes = fitter.component_bytes([update.factors.spec for update in updates])
        stack = fitter.stack(updates)
        whole = stack.full_spectrum()
        self.full: ComponentCounts = (whole[0].k, whole[1].k)
        self.candidates = [
            DROPPED,
            *((down, up) for down in _counts(self.full[0], max_counts) for up in _counts(self.full[1], max_counts)),
        ]
        self.position = {candidate: index for index, candidate in enumerate(self.candidates)}
        self.prices = np.array([self.price(candidate) for candidate in self.candidates], dtype=np.float64)
        self.predicted = self._predict(updates, stack, whole)
        rows = min(stack.down.rows.shape[0], max(stack.down.rows.shape[1], stack.up.rows.shape[1]))
        # milliseconds of six eigenproblems, and of some thirty small products per adapter
        self.work = 6 * (1 + 3e-7 * rows**3) + 1.5 * len(updates)
        self.measured = {DROPPED: MeasuredFit(0, self.predicted[0])}

    def price(self, candidate: ComponentCounts) -> int:
        """Return the bytes of a candidate's components and of all adapters' coefficients."""
        return candidate[0] * self._component_bytes[0] + candidate[1] * self._component_bytes[1]

    def _predict(self, updates: Sequence[ModuleUpdate], stack: ExactFit, whole: SidePair) -> np.ndarray:
        """Return the squared error of each adapter with the leading components of each candidate, (c, n).

        Args:
            updates: Updates of the module.
            stack: The updates, stacked.
            whole: All components (down, up).
        """
        errors = np.zeros((len(self.candidates), len(self._index)))
        down, up = np.array(self.candidates).T
        rows, columns = (np.searchsorted(np.unique(counts), counts) for counts in (down, up))
        for update, captured in captured_norms(updates, stack, whole):
            weight = self._fitter.weights[update.adapter] ** 2
            total = weight * delta_square(update.factors)
            missing = total - weight * captured.table(np.unique(down), np.unique(up))
            errors[:, self._index[update.adapter]] = np.maximum(missing[rows, columns], 0.0)
        return errors

    def measure(self, candidate: ComponentCounts) -> None:
        """Fit a candidate as `fit` will, and measure its errors after rounding, unless this was done before."""
        if candidate in self.measured:
            return
        updates = self._load_module()
        stack = self._fitter.stack(updates)
        exact = stack.fit(stack.full_spectrum(), candidate)
        stored = self._fitter.storage.round_bases(exact)
        before, dual = metrics.unrounded_bases(exact, stored), projection.dual_components(stored)
        errors = np.zeros(len(self._index))
        for update in updates:
            if update.adapter not in self._index:
                continue
            try:
                coefficients = projection.project(update.factors, stored, self._fitter.coefficient_storage.dtype, dual)
            except NonFiniteError as error:
                if candidate == self.full:
                    raise NonFiniteError(f"Adapter {update.adapter!r}, module {self.name}: {error}") from error
                # coefficients of this adapter are outside the dtype's range, so the candidate cannot be used
                errors[:] = np.inf
                break
            squared_error = metrics.module_error(update.factors, coefficients, stored, before).squared_error
            errors[self._index[update.adapter]] = squared_error * self._fitter.weights[update.adapter] ** 2
        self.measured[candidate] = MeasuredFit(self.price((exact.down.k, exact.up.k)), errors)

    def choices(self, caution: float) -> Choices:
        """Return all candidates with their measured errors, or with predictions where they were not measured.

        A prediction is corrected by the ratio of measured to predicted error at the nearest measured candidate, and
        multiplied by `caution`.
        """
        tried = [candidate for candidate in self.measured if candidate not in (DROPPED, self.full)]
        prices, errors = self.prices.copy(), self.predicted.copy()
        if tried:
            predicted = self.predicted[[self.position[candidate] for candidate in tried]]
            actual = np.array([self.measured[candidate].errors for candidate in tried])
            ratios = np.where(predicted > 1e-12, actual / np.maximum(predicted, 1e-12), 1.0).clip(0.2, 5.0)
            all_logs, tried_logs = np.log(np.array(self.candidates[1:])), np.log(np.array(tried))
            distance = np.abs(all_logs[:, None] - tried_logs[None]).sum(axis=2)
            errors[1:] *= ratios[distance.argmin(axis=1)]
        errors[1:] *= caution
        for candidate, fit in self.measured.items():
            prices[self.position[candidate]], errors[self.position[candidate]] = fit.price, fit.errors
        return Choices(prices, errors)


def _counts(rank: int, max_counts: int) -> list[int]:
    """Return the numbers of components to consider: all up to the rank, or a geometric sequence if they are many."""
    if rank <= max_counts:
        return list(range(1, rank + 1))
    return sorted({round(count) for count in np.geomspace(1, rank, max_counts)})


class _Search:
    """Search for one candidate per module: predict errors, pick candidates, measure them, and correct predictions."""

    def __init__(self, modules: Sequence[ModuleCandidates], fitter: ModuleFitter, report: Report) -> None:
        assert fitter.options.max_error is not None
        self.max_error = fitter.options.max_error
        self.modules, self.fitter, self._report = modules, fitter, report
        # slightly lower than the square, because the recorded error sums over modules in another order
        self.bound = self.max_error**2 * (1 - 1e-12)
        self.best: list[ComponentCounts] | None = None

    def run(self) -> list[ComponentCounts]:
        """Return the cheapest candidates whose measured errors are within the bound, one per module."""
        stored = (self.fitter.storage.dtype, self.fitter.coefficient_storage.dtype)
        rounding = sum(torch.finfo(dtype).eps for dtype in stored)
        if self.max_error < 16 * rounding:
            # with a bound near the rounding error, all components may be too few: raise before the search starts
            self.best = self._measure_full()
        caution, budget = 1.0, WORK_BUDGET
        for turn in range(MAX_ROUNDS):
            picked, choices, picks = self._pick(caution)
            fresh = [i for i, module in enumerate(self.modules) if picked[i] not in module.measured]
            worthwhile = (1 - NEGLIGIBLE_SAVING) * self._price(self.best) if self.best is not None else math.inf
            if knapsack.price(choices, picks) > worthwhile:
                fresh = []
            for i in fresh:
                self._report(TRIALS, turn * len(self.modules) + i, MAX_ROUNDS * len(self.modules))
                self.modules[i].measure(picked[i])
            budget -= sum(self.modules[i].work for i in fresh)
            self._keep_if_better(picked)
            if turn + 1 >= MIN_ROUNDS and budget < 0:
                break
            if not fresh:
                # no measured candidate saves more: lower the predictions step by step, in case they are too high
                caution = 1.0 if caution > 1.0 else caution - 0.02
                if caution < MIN_CAUTION:
                    break
            elif caution == 1.0 and (self._errors(picked) > self.bound).any():
                caution = self._next_caution(picked, choices, picks, fresh)
            else:
                caution = 1.0
        self._report(TRIALS, MAX_ROUNDS * len(self.modules), MAX_ROUNDS * len(self.modules))
        return self.best if self.best is not None else self._measure_full()

    def _pick(self, caution: float) -> tuple[list[ComponentCounts], list[Choices], list[int]]:
        choices = [module.choices(caution) for module in self.modules]
        start = self.best or [module.full for module in self.modules]
        positions = [module.position[candidate] for module, candidate in zip(self.modules, start, strict=True)]
        picks = knapsack.select(choices, self.bound, positions)
        return [m.candidates[pick] for m, pick in zip(self.modules, picks, strict=True)], choices, picks

    def _keep_if_better(self, picked: list[ComponentCounts]) -> None:
        if any(candidate not in module.measured for module, candidate in zip(self.modules, picked, strict=True)):
            return
        is_within = bool((self._errors(picked) <= self.bound).all())
        if is_within and (self.best is None or self._price(picked) < self._price(self.best)):
            self.best = picked

    def _next_caution(
        self, picked: Sequence[ComponentCounts], choices: Sequence[Choices], picks: Sequence[int], fresh: Sequence[int]
    ) -> float:
        """Return the ratio of measured to predicted errors of the candidates just measured, for the worst adapter.

        Candidates are picked because they look cheap, so their errors are predicted too low more often than too high.
        """
        worst = int(self._errors(picked).argmax())
        actual = sum(float(self.modules[i].measured[picked[i]].errors[worst]) for i in fresh)
        predicted = sum(float(choices[i].losses[picks[i], worst]) for i in fresh)
        return min(max(actual / predicted, 1.0), MAX_CAUTION) if predicted > 0 else 1.0

    def _measure_full(self) -> list[ComponentCounts]:
        """Measure all modules with all components. Raise `OptionError` if an adapter still exceeds the bound."""
        full = [module.full for module in self.modules]
        for module in self.modules:
            module.measure(module.full)
        _check_reachable(self._errors(full), self.bound, self.fitter)
        return full

    def _errors(self, picked: Sequence[ComponentCounts]) -> np.ndarray:
        """Return the measured squared error of each adapter over all modules, (n,)."""
        errors: np.ndarray = np.sum(
            [m.measured[candidate].errors for m, candidate in zip(self.modules, picked, strict=True)], axis=0
        )
        return errors

    def _price(self, picked: Sequence[ComponentCounts]) -> int:
        return sum(m.measured[candidate].price for m, candidate in zip(self.modules, picked, strict=True))


def choose(loaders: Mapping[str, LoadModule], fitter: ModuleFitter, report: Report) -> dict[str, ComponentCounts]:
    """Return numbers of components with which every adapter's error is at most `max_error`, by module.

    Args:
        loaders: Functions that load a module's updates, by module, for modules that some adapter has trained.
        fitter: Options of the fit, with `max_error`.
        report: Progress callback.

    Raises:
        OptionError: The rounding error alone exceeds the bound.
    """
    # keeps the tables of predictions within TABLE_BYTES, for any number of modules and adapters
    counts_per_side = int(math.sqrt(TABLE_BYTES / (8 * len(fitter.weights) * len(loaders))))
    modules = []
    for done, (name, load_module) in enumerate(loaders.items()):
        report(SPECTRA, done, len(loaders))
        modules.append(ModuleCandidates(name, load_module, fitter, max(24, min(counts_per_side, 160))))
    report(SPECTRA, len(loaders), len(loaders))
    best = _Search(modules, fitter, report).run()
    return {module.name: candidate for module, candidate in zip(modules, best, strict=True)}


def _check_reachable(errors: np.ndarray, bound: float, fitter: ModuleFitter) -> None:
    """Raise `OptionError` if an adapter's squared error with all components exceeds the bound. errors: (n,)."""
    worst = int(errors.argmax())
    if errors[worst] > bound:
        error = math.sqrt(errors[worst])
        stored = (fitter.storage.dtype, fitter.coefficient_storage.dtype)
        wider = "float64" if torch.float32 in stored else "float32"
        raise OptionError(
            f"max_error={fitter.options.max_error:g} cannot be reached: with all components, adapter "
            f"{list(fitter.weights)[worst]!r} has a delta error of {error:.2g} from rounding. Store the pack in "
            f"a wider dtype (dtype={wider!r}, --dtype {wider}), or pass max_error={_rounded_up(error):g}."
        )


def _rounded_up(error: float) -> float:
    """Return the error rounded up to two digits."""
    scale = 10.0 ** (1 - math.floor(math.log10(error)))
    return math.ceil(error * scale) / scale
