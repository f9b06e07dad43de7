"""Fit for an error bound or a size: encode shared bases and all adapters with `codec.encoder`."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeVar

import torch

from ..codec import basis_bytes, bitstream, encoder
from ..codec.adapter_codes import UNTRAINED, AdapterCodes, ModuleCodes, ModuleLayout
from ..codec.byte_limit import encode_within
from ..codec.encoder import CollectionEncoder, EncodedCollection, RatePoint
from ..codec.module_updates import ModuleUpdates, UpdateSource
from ..codec.quantised_basis import QuantisedBasis
from ..codec.stage_runner import StageRunner
from ..codec.step_sizes import check_error_bound, step_size_grid, wide_step_size_grid
from ..codec.storage import coded
from ..codec.storage.table import CODED
from ..core import threads
from ..core.adapter import Adapter, LoRAFactors, ModuleSpec
from ..core.basis import Basis
from ..core.engine import Engine, SharedValue
from ..core.fit_options import FitOptions
from ..core.iterative import RunCalls
from ..core.subspace import ModuleBases
from ..errors import OptionError
from ..pack.encoding import encoded_by_codes
from . import equal_updates
from .coded_checkpoint import resumable_calls
from .collection import AdapterModule, Collection
from .component_fit import FittedCollection
from .near_copies import near_copies_note
from .options import Execution, Target
from .stored_outside import StoredOutside, encode_for_size, encode_outside

BATCH_INTEGERS = 2**23
"""Number of integers, of adapters or of bases, from which on they are encoded to bytes by a call of their own."""
MIN_FRONTIER_ERROR, MAX_FRONTIER_ERROR = 1e-5, 0.7
"""Range of errors in which the estimated bytes are accurate enough to be reported."""
FRONTIER_FACTORS = (0.5, 0.7, 1.0, 1.4, 2.0)
"""Errors of the frontier, relative to the error of the pack."""


Name = TypeVar("Name")


@dataclass(frozen=True, slots=True)
class EncodedBytes:
    """Encoded collection as bytes.

    Attributes:
        codes: Integers of each adapter, by name.
        layouts: Layout of each module's integers, by adapter and module.
        adapters: Bytes of each adapter, by name.
        bases: Bytes of each basis that has components, by module and side (0: down, 1: up).
    """

    codes: Mapping[str, AdapterCodes]
    layouts: Mapping[str, Mapping[str, ModuleLayout]]
    adapters: Mapping[str, bytes]
    bases: Mapping[tuple[str, int], bytes]

    @property
    def size(self) -> int:
        """Total bytes of bases and adapters."""
        return sum(map(len, self.adapters.values())) + sum(map(len, self.bases.values()))


@dataclass(frozen=True, slots=True)
class ByteLimit:
    """Maximum size of a pack.

    Attributes:
        total: Maximum size, in bytes.
        outside: Bytes of heads, carried tensors and reference tensors, and of the basis for training.
        lora: Bytes of the LoRAs if a ratio was passed; else None.
        name: The option as the caller passed it, for error messages.
    """

    total: float
    outside: int
    lora: int | None
    name: str

    @property
    def available(self) -> float:
        """Bytes for bases and coefficients."""
        return self.total - self.outside

    def check(self) -> None:
        """Raise `OptionError` if the tensors outside the subspace alone exceed the limit."""
        if self.total <= self.outside:
            possible = f" or a ratio below {self.lora / self.outside:.3g}" if self.lora is not None else ""
            raise OptionError(
                f"{self.name} cannot be reached: heads and other tensors outside the subspace, and the basis for "
                f"training if there is one, take {self.outside:,} bytes. Pass a larger head_error{possible}."
            )

    def message(self, min_bytes: int) -> str:
        """Return the error message for a collection whose bases and coefficients take at least `min_bytes`."""
        total = min_bytes + self.outside
        largest = f"; the largest ratio is about {_round_down(self.lora / total)}" if self.lora is not None else ""
        return f"{self.name} cannot be reached: with the largest possible errors, it takes {total:,} bytes{largest}."


def encode_collection(
    collection: Collection,
    copies: Mapping[str, str],
    target: Target,
    execution: Execution,
    engine: Engine,
    training_basis: int,
) -> tuple[FittedCollection, StoredOutside]:
    """Fit bases and encode all adapters in as few bytes as the target allows, on the CPU.

    Args:
        collection: The adapters.
        copies: Those of them that get the codes of another one, as `find_equal_updates` returns them.
        target: Error bound or size.
        execution: Progress callback; another device than the CPU gives a note.
        engine: Open engine that works on one module per job.
        training_basis: Bytes of the basis for training, which count in the size.

    Returns:
        Bases and adapters, and the heads and carried tensors.

    Raises:
        OptionError: The target cannot be reached.
    """
    started = time.perf_counter()
    # the largest tensors have as many numbers as all adapters of one module together
    with threads.suited_to(max(_numbers(members) for members in collection.modules.values())):
        distinct = equal_updates.without(collection, copies)
        with resumable_calls(collection, target, execution, engine, training_basis) as calls:
            runner = StageRunner.of(
                execution.progress, calls.run, engine.workers, error=target.options.max_error or 0.0
            )
            collection_encoder, encoded, outside = _encode(collection, distinct, target, training_basis, runner)
            runner.held.clear()
        written = _to_bytes(encoded, distinct, engine.run)
        bases = {name: _bases(name, encoded, members[0].spec, written) for name, members in collection.modules.items()}
        near_copies = near_copies_note(distinct, target.options.max_error or max(encoded.errors, default=0.0))
    notes = [*_notes(collection_encoder, execution), *calls.notes, *([near_copies] if near_copies is not None else [])]
    errors = dict(zip(distinct.weights, encoded.errors, strict=True))
    adapters = {}
    for scanned in collection.scanned:
        name = copies.get(scanned.name, scanned.name)
        adapters[scanned.name] = encoded_by_codes(
            scanned, written.codes[name], written.layouts[name], written.adapters[name], errors.get(name, 0.0)
        )
    fitted = FittedCollection(
        modules=bases,
        encoded=adapters,
        options=target.options,
        storage=CODED,
        coefficient_storage=CODED,
        notes=notes,
        seconds={"coding": time.perf_counter() - started},
        frontier=_frontier(collection_encoder, max(encoded.errors), written.size, outside.size + training_basis),
    )
    return fitted, outside


def _encode(
    collection: Collection, distinct: Collection, target: Target, training_basis: int, runner: StageRunner
) -> tuple[CollectionEncoder, EncodedCollection, StoredOutside]:
    """Encode the distinct adapters, and the heads of all, within the target, and return the encoder too.

    Args:
        collection: All adapters.
        distinct: Those without copies of others.
        target: Target of the fit.
        training_basis: Bytes of the basis for training.
        runner: Runs the stages of each module.
    """
    modules, options = _module_updates(distinct), target.options
    norms = torch.tensor([1 / weight for weight in distinct.weights.values()], dtype=torch.float64)
    if options.max_error is not None:
        check_error_bound(options.max_error)
        numbers = max(sum(spec.numbers for spec in scanned.adapter.specs.values()) for scanned in collection.scanned)
        grid = step_size_grid(options.max_error, numbers)
        whole = CollectionEncoder(modules, norms, grid, runner)
        clustered = encoder.split_into_clusters(whole, options.max_error)
        assert target.head_error is not None
        outside = encode_outside(collection, target.head_error, runner.progress)
        return clustered, clustered.encode(options.max_error), outside
    whole = CollectionEncoder(modules, norms, wide_step_size_grid(), runner)
    if target.head_error is None:
        outside = encode_for_size(
            collection,
            lambda stored: whole.error_for_bytes(_byte_limit(collection, stored, training_basis, options).available),
            runner.progress,
        )
    else:
        outside = encode_outside(collection, target.head_error, runner.progress)
    limit = _byte_limit(collection, outside, training_basis, options)
    limit.check()
    clustered = encoder.split_into_clusters(whole, whole.error_for_bytes(limit.available))
    encoded = encode_within(
        clustered, limit.available, lambda candidate: _to_bytes(candidate, distinct, runner.run).size, limit.message
    )
    return clustered, encoded, outside


def _notes(collection_encoder: CollectionEncoder, execution: Execution) -> list[str]:
    notes = []
    n_clusters = max(collection_encoder.groups) + 1
    if n_clusters > 1:
        notes.append(f"The adapters form {n_clusters} groups, each with its own bases.")
    if execution.device.type != "cpu":
        notes.append(f"Bytes were chosen on the CPU: device {execution.device} has no effect.")
    return notes


def _numbers(members: Sequence[AdapterModule]) -> int:
    return sum(member.spec.numbers for member in members)


def _module_updates(collection: Collection) -> list[ModuleUpdates]:
    """Return the nonzero updates of every module that has any, for the encoder."""
    index = {name: number for number, name in enumerate(collection.weights)}
    modules = []
    for name, members in collection.modules.items():
        trained = tuple(
            UpdateSource(
                index[member.name],
                partial(_read_update, collection.adapters, collection.index[member.name], member.module),
            )
            for member in members
            if member.is_trained
        )
        if trained:
            spec = members[0].spec
            modules.append(ModuleUpdates(name, (spec.out_features, spec.in_features), trained))
    return modules


def _read_update(adapters: SharedValue[Sequence[Adapter]], index: int, module: str) -> LoRAFactors:
    """Read the factors of a module of one adapter, in any process."""
    return adapters.get()[index].modules[module]


def _byte_limit(collection: Collection, outside: StoredOutside, training_basis: int, options: FitOptions) -> ByteLimit:
    fixed = outside.size + training_basis
    if options.max_bytes is not None:
        return ByteLimit(float(options.max_bytes), fixed, None, f"max_bytes={options.max_bytes}")
    assert options.ratio is not None
    # untrained adapters take no bytes in a pack, so counting their factors would inflate the ratio
    members = [member for members in collection.modules.values() for member in members]
    lora = 2 * sum(member.spec.numbers for member in members if not member.scanned.is_untrained)
    lora += sum(each.baseline_bytes for each in outside.by_adapter.values())
    total = lora / options.ratio
    return ByteLimit(total, fixed, lora, f"ratio={options.ratio:g}, which is {total:,.0f} bytes,")


def _round_down(ratio: float) -> str:
    """Return a ratio rounded down to three digits, so that a user who passes it can reach it."""
    unit = 10.0 ** (math.floor(math.log10(ratio)) - 2)
    return f"{math.floor(ratio / unit) * unit:.10g}"


def _to_bytes(encoded: EncodedCollection, collection: Collection, run: RunCalls) -> EncodedBytes:
    """Return bases and all adapters as bytes. Untrained adapters are encoded as zero updates.

    Args:
        encoded: Codes of the collection.
        collection: The adapters, without copies of others.
        run: Runs the calls that encode some adapters each.
    """
    fitted = dict(zip(collection.weights, encoded.adapters, strict=True))
    by_adapter = {scanned.name: fitted.get(scanned.name, AdapterCodes(1.0, 0, {})) for scanned in collection.scanned}
    modules: dict[str, dict[str, ModuleCodes]] = {name: {} for name in by_adapter}
    layouts: dict[str, dict[str, ModuleLayout]] = {name: {} for name in by_adapter}
    for module, members in collection.modules.items():
        spec = members[0].spec
        empty = QuantisedBasis.empty(spec.in_features), QuantisedBasis.empty(spec.out_features)
        by_cluster: dict[int, ModuleLayout] = {}
        for member in members:
            codes = by_adapter[member.name]
            if codes.cluster not in by_cluster:
                by_cluster[codes.cluster] = ModuleLayout.of(encoded.bases.get(module, empty), codes.cluster)
            modules[member.name][module] = codes.modules.get(module, UNTRAINED)
            layouts[member.name][module] = by_cluster[codes.cluster]
    complete = {name: AdapterCodes(codes.step_size, codes.cluster, modules[name]) for name, codes in by_adapter.items()}
    adapters = _in_batches(list(complete), lambda name: complete[name].n_integers)
    payloads = run(
        partial(bitstream.encode_adapters, [(complete[name], layouts[name]) for name in batch]) for batch in adapters
    )
    by_name = dict(zip(complete, chain.from_iterable(payloads), strict=True))
    sides = [(name, side) for name, pair in encoded.bases.items() for side in (0, 1) if pair[side].k]
    batches = _in_batches(sides, lambda side: encoded.bases[side[0]][side[1]].codes.numel())
    bases = run(partial(basis_bytes.encode, [encoded.bases[name][side] for name, side in batch]) for batch in batches)
    return EncodedBytes(complete, layouts, by_name, dict(zip(sides, chain.from_iterable(bases), strict=True)))


def _in_batches(names: Sequence[Name], count_integers: Callable[[Name], int]) -> list[list[Name]]:
    """Divide names into batches, in order, each of which ends with the one that completes `BATCH_INTEGERS`."""
    batches: list[list[Name]] = [[]]
    size = 0
    for name in names:
        if size >= BATCH_INTEGERS:
            batches.append([])
            size = 0
        batches[-1].append(name)
        size += count_integers(name)
    return batches


def _bases(name: str, encoded: EncodedCollection, spec: ModuleSpec, written: EncodedBytes) -> ModuleBases:
    """Return the bases of a module as they are decoded from their bytes."""
    if name not in encoded.bases:
        widths = (spec.in_features, spec.out_features)
        return ModuleBases(*(Basis(torch.zeros(0, d), torch.zeros(0), 1.0, payload={}) for d in widths))
    square, *captured = encoded.energies[name]

    def basis(side: int) -> Basis:
        quantised = encoded.bases[name][side]
        payload = {basis_bytes.PART: coded.blob(written.bases[name, side])} if quantised.k else {}
        energy = min(captured[side] / square, 1.0)
        return Basis(quantised.rows, torch.zeros(0), energy, tail=square, payload=payload)

    return ModuleBases(basis(0), basis(1))


def _frontier(collection_encoder: CollectionEncoder, error: float, size: int, outside: int) -> list[RatePoint]:
    """Return the estimated bytes of packs with errors around that of this pack.

    Args:
        collection_encoder: Encoder that estimates bytes.
        error: Largest error in this pack.
        size: Bytes of bases and coefficients in this pack.
        outside: Bytes of tensors outside the subspace.
    """
    candidates = {factor * error for factor in FRONTIER_FACTORS}
    bounds = {bound for bound in candidates if MIN_FRONTIER_ERROR <= bound <= MAX_FRONTIER_ERROR} | {error}
    estimates = collection_encoder.frontier(sorted(bounds))
    (own,) = (point.bytes for point in estimates if point.error == error)
    # estimates are off by about the same factor at all errors, but where the curve is steep only near this one
    correction, is_steep = size / max(own, 1.0), encoder.is_steep(estimates)
    points = []
    for point in estimates:
        share = max(1 - abs(math.log2(point.error / error)), 0.0) if is_steep else 1.0
        corrected = correction**share * point.bytes
        if (corrected > size) != (point.error < error):
            # a stricter bound takes more bytes than this pack, and a looser one fewer
            corrected = correction * point.bytes
        points.append(RatePoint(point.error, round(outside + corrected)))
    return [
        point
        for index, point in enumerate(points)
        # of errors with the same bytes, only the largest is reported
        if point.error == error or all(point.bytes != later.bytes for later in points[index + 1 :])
    ]
