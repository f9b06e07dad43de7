"""Choice of the number of components for `n_components="auto"`, by leaving adapters out of the fit.

Components of the other adapters are compared with random ones: beyond some number, further components keep no more of
an adapter that was left out than random ones would. The measure and the rule are in docs/method.md.
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
from .module_fitter import CapturedNorms, LoadModule, ModuleFitter, Report

STAGE = "choosing k: adapters left out"
MIN_ADAPTERS = 3
"""Minimum number of trained adapters: two to fit and one to leave out."""
SAMPLES = (24, 12)
"""Maximum number of adapters that are left out, in a small collection and in a large one."""
CHEAP = 3e10
"""Work that is always acceptable, in sizes of eigenproblems cubed: some seconds in all."""
SLACK = 0.1
"""Share of the possible gain over random components that does not justify further components."""
RANDOM_DENSITY = 0.9
"""Density outside the components from which the adapters are said to share nothing; it is 1 for random components."""


@dataclass(frozen=True, slots=True)
class ModuleOutline:
    """Module whose tensors were not read yet.

    Attributes:
        specs: Shapes of the factors of all adapters that have the module.
        trained: Names of the adapters whose update of the module is not zero.
    """

    specs: Sequence[ModuleSpec]
    trained: Sequence[str]


@dataclass(frozen=True, slots=True)
class Choice:
    """Chosen number of components.

    Attributes:
        n_components: The number.
        reason: Sentence that explains the choice.
        grid: Numbers that were compared, ascending.
        errors: Mean delta error of the adapters that were left out, for each number in `grid`.
        outside: Mean density of these adapters outside the components of the others, for each number in `grid`. It is 1
            for random components.
    """

    n_components: int
    reason: str
    grid: list[int]
    errors: list[float]
    outside: list[float]


@dataclass(frozen=True, slots=True)
class _Sample:
    """Numbers of components to compare, and the modules and adapters on which they are measured.

    Attributes:
        grid: Numbers of components, ascending.
        is_capped: True if the size of the LoRAs limits the largest number, False if the rank of the stacks does.
        modules: Names of the modules.
        adapters: Names of the adapters that are left out in turn.
    """

    grid: Sequence[int]
    is_capped: bool
    modules: Sequence[str]
    adapters: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over modules for each of s adapters left out, for g numbers of components.

    Attributes:
        totals: ‖D‖², (s,).
        captured: ‖P_U D P_V‖², the squared norm in the components, (s, g).
        outside: Density outside the components, times ‖D‖², (s, g).
    """

    totals: np.ndarray
    captured: np.ndarray
    outside: np.ndarray

    @classmethod
    def zeros(cls, n_adapters: int, n_grid: int) -> "_Sums":
        return cls(np.zeros(n_adapters), np.zeros((n_adapters, n_grid)), np.zeros((n_adapters, n_grid)))


def choose(
    loaders: Mapping[str, LoadModule], outlines: Mapping[str, ModuleOutline], fitter: ModuleFitter, report: Report
) -> Choice:
    """Return the smallest number of components beyond which further ones are hardly better than random ones.

    At most 24 adapters are left out, one at a time. In a large collection, only some modules are measured. Adapters and
    modules are drawn from a fixed seed. The bases are fitted to the other adapters, without sweeps. The error alone
    would always favour more components, because bases are nested. Therefore the numbers are compared by the mean
    density of the adapters outside the components. The smallest number is chosen whose density exceeds the minimum by
    at most a tenth of (1 − minimum), or by one standard error of the difference, whichever is more.

    Args:
        loaders: Functions that load a module's updates, by module, for modules that some adapter has trained.
        outlines: Shapes and trained adapters of these modules.
        fitter: Options of the fit.
        report: Progress callback.

    Raises:
        OptionError: Fewer than three adapters are trained.
    """
    names = list(fitter.weights)
    if len(names) < MIN_ADAPTERS:
        raise OptionError(
            f"n_components='auto' leaves out one adapter at a time, and needs at least {MIN_ADAPTERS} trained ones, "
            f"got {len(names)}. Pass a number, n_components=32, or max_error=0.3."
        )
    sample = _sample({name: outlines[name] for name in loaders}, fitter)
    sums = _Sums.zeros(len(sample.adapters), len(sample.grid))
    for done, module in enumerate(sample.modules):
        report(STAGE, done, len(sample.modules))
        _add_module(sums, loaders[module], sample, fitter)
    report(STAGE, len(sample.modules), len(sample.modules))
    outside = sums.outside / sums.totals[:, None]
    errors = np.sqrt(np.maximum(1 - sums.captured / sums.totals[:, None], 0.0)).mean(axis=0)
    means = outside.mean(axis=0)
    best = int(means.argmin())
    # paired differences, so that differences between adapters do not count as uncertainty
    differences = outside - outside[:, [best]]
    standard_error = np.zeros(len(means))
    if len(outside) > 1:
        standard_error = differences.std(axis=0, ddof=1) / math.sqrt(len(outside))
    slack = np.maximum(standard_error, SLACK * max(1 - float(means[best]), 0.0))
    pick = int(np.flatnonzero(differences.mean(axis=0) <= slack)[0])
    reason = _reason(sample, pick, errors, float(means[best]), (len(outside), len(names)))
    return Choice(sample.grid[pick], reason, list(sample.grid), errors.tolist(), means.tolist())


def _reason(sample: _Sample, pick: int, errors: np.ndarray, min_outside: float, sampled: tuple[int, int]) -> str:
    """Return the sentence that explains a choice.

    Args:
        sample: The numbers that were compared.
        pick: Index of the chosen number in the grid.
        errors: Mean delta error of the adapters left out, for each number.
        min_outside: Smallest mean density outside the components.
        sampled: Number of adapters left out, and of all adapters.
    """
    grid = sample.grid
    subject = f"{sampled[0]} of {sampled[1]} adapters" if sampled[0] < sampled[1] else "adapters"
    limit = "the LoRAs' size allows no more" if sample.is_capped else "there are no more"
    at_limit = f" ({limit})" if pick == len(grid) - 1 else f", and {errors[-1]:.2f} with {grid[-1]} ({limit})"
    if min_outside >= RANDOM_DENSITY:
        cause = "they share hardly anything: no number of components keeps much more of them than random ones would"
    elif pick == len(grid) - 1 and sample.is_capped:
        cause = "further components would keep even more of them than random ones would"
    elif pick == len(grid) - 1:
        cause = "all components keep more of them than random ones would"
    else:
        cause = "further components keep little more of them than random ones would"
    return (
        f"n_components={grid[pick]} was chosen: {subject} left out of the fit one at a time have a mean delta error of "
        f"{errors[pick]:.2f} with {grid[pick]} components{at_limit}; {cause}."
    )


def _sample(outlines: Mapping[str, ModuleOutline], fitter: ModuleFitter) -> _Sample:
    """Return all modules and adapters, or a random sample of them that takes no more work than the fit itself."""
    grid, is_capped = _grid(outlines, fitter)
    generator = torch.Generator().manual_seed(0)
    names = list(fitter.weights)
    work = {name: _work(outline.specs) for name, outline in outlines.items()}
    total = sum(work.values())
    budget = max(CHEAP, (1 + fitter.options.sweeps) * total)
    counts = [min(max_adapters, len(names)) for max_adapters in SAMPLES]
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
    """Return the numbers of components to compare, and whether the size of the LoRAs limits the largest one."""
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

    max_rank = max(max(pair) for pair in limits)
    smaller = [k for k in range(1, max_rank + 1) if is_smaller(k)]
    largest = smaller[-1] if smaller else max_rank
    # two per octave
    candidates = {round(2 ** (half / 2)) for half in range(2 * largest.bit_length())}
    return sorted({k for k in candidates if k < largest} | {largest}), largest < max_rank


def _shuffled(names: Sequence[str], generator: torch.Generator) -> list[str]:
    return [names[index] for index in torch.randperm(len(names), generator=generator).tolist()]


def _work(specs: Sequence[ModuleSpec]) -> float:
    """Return the work of fitting both bases, in sizes of eigenproblems cubed."""
    rows = sum(spec.rank for spec in specs)
    return float(sum(min(rows, width) ** 3 for width in (specs[0].in_features, specs[0].out_features)))


def _add_module(sums: _Sums, load_module: LoadModule, sample: _Sample, fitter: ModuleFitter) -> None:
    """Add one module of the sampled adapters to the sums."""
    trained = [update for update in load_module() if update.trained]
    stack = fitter.stack(trained)
    max_components = sample.grid[-1]
    down = _components_of_others(stack.down, stack.down_roots, max_components)
    up = _components_of_others(stack.up, stack.up_roots, max_components)
    for index, update in enumerate(trained):
        if update.adapter not in sample.adapters:
            continue
        row = sample.adapters.index(update.adapter)
        down_gram, up_gram = factor_grams(update.factors)
        total = update.factors.scaling**2 * float((down_gram * up_gram).sum())
        sums.totals[row] += total
        if len(trained) == 1:
            # no other adapters: all energy counts as outside
            sums.outside[row] += total
            continue
        captured, outside = _measure(update.factors, (down(index), up(index)), total, sample.grid)
        sums.captured[row] += captured
        sums.outside[row] += outside


def _components_of_others(stack: RowBlocks, roots: Sequence[Tensor], max_components: int) -> Callable[[int], Tensor]:
    """Return a function that computes the leading components of all blocks except one.

    Args:
        stack: Rows of one side, one block per adapter.
        roots: Weight of each block, (r, r).
        max_components: Maximum number of components.

    Returns:
        A function from the index of the block that is left out to components, (k, d).
    """
    if stack.gram is not None:
        rule = component_rule(max_components, None)
        return lambda index: stack.without(index).leading([*roots[:index], *roots[index + 1 :]], rule).components()
    rows = stack.weighted(roots)
    total = rows.mT @ rows

    def components(index: int) -> Tensor:
        block = rows[stack.blocks[index]]
        squares, vectors = torch.linalg.eigh(total - block.mT @ block)
        rank = int((squares > GRAM_RESOLUTION**2 * squares[-1]).sum())
        leading: Tensor = vectors.flip(1)[:, : min(max_components, rank)].mT
        return leading

    return components


def _measure(
    factors: LoRAFactors, components: tuple[Tensor, Tensor], total: float, grid: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Measure an update inside and outside the first k components of the other adapters, for each k of a grid.

    Args:
        factors: Factors of the update D.
        components: Components (down, up) of the other adapters, (k, d).
        total: ‖D‖².
        grid: The numbers k.

    Returns:
        The squared norm inside the components, (g,), and the density outside, (g,). The density of a side is ‖D‖²
        outside its components, divided by the share of the side's dimension that is outside. The mean of both sides is
        returned.
    """
    down, up = (side.cpu() for side in components)
    rows = factors.down.to(torch.float64).cpu(), factors.up.mT.to(torch.float64).cpu()
    norms = CapturedNorms.of(rows[0] @ down.mT, rows[1] @ up.mT, factors.scaling)
    grams = [gram.cpu().flatten().numpy() for gram in factor_grams(factors)]
    counts = np.array(grid)
    outside = np.zeros(len(grid))
    for projected, other_gram, basis in ((norms.down, grams[1], down), (norms.up, grams[0], up)):
        k, dimension = basis.shape
        # beyond the last component, or without a dimension outside, the density stays constant
        inside = np.minimum(counts, min(k, dimension - 1))
        left = total - factors.scaling**2 * (projected[inside] @ other_gram)
        outside += left * dimension / (dimension - inside) / 2
    return norms.pairwise(np.minimum(counts, len(down)), np.minimum(counts, len(up))), outside
