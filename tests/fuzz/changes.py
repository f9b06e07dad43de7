"""Changes of an input, as data that can be written to a file of cases and made again.

An input is a tree of files in memory. A change names the file, what is done to it, and the arguments of that.
"""

import json
import math
import os
import socket
import struct
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from . import documents

HEADER_LENGTH = 8
LONGEST = 1 << 26
"""Bytes of a tensor that is made."""
GIANT = 4 << 40
"""Bytes of a sparse file that is larger than any memory."""
ITEMSIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}


@dataclass(frozen=True)
class Special:
    """What lies in the place of a file, or of a folder, that is no plain file."""

    kind: str


KINDS = ("absent", "fifo", "folder", "dangling", "cycle", "zero", "giant", "socket", "file")
Tree = dict[str, bytes | Special]
"""Files by their path in the input."""


@dataclass(frozen=True)
class Change:
    """One change: `how` is a key of `HOW`."""

    file: str
    how: str
    arguments: tuple[Any, ...] = ()

    def to_plain(self) -> list[Any]:
        return [self.file, self.how, *documents.to_plain(list(self.arguments))]

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> "Change":
        return cls(plain[0], plain[1], tuple(documents.from_plain(list(plain[2:]))))


def apply(tree: Tree, change: Change) -> Tree:
    """The input with one change; as it is where the change does not fit what others have left of it.

    A pattern stands for every file that it fits: names may depend on what is in files.
    """
    if change.how == "create":
        (text,) = change.arguments
        return {**tree, change.file: text.encode()}
    if change.how == "special":
        # a folder goes with all that is in it
        kept = {path: data for path, data in tree.items() if not f"{path}/".startswith(f"{change.file}/")}
        (kind,) = change.arguments
        return kept if kind == "absent" else {**kept, change.file: Special(kind)}
    if change.how == "as":
        (other,) = change.arguments
        return {**tree, change.file: tree.get(other, b"")}
    return {
        name: HOW[change.how](name, data, *change.arguments)
        if isinstance(data, bytes) and (name == change.file or fnmatchcase(name, change.file))
        else data
        for name, data in tree.items()
    }


def write(tree: Tree, folder: Path) -> None:
    """The input as files."""
    folder.mkdir()
    made = {folder}
    specials = {name for name, data in tree.items() if isinstance(data, Special)}
    for name, data in tree.items():
        path = folder / name
        if specials & {str(parent) for parent in PurePosixPath(name).parents}:
            # of two changes, one has made a folder something else
            continue
        if path.parent not in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.add(path.parent)
        if isinstance(data, bytes):
            path.write_bytes(data)
        else:
            _make_special(path, data.kind)


def size(tree: Tree) -> int:
    """Bytes of the plain files."""
    return sum(len(data) for data in tree.values() if isinstance(data, bytes))


def _make_special(path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nothing-is-here")
    elif kind == "cycle":
        path.symlink_to(path.name)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "giant":
        with open(path, "wb") as file:
            # so that a safetensors file has a header of plausible length
            file.write(struct.pack("<Q", 2))
            file.truncate(GIANT)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            # a path of a socket may have about a hundred bytes
            here = os.open(".", os.O_RDONLY)
            os.chdir(path.parent)
            try:
                one.bind(path.name[:90])
            finally:
                os.fchdir(here)
                os.close(here)
    else:
        path.write_bytes(b"")


# What is done to a file: functions of its name, its bytes, and a change's arguments.


def _in_document(name: str, data: bytes, edit: Callable[[Any], Any]) -> bytes:
    """A JSON file, or the header of a safetensors file, edited; as it is where it cannot be parsed any more."""
    with suppress(ValueError, RecursionError, struct.error):
        if name.endswith(".safetensors"):
            header, rest = split(data)
            return joined(edit(header), rest)
        if name.endswith((".jsonl", ".ndjson")):
            lines = edit([json.loads(line) for line in data.splitlines()])
            if isinstance(lines, list):
                return "\n".join(documents.dumps(line) for line in lines).encode()
            return documents.dumps(lines).encode()
        return documents.dumps(edit(json.loads(data)), 1).encode()
    return data


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes after it."""
    (length,) = struct.unpack("<Q", data[:HEADER_LENGTH])
    return json.loads(data[HEADER_LENGTH : HEADER_LENGTH + length]), data[HEADER_LENGTH + length :]


def joined(header: Any, rest: bytes) -> bytes:
    """A safetensors file; the header need not fit the bytes."""
    text = documents.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + rest


def _set(name: str, data: bytes, path: documents.Path, value: Any) -> bytes:
    return _in_document(name, data, lambda body: documents.replaced(body, path, lambda _: value))


def _delete(name: str, data: bytes, path: documents.Path) -> bytes:
    def without(parent: Any) -> Any:
        if isinstance(parent, dict):
            return {key: one for key, one in parent.items() if key != path[-1]}
        if isinstance(parent, list):
            return [one for index, one in enumerate(parent) if index != path[-1]]
        return parent

    return _in_document(name, data, lambda body: documents.replaced(body, path[:-1], without))


def _insert(name: str, data: bytes, path: documents.Path, key: str, value: Any) -> bytes:
    def more(parent: Any) -> Any:
        if isinstance(parent, dict):
            return {**parent, key: value}
        return [*parent, value] if isinstance(parent, list) else parent

    return _in_document(name, data, lambda body: documents.replaced(body, path, more))


def _rename(name: str, data: bytes, path: documents.Path, key: str) -> bytes:
    def renamed(parent: Any) -> Any:
        if isinstance(parent, dict):
            return {key if old == path[-1] else old: one for old, one in parent.items()}
        return parent

    return _in_document(name, data, lambda body: documents.replaced(body, path[:-1], renamed))


def _twice(name: str, data: bytes, path: documents.Path, key: str, value: Any) -> bytes:
    """A key of an object once more, with another value."""

    def doubled(parent: Any) -> Any:
        if not isinstance(parent, dict) or not parent:
            return parent
        return documents.raw(f"{documents.dumps(parent)[:-1]}, {json.dumps(key)}: {documents.dumps(value)}}}")

    return _in_document(name, data, lambda body: documents.replaced(body, path, doubled))


def _copy(name: str, data: bytes, path: documents.Path, source: documents.Path) -> bytes:
    """A value in another place of the document too."""

    def edit(body: Any) -> Any:
        try:
            value = documents.at(body, source)
        except (LookupError, TypeError):
            return body
        return documents.replaced(body, path, lambda _: value)

    return _in_document(name, data, edit)


def _text(name: str, data: bytes, old: str, new: str) -> bytes:
    """A text of a JSON file, or of a safetensors file's header, in the place of another one."""
    before, after = (json.dumps(one)[1:-1].encode() for one in (old, new))
    if not name.endswith(".safetensors"):
        return data.replace(before, after)
    (length,) = struct.unpack("<Q", data[:HEADER_LENGTH].ljust(HEADER_LENGTH, b"\0"))
    header = data[HEADER_LENGTH : HEADER_LENGTH + length].replace(before, after)
    return struct.pack("<Q", len(header)) + header + data[HEADER_LENGTH + length :]


def _flip(name: str, data: bytes, place: int, bit: int) -> bytes:
    return _put(name, data, place, bytes([data[place % len(data)] ^ 1 << bit]).hex()) if data else data


def _put(_: str, data: bytes, place: int, text: str) -> bytes:
    place %= max(len(data), 1)
    new = bytes.fromhex(text)
    return data[:place] + new + data[place + len(new) :]


def _add(_: str, data: bytes, place: int, text: str, times: int = 1) -> bytes:
    place %= len(data) + 1
    return data[:place] + bytes.fromhex(text) * times + data[place:]


def _cut(_: str, data: bytes, place: int, length: int) -> bytes:
    place %= max(len(data), 1)
    return data[:place] + data[place + length :]


def _end(_: str, data: bytes, length: int) -> bytes:
    return data[:length]


def _tensor(name: str, data: bytes, key: str, dtype: str | None, shape: list[int] | None, fill: str | None) -> bytes:
    """A tensor of a safetensors file in another dtype or shape, or with other numbers, at offsets that are right.

    fill: hexadecimal bytes that are repeated; None for those that the tensor has, cut or repeated.
    """

    def changed(described: dict[str, Any], old: bytes) -> tuple[dict[str, Any], bytes]:
        new = {
            **described,
            "dtype": dtype or described["dtype"],
            "shape": described["shape"] if shape is None else shape,
        }
        length = math.prod(new["shape"]) * ITEMSIZES[new["dtype"]]
        if length > LONGEST:
            raise OverflowError
        pattern = bytes.fromhex(fill) if fill is not None else old or b"\0"
        return new, (pattern * (length // len(pattern) + 1))[:length]

    return _over_tensors(data, lambda tensors: {**tensors, key: changed(*tensors[key])} if key in tensors else tensors)


def _drop(name: str, data: bytes, key: str) -> bytes:
    return _over_tensors(data, lambda tensors: {one: held for one, held in tensors.items() if one != key})


def _call(name: str, data: bytes, key: str, other: str) -> bytes:
    """A tensor under another name."""
    return _over_tensors(data, lambda tensors: {other if one == key else one: held for one, held in tensors.items()})


def _repeat(name: str, data: bytes, key: str, other: str) -> bytes:
    """A tensor under another name too."""
    return _over_tensors(data, lambda tensors: {**tensors, other: tensors[key]} if key in tensors else tensors)


Tensors = dict[str, tuple[dict[str, Any], bytes]]


def _over_tensors(data: bytes, edit: Callable[[Tensors], Tensors]) -> bytes:
    """A safetensors file with tensors edited and offsets made anew; as it is where it is none any more."""
    try:
        header, rest = split(data)
        metadata = header.pop("__metadata__", None)
        tensors = {key: (one, rest[slice(*one["data_offsets"])]) for key, one in header.items()}
        found = edit(tensors)
    except (ArithmeticError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error):
        return data
    new: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    body = b""
    for key, (described, held) in found.items():
        new[key] = {**described, "data_offsets": [len(body), len(body) + len(held)]}
        body += held
    return joined(new, body)


def _blob(name: str, data: bytes, key: str, how: str, *arguments: Any) -> bytes:
    """A tensor of bytes with a change of bytes, and a shape that fits."""

    def changed(tensors: Tensors) -> Tensors:
        if key not in tensors:
            return tensors
        described, held = tensors[key]
        new = BYTES[how](name, held, *arguments)
        return {**tensors, key: ({**described, "shape": [len(new)]}, new)}

    return _over_tensors(data, changed)


def _levels(_: str, data: bytes, how: str, *arguments: Any) -> bytes:
    """The bytes of a coded adapter with its levels changed, and deflated again."""
    flags, at = _varint(data, 3)
    if flags & 2:
        length, at = _varint(data, at)
        try:
            body = zlib.decompressobj(-15).decompress(data[at : at + length], 1 << 20)
        except zlib.error:
            return data
        rest = data[at + length :]
    else:
        # where levels end shows as they are read: what is changed may lie behind them
        body, rest = data[at:], b""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(BYTES[how](_, body, *arguments)) + packer.flush()
    return data[:3] + varint(flags | 2) + varint(len(packed)) + packed + rest


def _flags(_: str, data: bytes, flags: int) -> bytes:
    """The bytes of a coded adapter with other flags, or another cluster."""
    return data[:3] + varint(flags) + data[_varint(data, 3)[1] :]


def _basis(_: str, data: bytes, index: int, how: str, *arguments: Any) -> bytes:
    """The bytes of all coded bases with those of one changed, and their number right again."""
    parts, at = [], 0
    while at < len(data):
        length, at = _varint(data, at)
        parts.append(data[at : at + length])
        at += length
    if parts:
        parts[index % len(parts)] = BYTES[how](_, parts[index % len(parts)], *arguments)
    return b"".join(varint(len(part)) + part for part in parts)


def varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while at < len(data):
        number |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            break
    return number, at


BYTES: dict[str, Callable[..., bytes]] = {
    "flip": _flip,
    "put": _put,
    "add": _add,
    "cut": _cut,
    "end": _end,
    "levels": _levels,
    "flags": _flags,
    "basis": _basis,
}
"""Changes of bytes: of a file, or of a tensor of bytes in one."""
HOW: dict[str, Callable[..., bytes]] = {
    **BYTES,
    "set": _set,
    "delete": _delete,
    "insert": _insert,
    "rename": _rename,
    "twice": _twice,
    "copy": _copy,
    "text": _text,
    "tensor": _tensor,
    "drop": _drop,
    "call": _call,
    "repeat": _repeat,
    "blob": _blob,
}
