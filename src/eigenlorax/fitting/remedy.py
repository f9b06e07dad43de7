"""Advice for a pack with large errors: how many components would bring every adapter below an error."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..core.adapter import delta_square
from .module_fitter import ComponentCounts, ModuleFitter, ReadModule, captured_norms

FEW = 500
"""Adapters × modules up to which all modules are read for the advice."""


@dataclass(frozen=True, slots=True)
class ModuleSpectrum:
    """Energy of one module's updates in its leading components, for each number of them, without sweeps or rounding.

    ranks: of both sides. component_bytes: of one more component per side. lora_bytes: of the module as LoRAs.
    captured, totals: ‖P_U D P_V‖² by number of components, (k + 1, n), and ‖D‖², (n,), of each adapter, weighted.
    """

    ranks: ComponentCounts
    component_bytes: tuple[int, int]
    lora_bytes: int
    captured: np.ndarray
    totals: np.ndarray


def _spectrum(read: ReadModule, fitter: ModuleFitter) -> ModuleSpectrum:
    updates = read()
    stack = fitter.stack(updates)
    whole = stack.full_spectrum()
    ranks = whole[0].k, whole[1].k
    counts = np.arange(max(ranks) + 1)
    index = {adapter: i for i, adapter in enumerate(fitter.weights)}
    captured, totals = np.zeros((len(counts), len(index))), np.zeros(len(index))
    both = [np.minimum(counts, rank) for rank in ranks]
    for update, norms in captured_norms(updates, stack, whole):
        weight = fitter.weights[update.adapter] ** 2
        captured[:, index[update.adapter]] = weight * norms.pairwise(*both)
        totals[index[update.adapter]] = weight * delta_square(update.factors)
    specs = [update.factors.spec for update in updates]
    return ModuleSpectrum(ranks, fitter.component_bytes(specs), fitter.lora_bytes(specs), captured, totals)


def smallest(reads: Mapping[str, ReadModule], fitter: ModuleFitter, error: float) -> tuple[int, float]:
    """Return the smallest number of components with which every delta error is about `error` at most.

    Also returns the bytes of components and coefficients that this takes, divided by those of the LoRAs. Both are
    estimates, from bases without sweeps or rounding.
    """
    modules = [_spectrum(read, fitter) for read in reads.values()]
    counts = range(max(len(module.captured) for module in modules))
    captured = np.array([sum(m.captured[min(k, len(m.captured) - 1)] for m in modules) for k in counts])
    totals = np.sum([module.totals for module in modules], axis=0)
    trained = totals > 0
    errors = np.sqrt(np.maximum(1 - captured[:, trained] / totals[trained], 0.0)).max(axis=1)
    k = int(np.flatnonzero(errors <= max(error, errors[-1]))[0])
    sides = [pair for module in modules for pair in zip(module.ranks, module.component_bytes, strict=True)]
    stored = sum(min(k, rank) * size for rank, size in sides)
    return k, stored / sum(module.lora_bytes for module in modules)


def suggest(reads: Mapping[str, ReadModule], fitter: ModuleFitter, above: float) -> str:
    """Return a sentence on what would keep every adapter's delta error below `above`."""
    k, share = smallest(_sampled(reads, len(fitter.weights)), fitter, above)
    enough = f"About -k {k} (n_components={k}) would bring every adapter below {above:g}"
    if share >= 1:
        return f"{enough}, in more bytes than the LoRAs themselves have: keep such adapters as ordinary LoRAs."
    bounded = f"; or --max-error {above:g} (max_error={above:g}), in the fewest bytes" if above else ""
    return f"{enough}{bounded}."


def _sampled(reads: Mapping[str, ReadModule], n_adapters: int) -> Mapping[str, ReadModule]:
    """Return all modules, or a quarter of them drawn from a fixed seed if reading all would take long."""
    if n_adapters * len(reads) <= FEW:
        return reads
    order = torch.randperm(len(reads), generator=torch.Generator().manual_seed(0)).tolist()
    names = list(reads)
    return {names[index]: reads[names[index]] for index in sorted(order[: -(-len(reads) // 4)])}
