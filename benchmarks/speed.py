"""Seconds of each method on collections that are made up for it."""

import gc
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from collection import Shape, make_up
from methods import METHODS, fit_module_seconds

SEED = 20261124
COMPONENTS = 32
VLORA_COMPONENTS = 16
WARM_UP = Shape(3, 4, 64, 1)
FITS = {"delta": ("delta", 2), "delta_without_sweeps": ("delta", 0), "factors": ("factors", 2)}

Json = dict[str, Any]


def measure_speed(shape: Shape, repetitions: int, folder: Path) -> Json:
    """Medians over repetitions, in each of which every method runs once, another one first each time.

    Files are in the page cache, and every method has run once before, on a small collection.
    """
    warm_up = {path.name: path for path in make_up(WARM_UP, SEED, folder / "warm-up")}
    folders = {path.name: path for path in make_up(shape, SEED, folder / "adapters")}
    for path in folders.values():
        (path / "adapter_model.safetensors").read_bytes()
    names = list(METHODS)
    for name in names:
        METHODS[name](warm_up, 2)
    parts: dict[str, list[Mapping[str, float]]] = {name: [] for name in names}
    bare: dict[str, list[float]] = {name: [] for name in FITS}
    for repetition in range(repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            parts[name].append(METHODS[name](folders, components_of(name)).parts)
            line = f"{shape.label}, repetition {repetition + 1}: {name} {parts[name][-1]['total']:.2f} s"
            print(line, file=sys.stderr, flush=True)
        for name, (weighting, sweeps) in FITS.items():
            bare[name].append(fit_module_seconds(folders, COMPONENTS, weighting, sweeps))
    medians = {
        name: {part: statistics.median(each[part] for each in runs) for part in runs[0]} for name, runs in parts.items()
    }
    fits = {name: statistics.median(seconds) for name, seconds in bare.items()}
    return {
        "shape": shape.label,
        "repetitions": repetitions,
        "n_components": {name: components_of(name) for name in names},
        "median_seconds": medians,
        "all_seconds": {name: [each["total"] for each in runs] for name, runs in parts.items()},
        "fit_module_seconds": fits,
        "ratios": {
            "whole": ratios({name: each["total"] for name, each in medians.items()}),
            "fit": ratios({name: each["fit"] for name, each in medians.items()}),
            "fit_module_delta_to_factors": fits["delta"] / fits["factors"],
        },
    }


def components_of(method: str) -> int:
    """vlora's are whole flattened factors, of which 32 adapters span 31 at most: it would have nothing to leave out."""
    return VLORA_COMPONENTS if method == "vlora" else COMPONENTS


def ratios(seconds: Mapping[str, float]) -> Json:
    return {
        "delta_to_factors": seconds["delta"] / seconds["factors"],
        "lorashare_to_delta": seconds["lorashare"] / seconds["delta"],
        "lorashare_to_factors": seconds["lorashare"] / seconds["factors"],
        "vlora_to_delta": seconds["vlora"] / seconds["delta"],
    }
