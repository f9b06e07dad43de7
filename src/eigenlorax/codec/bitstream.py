"""Adapters as bytes: docs/pack-format.md, "An adapter's bytes".

The bytes of an adapter are read with the layouts of its modules alone. Step size, counts and levels come first, as
plain or deflated bytes. They determine the class of every integer of the entropy-coded stream that follows.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.limits import MAX_CORE, MAX_RANK
from ..errors import FormatError
from . import entropy, short_streams, singular_codes, varint
from .adapter_codes import NO_INTEGERS, AdapterCodes, ModuleCodes, ModuleLayout, SideCodes
from .class_tables import CLASSES
from .narrow_integers import narrow

STEP_SIZES_PER_OCTAVE = 2**14
"""Resolution of an adapter's quantisation step size, far finer than the search for it (`step_sizes.CLOSE`)."""
_STEP_BYTES = 3
_WIDE_COUNTS, _DEFLATED, _CLUSTER = 1, 2, 4
"""The first number of an adapter in the long form: a bit for counts of two bytes, a bit for deflated levels, and above
these the cluster."""
_SHORT_BITS = 21
"""Bits of the step size in the short form, ±64 octaves. The three bits above are one of the following kinds."""
_PLAIN_LEVELS, _DEFLATED_LEVELS, _CORES_OF_ONE_LEVEL = 2, 3, 4
_SHORT_KINDS = (_PLAIN_LEVELS, _DEFLATED_LEVELS, _CORES_OF_ONE_LEVEL)
_RESERVED_KIND = 5


def encode_adapters(adapters: Sequence[tuple[AdapterCodes, Mapping[str, ModuleLayout]]]) -> list[bytes]:
    """Return the bytes of each adapter, from its codes and the layouts of its modules."""
    headers, streams = [], []
    for codes, layouts in adapters:
        # a reader knows the names of the modules from the adapter's config, and needs an order of them
        names = sorted(codes.modules)
        modules = [codes.modules[name] for name in names]
        headers.append(_Header.of(codes, modules))
        # empty arrays would widen the dtype of the others
        integers = [array.ravel() for module in modules for array in _code_arrays(module) if array.size]
        classes = [array for name in names for array in _class_arrays(codes.modules[name], layouts[name])]
        streams.append(
            (np.concatenate([np.zeros(0, np.int8), *integers]), np.concatenate([np.zeros(0, np.uint8), *classes]))
        )
    encoded = [header.long_form + data for header, data in zip(headers, entropy.encode(streams), strict=True)]
    for index, (header, stream) in enumerate(zip(headers, streams, strict=True)):
        short_form = header.short_form
        if short_form is not None and len(stream[0]) <= short_streams.MAX_INTEGERS:
            encoded[index] = min(encoded[index], short_form + short_streams.encode(*stream), key=len)
    return encoded


@dataclass(frozen=True, slots=True)
class _Header:
    """Step size, cluster and levels of an adapter, which can be written in two forms.

    Attributes:
        logarithm: Logarithm of the step size, in `STEP_SIZES_PER_OCTAVE`.
        cluster: Cluster whose bases the adapter uses.
        is_wide: True if counts have two bytes.
        levels: The levels, plane by plane.
        deflated: The same, deflated, after their length.
        core_level: Level of all cores if no module has singular components, and all cores have one level; else None.
    """

    logarithm: int
    cluster: int
    is_wide: bool
    levels: bytes
    deflated: bytes
    core_level: int | None

    @classmethod
    def of(cls, codes: AdapterCodes, modules: Sequence[ModuleCodes]) -> "_Header":
        """Return the header of an adapter, whose modules are in sorted order of names."""
        levels, is_wide = _level_planes(modules)
        # raw deflate, without zlib's header and checksum: the manifest has a SHA-256 of every file
        compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
        deflated = compressor.compress(levels) + compressor.flush()
        core_levels = {module.core_level for module in modules}
        has_cores_only = len(core_levels) == 1 and not any(module.count for module in modules)
        # a step size beyond float32, which a caller refuses with the adapter's name, may be beyond three bytes too
        logarithm = min(max(round(STEP_SIZES_PER_OCTAVE * math.log2(codes.step_size)), -(2**22)), 2**22 - 1)
        return cls(
            logarithm,
            codes.cluster,
            is_wide,
            levels,
            varint.encode(len(deflated)) + deflated,
            core_levels.pop() if has_cores_only else None,
        )

    @property
    def long_form(self) -> bytes:
        """Bytes before a stream of `entropy`."""
        # adapters of few modules are shorter without deflate
        is_deflated = len(self.deflated) < len(self.levels)
        flags = _WIDE_COUNTS * self.is_wide + _DEFLATED * is_deflated + _CLUSTER * self.cluster
        step = self.logarithm.to_bytes(_STEP_BYTES, "little", signed=True)
        return step + varint.encode(flags) + (self.deflated if is_deflated else self.levels)

    @property
    def short_form(self) -> bytes | None:
        """Bytes before a stream of `short_streams`; None if the adapter needs the long form."""
        shifted = self.logarithm + (1 << _SHORT_BITS - 1)
        if self.is_wide or self.cluster or not 0 <= shifted < 1 << _SHORT_BITS:
            return None
        forms = {_PLAIN_LEVELS: self.levels, _DEFLATED_LEVELS: self.deflated}
        if self.core_level is not None:
            forms[_CORES_OF_ONE_LEVEL] = bytes([self.core_level])
        kind, levels = min(forms.items(), key=lambda form: len(form[1]))
        return (kind << _SHORT_BITS | shifted).to_bytes(_STEP_BYTES, "little") + levels


def _level_planes(modules: Sequence[ModuleCodes]) -> tuple[bytes, bool]:
    """Return the levels of all modules, plane by plane, and whether counts have two bytes."""
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
    return b"".join((plane & 255).astype("u1").tobytes() for plane in planes), wide


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
    all_classes = np.concatenate([np.zeros(0, np.uint8), *classes])
    if header.is_short:
        integers = short_streams.decode(header.stream, all_classes)
    else:
        (integers,) = entropy.decode([(header.stream, all_classes)])
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
    if _kind(data) in _SHORT_KINDS:
        return 0
    return varint.decode(data, _STEP_BYTES)[0] // _CLUSTER


@dataclass(frozen=True, slots=True)
class AdapterHeader:
    """Header of an adapter, and the entropy-coded stream that follows it.

    Attributes:
        step_size: Quantisation step size of the adapter.
        cluster: Cluster whose bases the adapter uses.
        levels: Scales and levels by module, as codes without integers.
        stream: Entropy-coded integers of all modules.
        is_short: True if the stream is one of `short_streams`, and not of `entropy`.
    """

    step_size: float
    cluster: int
    levels: Mapping[str, ModuleCodes]
    stream: bytes
    is_short: bool


def read_header(data: bytes, names: Sequence[str], max_components: int) -> AdapterHeader:
    """Read the header of an adapter.

    Args:
        data: Bytes of one adapter, from `encode_adapters`.
        names: Names of the adapter's modules in the subspace, sorted.
        max_components: Number of singular components of all modules together, at most. It bounds the memory that
            deflated levels may take.
    """
    number, kind = int.from_bytes(data[:_STEP_BYTES], "little"), _kind(data)
    is_short = kind in _SHORT_KINDS
    if is_short:
        logarithm = (number & (1 << _SHORT_BITS) - 1) - (1 << _SHORT_BITS - 1)
        flags, at = _DEFLATED * (kind == _DEFLATED_LEVELS), _STEP_BYTES
    else:
        logarithm = int.from_bytes(data[:_STEP_BYTES], "little", signed=True)
        flags, at = varint.decode(data, _STEP_BYTES)
    wide = bool(flags & _WIDE_COUNTS)
    # a count of one or two bytes and a core of one for each module; a scale, flags and four levels for each component
    most = (2 + wide) * len(names) + 6 * max_components
    try:
        if flags & _DEFLATED:
            size, at = varint.decode(data, at)
            # one byte more than allowed, so that a body that is too long is noticed
            body, at = zlib.decompressobj(-15).decompress(data[at : at + size], most + 1), at + size
        elif kind == _CORES_OF_ONE_LEVEL:
            body, at = bytes(len(names)) + bytes([data[at]]) * len(names), at + 1
        else:
            body = data[at : at + most]
        levels, end = _decode_levels(np.frombuffer(body, "u1").astype(np.int64), len(names), wide)
        if flags & _DEFLATED and end != len(body):
            raise ValueError(f"{len(body)} bytes in place of {end}")
        at += end if not flags & _DEFLATED and kind != _CORES_OF_ONE_LEVEL else 0
    except (zlib.error, ValueError, IndexError) as error:
        raise FormatError(f"the levels of an adapter cannot be read: {error}.") from error
    step_size = 2.0 ** (logarithm / STEP_SIZES_PER_OCTAVE)
    return AdapterHeader(step_size, flags // _CLUSTER, dict(zip(names, levels, strict=True)), data[at:], is_short)


def _kind(data: bytes) -> int:
    """Return the three bits that tell the short form of an adapter from the long one; `FormatError` for another one."""
    kind = int.from_bytes(data[:_STEP_BYTES], "little") >> _SHORT_BITS
    if len(data) < _STEP_BYTES or kind == _RESERVED_KIND:
        raise FormatError("the bytes of an adapter have an unknown form.")
    return kind


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
