"""Bytes against the worst error, for the pack, for other error bounds of the codec, and for tuned baselines."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from ..codec.encoder import RatePoint, is_steep
from ..core.adapter import LazyMapping
from ..core.batch import ModuleBatch, pad_factors
from ..core.progress import Progress
from ..pack.pack import Pack
from ..pack.packed_adapter import PackedAdapter
from . import module_sample, numbers
from .analysis import codec_bytes, losses, per_adapter, rate_bound
from .analysis.per_adapter import BOTH, CUT_BY_ENERGY, ROUNDED, Point, Tables
from .analysis.shared_basis import SHARED_BASIS, SharedBasis
from .comparison_data import Frontier, FrontierPoint
from .measure import own_name
from .originals import Originals
from .task_data import TaskFrontier

NUMBERS = 1.5e6
"""Maximum number of elements of all factors for which all modules are measured; else only some modules."""
HELD_NUMBERS = 2**24
"""Maximum number of elements of measured modules that are held in memory, in float64."""
SHARE = 0.02
"""Share of the elements of larger collections that is measured, where that is more than `NUMBERS`."""
ERRORS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
WORST = 0.8
"""Maximum worst error of a point; points with a larger one are left out."""
ESTIMATED = 1e-5, 0.5
"""Range of error bounds in which estimates of the codec's bytes are accurate to a few per cent, or `is_rough`."""
_OWN_BOUND = 1.05
"""Factor between the error of a coded pack and a bound up to which bytes are not estimated: the pack's are known."""
PACK, FIT, CODEC, BOUND = "pack", "fit", "codec", "bound"
SHARING_METHODS = {
    SHARED_BASIS: "one shared basis",
    # no longer measured, but contained in reports of earlier versions
    "joint, full cores": "joint diagonalisation, full cores",
    "joint, diagonal cores": "joint diagonalisation, diagonal cores",
}
METHODS = {
    PACK: "this pack",
    CODEC: "the codec at other error bounds, estimated",
    BOUND: "Gaussian bound of each LoRA by itself",
    ROUNDED: "each LoRA rounded to few bits",
    CUT_BY_ENERGY: "each LoRA truncated by SVD, 16 bits",
    BOTH: "each LoRA truncated and rounded",
    **SHARING_METHODS,
}
"""Labels of the methods of a frontier, by the `way` of a point."""
TASK_METHODS = {PACK: METHODS[PACK], FIT: "fitted at a ratio", BOTH: METHODS[BOTH]}
"""Labels of the methods that are run on a task."""

_MUCH_SMALLER = 0.95
"""Share of the pack's bytes below which the codec's estimate is mentioned; estimates are accurate to a few per cent."""
BASELINES = "measuring baselines"
"""Stage that is reported to a progress callback."""
_SIZES = (4, 8, 16, 32, 64, 128, 256, 512)
"""Components per side of the shared basis."""
_BITS, _SWEEPS = ((8, 8), (4, 4)), 1
_IMPROVEMENT = 0.97
"""Maximum ratio of a point's error to that of the previous, smaller point."""


def frontier(
    pack: Pack, packed: Mapping[str, PackedAdapter], originals: Originals, seed: int, progress: Progress
) -> Frontier | None:
    """Measure the pack and the baselines for the trained adapters whose originals were passed.

    The bytes of the codec at other error bounds are estimates. In a collection with more than `NUMBERS` elements, the
    codec and the baselines are measured on some modules, drawn by kind, and their bytes are scaled to all modules.

    Args:
        pack: The pack.
        packed: Its adapters, by name.
        originals: The original adapters.
        seed: Seed of the sample of modules.
        progress: Callback with the arguments (stage, done, total).

    Returns:
        The points: the pack, the codec and the baselines; None if there is nothing to store.
    """
    names = list(originals.adapters)
    sizes = _sizes(pack, packed, originals)
    nonempty = [module for module, size in sizes.items() if size > 0]
    if not nonempty:
        return None
    chosen = _sample(nonempty, sizes, seed)
    scale = sum(sizes.values()) / sum(sizes[module] for module in chosen)
    stacks = LazyMapping(dict.fromkeys(chosen), lambda module: _stack(pack, packed, originals, module))
    # modules that are not held in memory are read each time they are needed
    is_held = sum(sizes[module] for module in chosen) <= HELD_NUMBERS
    modules: Mapping[str, ModuleBatch] = dict(stacks) if is_held else stacks
    records = [pack.records[name] for name in names]
    of_pack = FrontierPoint(
        way=PACK,
        settings="",
        stored_bytes=pack.info.stored_bytes + sum(record.coefficient_bytes for record in records),
        worst=max(record.delta_error for record in records),
        mean=sum(record.delta_error for record in records) / len(records),
    )
    lora_float16 = 2 * sum(sizes.values())
    shapes = {module: pack.subspace.modules[module].shape for module in chosen}
    bounds = [error for error in _bounds(of_pack.worst) if ESTIMATED[0] <= error <= ESTIMATED[1]]
    coded = [
        # the codec lets the error of every adapter come close to the bound
        FrontierPoint(CODEC, "", round(scale * point.bytes), point.error, point.error)
        for point in reversed(codec_bytes.rate_points(shapes, packed, originals, bounds, progress))
    ]
    if pack.is_coded:
        coded = _consistent(coded, of_pack)
    least = [
        FrontierPoint(BOUND, "", round(scale * stored_bytes), error, error)
        for error, stored_bytes in reversed(_least_bytes(modules, shapes, originals, bounds))
    ]
    progress(BASELINES, 0, 1 + len(_SIZES))
    tables = per_adapter.tables(modules)
    points = [
        FrontierPoint(method, settings, round(scale * point.stored_bytes), point.worst, point.mean)
        for method, settings, point in _baseline_points(modules, tables, of_pack.worst, lora_float16 / scale, progress)
    ]
    error = _relative_error(tables, [sizes[module] for module in chosen], of_pack.worst, len(nonempty))
    return Frontier(len(names), len(chosen), len(nonempty), error, lora_float16, [of_pack, *coded, *least, *points])


def cheapest(frontier: Frontier) -> FrontierPoint | None:
    """Return the smallest baseline whose worst error is at most the pack's; None if there is none."""
    pack, *others = frontier.points
    candidates = [point for point in others if point.way not in (CODEC, BOUND) and point.worst <= pack.worst]
    return min(candidates, key=lambda point: (point.stored_bytes, point.worst), default=None)


def coded_points(frontier: Frontier | None) -> list[FrontierPoint]:
    """Return the codec's points, from small errors to large ones; empty in reports of earlier versions."""
    points = frontier.points if frontier is not None else []
    return sorted((point for point in points if point.way == CODEC), key=lambda point: point.worst)


def coded_within(frontier: Frontier | None, error: float) -> FrontierPoint | None:
    """Return the codec's smallest point whose error is at most `error`; None if there is none."""
    return max(
        (point for point in coded_points(frontier) if point.worst <= error), key=lambda point: point.worst, default=None
    )


def _consistent(coded: Sequence[FrontierPoint], of_pack: FrontierPoint) -> list[FrontierPoint]:
    """Return the estimates that agree with a coded pack: more bytes at clearly smaller errors, fewer at larger ones."""
    return [
        point
        for point in coded
        if (point.worst * _OWN_BOUND < of_pack.worst and point.stored_bytes > of_pack.stored_bytes)
        or (point.worst > of_pack.worst * _OWN_BOUND and point.stored_bytes < of_pack.stored_bytes)
    ]


def is_rough(frontier: Frontier, *, is_coded: bool = False) -> bool:
    """Return whether estimates of the codec's bytes can be wrong by a factor of two.

    Args:
        frontier: Bytes against the worst error.
        is_coded: True if the pack is coded, so that it is a point of the codec's curve.
    """
    points = [*coded_points(frontier), *frontier.points[: int(is_coded)]]
    return is_steep([RatePoint(point.worst, point.stored_bytes) for point in points])


def estimated_size(frontier: Frontier, coded: FrontierPoint) -> str:
    """Return the estimated bytes of a point in words, and how far the estimate can be wrong."""
    caution = " (an estimate that can be wrong by a factor of two)" if is_rough(frontier) else ""
    return f"about {numbers.size(coded.stored_bytes)}{caution}"


def at_equal_error(frontier: Frontier) -> str:
    """Return sentences that compare the pack with other methods and the Gaussian bound at the pack's worst error."""
    return " ".join([other_methods(frontier), *on_bound(frontier)])


def other_methods(frontier: Frontier) -> str:
    """Return sentences that compare the pack, the codec and the smallest baseline at the pack's worst error."""
    pack, baseline, coded = frontier.points[0], cheapest(frontier), coded_within(frontier, frontier.points[0].worst)
    at_error = f"the pack's worst error of {numbers.error(pack.worst)}"
    sentences = [f"No other method that was tried reaches {at_error}."]
    if baseline is not None:
        settings = f" ({baseline.settings})" if baseline.settings else ""
        sentences = [
            f"For {at_error}, the best other method takes {numbers.size(baseline.stored_bytes)}: "
            f"{METHODS[baseline.way]}{settings}.",
            f"The pack takes {numbers.size(pack.stored_bytes)}.",
        ]
    if coded is not None and coded.stored_bytes < _MUCH_SMALLER * pack.stored_bytes:
        smaller_error = ", at a smaller error" if coded.worst * _OWN_BOUND < pack.worst else ""
        sentences.append(f"{option(coded)} would take {estimated_size(frontier, coded)}{smaller_error}.")
    return " ".join(sentences)


def on_bound(frontier: Frontier) -> list[str]:
    """Return a sentence on the Gaussian bound at the pack's worst error; none in reports of earlier versions."""
    worst = frontier.points[0].worst
    bound = next((point for point in frontier.points if point.way == BOUND and point.worst == worst), None)
    if bound is None:
        return []
    least = numbers.size(bound.stored_bytes)
    return [
        f"About the fewest bytes in which any code holds these LoRAs at this error, each by itself, are {least}: the "
        "Gaussian rate–distortion bound."
    ]


def option(coded: FrontierPoint) -> str:
    """Return the option of `fit` that makes a pack of this error, for the command line and for Python."""
    bound = numbers.bound(coded.worst)
    return f"`--max-error {bound}` (`max_error={bound}`)"


def on_task(frontier: TaskFrontier) -> str:
    """Return a sentence that compares fits with truncated and rounded LoRAs of the same bytes, by KL divergence."""
    fits, baselines = (
        {point.ratio: point for point in frontier.points if point.way == method} for method in (FIT, BOTH)
    )
    better = sum(point.kl < baselines[ratio].kl for ratio, point in fits.items())
    worse = sum(point.kl > baselines[ratio].kl for ratio, point in fits.items())
    return (
        f"Compared with LoRAs truncated and rounded to the same bytes, the predictions of the fit are closer to the "
        f"originals at {better} of {numbers.plural(len(fits), 'ratio')}, and less close at {worse}."
    )


def _bounds(worst: float) -> list[float]:
    """Return error bounds, ascending: `ERRORS`, and the pack's worst error if it is less than `WORST`."""
    return sorted({*ERRORS, *([worst] if worst < WORST else [])})


def _sizes(pack: Pack, packed: Mapping[str, PackedAdapter], originals: Originals) -> dict[str, int]:
    """Return the number of elements of all adapters' factors, by module of the subspace."""
    sizes = dict.fromkeys(pack.subspace.modules, 0)
    for name, adapter in originals.adapters.items():
        for own, module in packed[name].subspace_names.items():
            sizes[module] += adapter.specs[own].numbers
    return sizes


def _sample(modules: Sequence[str], sizes: Mapping[str, int], seed: int) -> list[str]:
    """Return as many modules as `NUMBERS` and `SHARE` allow, at least one."""
    total = sum(sizes[module] for module in modules)
    count = max(1, min(len(modules), int(len(modules) * max(NUMBERS / total, SHARE))))
    return module_sample.systematic(modules, count, seed) if count < len(modules) else list(modules)


def _relative_error(tables: Tables, sizes: Sequence[int], worst: float, of: int) -> float | None:
    """Return the relative standard error of bytes that were scaled from a sample to all modules.

    Args:
        tables: Measurements of the modules of the sample.
        sizes: Number of elements of each of these modules.
        worst: Error at which bytes are compared.
        of: Number of all modules.
    """
    n = len(sizes)
    if not 1 < n < of:
        return None
    points = [per_adapter.at_error(tables.of_module(index), worst)[BOTH] for index in range(n)]
    rates = [point.stored_bytes / size for point, size in zip(points, sizes, strict=True) if point is not None]
    if len(rates) < n or not any(rates):
        return None
    return statistics.stdev(rates) / statistics.fmean(rates) * math.sqrt((1 - n / of) / n)


def _stack(pack: Pack, packed: Mapping[str, PackedAdapter], originals: Originals, module: str) -> ModuleBatch:
    n_out, n_in = pack.subspace.modules[module].shape
    factors = []
    for name, adapter in originals.adapters.items():
        own = own_name(packed[name], module)
        factors.append(adapter.modules[own] if own is not None else None)
    return pad_factors(factors, n_in, n_out)


def _least_bytes(
    modules: Mapping[str, ModuleBatch],
    shapes: Mapping[str, tuple[int, int]],
    originals: Originals,
    errors: Sequence[float],
) -> list[tuple[float, float]]:
    """Return the Gaussian bound in bytes at each error. Equal adapters are counted once, as the codec stores them."""
    rows = {originals.scans[name].content_hash: row for row, name in enumerate(originals.adapters)}
    distinct = sorted(rows.values())
    spectra = [(losses.singular_squares(modules[name])[distinct], shapes[name]) for name in modules]
    return list(zip(errors, rate_bound.least_bytes(spectra, errors), strict=True))


def _baseline_points(
    modules: Mapping[str, ModuleBatch], tables: Tables, worst: float, lora_bytes: float, progress: Progress
) -> Iterator[tuple[str, str, Point]]:
    """Yield (method, settings in words, point) of each baseline, for each method from few bytes to many."""
    steps = 1 + len(_SIZES)
    by_error = [per_adapter.at_error(tables, error) for error in _bounds(worst)]
    for method in (ROUNDED, CUT_BY_ENERGY, BOTH):
        yield from ((method, "", point) for point in _pareto_front([points[method] for points in by_error], worst))
    shared = SharedBasis(modules, _BITS, _SWEEPS)
    candidates: list[Point] = []
    for done, k in enumerate(_SIZES, start=1):
        progress(BASELINES, done, steps)
        if shared.lower_bound(k) >= WORST or k // 2 >= shared.max_components:
            continue
        # a shared basis that is larger than the LoRAs cannot be on the front
        if shared.stored_bytes(k, _BITS[0]) < lora_bytes:
            candidates += shared.measure(min(k, shared.max_components)).values()
    for point in _pareto_front([point for point in candidates if point.stored_bytes < lora_bytes], worst):
        yield SHARED_BASIS, _settings_text(point), point
    progress(BASELINES, steps, steps)


def _pareto_front(points: Sequence[Point | None], bound: float) -> list[Point]:
    """Return the Pareto-optimal points in bytes and worst error, sorted by bytes.

    Points that hardly improve on the previous one are left out, except the smallest one with an error of at most
    `bound`.
    """
    candidates = sorted(
        (point for point in points if point is not None and point.worst < WORST),
        key=lambda point: (point.stored_bytes, point.worst),
    )
    front: list[Point] = []
    worst = math.inf
    for point in candidates:
        if point.worst < _IMPROVEMENT * worst or point.worst <= bound < worst:
            front.append(point)
            worst = point.worst
    return front


def _settings_text(point: Point) -> str:
    basis, coefficients = point.settings["bits"]
    return f"k = {point.settings['k']}, {basis} bits" + (f" and {coefficients}" if coefficients != basis else "")
