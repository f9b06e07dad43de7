"""One number of components for all modules, by what the others' directions keep of an adapter that is left out.

Beyond some number, further directions keep no more of an adapter that was not in the fit than random ones would: they
are what the others alone have in common with themselves. What is measured, and the rule, are in docs/method.md.
Nothing here knows of files or packs.
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
from .sizes import Kept, Read, Report, Setting, lora_bytes, prices

STAGE = "choosing k: adapters left out"
LEAST = 3
"""Adapters without which there is no choice: two to fit, and one to leave out; and each of them in its turn."""
SAMPLES = (24, 12)
"""How many adapters are left out at most, and where that is much work."""
CHEAP = 3e10
"""Work that is not much beside any fit: sizes of eigenproblems cubed, seconds in all."""
SLACK = 0.1
"""The share of what can be won over random directions that is not worth further ones."""
NOTHING = 0.9
"""From here on, what is outside the directions of the others is as dense there as anywhere."""


@dataclass(frozen=True, slots=True)
class Outline:
    """A module: the shapes of all its adapters' factors, and the names of the adapters that have trained it."""

    specs: Sequence[ModuleSpec]
    trained: Sequence[str]


@dataclass(frozen=True, slots=True)
class Choice:
    """The number of components, and why, in a sentence.

    grid: the numbers that were compared, ascending. errors: the mean delta error, at each of them, of adapters that
    were left out; outside: how dense they are outside the directions of the others, in units of what chance gives.
    """

    n_components: int
    reason: str
    grid: list[int]
    errors: list[float]
    outside: list[float]


def choose(reads: Mapping[str, Read], outlines: Mapping[str, Outline], setting: Setting, report: Report) -> Choice:
    """The smallest number of components beyond which the directions are hardly better than random ones.

    reads: of every module that some adapter has trained, its adapters' factors, and their outlines. One adapter at a
    time is left out, and what the others' directions, without sweeps, keep of it is measured: of at most 24 adapters,
    and in some of the modules, drawn at random but the same each time, where they are many.

    Its error cannot grow with k, since bases are nested, and says little. So it is the density outside that is
    compared, with its minimum over k: the smallest k wins whose mean is within a tenth of the minimum's distance from
    chance, or within one standard error of it, whichever is more. The standard error is that of the differences from
    the minimum, adapter by adapter: how the adapters differ among themselves does not count.
    """
    names = list(setting.weights)
    if len(names) < LEAST:
        raise OptionError(
            f"n_components='auto' leaves out one adapter at a time, and needs at least {LEAST} trained ones, got "
            f"{len(names)}. Give a number, n_components=32, or max_error=0.3."
        )
    outlines = {name: outlines[name] for name in reads}
    grid, capped = _grid(outlines, setting)
    modules, sample = _samples(outlines, setting)
    found = _Sums.of(len(sample), len(grid))
    for done, module in enumerate(modules):
        report(STAGE, done, len(modules))
        _add(found, reads[module], sample, setting, grid)
    report(STAGE, len(modules), len(modules))
    outside = found.outside / found.totals[:, None]
    errors = np.sqrt(np.maximum(1 - found.kept / found.totals[:, None], 0.0)).mean(axis=0)
    means = outside.mean(axis=0)
    best = int(means.argmin())
    differences = outside - outside[:, [best]]
    error = differences.std(axis=0, ddof=1) / math.sqrt(len(outside)) if len(outside) > 1 else np.zeros(len(grid))
    slack = np.maximum(error, SLACK * max(1 - float(means[best]), 0.0))
    pick = int(np.flatnonzero(differences.mean(axis=0) <= slack)[0])
    reason = _reason(grid, pick, errors, float(means[best]), capped, (len(outside), len(names)))
    return Choice(grid[pick], reason, grid, errors.tolist(), means.tolist())


def _reason(
    grid: Sequence[int], pick: int, errors: np.ndarray, least: float, capped: bool, sampled: tuple[int, int]
) -> str:
    who = f"{sampled[0]} of {sampled[1]} adapters" if sampled[0] < sampled[1] else "adapters"
    most = "the most with which the pack is smaller than the LoRAs" if capped else "the most there are"
    others = f", and {errors[-1]:.2f} at {grid[-1]}, {most}" if pick < len(grid) - 1 else f", which is {most}"
    if least >= NOTHING:
        why = (
            "there is next to nothing that they share, for at no number of components do the directions of the others "
            "keep much more of them than random ones would"
        )
    elif pick == len(grid) - 1 and capped:
        why = "further directions would keep still more of them than random ones"
    elif pick == len(grid) - 1:
        why = "up to the last one, the directions keep more of them than random ones would"
    else:
        why = "further directions keep little more of them than random ones would"
    return (
        f"n_components={grid[pick]} was chosen: {who} left out of the fit one at a time have a mean delta error of "
        f"{errors[pick]:.2f} there{others}; {why}."
    )


def _grid(outlines: Mapping[str, Outline], setting: Setting) -> tuple[list[int], bool]:
    """Numbers to compare, up to the largest with which the pack is smaller than the LoRAs; whether that is a limit."""
    limits, costs, spectra, lora = [], [], 0, 0
    for outline in outlines.values():
        specs = outline.specs
        rows = sum(spec.rank for spec in specs)
        limits.append((min(rows, specs[0].in_features), min(rows, specs[0].out_features)))
        costs.append(prices(specs, setting))
        spectra += 4 * sum(limits[-1])
        lora += lora_bytes(specs, setting)

    def smaller(k: int) -> bool:
        sides = zip(limits, costs, strict=True)
        return spectra + sum(min(k, n) * p for pair, cost in sides for n, p in zip(pair, cost, strict=True)) < lora

    most = max(max(pair) for pair in limits)
    below = [k for k in range(1, most + 1) if smaller(k)]
    top = below[-1] if below else most
    steps = {round(2 ** (half / 2)) for half in range(2 * top.bit_length())}
    return sorted({k for k in steps if k < top} | {top}), top < most


def _samples(outlines: Mapping[str, Outline], setting: Setting) -> tuple[list[str], list[str]]:
    """Modules to look at, and adapters to leave out: all, or so many that it is no more work than the fit itself."""
    generator = torch.Generator().manual_seed(0)
    names = list(setting.weights)
    work = {name: _work(outline.specs) for name, outline in outlines.items()}
    total = sum(work.values())
    budget = max(CHEAP, (1 + setting.options.sweeps) * total)
    counts = [min(most, len(names)) for most in SAMPLES]
    count = next((count for count in counts if count * total <= budget), counts[-1])
    modules: list[str] = []
    spent = 0.0
    for name in _shuffled(list(outlines), generator):
        spent += count * work[name]
        if modules and spent > budget:
            break
        modules.append(name)
    seen = {adapter for module in modules for adapter in outlines[module].trained}
    chosen = _shuffled([name for name in names if name in seen], generator)[:count]
    return sorted(modules), [name for name in names if name in chosen]


def _shuffled(names: Sequence[str], generator: torch.Generator) -> list[str]:
    return [names[place] for place in torch.randperm(len(names), generator=generator).tolist()]


def _work(specs: Sequence[ModuleSpec]) -> float:
    """Of a basis on both sides."""
    rows = sum(spec.rank for spec in specs)
    return float(sum(min(rows, width) ** 3 for width in (specs[0].in_features, specs[0].out_features)))


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of each adapter that is left out, over the modules: ‖D‖², (s,); ‖P_U D P_V‖² and what is outside, (s, g)."""

    totals: np.ndarray
    kept: np.ndarray
    outside: np.ndarray

    @classmethod
    def of(cls, adapters: int, steps: int) -> "_Sums":
        return cls(np.zeros(adapters), np.zeros((adapters, steps)), np.zeros((adapters, steps)))


def _add(found: _Sums, read: Read, sample: Sequence[str], setting: Setting, grid: Sequence[int]) -> None:
    trained = [member for member in read() if member.trained]
    everyone = setting.stack(trained)
    most = grid[-1]
    down, up = _without(everyone.down, everyone.down_roots, most), _without(everyone.up, everyone.up_roots, most)
    for index, member in enumerate(trained):
        if member.adapter not in sample:
            continue
        row = sample.index(member.adapter)
        down_gram, up_gram = factor_grams(member.factors)
        total = member.factors.scaling**2 * float((down_gram * up_gram).sum())
        found.totals[row] += total
        if len(trained) == 1:
            found.outside[row] += total
            continue
        kept, outside = _of_one(member.factors, (down(index), up(index)), total, grid)
        found.kept[row] += kept
        found.outside[row] += outside


def _without(stack: RowBlocks, roots: Sequence[Tensor], most: int) -> Callable[[int], Tensor]:
    """The leading directions, as rows and at most so many, of all blocks but one; by the place of that one."""
    if stack.gram is not None:
        return lambda index: (
            stack.without(index).leading([*roots[:index], *roots[index + 1 :]], component_rule(most, None)).components()
        )
    rows = stack.weighted(roots)
    total = rows.mT @ rows

    def directions(index: int) -> Tensor:
        own = rows[stack.blocks[index]]
        squares, vectors = torch.linalg.eigh(total - own.mT @ own)
        there = int((squares > GRAM_RESOLUTION**2 * squares[-1]).sum())
        leading: Tensor = vectors.flip(1)[:, : min(most, there)].mT
        return leading

    return directions


def _of_one(
    factors: LoRAFactors, others: tuple[Tensor, Tensor], total: float, grid: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """What the first k directions of the others keep of an adapter, and how dense it is outside of them, by k.

    The latter: ‖D‖² outside the directions of one side, divided by the share of that side's dimension which is
    outside; the mean of both sides.
    """
    down, up = (side.cpu() for side in others)
    rows = factors.down.to(torch.float64).cpu(), factors.up.mT.to(torch.float64).cpu()
    kept = Kept.of(rows[0] @ down.mT, rows[1] @ up.mT, factors.scaling)
    whole = [gram.cpu().flatten().numpy() for gram in factor_grams(factors)]
    steps = np.array(grid)
    outside = np.zeros(len(grid))
    for grams, other, basis in ((kept.down, whole[1], down), (kept.up, whole[0], up)):
        k, dimension = basis.shape
        # beyond what there is, and where nothing is outside, it stays as it was
        inside = np.minimum(steps, min(k, dimension - 1))
        left = total - factors.scaling**2 * (grams[inside] @ other)
        outside += left * dimension / (dimension - inside) / 2
    return kept.diagonal(np.minimum(steps, len(down)), np.minimum(steps, len(up))), outside
