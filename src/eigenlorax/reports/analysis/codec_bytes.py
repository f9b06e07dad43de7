"""Bytes that the codec would take for other error bounds, estimated from a survey of some modules."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from ...codec import encoder
from ...codec.encoder import CollectionEncoder, RatePoint
from ...codec.module_updates import ModuleUpdates, UpdateSource
from ...codec.stage_runner import StageRunner
from ...codec.step_sizes import upper_step_size_grid
from ...core.batch import delta_squares, pad_factors
from ...core.progress import Progress
from ...pack.packed_adapter import PackedAdapter
from ..originals import Originals

COMPARED_MODULES = 4
"""Number of modules on which one set of bases and several are compared."""
CLUSTERED_AT = 0.1
"""Error bound at which one set of bases and several are compared, the common choice for storage."""


def rate_points(
    shapes: Mapping[str, tuple[int, int]],
    packed: Mapping[str, PackedAdapter],
    originals: Originals,
    errors: Sequence[float],
    progress: Progress,
) -> list[RatePoint]:
    """Estimate the bytes of bases and adapters for each error bound, as `fit(max_error=…)` would store them.

    Equal adapters are counted once, because the codec stores the others as references.

    Args:
        shapes: Shape (out, in) of each module that is surveyed.
        packed: Adapters of the pack, by name.
        originals: The original adapters.
        errors: Error bounds, ascending.
        progress: Callback with the arguments (stage, done, total).

    Returns:
        A point for each bound; an empty list if no adapter has trained any of the modules.
    """
    distinct = {originals.scans[name].content_hash: name for name in sorted(originals.adapters, reverse=True)}
    squares: dict[str, float] = {}
    trained: dict[str, dict[str, str]] = {module: {} for module in shapes}
    for name in sorted(distinct.values()):
        own_squares = originals.scans[name].delta_squares
        for own, module in packed[name].subspace_names.items():
            if module in shapes and own_squares[own] > 0:
                trained[module][name] = own
                squares[name] = squares.get(name, 0.0) + own_squares[own]
    index = {name: number for number, name in enumerate(squares)}
    modules = [
        ModuleUpdates(
            module,
            shapes[module],
            tuple(_source(index[name], originals, name, own) for name, own in members.items()),
        )
        for module, members in trained.items()
        if members
    ]
    if not modules:
        return []

    def surveyed(_stage: str, done: int, total: int) -> None:
        progress("estimating the codec's bytes", done, total)

    norms = torch.tensor(list(squares.values()), dtype=torch.float64).sqrt()
    numbers = _numbers(originals, trained)
    grid = upper_step_size_grid(min(errors), numbers)
    whole = CollectionEncoder(modules, norms, grid, StageRunner.of(surveyed, error=min(errors)))
    if len(modules) <= COMPARED_MODULES:
        return encoder.split_into_clusters(whole, CLUSTERED_AT).frontier(errors)
    groups = _groups(modules, len(squares), numbers, whole.runner)
    return (whole if groups is None else whole.in_clusters(grid, groups)).frontier(errors)


def _numbers(originals: Originals, trained: Mapping[str, Mapping[str, str]]) -> int:
    """Return the largest number of elements of an adapter's factors in the surveyed modules."""
    numbers = Counter[str]()
    for members in trained.values():
        for name, own in members.items():
            numbers[name] += originals.adapters[name].specs[own].numbers
    return max(numbers.values())


def _groups(modules: Sequence[ModuleUpdates], n: int, numbers: int, runner: StageRunner) -> list[int] | None:
    """Return the cluster of each of n adapters, chosen by the bytes of a few modules that all of them have trained.

    Args:
        modules: Updates of all modules.
        n: Number of adapters.
        numbers: Number of elements of an adapter's factors, at most.
        runner: Runner of the stages, which holds the singular components of the modules.
    """
    common = [module for module in modules if len(module.sources) == n]
    count = min(len(common), COMPARED_MODULES)
    chosen = [common[index * len(common) // count] for index in range(count)]
    if not chosen:
        return None
    squares = torch.zeros(n, dtype=torch.float64)
    for module in chosen:
        factors = [source.read() for source in module.sources]
        squares[module.indices] += delta_squares(pad_factors(factors, *reversed(module.shape)))
    grid = upper_step_size_grid(CLUSTERED_AT, numbers)
    few = CollectionEncoder(chosen, squares.sqrt(), grid, runner)
    return encoder.best_groups(few, CLUSTERED_AT)


def _source(index: int, originals: Originals, name: str, own: str) -> UpdateSource:
    return UpdateSource(index, lambda: originals.adapters[name].modules[own])
