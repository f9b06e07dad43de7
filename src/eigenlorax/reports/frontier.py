"""Bytes against the worst error: the pack as one point among everything else that could be done with its adapters."""

import math
from collections.abc import Iterator, Mapping, Sequence

from ..core.adapter import Lazy
from ..core.stack import Stack, stack
from ..fitting.fit import Progress
from ..pack.pack import Pack
from ..pack.packed_adapter import PackedAdapter
from . import numbers
from .analysis import rivals
from .analysis.rivals import Point, Together
from .data import Frontier, FrontierPoint, TaskFrontier
from .measure import own_name
from .originals import Originals

NUMBERS = 1.5e6
"""Numbers of factors that are looked at: of a larger collection, some modules."""
ERRORS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
WORST = 0.8
"""The error from which on a way is of no use."""
WAYS = {
    "pack": "this pack",
    rivals.ROUNDED: "each LoRA rounded to few bits",
    rivals.CUT_BY_ENERGY: "each LoRA cut by SVD, 16 bits",
    rivals.BOTH: "each LoRA cut and rounded",
    rivals.COEFFICIENTS: "one shared basis",
    rivals.FULL: "joint diagonalisation, full cores",
    rivals.DIAGONAL: "joint diagonalisation, diagonal cores",
}
"""The ways of the frontier in words."""
SHARING = rivals.KINDS
FIT = "fit"
TASK_WAYS = {"pack": WAYS["pack"], FIT: "fitted at a ratio", rivals.BOTH: WAYS[rivals.BOTH]}
"""Those that are run on a task."""

_LEAST_K, _MOST_K = 4, 512
_QUICK_K = 64
"""With diagonal cores, the most."""
_BITS, _ROUNDS = ((8, 8), (4, 4)), (1, 10)
_ENOUGH = 0.97
"""Of the best so far, a share of bytes or of error that is worth another point."""


def frontier(pack: Pack, packed: Mapping[str, PackedAdapter], found: Originals, say: Progress) -> Frontier | None:
    """The pack, and what else could be done with the trained adapters whose originals are at hand.

    Of a collection of more than `NUMBERS`, every way is tried on some of the modules, evenly spread, and its bytes are
    those it would take with all, in proportion. None where there is nothing to store.
    """
    names = list(found.adapters)
    sizes = _sizes(pack, packed, found)
    every = [module for module, size in sizes.items() if size > 0]
    if not every:
        return None
    chosen = _some(every, sizes)
    scale = sum(sizes.values()) / sum(sizes[module] for module in chosen)
    stacks = Lazy(dict.fromkeys(chosen), lambda module: _stack(pack, packed, found, names, module))
    modules: Mapping[str, Stack] = dict(stacks) if scale == 1 else stacks
    records = [pack.records[name] for name in names]
    own = FrontierPoint(
        "pack",
        "",
        pack.info.stored_bytes + sum(record.coefficient_bytes for record in records),
        max(record.delta_error for record in records),
        sum(record.delta_error for record in records) / len(records),
    )
    lora = 2 * sum(sizes.values())
    points = [
        FrontierPoint(way, words, round(scale * point.stored_bytes), point.worst, point.mean)
        for way, words, point in _tried(modules, own.worst, lora / scale, say)
    ]
    return Frontier(len(names), len(chosen), len(every), lora, [own, *points])


def cheapest(found: Frontier) -> FrontierPoint | None:
    """Of all ways but the pack, the fewest bytes with a worst error that is not above the pack's."""
    pack, *others = found.points
    there = [point for point in others if point.worst <= pack.worst]
    return min(there, key=lambda point: (point.stored_bytes, point.worst), default=None)


def at_equal_error(found: Frontier) -> str:
    """The pack beside the cheapest other way that loses no more, in a sentence."""
    pack, other = found.points[0], cheapest(found)
    if other is None:
        return f"Nothing else that was tried holds the pack's worst error of {numbers.error(pack.worst)}."
    settings = f" ({other.settings})" if other.settings else ""
    return (
        f"For the pack's worst error of {numbers.error(pack.worst)}, the best other way takes "
        f"{numbers.size(other.stored_bytes)}: {WAYS[other.way]}{settings}. The pack takes "
        f"{numbers.size(pack.stored_bytes)}."
    )


def on_task(found: TaskFrontier) -> str:
    """How often what is fitted at a ratio changes predictions less than what stands alone in the same bytes, in a
    sentence."""
    fits, rival = ({one.ratio: one for one in found.points if one.way == way} for way in (FIT, rivals.BOTH))
    better = sum(one.kl < rival[ratio].kl for ratio, one in fits.items())
    worse = sum(one.kl > rival[ratio].kl for ratio, one in fits.items())
    return (
        f"Of {numbers.plural(len(fits), 'ratio')}, the fit predicts more nearly what the originals do than each LoRA "
        f"cut and rounded to the same bytes at {better}, and less nearly at {worse}."
    )


def _sizes(pack: Pack, packed: Mapping[str, PackedAdapter], originals: Originals) -> dict[str, int]:
    """Numbers of the adapters' factors by module of the subspace."""
    found = dict.fromkeys(pack.subspace.modules, 0)
    for name in originals.adapters:
        for own, place in packed[name].places.items():
            found[place] += originals.adapters[name].specs[own].numbers
    return found


def _some(modules: Sequence[str], sizes: Mapping[str, int]) -> list[str]:
    """As many as there is room for, evenly spread; one at least."""
    total = sum(sizes[module] for module in modules)
    count = max(1, min(len(modules), int(len(modules) * NUMBERS / total)))
    return [modules[place * len(modules) // count] for place in range(count)]


def _stack(
    pack: Pack, packed: Mapping[str, PackedAdapter], found: Originals, names: Sequence[str], module: str
) -> Stack:
    n_out, n_in = pack.subspace.modules[module].shape
    owns = [own_name(packed[name], module) for name in names]
    return stack(
        [found.adapters[name].modules[own] if own is not None else None for name, own in zip(names, owns, strict=True)],
        n_in,
        n_out,
    )


def _tried(modules: Mapping[str, Stack], worst: float, lora: float, say: Progress) -> Iterator[tuple[str, str, Point]]:
    """Ways, their settings in words, and what became of them; each way from few bytes to many."""
    stage = "trying other ways"
    ks = [k for k in (2**power for power in range(12)) if _LEAST_K <= k <= _MOST_K]
    steps, done = 1 + len(ks) * len(rivals.KINDS), 0
    say(stage, done, steps)
    tables = rivals.tables(modules)
    by_error = [rivals.alone(tables, error) for error in sorted({*ERRORS, *([worst] if worst < WORST else [])})]
    for way in (rivals.ROUNDED, rivals.CUT_BY_ENERGY, rivals.BOTH):
        yield from ((way, "", point) for point in _best([each[way] for each in by_error], worst))
    n = len(tables.total)
    shared = Together(modules, [range(n)], _BITS, _ROUNDS)
    small = sum(sum(ranks) * sum(shared.shapes[name]) for name, ranks in shared.ranks.items()) <= NUMBERS
    for kind in rivals.KINDS if small else (rivals.COEFFICIENTS, rivals.FULL):
        found: list[Point] = []
        for k in ks:
            done += 1
            say(stage, done, steps)
            # what takes more than the LoRAs is no way to make them smaller
            useful = (
                shared.floor(k) < WORST and k // 2 < shared.most(kind) and (kind != rivals.DIAGONAL or k <= _QUICK_K)
            )
            if useful and shared.stored_bytes(kind, k, (8, 8)) < lora:
                found += shared.tried(kind, min(k, shared.most(kind))).values()
        for point in _best([point for point in found if point.stored_bytes < lora], worst):
            yield kind, _words(point), point
    say(stage, steps, steps)


def _best(points: Sequence[Point | None], asked: float) -> list[Point]:
    """Those than which no other has both fewer bytes and a lower error, ascending, not too many; the first of those
    within the error that is asked for is one of them."""
    there = sorted(
        (point for point in points if point is not None and point.worst < WORST),
        key=lambda point: (point.stored_bytes, point.worst),
    )
    found: list[Point] = []
    worst = math.inf
    for point in there:
        if point.worst < _ENOUGH * worst or point.worst <= asked < worst:
            found.append(point)
            worst = point.worst
    return found


def _words(point: Point) -> str:
    basis, own = point.settings["bits"]
    return f"k = {point.settings['k']}, {basis} bits" + (f" and {own}" if own != basis else "")
