"""The bytes of a version: a header, levels and classes of all rows, entropy-coded increments, exact tensors.

docs/pack-format.md describes each byte.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Int64

from ...core.json_dataclasses import from_json
from ...core.limits import MAX_JSON_BYTES, check_coded_count, check_expansion, check_growth
from ...errors import FormatError
from .. import varint
from ..class_tables import ALL_CLASSES
from . import increments
from .decoded import ModuleLayout, TensorLayout
from .increments import RowShape
from .lattice import MAX_LEVEL, ZERO_CLASS, RowLabels


@dataclass(frozen=True, slots=True)
class Header:
    """Layout of a version.

    Attributes:
        has_reference: True if rows are predicted from those of an earlier version.
        level: Level of rows of weight 1.
        modules: Layout of the modules whose factors are coded, by name; None if they are those of the reference.
        tensors: Layout of the tensors that are coded, by key; None likewise.
        orders: Rows of the reference that predict the rows of a module, −1 for none, by module. Other modules have as
            many rows as in the reference, predicted in their order, or are not in the reference.
        exact_modules: Layout of the modules whose factors are stored exactly, by name.
    """

    has_reference: bool
    level: int
    modules: dict[str, ModuleLayout] | None
    tensors: dict[str, TensorLayout] | None
    orders: dict[str, list[int]]
    exact_modules: dict[str, ModuleLayout]


@dataclass(frozen=True, slots=True)
class Labels:
    """Layouts and labels of all rows of a version. Blocks are up and down of each module, then each tensor.

    Attributes:
        modules: Layout of the coded modules, by name, sorted.
        tensors: Layout of the coded tensors, by key, sorted.
        blocks: Labels of each block.
    """

    modules: Mapping[str, ModuleLayout]
    tensors: Mapping[str, TensorLayout]
    blocks: Sequence[RowLabels]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Number and width of the rows of each block."""
        return shapes_of(self.modules, self.tensors)

    @property
    def row_shapes(self) -> list[RowShape]:
        """Widths and classes of all blocks, which divide them into streams."""
        return [RowShape(width, labels.classes) for (_, width), labels in zip(self.shapes, self.blocks, strict=True)]

    @property
    def lora_blocks(self) -> int:
        """Number of blocks of LoRA factors, which come first."""
        return 2 * len(self.modules)


def shapes_of(modules: Mapping[str, ModuleLayout], tensors: Mapping[str, TensorLayout]) -> list[tuple[int, int]]:
    """Return the number and the width of the rows of each block."""
    blocks = [(layout.rank, width) for layout in modules.values() for width in layout.widths]
    return blocks + [(layout.rows, layout.width) for layout in tensors.values()]


Orders = Sequence[tuple[int, Int64[np.ndarray, " _"] | None] | None]
"""For each block, the number of the block of the reference that predicts it, and the order of the rows there (None for
the same order); None for no prediction."""


def find_references(
    header: Header, earlier: Labels | None, modules: Mapping[str, ModuleLayout], tensors: Mapping[str, TensorLayout]
) -> Orders:
    """Return which blocks of a reference predict the blocks of a version.

    Args:
        header: Header of the version.
        earlier: Labels of the reference; None for none.
        modules, tensors: Layouts of the version.

    Raises:
        FormatError: An order does not fit the reference.
    """
    if earlier is None:
        return [None] * (2 * len(modules) + len(tensors))
    module_numbers = {module: number for number, module in enumerate(earlier.modules)}
    tensor_numbers = {key: number for number, key in enumerate(earlier.tensors)}
    references: list[tuple[int, np.ndarray | None] | None] = []
    for module, layout in modules.items():
        source = earlier.modules.get(module)
        order = np.array(header.orders[module], np.int64) if module in header.orders else None
        if source is None or source.widths != layout.widths or (order is None and source.rank != layout.rank):
            references += [None, None]
            continue
        if order is not None and (len(order) != layout.rank or order.max() >= source.rank or order.min() < -1):
            raise FormatError(f"the rows of module {module} refer to rows that the reference does not have.")
        references += [(2 * module_numbers[module] + side, order) for side in range(2)]
    for key, tensor in tensors.items():
        is_same = key in earlier.tensors and earlier.tensors[key].shape == tensor.shape
        references.append((2 * len(earlier.modules) + tensor_numbers[key], None) if is_same else None)
    return references


@dataclass(frozen=True, slots=True)
class ParsedVersion:
    """The bytes of a version, before increments are decoded.

    Attributes:
        header: The header.
        labels: Layouts, levels and classes.
        references: Which blocks of the reference predict the blocks.
        lora_streams, tensor_streams: Streams of increments.
        exact: Bytes of the tensors that are stored exactly; empty if there are none.
    """

    header: Header
    labels: Labels
    references: Orders
    lora_streams: list[bytes]
    tensor_streams: list[bytes]
    exact: bytes


def to_bytes(parsed: ParsedVersion, earlier: Labels | None) -> tuple[bytes, int]:
    """Return the bytes of a version, and how many of them are LoRA factors rather than other tensors.

    Args:
        parsed: The version.
        earlier: Labels of the reference; None for none.
    """
    labels, lora_blocks = parsed.labels, parsed.labels.lora_blocks
    text = json.dumps(asdict(parsed.header), separators=(",", ":"), sort_keys=True).encode()
    expected = _expected_labels(labels.shapes, parsed.references, earlier)
    lora = _label_parts(labels.blocks[:lora_blocks], expected[:lora_blocks], has_one_level=False)
    tensors = _label_parts(labels.blocks[lora_blocks:], expected[lora_blocks:], has_one_level=True)
    parts = [_deflate(text), *lora, *parsed.lora_streams, *tensors, *parsed.tensor_streams, parsed.exact]
    sized = [varint.encode(len(part)) + part for part in parts]
    lora_bytes = sum(map(len, sized[: 1 + len(lora) + len(parsed.lora_streams)]))
    return b"".join(sized), lora_bytes


def _label_parts(blocks: Sequence[RowLabels], expected: Sequence[RowLabels], *, has_one_level: bool) -> list[bytes]:
    """Return levels, classes and, unless each block has one level, gains, as differences to those of the reference."""
    levels, classes, gains = b"", b"", b""
    for block, earlier in zip(blocks, expected, strict=True):
        difference = block.step_levels.astype(np.int32) - earlier.step_levels
        levels += difference[: 1 if has_one_level else None].astype("<i2").tobytes()
        classes += (block.classes.astype(np.int32) - earlier.classes).astype(np.uint8).tobytes()
        gains += block.gains.tobytes()
    return [_deflate(part) for part in (levels, classes) + (() if has_one_level else (gains,))]


def _expected_labels(shapes: Sequence[tuple[int, int]], references: Orders, earlier: Labels | None) -> list[RowLabels]:
    expected = []
    for (count, _), reference in zip(shapes, references, strict=True):
        if reference is None or earlier is None:
            expected.append(RowLabels.zeros(count))
        else:
            number, order = reference
            expected.append(earlier.blocks[number] if order is None else earlier.blocks[number].reordered(order))
    return expected


def parse(data: bytes, earlier: Labels | None) -> ParsedVersion:
    """Read the bytes that `to_bytes` wrote, without decoding increments.

    Args:
        data: The bytes.
        earlier: Labels of the reference; None if the version is decoded without one.

    Raises:
        FormatError, ValueError: The bytes are damaged, do not fit the reference, or ask for more memory than they
            explain.
    """
    reader = _Reader(data)
    header = from_json(Header, json.loads(reader.inflate(MAX_JSON_BYTES)), "the header of a version")
    if header.has_reference != (earlier is not None):
        wanted = "an earlier version" if header.has_reference else "no earlier version"
        raise FormatError(f"a version refers to {wanted}.")
    if abs(header.level) > MAX_LEVEL:
        raise FormatError("the level of a version is out of range.")
    modules = header.modules if earlier is None or header.modules is not None else earlier.modules
    tensors = header.tensors if earlier is None or header.tensors is not None else earlier.tensors
    if modules is None or tensors is None:
        raise FormatError("a key version has no layout.")
    for module in [*modules.values(), *header.exact_modules.values()]:
        module.check()
    for tensor in tensors.values():
        tensor.check()
    shapes = shapes_of(modules, tensors)
    numbers = sum(count * width for count, width in shapes)
    explained = sum(count * width for count, width in earlier.shapes) if earlier is not None else 0
    if explained:
        check_growth(4 * (numbers - explained), len(data), "a version")
    else:
        check_expansion(4 * numbers, len(data), "a version")
    references = find_references(header, earlier, modules, tensors)
    expected, lora_blocks = _expected_labels(shapes, references, earlier), 2 * len(modules)
    lora = _read_labels(reader, shapes[:lora_blocks], expected[:lora_blocks], has_one_level=False)
    lora_streams = reader.streams(shapes[:lora_blocks], lora)
    others = _read_labels(reader, shapes[lora_blocks:], expected[lora_blocks:], has_one_level=True)
    tensor_streams = reader.streams(shapes[lora_blocks:], others)
    exact = reader.part()
    reader.check_end()
    labels = Labels(modules, tensors, lora + others)
    # the increments of a version that hardly differs from the earlier one take next to no bytes
    coded = increments.count_coded(labels.row_shapes) - explained
    check_coded_count(coded, sum(map(len, lora_streams + tensor_streams)), "a version")
    return ParsedVersion(header, labels, references, lora_streams, tensor_streams, exact)


def _read_labels(
    reader: "_Reader", shapes: Sequence[tuple[int, int]], expected: Sequence[RowLabels], *, has_one_level: bool
) -> list[RowLabels]:
    counts = [count for count, _ in shapes]
    level_counts = [1] * len(counts) if has_one_level else counts
    levels = np.frombuffer(reader.inflate(2 * sum(level_counts), exact=True), "<i2")
    classes = np.frombuffer(reader.inflate(sum(counts), exact=True), np.uint8)
    gains = np.zeros(sum(counts), np.int8)
    if not has_one_level:
        gains = np.frombuffer(reader.inflate(sum(counts), exact=True), np.int8)
    blocks, row, level = [], 0, 0
    for count, level_count, labels in zip(counts, level_counts, expected, strict=True):
        block_levels = labels.step_levels.astype(np.int32) + levels[level : level + level_count]
        block_classes = (labels.classes + classes[row : row + count]).astype(np.uint8)
        if np.abs(block_levels).max(initial=0) > MAX_LEVEL:
            raise FormatError("a level is out of range.")
        if ((block_classes >= ALL_CLASSES) & (block_classes != ZERO_CLASS)).any():
            raise FormatError("a class is out of range.")
        blocks.append(RowLabels(block_levels.astype(np.int16), gains[row : row + count], block_classes))
        row, level = row + count, level + level_count
    return blocks


class _Reader:
    """Reads parts that begin with their length.

    Args:
        data: The parts.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def part(self) -> bytes:
        """Return the next part."""
        size, at = varint.decode(self._data, self._at)
        part = self._data[at : at + size]
        if len(part) != size:
            raise FormatError("the bytes of a version end too early.")
        self._at = at + size
        return part

    def inflate(self, limit: int, *, exact: bool = False) -> bytes:
        """Return the next part, inflated: at most `limit` bytes, or exactly as many."""
        decompressor = zlib.decompressobj(-15)
        inflated = decompressor.decompress(self.part(), limit + 1)
        if len(inflated) > limit or not decompressor.eof or decompressor.unused_data:
            raise FormatError("a deflated part of a version is damaged.")
        if exact and len(inflated) != limit:
            raise FormatError(f"a version has {len(inflated)} bytes of labels, not {limit}.")
        return inflated

    def streams(self, shapes: Sequence[tuple[int, int]], labels: Sequence[RowLabels]) -> list[bytes]:
        """Return the streams of blocks."""
        row_shapes = [RowShape(width, block.classes) for (_, width), block in zip(shapes, labels, strict=True)]
        return [self.part() for _ in range(increments.count_streams(row_shapes))]

    def check_end(self) -> None:
        """Raise `FormatError` if there are more bytes."""
        if self._at != len(self._data):
            raise FormatError("the bytes of a version are followed by more.")


def _deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return compressor.compress(data) + compressor.flush()
