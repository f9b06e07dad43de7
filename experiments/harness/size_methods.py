"""A collection of adapters stored in so many bytes: as a pack, and by other methods.

Every method returns the two factors of each module of each adapter. Methods that store each adapter by itself, by SVD
or rounding, are tuned as the pack is: to the smallest error that every adapter can have in the bytes of all together.
Methods with a whole number of shared components get the fewest whose bytes are not below the pack's, so that none has
fewer bytes than the pack.
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
"""Packages of benchmarks/methods.py that are compared."""

Json = dict[str, Any]
Factors = Mapping[str, ex.LoRAFactors]


@dataclass(frozen=True, slots=True)
class Kept:
    """A collection as one method stores it. bytes: of tensors without heads. settings: options that gave this size."""

    bytes: int
    settings: Json
    adapters: Mapping[str, Factors]


class Collection:
    """Adapters by name, and the batches of their modules."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = dict(folders)
        self.adapters = {name: ex.read_adapter(folder, name=name) for name, folder in folders.items()}

    @cached_property
    def modules(self) -> dict[str, ModuleBatch]:
        specs = {module: spec for adapter in self.adapters.values() for module, spec in adapter.specs.items()}
        return {
            module: pad_factors(
                [adapter.modules.get(module) for adapter in self.adapters.values()], spec.in_features, spec.out_features
            )
            for module, spec in specs.items()
        }

    def of_rows(self, rows: Mapping[str, Sequence[tuple[Tensor, Tensor]]]) -> dict[str, Factors]:
        """Return the factors of each adapter from rows (down, up) of each module, which include the scaling."""
        return {
            name: {
                module: ex.LoRAFactors(rows[module][index][0].float(), rows[module][index][1].mT.float(), 1.0)
                for module in adapter.modules
            }
            for index, (name, adapter) in enumerate(self.adapters.items())
        }


def kept(method: str, collection: Collection, ratio: float, pack_bytes: int) -> Kept | None:
    """Store the collection by one of the `METHODS`, in about as many bytes as the pack of that ratio.

    Returns None if the method does not reach the size.
    """
    return METHODS[method](collection, ratio, pack_bytes)


def packed(collection: Collection, ratio: float, _: int = 0) -> Kept:
    """Store the collection by `eigenlorax.fit(ratio=)`, and read its files."""
    return _opened(collection, {"ratio": ratio})


def _opened(collection: Collection, options: Json) -> Kept:
    folders = {name: str(folder) for name, folder in collection.folders.items()}
    with tempfile.TemporaryDirectory() as temporary:
        ex.fit(folders, warn_above=1.0, same_base=True, **options).save(Path(temporary) / "pack")
        pack = ex.Pack.from_pretrained(Path(temporary) / "pack")
        sizes = pack.summary.bytes
        # factors are read when they are used, and the files are removed at the end of the block
        adapters = {name: dict(pack.adapter(name).modules.items()) for name in folders}
    return Kept(sizes.basis + sizes.coefficients + sizes.carried, options, adapters)


def shared(collection: Collection, _: float, least: int) -> Kept:
    """Store the collection by a fit with k components per side, bases and coefficients in float16."""
    together = SharedFactors(collection.modules, [range(len(collection.adapters))])
    k = _fewest(
        lambda k: together.stored_bytes(SHARED_BASIS, k, (16, 16)), least, together.max_components(SHARED_BASIS)
    )
    return _opened(collection, {"n_components": k, "dtype": "float16", "coefficient_dtype": "float16"})


# --- alone ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Steps:
    """One adapter with its first 0, 1, … components, in the order of their gain per byte.

    bits: per number. lost: squared error after each number of components, as a fraction of ‖D‖², made non-increasing.
    costs: bytes. modules: module of each component.
    """

    bits: int
    lost: Tensor
    costs: Tensor
    modules: list[int]


def alone(bits: Sequence[int], *, cut: bool) -> Callable[[Collection, float, int], Kept | None]:
    """Return a method that stores each adapter by itself.

    bits: numbers of bits to choose from. cut: truncate the modules by SVD.
    """

    def store(collection: Collection, _: float, most: int) -> Kept | None:
        tables = per_adapter.tables(collection.modules, bits)
        n = len(collection.adapters)
        choices = [[_steps(tables, index, each) for each in bits] for index in range(n)]
        if not cut:
            choices = [[_all_of(steps) for steps in own] for own in choices]

        def chosen(error: float) -> list[tuple[_Steps, int]] | None:
            own = [_cheapest(each, error**2) for each in choices]
            there = [steps for steps in own if steps is not None]
            fits = len(there) == n and sum(int(steps.costs[at]) for steps, at in there) <= most
            return there if fits else None

        # an adapter without components has an error of 1, a coarsely rounded one a little more
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

    return store


def _steps(tables: per_adapter.Tables, index: int, bits: int) -> _Steps:
    gains: list[tuple[float, int, float, int]] = []
    for module, (table, cost) in enumerate(zip(tables.squared_errors[bits], tables.costs[bits], strict=True)):
        own = (table[index, :-1] - table[index, 1:]).tolist()[: int(tables.ranks[module][index])]
        first = math.inf
        for at, gain in enumerate(own):
            # no component comes before a larger one of its module
            first = min(first, gain / cost)
            gains.append((-first, module, at, gain))
    gains.sort(key=lambda gain: gain[:3])
    total = float(tables.total[index]) or 1.0
    lost = total - torch.tensor([0.0, *(gain for *_, gain in gains)], dtype=torch.float64).cumsum(0)
    costs = torch.tensor([0, *(tables.costs[bits][module] for _, module, *_ in gains)]).cumsum(0)
    return _Steps(bits, (lost / total).cummin(0)[0], costs, [module for _, module, *_ in gains])


def _all_of(steps: _Steps) -> _Steps:
    """Return the steps with the whole adapter as the only choice."""
    lost = torch.full_like(steps.lost, math.inf)
    lost[-1] = steps.lost[-1]
    return _Steps(steps.bits, lost, steps.costs, steps.modules)


def _cheapest(choices: Sequence[_Steps], bound: float) -> tuple[_Steps, int] | None:
    candidates = [
        (steps, int((steps.lost <= bound).int().argmax())) for steps in choices if (steps.lost <= bound).any()
    ]
    return min(candidates, key=lambda candidate: int(candidate[0].costs[candidate[1]]), default=None)


def _restored(collection: Collection, chosen: Sequence[tuple[_Steps, int]]) -> Kept:
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for position, (name, batch) in enumerate(collection.modules.items()):
        own = per_adapter.balanced(batch)
        for index, (steps, at) in enumerate(chosen):
            # at least one component, of zeros, because a LoRA has a rank of 1 or more
            rank = steps.modules[:at].count(position)
            rows_of_adapter = own.select([index])
            pair = (losses.rounded_rows(side, steps.bits)[0] for side in (rows_of_adapter.down, rows_of_adapter.up))
            down, up = (side[: max(rank, 1)] * (rank > 0) for side in pair)
            rows.setdefault(name, []).append((down, up))
    settings = {
        "bits": {name: steps.bits for name, (steps, _) in zip(collection.adapters, chosen, strict=True)},
        "directions": {name: at for name, (_, at) in zip(collection.adapters, chosen, strict=True)},
    }
    return Kept(sum(int(steps.costs[at]) for steps, at in chosen), settings, collection.of_rows(rows))


# --- together -------------------------------------------------------------------------------------------------------


def jointly(kind: str) -> Callable[[Collection, float, int], Kept | None]:
    """Return a method with one pair of factors per module and cores, with the bits that suit the worst adapter best."""

    def store(collection: Collection, _: float, least: int) -> Kept | None:
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
        rows = {name: _in_cores(kind, batch, together.weights, k, bits) for name, batch in collection.modules.items()}
        settings = {"k": k, "bits": list(bits)}
        return Kept(together.stored_bytes(kind, k, bits), settings, collection.of_rows(rows))

    return store


def _in_cores(
    kind: str, batch: ModuleBatch, weights: Tensor, k: int, bits: tuple[int, int]
) -> list[tuple[Tensor, Tensor]]:
    if kind == DIAGONAL:
        fitted = joint.diagonal(batch, weights, k, rounds=ROUNDS[kind], tolerance=1e-4)
        down, up = (losses.rounded_rows(rows[None], bits[0])[0] for rows in (fitted.down, fitted.up))
        cores = losses.rounded_rows(joint.in_diagonal(batch, (down, up)).cores[:, None], bits[1])[:, 0]
        return [(core[:, None] * down, up) for core in cores]
    pair = joint.bases(batch, weights, k, rounds=ROUNDS[kind], tolerance=1e-3)
    down, up = (losses.rounded_rows(rows[None], bits[0])[0] for rows in pair)
    cores = (batch.up @ dual_rows(up).mT).mT @ (batch.down @ dual_rows(down).mT)
    flat = losses.rounded_rows(cores.flatten(1)[:, None], bits[1])[:, 0]
    return [(core @ down, up) for core in flat.reshape(cores.shape)]


def package(name: str) -> Callable[[Collection, float, int], Kept]:
    """Return the method of an installed package. Its numbers count as 16 bits, which is in its favour."""

    def store(collection: Collection, _: float, least: int) -> Kept:
        import collection as folders_of
        import methods

        with tempfile.TemporaryDirectory() as temporary:
            links = Path(temporary) / "links"
            links.mkdir()
            for adapter_name, folder in collection.folders.items():
                (links / adapter_name).symlink_to(folder.resolve(), target_is_directory=True)
            sources = folders_of.copies_in_float32(links, Path(temporary) / "float32")
            heads = sorted({key for source in sources for key in folders_of.head_keys(source)})
            fits: dict[int, tuple[int, Any]] = {}

            def size(k: int) -> int:
                if k not in fits:
                    fitted = methods.METHODS[name]({source.name: source.path for source in sources}, k)
                    fitted.save(Path(temporary) / f"k{k}")
                    fits[k] = folders_of.saved_tensor_bytes(Path(temporary) / f"k{k}", heads) // 2, fitted
                return fits[k][0]

            most = len(sources) if name == "vlora" else 128
            k = _fewest(size, least, most)
            stored, fitted = size(k), fits[k][1]
            adapters = {
                source.name: {
                    module: ex.LoRAFactors(down.float().clone(), up.float().clone(), source.scaling)
                    for module, (down, up) in fitted.reconstruct(source.name).items()
                }
                for source in sources
            }
        return Kept(stored, {"k": k}, adapters)

    return store


def _fewest(size: Callable[[int], int], least: int, most: int) -> int:
    """Return the fewest components that take at least so many bytes, or the most if all take fewer."""
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


METHODS: Mapping[str, Callable[[Collection, float, int], Kept | None]] = {
    PACK: packed,
    per_adapter.CUT: alone((16,), cut=True),
    per_adapter.ROUNDED: alone(tuple(bits for bits in per_adapter.BITS if bits < 16), cut=False),
    per_adapter.BOTH: alone(per_adapter.BITS, cut=True),
    SHARED: shared,
    FULL: jointly(FULL),
    DIAGONAL: jointly(DIAGONAL),
    **{name: package(name) for name in PACKAGES},
}
