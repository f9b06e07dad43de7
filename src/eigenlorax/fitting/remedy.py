"""Advice for a pack with large errors: the number of components that brings every adapter below an error."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..core.adapter import delta_square
from .module_fitter import ComponentCounts, LoadModule, ModuleFitter, captured_norms

FEW = 500
"""Maximum number of adapters × modules for which all modules are read."""


@dataclass(frozen=True, slots=True)
class ModuleSpectrum:
    """Energy of one module's updates in its leading components, without sweeps or rounding.

    Attributes:
        ranks: Maximum number of components (down, up).
        component_bytes: Bytes (down, up) of one more component, with its coefficients in all adapters.
        lora_bytes: Bytes of the module as LoRAs.
        captured: Weighted squared norm ‖P_U D P_V‖² of each adapter in the first 0, 1, …, k components, (k + 1, n).
        totals: Weighted squared norm ‖D‖² of each adapter, (n,).
    """

    ranks: ComponentCounts
    component_bytes: tuple[int, int]
    lora_bytes: int
    captured: np.ndarray
    totals: np.ndarray


def _spectrum(load_module: LoadModule, fitter: ModuleFitter) -> ModuleSpectrum:
    updates = load_module()
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


def smallest(loaders: Mapping[str, LoadModule], fitter: ModuleFitter, error: float) -> tuple[int, float]:
    """Estimate the smallest number of components with which every delta error is at most `error`.

    Args:
        loaders: Functions that load a module's updates, by module.
        fitter: Options of the fit.
        error: Largest delta error of an adapter.

    Returns:
        The number of components, and the bytes of components and coefficients ÷ bytes of the LoRAs. Both are estimates
        from bases without sweeps or rounding.
    """
    modules = [_spectrum(load_module, fitter) for load_module in loaders.values()]
    counts = range(max(len(module.captured) for module in modules))
    captured = np.array([sum(m.captured[min(k, len(m.captured) - 1)] for m in modules) for k in counts])
    totals = np.sum([module.totals for module in modules], axis=0)
    trained = totals > 0
    errors = np.sqrt(np.maximum(1 - captured[:, trained] / totals[trained], 0.0)).max(axis=1)
    k = int(np.flatnonzero(errors <= max(error, errors[-1]))[0])
    sides = [pair for module in modules for pair in zip(module.ranks, module.component_bytes, strict=True)]
    stored = sum(min(k, rank) * size for rank, size in sides)
    return k, stored / sum(module.lora_bytes for module in modules)


def suggest(loaders: Mapping[str, LoadModule], fitter: ModuleFitter, error: float) -> str:
    """Return a sentence that advises how to bring every adapter's delta error below `error`."""
    k, share = smallest(_sample(loaders, len(fitter.weights)), fitter, error)
    by_components = f"About -k {k} (n_components={k}) would bring every adapter below {error:g}"
    if share >= 1:
        return f"{by_components}, in more bytes than the LoRAs take: keep such adapters as ordinary LoRAs."
    by_error_bound = f"; or --max-error {error:g} (max_error={error:g}), in the fewest bytes" if error else ""
    return f"{by_components}{by_error_bound}."


def _sample(loaders: Mapping[str, LoadModule], n_adapters: int) -> Mapping[str, LoadModule]:
    """Return all modules, or a quarter of them, drawn from a fixed seed, if loading all would take long."""
    if n_adapters * len(loaders) <= FEW:
        return loaders
    order = torch.randperm(len(loaders), generator=torch.Generator().manual_seed(0)).tolist()
    names = list(loaders)
    return {names[index]: loaders[names[index]] for index in sorted(order[: -(-len(loaders) // 4)])}
