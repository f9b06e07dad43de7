"""Encode and decode versions within an error bound. Each is predicted from at most one earlier version."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from ...core import keys
from ...core.adapter import LoRAFactors
from ...core.limits import PARSE_FAILURES
from ...errors import FormatError, OptionError, reason
from ..quantised_tensor import MAX_NORM, MIN_NORM
from . import container, gauge, increments, lossless
from .container import Header, Labels, Orders, ParsedVersion
from .decoded import LossyVersion, ModuleLayout
from .increments import Increments
from .lattice import LatticeRows, Prediction
from .lora_rows import QuantisedModules, quantise_modules
from .rate_rounding import classes_and_bits
from .relabelling import relabel
from .tensor_rows import QuantisedTensors, quantise_tensors
from .version import DecodedVersion, EncodedVersion, Version


def encode(version: Version, reference: DecodedVersion | None) -> EncodedVersion:
    """Encode a version within its error bounds.

    Whatever cannot be encoded within its bound is stored exactly: tensors with a bound of 0, tensors that are not of
    floats, factors whose update is beyond the range of float64's squares, and factors of which one is zero, beside
    other updates: the bound of the whole update would allow to lose the other factor, from which a training goes on.

    Args:
        version: The version. All numbers are finite.
        reference: Decoded version that it may be predicted from, usually the previous one; None for a key version.
            A version of another codec predicts nothing.
    """
    reference = reference if isinstance(reference, LossyVersion) else None
    modules = dict(sorted(version.modules.items()))
    idle = {module: factors for module, factors in modules.items() if _is_half_zero(factors)}
    # before the first step all are, and are quantised as they are
    idle = idle if len(idle) < len(modules) else {}
    moved = {module: factors for module, factors in modules.items() if module not in idle}
    quantised, exact_modules = QuantisedModules(0, {}, {}, 0.0), modules
    if _is_in_range(moved):
        with suppress(OptionError):
            quantised, exact_modules = quantise_modules(moved, version.max_error, reference), idle
    tensors = quantise_tensors(version.tensors, version.tensor_bounds, reference)
    decoded = _join(quantised, exact_modules, tensors)
    encoded = _to_bytes(decoded, reference, quantised.orders)
    if encoded is None or not _can_be_read(encoded, reference):
        encoded = _key_version(decoded)
        if encoded is None:
            return _exact(modules, version.tensors)
    return replace(encoded, delta_error=quantised.error, tensor_error=tensors.error)


def _join(
    quantised: QuantisedModules, exact_modules: Mapping[str, LoRAFactors], tensors: QuantisedTensors
) -> LossyVersion:
    """Return a version of quantised and exact parts."""
    exact = dict(tensors.exact)
    for module, factors in exact_modules.items():
        exact |= {keys.lora_key(module, "down"): factors.down, keys.lora_key(module, "up"): factors.up}
    return LossyVersion(
        level=quantised.level,
        module_rows=quantised.modules,
        tensor_rows=tensors.tensors,
        exact_modules={module: ModuleLayout.of(factors) for module, factors in exact_modules.items()},
        exact=dict(sorted(exact.items())),
    )


def _exact(modules: Mapping[str, LoRAFactors], tensors: Mapping[str, Tensor]) -> EncodedVersion:
    """Return a key version whose parts are all stored exactly."""
    decoded = _join(QuantisedModules(0, {}, {}, 0.0), modules, QuantisedTensors({}, tensors, 0.0))
    encoded = _to_bytes(decoded, None, {})
    assert encoded is not None
    return encoded


def _key_version(decoded: LossyVersion) -> EncodedVersion | None:
    """Encode the numbers of a version without a reference; None if that cannot be read."""
    relabelled = _relabel(decoded, None, {})
    encoded = _to_bytes(relabelled, None, {}) if relabelled is not None else None
    return encoded if encoded is not None and _can_be_read(encoded, None) else None


def _relabel(
    decoded: LossyVersion, reference: LossyVersion | None, orders: Mapping[str, Int64[np.ndarray, " rank"]]
) -> LossyVersion | None:
    """Return the same numbers as another reference predicts them; None if the differences are too large."""
    header, earlier = _header(decoded, reference, orders)
    sources = container.find_references(header, earlier, decoded.module_layouts, decoded.tensor_layouts)
    lora_blocks = 2 * len(decoded.module_rows)
    blocks = []
    for number, (rows, predicting) in enumerate(
        zip(decoded.all_rows, _predicting_rows(reference, sources), strict=True)
    ):
        relabelled = relabel(rows, predicting, has_one_level=number >= lora_blocks)
        if relabelled is None:
            return None
        blocks.append(relabelled)
    return decoded.with_rows(blocks)


def _can_be_read(encoded: EncodedVersion, reference: LossyVersion | None) -> bool:
    """Return whether the limits of memory let a version be read: hundreds of megabytes of zeros take few bytes."""
    earlier = labels_of(reference) if reference is not None and encoded.has_reference else None
    try:
        container.parse(encoded.data, earlier)
    except ValueError:
        return False
    return True


def _is_in_range(modules: Mapping[str, LoRAFactors]) -> bool:
    """Return whether float64 can represent the square of the update, and its parts."""
    norms = [float(side.to(torch.float64).norm()) for each in modules.values() for side in (each.down, each.up)]
    scalings = [abs(factors.scaling) for factors in modules.values()]
    # the update is at most the product of the three, which stays in the range of `quantised_tensor`
    return all(norm == 0 or MIN_NORM ** (1 / 3) < norm < MAX_NORM ** (1 / 3) for norm in norms + scalings)


def _is_half_zero(factors: LoRAFactors) -> bool:
    """Return whether exactly one of two factors is zero."""
    return bool(factors.up.any()) != bool(factors.down.any())


def encode_again(decoded: DecodedVersion, reference: DecodedVersion | None) -> EncodedVersion:
    """Encode a decoded version so that it decodes to exactly the same numbers, with another reference.

    The errors of the result are 0: they are relative to the decoded version.

    Args:
        decoded: The version.
        reference: Decoded version that it is predicted from if that takes fewer bytes; None for a key version.

    Raises:
        OptionError: The version was not decoded by this codec.
    """
    if not isinstance(decoded, LossyVersion):
        raise OptionError("a lossless version cannot be encoded within an error bound again.")
    key_version = _key_version(decoded)
    if key_version is None:
        key_version = _exact(decoded.modules, decoded.tensors)
    if not isinstance(reference, LossyVersion):
        return key_version
    orders = {}
    for name, module in decoded.module_rows.items():
        earlier = reference.module_rows.get(name)
        if earlier is not None and earlier.layout.rank != module.layout.rank:
            orders[name] = gauge.match_rows(module.down.values, earlier.up.values, earlier.down.values)
    relabelled = _relabel(decoded, reference, orders)
    predicted = _to_bytes(relabelled, reference, orders) if relabelled is not None else None
    if predicted is None or not _can_be_read(predicted, reference):
        return key_version
    return min(predicted, key_version, key=lambda encoded: len(encoded.data))


def _header(
    decoded: LossyVersion, reference: LossyVersion | None, orders: Mapping[str, Int64[np.ndarray, " rank"]]
) -> tuple[Header, Labels | None]:
    """Return the header of a version, and the labels of its reference."""
    modules, tensors = decoded.module_layouts, decoded.tensor_layouts
    earlier = labels_of(reference) if reference is not None else None
    header = Header(
        has_reference=reference is not None,
        level=decoded.level,
        modules=modules if earlier is None or dict(earlier.modules) != modules else None,
        tensors=tensors if earlier is None or dict(earlier.tensors) != tensors else None,
        orders={name: order.tolist() for name, order in orders.items()},
        exact_modules=dict(decoded.exact_modules),
    )
    return header, earlier


def _to_bytes(
    decoded: LossyVersion, reference: LossyVersion | None, orders: Mapping[str, Int64[np.ndarray, " rank"]]
) -> EncodedVersion | None:
    """Return a version as bytes, with errors of 0; None if no increments of 32 bits lead to it from the reference.

    Args:
        decoded: The version, with labels for this reference. Their classes are not used.
        reference: Version that predicts it; None for none.
        orders: Rows of the reference that predict a module's rows, where these are not all of them in their order.
    """
    header, earlier = _header(decoded, reference, orders)
    sources = container.find_references(header, earlier, decoded.module_layouts, decoded.tensor_layouts)
    blocks, changes = [], []
    for rows, predicting in zip(decoded.all_rows, _predicting_rows(reference, sources), strict=True):
        change = rows.increments(predicting)
        if change is None or np.abs(change).max(initial=0) >= 2**31:
            return None
        change = change.astype(np.int32)
        blocks.append(rows.with_classes(classes_and_bits(change)[0]))
        changes.append(change)
    decoded = decoded.with_rows(blocks)
    labels = labels_of(decoded)
    exact_before = reference.exact if reference is not None else None
    parsed = ParsedVersion(
        header=header,
        labels=labels,
        references=sources,
        lora_streams=increments.encode(labels.row_shapes[: labels.lora_blocks], changes[: labels.lora_blocks]),
        tensor_streams=increments.encode(labels.row_shapes[labels.lora_blocks :], changes[labels.lora_blocks :]),
        exact=lossless.encode(decoded.exact, exact_before) if decoded.exact else b"",
    )
    data, lora_bytes = container.to_bytes(parsed, earlier)
    return EncodedVersion(
        data=data,
        has_reference=reference is not None,
        delta_error=0.0,
        tensor_error=0.0,
        lora_bytes=lora_bytes,
        tensor_bytes=len(data) - lora_bytes,
        decoded=decoded,
    )


def labels_of(version: LossyVersion) -> Labels:
    """Return the layouts and labels of a version."""
    return Labels(version.module_layouts, version.tensor_layouts, [rows.labels for rows in version.all_rows])


def _predicting_rows(reference: LossyVersion | None, sources: Orders) -> Iterator[LatticeRows | None]:
    """Yield the rows of a reference that predict each block; None for none."""
    rows = reference.all_rows if reference is not None else []
    for source in sources:
        if source is None:
            yield None
        else:
            number, order = source
            yield rows[number] if order is None else rows[number].reordered(order)


def decode_chain(chain: Sequence[bytes], start: DecodedVersion | None = None) -> LossyVersion:
    """Decode the last version of a chain, in which each version refers to the previous one. Faster than one by one.

    Args:
        chain: The bytes of the versions, the first of which refers to `start`, or to nothing if that is None.
        start: A decoded version.

    Raises:
        FormatError: The bytes are damaged, or do not fit their references.
    """
    if start is not None and not isinstance(start, LossyVersion):
        raise FormatError("a version within an error bound refers to a lossless one.")
    try:
        return _decode_chain(chain, start)
    except PARSE_FAILURES as error:
        raise FormatError(f"a version cannot be decoded: {reason(error)}") from error


def _decode_chain(chain: Sequence[bytes], version: LossyVersion | None) -> LossyVersion:
    parsed, labels = [], labels_of(version) if version is not None else None
    for data in chain:
        parsed.append(container.parse(data, labels))
        labels = parsed[-1].labels
    coded = [
        part
        for each in parsed
        for part in (
            (each.labels.row_shapes[: each.labels.lora_blocks], each.lora_streams),
            (each.labels.row_shapes[each.labels.lora_blocks :], each.tensor_streams),
        )
    ]
    changes = (blocks for together in increments.decode(coded) for blocks in together)
    for each in parsed:
        version = _apply(each, [*next(changes), *next(changes)], version)
    if version is None:
        raise FormatError("a chain has no version.")
    return version


def _apply(
    parsed: ParsedVersion, changes: Sequence[Sequence[Increments]], reference: LossyVersion | None
) -> LossyVersion:
    """Return a version from its decoded increments and its reference."""
    blocks = []
    predicting_rows = _predicting_rows(reference, parsed.references)
    for labels, shape, predicting, parts in zip(
        parsed.labels.blocks, parsed.labels.shapes, predicting_rows, changes, strict=True
    ):
        prediction = Prediction.of(labels, shape[1], predicting)
        for part in parts:
            prediction.add(part.integers, part.rows)
        if np.abs(prediction.integers).max(initial=0) >= 2**31:
            raise FormatError("an integer is beyond 32 bits.")
        blocks.append(LatticeRows(prediction.integers.astype(np.int32), prediction.levels, labels))
    exact_before = reference.exact if reference is not None else None
    exact = lossless.decode(parsed.exact, exact_before) if parsed.exact else {}
    for module, layout in parsed.header.exact_modules.items():
        _check_exact(module, layout, exact)
    return LossyVersion.from_rows(
        parsed.header.level, parsed.labels.modules, parsed.labels.tensors, blocks, parsed.header.exact_modules, exact
    )


def _check_exact(module: str, layout: ModuleLayout, exact: Mapping[str, Tensor]) -> None:
    """Raise `FormatError` unless the factors of a module are among the exact tensors, in its layout."""
    down, up = (exact.get(keys.lora_key(module, side)) for side in keys.SIDES)
    if down is None or up is None or ModuleLayout.of(LoRAFactors(down, up, layout.scaling, layout.kernel)) != layout:
        raise FormatError(f"the factors of module {module} are not those of its layout.")
