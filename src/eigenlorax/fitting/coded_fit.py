"""A fit for an error or a size: the subspace of a collection, and each adapter in as few bytes as that takes.

The mathematics is in `coding`; here are adapters, with their names and what they carry.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..codec import bitstream, encoder
from ..codec.adapter_codes import UNTRAINED, AdapterCodes, ModuleCodes, ModuleLayout
from ..codec.byte_limit import encode_within
from ..codec.encoder import CollectionEncoder, EncodedCollection, ModuleUpdates, RatePoint, UpdateSource
from ..codec.quantised_basis import QuantisedBasis
from ..codec.step_sizes import check_error_bound, step_size_grid, wide_step_size_grid
from ..codec.storage import coded
from ..core import threads
from ..core.adapter import ModuleSpec
from ..core.basis import Basis
from ..core.fit_options import FitOptions
from ..core.subspace import ModuleBases
from ..errors import OptionError
from ..pack.packed_adapter import Packing

BATCH = 64
"""Adapters whose bytes are made together."""
FAINT, COARSE = 1e-5, 0.7
"""The smallest and the largest of them: beyond, estimates are poor."""
AROUND = (0.5, 0.7, 1.0, 1.4, 2.0)
"""Errors of the frontier that are told, beside the one that was chosen."""

ByModule = Sequence[tuple[str, Sequence[tuple[Packing, str]]]]
"""The modules of the subspace, each with its adapters and the name it has there."""


@dataclass(frozen=True, slots=True)
class Compact:
    """Bases by module; errors and about the bytes that they take, around what was chosen; and what there is to say."""

    modules: Mapping[str, ModuleBases]
    frontier: list[RatePoint]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class _Written:
    """Adapters by name: codes, places of their modules, and bytes."""

    codes: Mapping[str, AdapterCodes]
    places: Mapping[str, Mapping[str, ModuleLayout]]
    data: Mapping[str, bytes]


def fit(by_module: ByModule, weights: Mapping[str, float], options: FitOptions, report: encoder.Progress) -> Compact:
    """Bases for all modules; every packing gets its coefficients.

    weights: of the adapters that are fitted, 1 / ‖update‖. options: `max_error`, `max_bytes` or `ratio`.
    """
    with threads.suited_to(max(_numbers(members) for _, members in by_module)):
        return _fit(by_module, weights, options, report)


def _numbers(members: Sequence[tuple[Packing, str]]) -> int:
    """Of all adapters of one module: its largest tensors have at most so many."""
    return sum(packing.adapter.specs[module].numbers for packing, module in members)


def _fit(by_module: ByModule, weights: Mapping[str, float], options: FitOptions, report: encoder.Progress) -> Compact:
    packings = {packing.adapter.name: packing for _, members in by_module for packing, _ in members}
    modules, shapes = _modules(by_module, list(weights)), _shapes(by_module)
    norms = torch.tensor([1 / weight for weight in weights.values()], dtype=torch.float64)
    numbers = max(sum(one.numbers for one in packing.adapter.specs.values()) for packing in packings.values())
    error = options.max_error
    if error is not None:
        check_error_bound(error)
    steps = step_size_grid(error, numbers) if error is not None else wide_step_size_grid()
    collection = CollectionEncoder(modules, norms, steps, report)
    carried = _carried(packings, by_module)
    if error is None:
        limit, refused = _limit(by_module, options, carried)
        collection = encoder.split_into_clusters(
            collection, modules, collection.error_for_bytes(limit - carried), report
        )
        found = encode_within(
            collection, limit - carried, lambda one: _size(one, by_module, packings, list(weights)), refused
        )
    else:
        collection = encoder.split_into_clusters(collection, modules, error, report)
        found = collection.encode(error)
    written = _written(found, by_module, packings, list(weights))
    blobs = _basis_blobs(found)
    bases = {name: _bases(name, found, shapes[name], blobs) for name, _ in by_module}
    errors = dict(zip(weights, found.errors, strict=True))
    for place, members in by_module:
        for packing, module in members:
            packing.places[module] = place
    for name, packing in packings.items():
        packing.take_codes(written.codes[name], written.places[name], written.data[name], errors.get(name, 0.0))
    size = sum(map(len, written.data.values())) + sum(map(len, blobs.values())) + carried
    clusters = max(collection.groups) + 1
    notes = [f"The adapters fall into {clusters} groups, each with bases of its own."] if clusters > 1 else []
    return Compact(bases, _frontier(collection, max(found.errors), size, carried), notes)


def _modules(by_module: ByModule, names: Sequence[str]) -> list[ModuleUpdates]:
    index = {name: place for place, name in enumerate(names)}
    found = []
    for name, members in by_module:
        trained = tuple(
            UpdateSource(index[packing.adapter.name], partial(packing.adapter.modules.__getitem__, module))
            for packing, module in members
            if packing.scan.delta_squares[module] > 0
        )
        if trained:
            spec = _spec(members)
            found.append(ModuleUpdates(name, (spec.out_features, spec.in_features), trained, _numbers(members)))
    return found


def _spec(members: Sequence[tuple[Packing, str]]) -> ModuleSpec:
    packing, module = members[0]
    return packing.adapter.specs[module]


def _shapes(by_module: ByModule) -> dict[str, tuple[int, int]]:
    return {
        name: (spec.out_features, spec.in_features) for name, spec in ((n, _spec(members)) for n, members in by_module)
    }


def _carried(packings: Mapping[str, Packing], by_module: ByModule) -> int:
    """Bytes of what adapters keep as it is: modules that are kept out of the subspace, and what is no LoRA."""
    inside = {(packing.adapter.name, module) for _, members in by_module for packing, module in members}
    found = 0
    for name, packing in packings.items():
        found += sum(tensor.nbytes for tensor in packing.adapter.carried.values())
        specs = [spec for module, spec in packing.adapter.specs.items() if (name, module) not in inside]
        found += sum(spec.numbers * spec.dtype.itemsize for spec in specs)
    return found


def _limit(by_module: ByModule, options: FitOptions, carried: int) -> tuple[float, Callable[[int], str]]:
    """The bytes that are allowed, and what is said where so many are needed beside those that are carried."""
    if options.max_bytes is not None:
        lora, limit, asked = None, float(options.max_bytes), f"max_bytes={options.max_bytes} cannot be reached"
    else:
        assert options.ratio is not None
        # factors of an adapter that changes nothing are worth no byte
        lora = carried + 2 * sum(
            packing.adapter.specs[module].numbers
            for _, members in by_module
            for packing, module in members
            if not packing.untrained
        )
        limit = lora / options.ratio
        asked = f"ratio={options.ratio:g}, which is {limit:,.0f} bytes, cannot be reached"

    if limit <= carried:
        below = f", so that a ratio is below {lora / carried:.3g}" if lora is not None else ""
        raise OptionError(f"{asked}: {carried:,} bytes are carried as they are{below}.")

    def refused(least: int) -> str:
        whole = least + carried
        largest = f"; the largest is about {_rounded_down(lora / whole)}" if lora is not None else ""
        return f"{asked}: with next to nothing kept, there are {whole:,} bytes{largest}."

    return limit, refused


def _rounded_down(ratio: float) -> str:
    """To three digits, so that it can be asked for."""
    unit = 10.0 ** (math.floor(math.log10(ratio)) - 2)
    return f"{math.floor(ratio / unit) * unit:.10g}"


def _size(found: EncodedCollection, by_module: ByModule, packings: Mapping[str, Packing], names: Sequence[str]) -> int:
    written = _written(found, by_module, packings, names)
    return sum(map(len, written.data.values())) + sum(map(len, _basis_blobs(found).values()))


def _written(
    found: EncodedCollection, by_module: ByModule, packings: Mapping[str, Packing], names: Sequence[str]
) -> _Written:
    """All adapters, those that are untrained too."""
    fitted = dict(zip(names, found.adapters, strict=True))
    codes = {name: fitted.get(name, AdapterCodes(1.0, 0, {})) for name in packings}
    own: dict[str, dict[str, ModuleCodes]] = {name: {} for name in packings}
    places: dict[str, dict[str, ModuleLayout]] = {name: {} for name in packings}
    for place, members in by_module:
        spec = _spec(members)
        none = QuantisedBasis.empty(spec.in_features), QuantisedBasis.empty(spec.out_features)
        clusters: dict[int, ModuleLayout] = {}
        for packing, _ in members:
            name = packing.adapter.name
            number = codes[name].cluster
            if number not in clusters:
                clusters[number] = ModuleLayout.of(found.bases.get(place, none), number)
            own[name][place] = codes[name].modules.get(place, UNTRAINED)
            places[name][place] = clusters[number]
    whole = {name: AdapterCodes(one.step_size, one.cluster, own[name]) for name, one in codes.items()}
    data: dict[str, bytes] = {}
    for start in range(0, len(whole), BATCH):
        batch = list(whole)[start : start + BATCH]
        blobs = bitstream.encode_adapters([(whole[name], places[name]) for name in batch])
        data |= dict(zip(batch, blobs, strict=True))
    return _Written(whole, places, data)


def _basis_blobs(found: EncodedCollection) -> dict[tuple[str, int], bytes]:
    """By module and side, of those that have rows."""
    sides = [(name, side) for name, pair in found.bases.items() for side in (0, 1) if pair[side].k]
    return dict(zip(sides, bitstream.encode_bases([found.bases[name][side] for name, side in sides]), strict=True))


def _bases(
    name: str, found: EncodedCollection, shape: tuple[int, int], blobs: Mapping[tuple[str, int], bytes]
) -> ModuleBases:
    """The bases of a module as a reader of their bytes has them."""
    if name not in found.bases:
        return ModuleBases(*(Basis(torch.zeros(0, d), torch.zeros(0), 1.0, payload={}) for d in reversed(shape)))
    square, *inside = found.energies[name]

    def side(number: int, one: QuantisedBasis) -> Basis:
        payload = {bitstream.BASIS_PART: coded.blob(blobs[name, number])} if one.k else {}
        energy = min(inside[number] / square, 1.0)
        return Basis(one.rows, torch.zeros(0), energy, tail=square, payload=payload)

    down, up = found.bases[name]
    return ModuleBases(side(0, down), side(1, up))


def _frontier(collection: CollectionEncoder, error: float, size: int, carried: int) -> list[RatePoint]:
    """About the bytes that other errors take, beside those that this one does; of those that were surveyed."""
    errors = sorted({around * error for around in AROUND if FAINT <= around * error <= COARSE} | {error})
    guessed = {point.error: point.bytes for point in collection.frontier(errors)}
    factor = (size - carried) / max(guessed[error], 1.0)
    found = [RatePoint(one, round(carried + factor * guess)) for one, guess in guessed.items()]
    return [
        point
        for place, point in enumerate(found)
        if point.error == error or all(point.bytes != other.bytes for other in found[place + 1 :])
    ]
