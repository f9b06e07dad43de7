"""One number of components for all modules, by leaving adapters out: `n_components="auto"`.

Beyond some number, further components fitted to the others keep no more of an adapter that was left out than random
ones would. The measure and the rule are in docs/method.md.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.adapter import LoRAFactors, ModuleSpec, factor_grams
from ..core.basis import component_rule
from ..core.linalg import GRAM_RESOLUTION, RowBlocks
from ..errors import OptionError
from .module_fitter import CapturedNorms, ModuleFitter, ReadModule, Report

STAGE = "choosing k: adapters left out"
MIN_ADAPTERS = 3
"""Two to fit and one to leave out."""
SAMPLES = (24, 12)
"""The most adapters that are left out, and the most where that would take long."""
CHEAP = 3e10
"""Work that is little beside any fit: sizes of eigenproblems cubed, some seconds in all."""
SLACK = 0.1
"""Share of the possible gain over random components that is not worth further ones."""
RANDOM_DENSITY = 0.9
"""Density outside the components from which on nothing is said to be shared; 1 for random components."""


@dataclass(frozen=True, slots=True)
class ModuleOutline:
    """A module before its tensors are read: shapes of all adapters' factors, and names of those that trained it."""

    specs: Sequence[ModuleSpec]
    trained: Sequence[str]


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen number of components, and a sentence that explains it.

    grid: the numbers that were compared, ascending. errors: mean delta error, at each of them, of the adapters that
    were left out. outside: their mean density outside the others' components, 1 for random components.
    """

    n_components: int
    reason: str
    grid: list[int]
    errors: list[float]
    outside: list[float]


@dataclass(frozen=True, slots=True)
class _Sample:
    """The numbers of components to compare, and the modules and adapters to measure them on.

    is_capped: whether the largest number is limited by the LoRAs' bytes, rather than by the rank of the stacks.
    """

    grid: Sequence[int]
    is_capped: bool
    modules: Sequence[str]
    adapters: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over modules for each adapter left out: ‖D‖², (s,); ‖P_U D P_V‖² and the density outside, (s, g)."""

    totals: np.ndarray
    captured: np.ndarray
    outside: np.ndarray

    @classmethod
    def zeros(cls, n_adapters: int, n_grid: int) -> "_Sums":
        return cls(np.zeros(n_adapters), np.zeros((n_adapters, n_grid)), np.zeros((n_adapters, n_grid)))


def choose(
    reads: Mapping[str, ReadModule], outlines: Mapping[str, ModuleOutline], fitter: ModuleFitter, report: Report
) -> Choice:
    """Return the smallest number of components beyond which they are hardly better than random ones.

    reads, outlines: of every module that some adapter has trained. Adapters are left out one at a time, at most 24 of
    them, in some of the modules where those are many; both are drawn from a fixed seed. What the components of the
    others, without sweeps, keep of an adapter is compared by the density outside of them: bases are nested, so that
    the error alone would always favour more components. The smallest number wins whose mean density exceeds the
    minimum over all numbers by at most a tenth of the minimum's distance from 1, or by one standard error of the
    difference, whichever is more.
    """
    names = list(fitter.weights)
    if len(names) < MIN_ADAPTERS:
        raise OptionError(
            f"n_components='auto' leaves out one adapter at a time, and needs at least {MIN_ADAPTERS} trained ones, "
            f"got {len(names)}. Pass a number, n_components=32, or max_error=0.3."
        )
    sample = _sample({name: outlines[name] for name in reads}, fitter)
    sums = _Sums.zeros(len(sample.adapters), len(sample.grid))
    for done, module in enumerate(sample.modules):
        report(STAGE, done, len(sample.modules))
        _add_module(sums, reads[module], sample, fitter)
    report(STAGE, len(sample.modules), len(sample.modules))
    outside = sums.outside / sums.totals[:, None]
    errors = np.sqrt(np.maximum(1 - sums.captured / sums.totals[:, None], 0.0)).mean(axis=0)
    means = outside.mean(axis=0)
    best = int(means.argmin())
    # paired differences: how much adapters differ from each other must not count
    differences = outside - outside[:, [best]]
    standard_error = np.zeros(len(means))
    if len(outside) > 1:
        standard_error = differences.std(axis=0, ddof=1) / math.sqrt(len(outside))
    slack = np.maximum(standard_error, SLACK * max(1 - float(means[best]), 0.0))
    pick = int(np.flatnonzero(differences.mean(axis=0) <= slack)[0])
    reason = _reason(sample, pick, errors, float(means[best]), (len(outside), len(names)))
    return Choice(sample.grid[pick], reason, list(sample.grid), errors.tolist(), means.tolist())


def _reason(sample: _Sample, pick: int, errors: np.ndarray, least: float, sampled: tuple[int, int]) -> str:
    """Return the sentence of a choice. least: the smallest density outside. sampled: adapters left out, and all."""
    grid = sample.grid
    who = f"{sampled[0]} of {sampled[1]} adapters" if sampled[0] < sampled[1] else "adapters"
    largest = "the most with which the pack is smaller than the LoRAs" if sample.is_capped else "the most there are"
    others = f", and {errors[-1]:.2f} at {grid[-1]}, {largest}" if pick < len(grid) - 1 else f", which is {largest}"
    if least >= RANDOM_DENSITY:
        why = (
            "there is next to nothing that they share: at no number of components do the components of the others keep "
            "much more of them than random ones would"
        )
    elif pick == len(grid) - 1 and sample.is_capped:
        why = "further components would keep still more of them than random ones"
    elif pick == len(grid) - 1:
        why = "up to the last one, components keep more of them than random ones would"
    else:
        why = "further components keep little more of them than random ones would"
    return (
        f"n_components={grid[pick]} was chosen: {who} left out of the fit one at a time have a mean delta error of "
        f"{errors[pick]:.2f} there{others}; {why}."
    )


def _sample(outlines: Mapping[str, ModuleOutline], fitter: ModuleFitter) -> _Sample:
    """Return all modules and adapters, or as many as take no more work than the fit itself."""
    grid, is_capped = _grid(outlines, fitter)
    generator = torch.Generator().manual_seed(0)
    names = list(fitter.weights)
    work = {name: _work(outline.specs) for name, outline in outlines.items()}
    total = sum(work.values())
    budget = max(CHEAP, (1 + fitter.options.sweeps) * total)
    counts = [min(most, len(names)) for most in SAMPLES]
    count = next((count for count in counts if count * total <= budget), counts[-1])
    modules: list[str] = []
    spent = 0.0
    for name in _shuffled(list(outlines), generator):
        spent += count * work[name]
        if modules and spent > budget:
            break
        modules.append(name)
    with_updates = {adapter for module in modules for adapter in outlines[module].trained}
    chosen = _shuffled([name for name in names if name in with_updates], generator)[:count]
    return _Sample(grid, is_capped, sorted(modules), [name for name in names if name in chosen])


def _grid(outlines: Mapping[str, ModuleOutline], fitter: ModuleFitter) -> tuple[list[int], bool]:
    """Return the numbers to compare, up to the largest with which the pack is smaller than the LoRAs.

    Also returns whether that is the limit.
    """
    limits, sizes, spectra, lora = [], [], 0, 0
    for outline in outlines.values():
        specs = outline.specs
        rows = sum(spec.rank for spec in specs)
        limits.append((min(rows, specs[0].in_features), min(rows, specs[0].out_features)))
        sizes.append(fitter.component_bytes(specs))
        # singular values are stored in float32
        spectra += 4 * sum(limits[-1])
        lora += fitter.lora_bytes(specs)

    def is_smaller(k: int) -> bool:
        sides = [side for pair in zip(limits, sizes, strict=True) for side in zip(*pair, strict=True)]
        return spectra + sum(min(k, limit) * size for limit, size in sides) < lora

    most = max(max(pair) for pair in limits)
    smaller = [k for k in range(1, most + 1) if is_smaller(k)]
    top = smaller[-1] if smaller else most
    # two per octave
    steps = {round(2 ** (half / 2)) for half in range(2 * top.bit_length())}
    return sorted({k for k in steps if k < top} | {top}), top < most


def _shuffled(names: Sequence[str], generator: torch.Generator) -> list[str]:
    return [names[index] for index in torch.randperm(len(names), generator=generator).tolist()]


def _work(specs: Sequence[ModuleSpec]) -> float:
    """Return the work of a basis on both sides, as sizes of eigenproblems cubed."""
    rows = sum(spec.rank for spec in specs)
    return float(sum(min(rows, width) ** 3 for width in (specs[0].in_features, specs[0].out_features)))


def _add_module(sums: _Sums, read: ReadModule, sample: _Sample, fitter: ModuleFitter) -> None:
    """Add one module of the sampled adapters to the sums."""
    trained = [update for update in read() if update.trained]
    stack = fitter.stack(trained)
    most = sample.grid[-1]
    down = _components_of_others(stack.down, stack.down_roots, most)
    up = _components_of_others(stack.up, stack.up_roots, most)
    for index, update in enumerate(trained):
        if update.adapter not in sample.adapters:
            continue
        row = sample.adapters.index(update.adapter)
        down_gram, up_gram = factor_grams(update.factors)
        total = update.factors.scaling**2 * float((down_gram * up_gram).sum())
        sums.totals[row] += total
        if len(trained) == 1:
            # without others there are no components, and the density outside of none is that of random ones
            sums.outside[row] += total
            continue
        captured, outside = _measure(update.factors, (down(index), up(index)), total, sample.grid)
        sums.captured[row] += captured
        sums.outside[row] += outside


def _components_of_others(stack: RowBlocks, roots: Sequence[Tensor], most: int) -> Callable[[int], Tensor]:
    """Return a function from the index of a block to at most `most` leading components of all other blocks."""
    if stack.gram is not None:
        return lambda index: (
            stack.without(index).leading([*roots[:index], *roots[index + 1 :]], component_rule(most, None)).components()
        )
    rows = stack.weighted(roots)
    total = rows.mT @ rows

    def components(index: int) -> Tensor:
        block = rows[stack.blocks[index]]
        squares, vectors = torch.linalg.eigh(total - block.mT @ block)
        rank = int((squares > GRAM_RESOLUTION**2 * squares[-1]).sum())
        leading: Tensor = vectors.flip(1)[:, : min(most, rank)].mT
        return leading

    return components


def _measure(
    factors: LoRAFactors, others: tuple[Tensor, Tensor], total: float, grid: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the first k components of the others keep of an update, and the density outside of them, by k.

    others: components (down, up). total: ‖D‖². The density of a side is ‖D‖² outside its components, divided by the
    share of the side's dimension that is outside; the mean of both sides is returned.
    """
    down, up = (side.cpu() for side in others)
    rows = factors.down.to(torch.float64).cpu(), factors.up.mT.to(torch.float64).cpu()
    norms = CapturedNorms.of(rows[0] @ down.mT, rows[1] @ up.mT, factors.scaling)
    grams = [gram.cpu().flatten().numpy() for gram in factor_grams(factors)]
    counts = np.array(grid)
    outside = np.zeros(len(grid))
    for projected, other_gram, basis in ((norms.down, grams[1], down), (norms.up, grams[0], up)):
        k, dimension = basis.shape
        # with all components used, or no dimension left outside, the density stays what it was before
        inside = np.minimum(counts, min(k, dimension - 1))
        left = total - factors.scaling**2 * (projected[inside] @ other_gram)
        outside += left * dimension / (dimension - inside) / 2
    return norms.pairwise(np.minimum(counts, len(down)), np.minimum(counts, len(up))), outside
