"""A collection of adapters in so many bytes: as a pack, and in each other way that is known. Nothing here knows a task.

Every way ends in the two factors of each module of each adapter. Those that keep an adapter alone, by SVD or by
rounding, are tuned as the pack is: to the smallest error that every adapter can have in the bytes of all together.
Those with a whole number of shared components get the fewest whose bytes are not below the pack's, so that none of
them has fewer bytes than it.
"""

import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eigenlorax as ex
from eigenlorax.core.batch import ModuleBatch, pad_factors
from eigenlorax.core.linalg import dual_rows
from eigenlorax.reports.analysis import losses, per_adapter
from eigenlorax.reports.analysis.shared_basis import SHARED_BASIS

from . import record

BENCHMARKS = record.ROOT / "benchmarks"
# at the end: nothing there may hide a module of another name
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))
import joint  # noqa: E402
from tuned_baselines import COMBINATIONS, DIAGONAL, FULL, SharedFactors  # noqa: E402

HALVINGS = 40
ROUNDS = {FULL: 20, DIAGONAL: 60}
PACK, SHARED = "pack", "shared basis, float16"
PACKAGES = ("lorashare", "vlora")
"""Rivals that are installed (benchmarks/methods.py)."""

Json = dict[str, Any]
Factors = Mapping[str, ex.LoRAFactors]


@dataclass(frozen=True, slots=True)
class Kept:
    """A collection as one way gives it back. bytes: of tensors, heads aside. settings: by what it came to this size."""

    bytes: int
    settings: Json
    adapters: Mapping[str, Factors]


class Collection:
    """Adapters by name, and their modules' stacks."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = dict(folders)
        self.adapters = {name: ex.read_adapter(folder, name=name) for name, folder in folders.items()}

    @cached_property
    def modules(self) -> dict[str, ModuleBatch]:
        specs = {module: spec for one in self.adapters.values() for module, spec in one.specs.items()}
        return {
            module: pad_factors(
                [one.modules.get(module) for one in self.adapters.values()], spec.in_features, spec.out_features
            )
            for module, spec in specs.items()
        }

    def of_rows(self, rows: Mapping[str, Sequence[tuple[Tensor, Tensor]]]) -> dict[str, Factors]:
        """Factors of each adapter from `down` and `up`, as rows, of each module: those with the scaling in them."""
        return {
            name: {
                module: ex.LoRAFactors(rows[module][index][0].float(), rows[module][index][1].mT.float(), 1.0)
                for module in one.modules
            }
            for index, (name, one) in enumerate(self.adapters.items())
        }


def kept(way: str, collection: Collection, ratio: float, pack_bytes: int) -> Kept | None:
    """The collection in one of the `WAYS`, in about as many bytes as the pack of that ratio took; None where it does
    not become so small."""
    return WAYS[way](collection, ratio, pack_bytes)


def packed(collection: Collection, ratio: float, _: int = 0) -> Kept:
    """`eigenlorax.fit(ratio=)`, by the files that it leaves."""
    return _opened(collection, {"ratio": ratio})


def _opened(collection: Collection, options: Json) -> Kept:
    folders = {name: str(folder) for name, folder in collection.folders.items()}
    with tempfile.TemporaryDirectory() as temporary:
        ex.fit(folders, warn_above=1.0, same_base=True, **options).save(Path(temporary) / "pack")
        pack = ex.Pack.from_pretrained(Path(temporary) / "pack")
        found = pack.summary.bytes
        # numbers are read as they are asked for, from files that go away
        adapters = {name: dict(pack.adapter(name).modules.items()) for name in folders}
    return Kept(found.basis + found.coefficients + found.carried, options, adapters)


def shared(collection: Collection, _: float, least: int) -> Kept:
    """A delta fit with k components a side, bases and coefficients in float16."""

    together = SharedFactors(collection.modules, [range(len(collection.adapters))])
    k = _fewest(
        lambda k: together.stored_bytes(SHARED_BASIS, k, (16, 16)), least, together.max_components(SHARED_BASIS)
    )
    return _opened(collection, {"n_components": k, "dtype": "float16", "coefficient_dtype": "float16"})


# --- alone ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Steps:
    """One adapter in so many bits, with its first 0, 1, … directions, those that win most for a byte first: what is
    lost, as a share of ‖D‖² that never grows, bytes, and the module that each direction is of."""

    bits: int
    lost: Tensor
    costs: Tensor
    modules: list[int]


def alone(bits: Sequence[int], *, cut: bool) -> Callable[[Collection, float, int], Kept | None]:
    """Every adapter by itself, in one of some numbers of bits; cut: and of a rank for each module."""

    def found(collection: Collection, _: float, most: int) -> Kept | None:
        tables = per_adapter.tables(collection.modules, bits)
        n = len(collection.adapters)
        choices = [[_steps(tables, index, each) for each in bits] for index in range(n)]
        if not cut:
            choices = [[_all_of(one) for one in own] for own in choices]

        def chosen(error: float) -> list[tuple[_Steps, int]] | None:
            own = [_cheapest(each, error**2) for each in choices]
            there = [one for one in own if one is not None]
            fits = len(there) == n and sum(int(steps.costs[at]) for steps, at in there) <= most
            return there if fits else None

        # what is cut to nothing has an error of 1, what is rounded coarsely a little more
        low, high = 0.0, 2.0
        best = chosen(high)
        if best is None:
            return None
        for _turn in range(HALVINGS):
            middle = (low + high) / 2
            tried = chosen(middle)
            if tried is None:
                low = middle
            else:
                high, best = middle, tried
        return _restored(collection, best)

    return found


def _steps(tables: per_adapter.Tables, index: int, bits: int) -> _Steps:
    gains: list[tuple[float, int, float, int]] = []
    for module, (table, cost) in enumerate(zip(tables.lost[bits], tables.costs[bits], strict=True)):
        own = (table[index, :-1] - table[index, 1:]).tolist()[: int(tables.ranks[module][index])]
        first = math.inf
        for at, gain in enumerate(own):
            # no direction goes before a larger one of its module
            first = min(first, gain / cost)
            gains.append((-first, module, at, gain))
    gains.sort(key=lambda one: one[:3])
    total = float(tables.total[index]) or 1.0
    lost = total - torch.tensor([0.0, *(gain for *_, gain in gains)], dtype=torch.float64).cumsum(0)
    costs = torch.tensor([0, *(tables.costs[bits][module] for _, module, *_ in gains)]).cumsum(0)
    return _Steps(bits, (lost / total).cummin(0)[0], costs, [module for _, module, *_ in gains])


def _all_of(one: _Steps) -> _Steps:
    """The whole adapter or nothing of it, of which the latter is no choice."""
    lost = torch.full_like(one.lost, math.inf)
    lost[-1] = one.lost[-1]
    return _Steps(one.bits, lost, one.costs, one.modules)


def _cheapest(choices: Sequence[_Steps], bound: float) -> tuple[_Steps, int] | None:
    found = [(steps, int((steps.lost <= bound).int().argmax())) for steps in choices if (steps.lost <= bound).any()]
    return min(found, key=lambda one: int(one[0].costs[one[1]]), default=None)


def _restored(collection: Collection, chosen: Sequence[tuple[_Steps, int]]) -> Kept:
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for place, (name, one) in enumerate(collection.modules.items()):
        own = per_adapter.balanced(one)
        for index, (steps, at) in enumerate(chosen):
            # at least one direction, of zeros, for what reads a LoRA
            rank = steps.modules[:at].count(place)
            part = own.select([index])
            pair = (losses.rounded_rows(side, steps.bits)[0] for side in (part.down, part.up))
            down, up = (side[: max(rank, 1)] * (rank > 0) for side in pair)
            rows.setdefault(name, []).append((down, up))
    settings = {
        "bits": {name: steps.bits for name, (steps, _) in zip(collection.adapters, chosen, strict=True)},
        "directions": {name: at for name, (_, at) in zip(collection.adapters, chosen, strict=True)},
    }
    return Kept(sum(int(steps.costs[at]) for steps, at in chosen), settings, collection.of_rows(rows))


# --- together -------------------------------------------------------------------------------------------------------


def jointly(kind: str) -> Callable[[Collection, float, int], Kept | None]:
    """One pair of factors a module, and cores of one kind, in those bits with which the worst adapter loses least."""

    def found(collection: Collection, _: float, least: int) -> Kept | None:
        together = SharedFactors(
            collection.modules, [range(len(collection.adapters))], rounds=(ROUNDS[FULL], ROUNDS[DIAGONAL])
        )
        tried = []
        for bits in COMBINATIONS:
            k = _fewest(
                lambda k, bits=bits: together.stored_bytes(kind, k, bits),
                least,
                together.max_components(kind),
            )
            tried.append((together.measure(kind, k)[bits].worst, k, bits))
        _, k, bits = min(tried)
        rows = {name: _in_cores(kind, one, together.weights, k, bits) for name, one in collection.modules.items()}
        settings = {"k": k, "bits": list(bits)}
        return Kept(together.stored_bytes(kind, k, bits), settings, collection.of_rows(rows))

    return found


def _in_cores(
    kind: str, one: ModuleBatch, weights: Tensor, k: int, bits: tuple[int, int]
) -> list[tuple[Tensor, Tensor]]:
    if kind == DIAGONAL:
        fitted = joint.diagonal(one, weights, k, rounds=ROUNDS[kind], tolerance=1e-4)
        down, up = (losses.rounded_rows(rows[None], bits[0])[0] for rows in (fitted.down, fitted.up))
        cores = losses.rounded_rows(joint.in_diagonal(one, (down, up)).cores[:, None], bits[1])[:, 0]
        return [(core[:, None] * down, up) for core in cores]
    pair = joint.bases(one, weights, k, rounds=ROUNDS[kind], tolerance=1e-3)
    down, up = (losses.rounded_rows(rows[None], bits[0])[0] for rows in pair)
    cores = (one.up @ dual_rows(up).mT).mT @ (one.down @ dual_rows(down).mT)
    flat = losses.rounded_rows(cores.flatten(1)[:, None], bits[1])[:, 0]
    return [(core @ down, up) for core in flat.reshape(cores.shape)]


def package(name: str) -> Callable[[Collection, float, int], Kept]:
    """An installed package, its numbers counted in 16 bits, which costs no error here."""

    def found(collection: Collection, _: float, least: int) -> Kept:
        import collection as folders_of
        import methods

        with tempfile.TemporaryDirectory() as temporary:
            links = Path(temporary) / "links"
            links.mkdir()
            for one, folder in collection.folders.items():
                (links / one).symlink_to(folder.resolve(), target_is_directory=True)
            sources = folders_of.copies_in_float32(links, Path(temporary) / "float32")
            heads = sorted({key for source in sources for key in folders_of.head_keys(source)})
            made: dict[int, tuple[int, Any]] = {}

            def size(k: int) -> int:
                if k not in made:
                    fitted = methods.METHODS[name]({source.name: source.path for source in sources}, k)
                    fitted.save(Path(temporary) / f"k{k}")
                    made[k] = folders_of.saved_tensor_bytes(Path(temporary) / f"k{k}", heads) // 2, fitted
                return made[k][0]

            most = len(sources) if name == "vlora" else 128
            k = _fewest(size, least, most)
            stored, fitted = size(k), made[k][1]
            adapters = {
                source.name: {
                    module: ex.LoRAFactors(down.float().clone(), up.float().clone(), source.scaling)
                    for module, (down, up) in fitted.reconstruct(source.name).items()
                }
                for source in sources
            }
        return Kept(stored, {"k": k}, adapters)

    return found


def _fewest(size: Callable[[int], int], least: int, most: int) -> int:
    """The fewest components of at least so many bytes; all there are where they have fewer."""
    low, high = 0, 1
    while high < most and size(high) < least:
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if size(middle) < least:
            low = middle
        else:
            high = middle
    return high


WAYS: Mapping[str, Callable[[Collection, float, int], Kept | None]] = {
    PACK: packed,
    per_adapter.CUT: alone((16,), cut=True),
    per_adapter.ROUNDED: alone(tuple(bits for bits in per_adapter.BITS if bits < 16), cut=False),
    per_adapter.BOTH: alone(per_adapter.BITS, cut=True),
    SHARED: shared,
    FULL: jointly(FULL),
    DIAGONAL: jointly(DIAGONAL),
    **{name: package(name) for name in PACKAGES},
}
