"""Bases and adapters in whole numbers as bytes, and back as tensors: docs/pack-format.md, "Coded".

A side of a module is one run of bytes, and all of an adapter is another, which can be read beside its bases alone.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.boundary import MAX_CORE, MAX_RANK
from ..core.coefficients import Coefficients
from ..errors import FormatError
from . import entropy, singular_codes
from .singular_codes import RoundedBasis

CODED = "coded"
"""What the bytes of a side are called in a subspace's file."""
STEPS = 2**14
"""Steps of adapters that can be written, to an octave."""
_STEP_BYTES = 3
EMPTY = bytes([1, 0, 0])
"""Those of a side without a row."""
_NONE = np.zeros(0, dtype=np.int64)
_NARROW = (np.int8, np.int16, np.int32, np.int64)
_AT_ONCE = 1 << 22
"""Numbers of bases that are decoded together: one basis after the other takes longer, all of them take more memory."""


@dataclass(frozen=True, slots=True)
class SideRows:
    """The components of one update on one side: codes row by row, in an integer dtype that is wide enough for them.

    Levels are those of `transform.SideCodes`, (r,). coefficients: (of the r those with a level, k); rest: (…, d).
    """

    coefficient_levels: np.ndarray
    coefficients: np.ndarray
    rest_levels: np.ndarray
    rest: np.ndarray


@dataclass(frozen=True, slots=True)
class ModuleCodes:
    """One update in whole numbers, as `transform.Codes` has several. core: empty where there is none."""

    scales: np.ndarray
    down: SideRows
    up: SideRows
    core_level: int
    core: np.ndarray

    @property
    def count(self) -> int:
        """How many components there are."""
        return len(self.scales)


@dataclass(frozen=True, slots=True)
class AdapterCodes:
    """An adapter in whole numbers of its step, by module. cluster: whose bases it is in."""

    step: float
    cluster: int
    modules: Mapping[str, ModuleCodes]


@dataclass(frozen=True, slots=True)
class ModuleLayout:
    """What an adapter's module must be read beside: of the bases (down, up) of its cluster, and of the module's shape.

    profiles: `RoundedBasis.profile`. shape: (out, in). widths: how many rows the bases of all clusters have; offsets:
    where those of this one begin.
    """

    profiles: tuple[np.ndarray, np.ndarray]
    shape: tuple[int, int]
    widths: tuple[int, int]
    offsets: tuple[int, int]

    @classmethod
    def of(cls, bases: tuple[RoundedBasis, RoundedBasis], cluster: int) -> "ModuleLayout":
        """That of a cluster, from the bases of all."""
        down, up = bases
        return cls(
            (down.block(cluster).profile, up.block(cluster).profile),
            (up.codes.shape[1], down.codes.shape[1]),
            (down.k, up.k),
            (down.span(cluster).start, up.span(cluster).start),
        )

    def dimension(self, side: int) -> int:
        """Of rows on the down side (0) or the up side (1)."""
        return self.shape[1 - side]


NO_CODES = SideRows(_NONE, _NONE, _NONE, _NONE)
UNTRAINED = ModuleCodes(_NONE, NO_CODES, NO_CODES, 0, _NONE)


def taken(codes: singular_codes.Codes, row: int) -> ModuleCodes:
    """One of several updates."""
    count = int(codes.counts[row])
    level = int(codes.core_levels[row])
    return ModuleCodes(
        codes.scales[row, :count].numpy(),
        _side_rows(codes.down, row, count),
        _side_rows(codes.up, row, count),
        level,
        _narrow(codes.cores[row]) if level else _NONE,
    )


def _side_rows(codes: singular_codes.SideCodes, row: int, count: int) -> SideRows:
    levels, rest_levels = (one[row, :count] for one in (codes.coefficient_levels, codes.rest_levels))
    return SideRows(
        levels.numpy(),
        _narrow(codes.coefficients[row, :count][levels > 0]),
        rest_levels.numpy(),
        _narrow(codes.rest[row, :count][rest_levels > 0]),
    )


def _narrow(codes: Tensor) -> np.ndarray:
    return _narrowed(codes.numpy())


def _narrowed(codes: np.ndarray) -> np.ndarray:
    """The same integers in one or two bytes each where that is enough."""
    low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    return codes.astype(next(kind for kind in _NARROW if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max))


def basis_bytes(bases: Sequence[RoundedBasis]) -> list[bytes]:
    """Sides of modules, each in bytes of its own."""
    streams = entropy.encode(
        [(one.codes.numpy().ravel(), _number_classes(one.fineness, one.codes.shape[1])) for one in bases]
    )
    return [
        bytes([max(len(one.blocks), 1)])
        + np.array(one.blocks or [one.k], "<u2").tobytes()
        + one.fineness.astype("u1").tobytes()
        + (-one.profile).astype("u1").tobytes()
        + stream
        for one, stream in zip(bases, streams, strict=True)
    ]


def _number_classes(fineness: np.ndarray, dimension: int) -> np.ndarray:
    """Of every number of a basis, row by row, in one byte each."""
    return np.repeat(singular_codes.row_classes(fineness, dimension).astype(np.uint8), dimension)


def bases(sides: Sequence[tuple[bytes, tuple[int, int]]]) -> Iterator[RoundedBasis]:
    """Yield the inverse of `basis_bytes`: sides of modules, each from its bytes and the shape (k, d) of its rows.

    `FormatError` for bytes of another number of rows, before any of them is decoded.
    """
    heads = []
    for data, (k, dimension) in sides:
        head = _basis_head(data)
        if len(head[1]) != k:
            raise FormatError(f"the bytes of a basis have {len(head[1])} rows, and should have {k}.")
        heads.append((*head, dimension))
    start = numbers = 0
    for end, (_, fineness, _, _, dimension) in enumerate(heads, start=1):
        numbers += len(fineness) * dimension
        if numbers >= _AT_ONCE or end == len(heads):
            yield from _decoded(heads[start:end])
            start, numbers = end, 0


def _decoded(heads: Sequence[tuple[tuple[int, ...], np.ndarray, np.ndarray, bytes, int]]) -> Iterator[RoundedBasis]:
    """The bases of `_basis_head`s and widths of rows."""
    streams = [(stream, _number_classes(fineness, dimension)) for _, fineness, _, stream, dimension in heads]
    for codes, (blocks, fineness, profile, _, dimension) in zip(entropy.decode(streams), heads, strict=True):
        yield RoundedBasis(torch.from_numpy(codes).reshape(len(fineness), dimension), fineness, profile, blocks)


def read_layout(sides: Sequence[tuple[bytes, int]], cluster: int) -> ModuleLayout:
    """That of a cluster, from the bytes and widths of a module's bases (down, up), whose rows are not needed for it."""
    bare, none = [], torch.zeros(1, 1, dtype=torch.int64)
    for data, dimension in sides:
        blocks, fineness, profile, _ = _basis_head(data)
        # a side without a row has none in any cluster
        if (blocks or len(fineness)) and cluster >= max(len(blocks), 1):
            raise FormatError(f"an adapter is in cluster {cluster}, and a basis has {max(len(blocks), 1)} of them.")
        bare.append(RoundedBasis(none.expand(len(fineness), dimension), fineness, profile, blocks))
    return ModuleLayout.of((bare[0], bare[1]), cluster)


def _basis_head(data: bytes) -> tuple[tuple[int, ...], np.ndarray, np.ndarray, bytes]:
    """Blocks where there are several, fineness, profile, and what the rows are coded in."""
    blocks = (
        tuple(np.frombuffer(data[1 : 1 + 2 * min(data[0], (len(data) - 1) // 2)], "<u2").tolist())
        if len(data) > 2
        else ()
    )
    k, at = sum(blocks), 1 + 2 * len(blocks)
    if not blocks or len(blocks) != data[0] or len(data) < at + 2 * k:
        raise FormatError("the bytes of a basis end too early.")
    fineness, profile = (np.frombuffer(data, "u1", k, at + start).astype(np.int64) for start in (0, k))
    return blocks if len(blocks) > 1 else (), fineness, -profile, data[at + 2 * k :]


def adapter_bytes(adapters: Sequence[tuple[AdapterCodes, Mapping[str, ModuleLayout]]]) -> list[bytes]:
    """Adapters, each beside the places of its modules."""
    heads, streams = [], []
    for one, places in adapters:
        modules = [one.modules[name] for name in sorted(one.modules)]
        heads.append(_head(one, modules))
        values = [part.ravel() for module in modules for part in _parts(module)]
        classes = [kinds for name in sorted(one.modules) for kinds in _classes(one.modules[name], places[name])]
        streams.append((np.concatenate([_NONE, *values]), np.concatenate([np.zeros(0, np.uint8), *classes])))
    return [head + stream for head, stream in zip(heads, entropy.encode(streams), strict=True)]


def _head(one: AdapterCodes, modules: Sequence[ModuleCodes]) -> bytes:
    """Step, cluster and all levels. Levels are written beside what a component's scale lets expect."""
    counts = np.array([module.count for module in modules], dtype=np.int64)
    scales = np.concatenate([_NONE, *(module.scales for module in modules)])
    levels = [np.concatenate([_NONE, *found]) for found in zip(*(_levels(module) for module in modules), strict=True)]
    there = [level > 0 for level in levels] or [np.zeros(0, dtype=bool)] * 4
    wide = bool((counts > 255).any())
    planes = [
        counts & 255,
        *([counts >> 8] if wide else []),
        np.array([module.core_level for module in modules], dtype=np.int64),
        np.diff(scales, prepend=0),
        sum(flag.astype(np.int64) << bit for bit, flag in enumerate(there)),
        *(level[flag] - scales[flag] // 2 for level, flag in zip(levels, there, strict=True)),
    ]
    body = b"".join((plane & 255).astype("u1").tobytes() for plane in planes)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(body) + packer.flush()
    packed = _varint(len(packed)) + packed
    flags = _WIDE * wide + _PACKED * (len(packed) < len(body)) + _CLUSTER * one.cluster
    body = min(body, packed, key=len)
    # what is beyond float32, and so refused with its name, may be beyond this too
    step = min(max(round(STEPS * math.log2(one.step)), -(2**23)), 2**23 - 1)
    return step.to_bytes(_STEP_BYTES, "little", signed=True) + _varint(flags) + body


_WIDE, _PACKED, _CLUSTER = 1, 2, 4
"""What the first number of an adapter says: whether counts have two bytes, whether levels are deflated, and, from
there on, the cluster."""


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that there are more."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def _from_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    number = shift = 0
    while True:
        if at >= len(data) or shift > 56:
            raise FormatError("the bytes of an adapter end too early.")
        number |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return number, at


def _levels(module: ModuleCodes) -> tuple[np.ndarray, ...]:
    down, up = module.down, module.up
    return down.coefficient_levels, down.rest_levels, up.coefficient_levels, up.rest_levels


def _parts(module: ModuleCodes) -> list[np.ndarray]:
    """Codes in the order in which they are written."""
    down, up = module.down, module.up
    return [module.core, down.coefficients, down.rest, up.coefficients, up.rest]


def _classes(module: ModuleCodes, place: ModuleLayout) -> list[np.ndarray]:
    """The class of each code of `_parts`, in one byte each."""
    down, up = place.profiles
    found = [np.zeros(0, np.uint8)]
    if module.core_level:
        found = [_as_classes(module.core_level - 1 + singular_codes.core_profile(down, up).numpy())]
    for side, (rows, profile) in enumerate(((module.down, down), (module.up, up))):
        known = rows.coefficient_levels[rows.coefficient_levels > 0]
        rest = rows.rest_levels[rows.rest_levels > 0]
        found.append(_as_classes(known[:, None] - 1 + profile[None]))
        found.append(np.repeat(_as_classes(rest - 1), place.dimension(side)))
    return found


def _as_classes(numbers: np.ndarray) -> np.ndarray:
    """Classes that may be negative, which stand for 0."""
    if numbers.size and numbers.max() >= entropy.CLASSES:
        raise FormatError(f"a level stands for class {numbers.max()}; classes end at {entropy.CLASSES - 1}.")
    classes: np.ndarray = np.maximum(numbers, 0).astype(np.uint8).ravel()
    return classes


def adapter(data: bytes, places: Mapping[str, ModuleLayout], ranks: Mapping[str, int]) -> AdapterCodes:
    """One adapter, from its bytes, the places of all its modules, each in the bases of its cluster, and their ranks.

    `FormatError` where the bytes have more components than a rank allows, before any of their numbers is decoded.
    """
    for name, place in places.items():
        check_rank(ranks[name], place.shape)
    step, cluster, levels, stream = opened(data, sorted(places), sum(ranks.values()))
    for name, place in places.items():
        _check_levels(levels[name], place, ranks[name])
    classes = [_classes(levels[name], places[name]) for name in sorted(places)]
    flat = [part for parts in classes for part in parts]
    (values,) = entropy.decode([(stream, np.concatenate([np.zeros(0, np.uint8), *flat]))])
    pieces = iter(np.split(values, np.cumsum([len(part) for part in flat])[:-1]) if flat else [])
    modules = {}
    for name in sorted(places):
        core, *sides = (next(pieces) for _ in range(5))
        modules[name] = _filled(levels[name], core, sides, places[name])
    return AdapterCodes(step, cluster, modules)


def check_rank(rank: int, shape: tuple[int, int]) -> None:
    """`FormatError` for a rank that no update of this shape (out, in) needs, and whose factors would take memory that
    nothing in a file accounts for."""
    if rank > max(sum(shape), MAX_RANK):
        raise FormatError(f"rank {rank} is beyond out + in = {sum(shape)} of a module of shape {shape}.")


def _check_levels(levels: ModuleCodes, place: ModuleLayout, rank: int) -> None:
    """`FormatError` for more components than the rank, and for a core beyond `MAX_CORE`."""
    if levels.count > rank:
        raise FormatError(f"a module of rank {rank} has {levels.count} components.")
    if levels.core_level and max(map(len, place.profiles)) > MAX_CORE:
        raise FormatError(f"a core lies between more than {MAX_CORE} components per side.")


def cluster(data: bytes) -> int:
    """Whose bases an adapter is in."""
    return _from_varint(data, _STEP_BYTES)[0] // _CLUSTER


def opened(data: bytes, names: Sequence[str], most_components: int) -> tuple[float, int, dict[str, ModuleCodes], bytes]:
    """Step, cluster, all levels, and what is to be decoded with them. most_components: of all modules together."""
    flags, at = _from_varint(data, _STEP_BYTES)
    wide = bool(flags & _WIDE)
    # a count of one or two bytes and a core of one for each module; a scale, flags and four levels for each component
    most = (2 + wide) * len(names) + 6 * most_components
    try:
        if flags & _PACKED:
            size, at = _from_varint(data, at)
            body, at = zlib.decompressobj(-15).decompress(data[at : at + size], most + 1), at + size
        else:
            body = data[at : at + most]
        unpacked, end = _unpacked(np.frombuffer(body, "u1").astype(np.int64), len(names), wide)
        if flags & _PACKED and end != len(body):
            raise ValueError(f"{len(body)} bytes in place of {end}")
        at += 0 if flags & _PACKED else end
    except (zlib.error, ValueError, IndexError) as error:
        raise FormatError(f"the levels of an adapter cannot be read: {error}.") from error
    step = 2.0 ** (int.from_bytes(data[:_STEP_BYTES], "little", signed=True) / STEPS)
    return step, flags // _CLUSTER, dict(zip(names, unpacked, strict=True)), data[at:]


def _unpacked(body: np.ndarray, n: int, wide: bool) -> tuple[list[ModuleCodes], int]:
    """The modules with their levels, and no codes yet; and how many bytes these are."""
    planes = [body[start * n : (start + 1) * n] for start in range(2 + wide)]
    counts, cores = planes[0] + (planes[1] << 8 if wide else 0), planes[-1]
    total, at = int(counts.sum()), (2 + wide) * n
    if at + 2 * total > len(body):
        raise ValueError(f"{len(body)} bytes in place of {at + 2 * total} at least")
    scales = np.cumsum(body[at : at + total]) & 255
    flags, at = body[at + total : at + 2 * total], at + 2 * total
    levels = []
    for bit in range(4):
        there = (flags >> bit & 1).astype(bool)
        level, size = np.zeros(total, dtype=np.int64), int(there.sum())
        level[there] = (body[at : at + size] + scales[there] // 2) & 255
        levels.append(level)
        at += size
    if at > len(body) or len(flags) != total or len(cores) != n:
        raise ValueError(f"{len(body)} bytes in place of {at}")
    found = []
    for start, count, core in zip(np.cumsum(counts) - counts, counts, cores, strict=True):
        part = slice(int(start), int(start + count))
        down = SideRows(levels[0][part], _NONE, levels[1][part], _NONE)
        up = SideRows(levels[2][part], _NONE, levels[3][part], _NONE)
        found.append(ModuleCodes(scales[part], down, up, int(core), _NONE))
    return found, at


def _filled(levels: ModuleCodes, core: np.ndarray, sides: Sequence[np.ndarray], place: ModuleLayout) -> ModuleCodes:
    """A module with its codes."""
    k = [len(profile) for profile in place.profiles]
    found = []
    for side, of in enumerate((levels.down, levels.up)):
        known, rest = sides[2 * side : 2 * side + 2]
        there, rest_there = int((of.coefficient_levels > 0).sum()), int((of.rest_levels > 0).sum())
        found.append(
            SideRows(
                of.coefficient_levels,
                _narrowed(known.reshape(there, k[side])),
                of.rest_levels,
                _narrowed(rest.reshape(rest_there, place.dimension(side))),
            )
        )
    wide = core.reshape(k[1], k[0]) if levels.core_level else _NONE
    return ModuleCodes(levels.scales, found[0], found[1], levels.core_level, wide)


def coefficients(
    one: ModuleCodes, step: float, place: ModuleLayout, *, rank: int, scaling: float, kernel: tuple[int, ...] = ()
) -> Coefficients:
    """What the codes stand for, float32, of the rank of the adapter: rows of zeros fill it up."""
    if one.core_level:
        core = torch.from_numpy(one.core.astype(np.float64))[None]
        left, right = singular_codes.core_factors(core, torch.tensor([step], dtype=torch.float64), torch.tensor([rank]))
        down = _placed(right[0], rank, place.widths[0], place.offsets[0])
        up = _placed(left[0].mT / (scaling or 1.0), rank, place.widths[1], place.offsets[1])
        return Coefficients(down, up.mT.contiguous(), scaling, kernel)
    weight = torch.from_numpy(np.sqrt(step * 2.0 ** (-one.scales / singular_codes.SCALES)))
    known, rests = [], []
    for side, (rows, rows_weight) in enumerate(((one.down, weight), (one.up, weight / (scaling or 1.0)))):
        on_basis = _weighted(rows.coefficients, rows.coefficient_levels, rows_weight, rank)
        known.append(_placed(on_basis, rank, place.widths[side], place.offsets[side]))
        rest = _weighted(rows.rest, rows.rest_levels, rows_weight, rank)
        rests.append(rest.float() if (rows.rest_levels > 0).any() else None)
    down, up = known
    down_residual, up_residual = rests
    if up_residual is not None:
        up_residual = up_residual.mT.contiguous()
    return Coefficients(down, up.mT.contiguous(), scaling, kernel, down_residual, up_residual)


def _weighted(codes: np.ndarray, levels: np.ndarray, weight: Tensor, rank: int) -> Tensor:
    """Rows from the codes of those that have a level, (rank, d) float64."""
    there = torch.from_numpy(np.flatnonzero(levels > 0))
    found = torch.zeros(rank, codes.shape[1] if codes.ndim == 2 else 0, dtype=torch.float64)
    if len(there):
        found[there] = torch.from_numpy(codes.astype(np.float64)) * weight[there, None]
    return found


def _placed(rows: Tensor, rank: int, width: int, offset: int) -> Tensor:
    """Coefficients on the rows of one cluster among those of all, float32."""
    found = torch.zeros(rank, width, dtype=torch.float32)
    found[: len(rows), offset : offset + rows.shape[1]] = rows
    return found
