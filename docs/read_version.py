"""A reader of versions within an error bound that needs no eigenlorax, as docs/pack-format.md specifies them.

Tensors that are stored exactly are left out: they are in the form of lossless versions.
"""

import json
import math
import zlib

import numpy as np
import read_pack

GROUPS = 128
UNCHANGED = 255
MOST_TOGETHER = 4194304


def version(chain):
    """Module name → (B, A, scaling) and key → tensor, of the last of some versions, each referring to the one before.

    All are float64, and not rounded to their dtypes.
    """
    blocks, header = {}, None
    for data in chain:
        header, blocks = decoded(data, header, blocks)
    updates = {
        name: (values(blocks["up", name]).T, values(blocks["down", name]), layout["scaling"])
        for name, layout in header["modules"].items()
    }
    tensors = {key: values(blocks["", key]).reshape(layout["shape"]) for key, layout in header["tensors"].items()}
    return updates, tensors


def values(block):
    """The numbers of (whole numbers, levels, step levels, classes) of rows."""
    integers, levels, _, _ = block
    return integers * steps(levels)[:, None]


def steps(levels):
    """The step size of each level."""
    return np.array([2.0 ** (level % 8 / 8) * 2.0 ** (level // 8) for level in levels.tolist()])


def decoded(data, earlier, known):
    """Header and blocks of a version, from those of the earlier one."""
    parts = iter(split(data))
    header = json.loads(inflated(next(parts)))
    assert header["has_reference"] == (earlier is not None)
    header = {**header, **{part: earlier[part] for part in ("modules", "tensors") if header[part] is None}}
    before = earlier["modules"] if earlier else {}
    modules, tensors = [], []
    for name, layout in header["modules"].items():
        order = header["orders"].get(name)
        sizes = ("out_features", "in_features") if order is not None else ("rank", "out_features", "in_features")
        same = name in before and all(before[name][size] == layout[size] for size in sizes)
        for side, width in (("up", layout["out_features"]), ("down", layout["in_features"])):
            block = known[side, name] if same else None
            modules.append(((side, name), (layout["rank"], width), rows_of(block, order)))
    for key, layout in header["tensors"].items():
        n = math.prod(layout["shape"])
        rows = layout["shape"][0] if len(layout["shape"]) > 1 else 1
        rows = rows if n // rows >= 32 else 1
        same = ("", key) in known and earlier["tensors"][key]["shape"] == layout["shape"]
        tensors.append((("", key), (rows, n // rows), known["", key] if same else None))
    blocks = read_blocks(modules, parts, one_level=False) | read_blocks(tensors, parts, one_level=True)
    next(parts)
    assert next(parts, None) is None
    return header, blocks


def rows_of(block, order):
    """The rows of a block in another order, -1 for a row of zeros."""
    if block is None or order is None:
        return block
    integers, levels, step_levels, classes = block
    return (
        np.array([integers[i] if i >= 0 else 0 * integers[0] for i in order]),
        np.array([levels[i] if i >= 0 else 0 for i in order]),
        np.array([step_levels[i] if i >= 0 else 0 for i in order]),
        np.array([classes[i] if i >= 0 else UNCHANGED for i in order]),
    )


def read_blocks(listed, parts, *, one_level):
    """Name → (whole numbers, levels, step levels, classes) of blocks, from (name, shape, predicting rows) of each."""
    levels, classes = np.frombuffer(inflated(next(parts)), "<i2").tolist(), list(inflated(next(parts)))
    gains = [0] * len(classes) if one_level else np.frombuffer(inflated(next(parts)), "i1").tolist()
    blocks = []
    for name, (rows, width), predicting in listed:
        differences = [levels.pop(0)] * rows if one_level else [levels.pop(0) for _ in range(rows)]
        step_levels = np.array(differences) + (predicting[2] if predicting else 0)
        block_classes = (np.array([classes.pop(0) for _ in range(rows)]) + (predicting[3] if predicting else 0)) % 256
        block_gains = [gains.pop(0) for _ in range(rows)]
        integers, block_levels = np.zeros((rows, width), np.int64), step_levels.copy()
        for i in range(rows):
            if predicting and predicting[0][i].any():
                k, m, g = int(predicting[1][i]), int(step_levels[i]), block_gains[i]
                if (m - k) % 8 == 0 and g == 0:
                    block_levels[i] = max(min(m, k), m - 32)
                factor = steps(np.array([k - block_levels[i]]))[0] / 64
                integers[i] = np.rint(predicting[0][i] * (64 + g) * factor).astype(np.int64)
        blocks.append((name, integers, block_levels, step_levels, block_classes))
    assert not levels
    assert not classes
    for pieces in divided(blocks):
        kinds = [np.repeat(block[4][rows], width) for block, rows, width, _ in pieces]
        numbers = stream(next(parts), np.concatenate(kinds))
        for block, rows, width, in_groups in pieces:
            coded, numbers = numbers[: len(rows) * width], numbers[len(rows) * width :]
            if in_groups:
                coded = (coded[:, None] // 3 ** np.arange(4) % 3 - 1).reshape(len(rows), -1)
            _, integers, block_levels, step_levels, _ = block
            counts = 2 ** ((step_levels - block_levels)[rows] // 8)
            integers[rows] += counts[:, None] * coded.reshape(len(rows), -1)[:, : integers.shape[1]]
    return {name: block for name, *block in blocks}


def divided(blocks):
    """For each stream, its pieces: block, rows, coded numbers of a row, and whether these are groups."""
    streams, size = [], MOST_TOGETHER
    for block in blocks:
        _, integers, _, _, classes = block
        width = integers.shape[1]
        at_once = max(1, MOST_TOGETHER // width)
        for in_groups in (False, True):
            chosen = (classes >= GROUPS) == in_groups
            rows = np.flatnonzero(chosen & (classes != UNCHANGED))
            coded = -(-width // 4) if in_groups else width
            for start in range(0, len(rows), at_once):
                piece = (block, rows[start : start + at_once], coded, in_groups)
                size += len(piece[1]) * coded
                if not streams or size > MOST_TOGETHER:
                    streams.append([])
                    size = len(piece[1]) * coded
                streams[-1].append(piece)
    return streams


def stream(data, classes):
    """The numbers of a stream, with the tables of groups beside those of read_pack."""
    tables = {c: group_table(c - GROUPS) if c >= GROUPS else read_pack.table(c) for c in set(classes.tolist())}
    return read_pack.decoded(data, classes, tables)


def group_table(g):
    """The table of a class of groups, in the form of those of read_pack."""
    p = 0.75 * 2.0 ** (-g / 4)
    frequencies = []
    for symbol in range(81):
        changed = sum(symbol // 3**i % 3 != 1 for i in range(4))
        frequencies.append(1 + math.floor((2**15 - 82) * (p / 2) ** changed * (1 - p) ** (4 - changed)))
    frequencies[40] += 2**15 - 1 - sum(frequencies)
    return 0, 0, [*np.cumsum([0, *frequencies]).tolist(), 2**15]


def split(data):
    """The parts of a version."""
    at = 0
    while at < len(data):
        size = shift = 0
        while True:
            byte, at = data[at], at + 1
            size |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        yield data[at : at + size]
        at += size


def inflated(part):
    """A raw DEFLATE stream, inflated."""
    return zlib.decompress(part, -15)
