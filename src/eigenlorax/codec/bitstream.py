"""Quantised bases and adapters as bytes: docs/pack-format.md, "Coded".

A basis is one run of bytes, and an adapter is another, which is read with the layouts of its modules alone. Step sizes,
counts and levels come first, as plain or deflated bytes. They determine the class of every integer of the
entropy-coded stream that follows.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..core.limits import MAX_CORE, MAX_RANK
from ..errors import FormatError
from . import entropy, singular_codes
from .adapter_codes import NO_INTEGERS, AdapterCodes, ModuleCodes, ModuleLayout, SideCodes, narrow
from .class_tables import CLASSES
from .quantised_basis import QuantisedBasis, row_classes

BASIS_PART = "coded"
"""Suffix of the name of a coded basis in a subspace's file."""
STEP_SIZES_PER_OCTAVE = 2**14
"""Resolution of an adapter's quantisation step size, far finer than the search for it (`step_sizes.CLOSE`)."""
MAX_CLUSTERS = 255
"""Largest number of clusters of a basis: it is one byte."""
EMPTY_BASIS = bytes([3, 1, 0, 0])
"""Bytes of a basis without a row."""
_STEP_BYTES = 3
_NUMBERS_AT_ONCE = 1 << 22
"""Numbers of bases that are decoded together: one basis after the other takes longer, all of them take more memory."""
_WIDE_COUNTS, _DEFLATED, _CLUSTER = 1, 2, 4
"""The first number of an adapter: a bit for counts of two bytes, a bit for deflated levels, and above these the
cluster."""


def encode_bases(bases: Sequence[QuantisedBasis]) -> list[bytes]:
    """Return the bytes of each basis. They begin with their number, so that bases can be joined and split again."""
    streams = entropy.encode([(b.codes.numpy().ravel(), _code_classes(b.fineness, b.dimension)) for b in bases])
    return [
        with_length(
            bytes([max(len(basis.blocks), 1)])
            + np.array(basis.blocks or [basis.k], "<u2").tobytes()
            + basis.fineness.astype("u1").tobytes()
            # profiles are 0 or less
            + (-basis.profile).astype("u1").tobytes()
            + stream
        )
        for basis, stream in zip(bases, streams, strict=True)
    ]


def with_length(data: bytes) -> bytes:
    """Return the bytes of a basis after their number, which packs up to format 5 do not store."""
    return _encode_varint(len(data)) + data


def split_bases(data: bytes, n: int) -> list[bytes]:
    """Return the bytes of each of `n` bases whose bytes were joined; `FormatError` for any other number of them."""
    bases, start = [], 0
    for _ in range(n):
        size, at = _decode_varint(data, start)
        if size > len(data) - at:
            raise FormatError("the bytes of the bases end too early.")
        bases.append(data[start : at + size])
        start = at + size
    if start != len(data):
        raise FormatError(f"the bytes of {n} bases are followed by {len(data) - start} more.")
    return bases


def _code_classes(fineness: np.ndarray, dimension: int) -> np.ndarray:
    """Return the class of every code of a basis, row by row, in one byte each."""
    return np.repeat(row_classes(fineness, dimension).astype(np.uint8), dimension)


@dataclass(frozen=True, slots=True)
class _BasisHeader:
    """Header of a basis, and the entropy-coded stream that follows it.

    Attributes:
        blocks: Number of rows of each cluster; empty if there is one cluster.
        fineness: As in `QuantisedBasis`, (k,).
        profile: As in `QuantisedBasis`, (k,).
        stream: Entropy-coded codes of the rows.
    """

    blocks: tuple[int, ...]
    fineness: np.ndarray
    profile: np.ndarray
    stream: bytes

    @classmethod
    def read(cls, data: bytes) -> "_BasisHeader":
        """Read the header; `FormatError` where the bytes are shorter than it says."""
        data = data[_decode_varint(data, 0)[1] :]
        blocks = (
            tuple(np.frombuffer(data[1 : 1 + 2 * min(data[0], (len(data) - 1) // 2)], "<u2").tolist())
            if len(data) > 2
            else ()
        )
        # a count of blocks that is too large yields fewer blocks than it says
        k, at = sum(blocks), 1 + 2 * len(blocks)
        if not blocks or len(blocks) != data[0] or len(data) < at + 2 * k:
            raise FormatError("the bytes of a basis end too early.")
        fineness, profile = (np.frombuffer(data, "u1", k, at + start).astype(np.int64) for start in (0, k))
        return cls(blocks if len(blocks) > 1 else (), fineness, -profile, data[at + 2 * k :])


def decode_bases(sides: Sequence[tuple[bytes, tuple[int, int]]]) -> Iterator[QuantisedBasis]:
    """Yield the bases that `encode_bases` wrote, each from its bytes and the shape (k, d) of its rows.

    `FormatError` for bytes of another number of rows, before any of them is decoded.
    """
    headers: list[tuple[_BasisHeader, int]] = []
    for data, (k, dimension) in sides:
        header = _BasisHeader.read(data)
        if len(header.fineness) != k:
            raise FormatError(f"the bytes of a basis have {len(header.fineness)} rows, and should have {k}.")
        headers.append((header, dimension))
    start = numbers = 0
    for end, (header, dimension) in enumerate(headers, start=1):
        numbers += len(header.fineness) * dimension
        if numbers >= _NUMBERS_AT_ONCE or end == len(headers):
            yield from _decode_batch(headers[start:end])
            start, numbers = end, 0


def _decode_batch(headers: Sequence[tuple[_BasisHeader, int]]) -> Iterator[QuantisedBasis]:
    """Yield the bases of headers and widths of rows."""
    streams = [(header.stream, _code_classes(header.fineness, dimension)) for header, dimension in headers]
    for codes, (header, dimension) in zip(entropy.decode(streams), headers, strict=True):
        rows = torch.from_numpy(codes).reshape(len(header.fineness), dimension)
        yield QuantisedBasis(rows, header.fineness, header.profile, header.blocks)


def read_layout(sides: Sequence[tuple[bytes, int]], cluster: int) -> ModuleLayout:
    """Return the layout of a cluster from the bytes and widths of a module's bases, (down, up).

    No row is decoded for it. `FormatError` where a basis has no such cluster.
    """
    bases, no_codes = [], torch.zeros(1, 1, dtype=torch.int64)
    for data, dimension in sides:
        header = _BasisHeader.read(data)
        # a side without a row has none in any cluster
        if (header.blocks or len(header.fineness)) and cluster >= max(len(header.blocks), 1):
            n_clusters = max(len(header.blocks), 1)
            raise FormatError(f"an adapter is in cluster {cluster}, and a basis has {n_clusters} of them.")
        # an expanded zero has the shape of the codes, and takes no memory
        codes = no_codes.expand(len(header.fineness), dimension)
        bases.append(QuantisedBasis(codes, header.fineness, header.profile, header.blocks))
    return ModuleLayout.of((bases[0], bases[1]), cluster)


def encode_adapters(adapters: Sequence[tuple[AdapterCodes, Mapping[str, ModuleLayout]]]) -> list[bytes]:
    """Return the bytes of each adapter, from its codes and the layouts of its modules."""
    headers, streams = [], []
    for codes, layouts in adapters:
        # a reader knows the names of the modules from the adapter's config, and needs an order of them
        names = sorted(codes.modules)
        modules = [codes.modules[name] for name in names]
        headers.append(_encode_header(codes, modules))
        integers = [array.ravel() for module in modules for array in _code_arrays(module)]
        classes = [array for name in names for array in _class_arrays(codes.modules[name], layouts[name])]
        streams.append((np.concatenate([NO_INTEGERS, *integers]), np.concatenate([np.zeros(0, np.uint8), *classes])))
    return [header + stream for header, stream in zip(headers, entropy.encode(streams), strict=True)]


def _encode_header(codes: AdapterCodes, modules: Sequence[ModuleCodes]) -> bytes:
    """Return the header of an adapter: step size, cluster, and levels plane by plane."""
    counts = np.array([module.count for module in modules], dtype=np.int64)
    scales = np.concatenate([NO_INTEGERS, *(module.scales for module in modules)])
    levels = [np.concatenate([NO_INTEGERS, *arrays]) for arrays in zip(*(_levels(m) for m in modules), strict=True)]
    nonzero = [level > 0 for level in levels] or [np.zeros(0, dtype=bool)] * 4
    wide = bool((counts > 255).any())
    # plane by plane: deflate compresses similar bytes better side by side
    planes = [
        counts & 255,
        *([counts >> 8] if wide else []),
        np.array([module.core_level for module in modules], dtype=np.int64),
        # scales fall within an adapter's module, so that differences are small
        np.diff(scales, prepend=0),
        sum(flag.astype(np.int64) << bit for bit, flag in enumerate(nonzero)),
        # a level follows the scale: eighths of an octave against quarters
        *(level[flag] - scales[flag] // 2 for level, flag in zip(levels, nonzero, strict=True)),
    ]
    body = b"".join((plane & 255).astype("u1").tobytes() for plane in planes)
    # raw deflate, without zlib's header and checksum: the manifest has a SHA-256 of every file
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    deflated = compressor.compress(body) + compressor.flush()
    deflated = _encode_varint(len(deflated)) + deflated
    flags = _WIDE_COUNTS * wide + _DEFLATED * (len(deflated) < len(body)) + _CLUSTER * codes.cluster
    # adapters of few modules are shorter without
    body = min(body, deflated, key=len)
    # a step size beyond float32, which a caller refuses with the adapter's name, may be beyond these three bytes too
    logarithm = min(max(round(STEP_SIZES_PER_OCTAVE * math.log2(codes.step_size)), -(2**23)), 2**23 - 1)
    return logarithm.to_bytes(_STEP_BYTES, "little", signed=True) + _encode_varint(flags) + body


def _encode_varint(number: int) -> bytes:
    """Return a number in seven bits a byte, the lowest first; the eighth bit says that there are more bytes."""
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes([*data, number])


def _decode_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at an index, and the index after it."""
    number = shift = 0
    while True:
        if at >= len(data) or shift > 56:
            raise FormatError("a number of several bytes does not end.")
        number |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return number, at


def _levels(module: ModuleCodes) -> tuple[np.ndarray, ...]:
    down, up = module.down, module.up
    return down.coefficient_levels, down.residual_levels, up.coefficient_levels, up.residual_levels


def _code_arrays(module: ModuleCodes) -> list[np.ndarray]:
    """Return the codes of a module in the order in which they are written."""
    down, up = module.down, module.up
    return [module.core, down.coefficients, down.residuals, up.coefficients, up.residuals]


def _class_arrays(module: ModuleCodes, layout: ModuleLayout) -> list[np.ndarray]:
    """Return the class of each code of `_code_arrays`, in one byte each; only levels of `module` are read."""
    down, up = layout.profiles
    classes = [np.zeros(0, np.uint8)]
    if module.core_level:
        classes = [_as_classes(module.core_level - 1 + singular_codes.core_profile(down, up).numpy())]
    for side, (codes, profile) in enumerate(((module.down, down), (module.up, up))):
        levels = codes.coefficient_levels[codes.coefficient_levels > 0]
        residual_levels = codes.residual_levels[codes.residual_levels > 0]
        classes.append(_as_classes(levels[:, None] - 1 + profile[None]))
        classes.append(np.repeat(_as_classes(residual_levels - 1), layout.dimension(side)))
    return classes


def _as_classes(numbers: np.ndarray) -> np.ndarray:
    """Return level − 1 + profile as classes; negative numbers stand for class 0."""
    if numbers.size and numbers.max() >= CLASSES:
        raise FormatError(f"a level stands for class {numbers.max()}; classes end at {CLASSES - 1}.")
    classes: np.ndarray = np.maximum(numbers, 0).astype(np.uint8).ravel()
    return classes


def decode_adapter(data: bytes, layouts: Mapping[str, ModuleLayout], ranks: Mapping[str, int]) -> AdapterCodes:
    """Return the codes of an adapter.

    Args:
        data: Bytes of one adapter, from `encode_adapters`.
        layouts: Layouts of all its modules for the adapter's cluster.
        ranks: Ranks of the adapter in these modules.

    Raises:
        FormatError: If the bytes are damaged, or have more components than a rank allows. The latter is checked before
            any of their numbers is decoded.
    """
    for name, layout in layouts.items():
        check_rank(ranks[name], layout.shape)
    # sizes are checked in this order, so that no step takes memory that the one before has not accounted for
    header = read_header(data, sorted(layouts), sum(ranks.values()))
    for name, layout in layouts.items():
        _check_levels(header.levels[name], layout, ranks[name])
    classes = [array for name in sorted(layouts) for array in _class_arrays(header.levels[name], layouts[name])]
    (integers,) = entropy.decode([(header.stream, np.concatenate([np.zeros(0, np.uint8), *classes]))])
    ends = np.cumsum([len(array) for array in classes])
    pieces = iter(np.split(integers, ends[:-1]) if classes else [])
    modules = {}
    for name in sorted(layouts):
        core, *sides = (next(pieces) for _ in range(5))
        modules[name] = _with_codes(header.levels[name], core, sides, layouts[name])
    return AdapterCodes(header.step_size, header.cluster, modules)


def check_rank(rank: int, shape: tuple[int, int]) -> None:
    """Raise `FormatError` for a rank that no update of this shape (out, in) needs.

    Its factors would take memory that nothing in a file accounts for.
    """
    if rank > max(sum(shape), MAX_RANK):
        raise FormatError(f"rank {rank} is beyond out + in = {sum(shape)} of a module of shape {shape}.")


def _check_levels(levels: ModuleCodes, layout: ModuleLayout, rank: int) -> None:
    """Raise `FormatError` for more components than the rank, and for a core beyond `MAX_CORE`."""
    if levels.count > rank:
        raise FormatError(f"a module of rank {rank} has {levels.count} components.")
    if levels.core_level and max(map(len, layout.profiles)) > MAX_CORE:
        raise FormatError(f"a core lies between more than {MAX_CORE} components per side.")


def read_cluster(data: bytes) -> int:
    """Return the cluster of an adapter from its bytes."""
    return _decode_varint(data, _STEP_BYTES)[0] // _CLUSTER


@dataclass(frozen=True, slots=True)
class AdapterHeader:
    """Header of an adapter, and the entropy-coded stream that follows it.

    Attributes:
        step_size: Quantisation step size of the adapter.
        cluster: Cluster whose bases the adapter uses.
        levels: Scales and levels by module, as codes without integers.
        stream: Entropy-coded integers of all modules.
    """

    step_size: float
    cluster: int
    levels: Mapping[str, ModuleCodes]
    stream: bytes


def read_header(data: bytes, names: Sequence[str], max_components: int) -> AdapterHeader:
    """Read the header of an adapter.

    Args:
        data: Bytes of one adapter, from `encode_adapters`.
        names: Names of the adapter's modules in the subspace, sorted.
        max_components: Number of singular components of all modules together, at most. It bounds the memory that
            deflated levels may take.
    """
    flags, at = _decode_varint(data, _STEP_BYTES)
    wide = bool(flags & _WIDE_COUNTS)
    # a count of one or two bytes and a core of one for each module; a scale, flags and four levels for each component
    most = (2 + wide) * len(names) + 6 * max_components
    try:
        if flags & _DEFLATED:
            size, at = _decode_varint(data, at)
            # one byte more than allowed, so that a body that is too long is noticed
            body, at = zlib.decompressobj(-15).decompress(data[at : at + size], most + 1), at + size
        else:
            body = data[at : at + most]
        levels, end = _decode_levels(np.frombuffer(body, "u1").astype(np.int64), len(names), wide)
        if flags & _DEFLATED and end != len(body):
            raise ValueError(f"{len(body)} bytes in place of {end}")
        at += 0 if flags & _DEFLATED else end
    except (zlib.error, ValueError, IndexError) as error:
        raise FormatError(f"the levels of an adapter cannot be read: {error}.") from error
    step_size = 2.0 ** (int.from_bytes(data[:_STEP_BYTES], "little", signed=True) / STEP_SIZES_PER_OCTAVE)
    return AdapterHeader(step_size, flags // _CLUSTER, dict(zip(names, levels, strict=True)), data[at:])


def _decode_levels(body: np.ndarray, n: int, wide: bool) -> tuple[list[ModuleCodes], int]:
    """Return the levels of n modules, without codes, and how many bytes they take. wide: counts have two bytes."""
    planes = [body[start * n : (start + 1) * n] for start in range(2 + wide)]
    counts, core_levels = planes[0] + (planes[1] << 8 if wide else 0), planes[-1]
    total, at = int(counts.sum()), (2 + wide) * n
    if at + 2 * total > len(body):
        raise ValueError(f"{len(body)} bytes in place of {at + 2 * total} at least")
    # written as differences modulo 256
    scales = np.cumsum(body[at : at + total]) & 255
    flags, at = body[at + total : at + 2 * total], at + 2 * total
    levels = []
    for bit in range(4):
        nonzero = (flags >> bit & 1).astype(bool)
        level, size = np.zeros(total, dtype=np.int64), int(nonzero.sum())
        level[nonzero] = (body[at : at + size] + scales[nonzero] // 2) & 255
        levels.append(level)
        at += size
    if at > len(body) or len(flags) != total or len(core_levels) != n:
        raise ValueError(f"{len(body)} bytes in place of {at}")
    modules = []
    for start, count, core_level in zip(np.cumsum(counts) - counts, counts, core_levels, strict=True):
        span = slice(int(start), int(start + count))
        down = SideCodes(levels[0][span], NO_INTEGERS, levels[1][span], NO_INTEGERS)
        up = SideCodes(levels[2][span], NO_INTEGERS, levels[3][span], NO_INTEGERS)
        modules.append(ModuleCodes(scales[span], down, up, int(core_level), NO_INTEGERS))
    return modules, at


def _with_codes(
    levels: ModuleCodes, core: np.ndarray, sides: Sequence[np.ndarray], layout: ModuleLayout
) -> ModuleCodes:
    """Return a module's levels with its codes.

    Args:
        levels: Scales and levels, without integers.
        core: Codes of the core, flat.
        sides: The other arrays of `_code_arrays`, flat.
        layout: Layout of the module.
    """
    k = [len(profile) for profile in layout.profiles]
    filled = []
    for side, side_levels in enumerate((levels.down, levels.up)):
        coefficients, residuals = sides[2 * side : 2 * side + 2]
        n_coefficients = int((side_levels.coefficient_levels > 0).sum())
        n_residuals = int((side_levels.residual_levels > 0).sum())
        filled.append(
            SideCodes(
                side_levels.coefficient_levels,
                narrow(coefficients.reshape(n_coefficients, k[side])),
                side_levels.residual_levels,
                narrow(residuals.reshape(n_residuals, layout.dimension(side))),
            )
        )
    core_codes = core.reshape(k[1], k[0]) if levels.core_level else NO_INTEGERS
    return ModuleCodes(levels.scales, filled[0], filled[1], levels.core_level, core_codes)
