"""Tensors of a safetensors file, read by their offsets when they are asked for.

The header is read and checked once. What is kept is a description, which may be pickled, and read from in any process
or thread: no file stays open, and none is mapped, since mapped pages count as the process's memory.
"""

import os
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.boundary import machine_memory
from ..errors import FormatError, reason
from . import header
from .header import Entry
from .urls import RemoteFile

_FIRST = 1 << 16
"""Bytes that are read at first: most headers are shorter, so that one read is enough."""

Part = tuple[int, memoryview]
"""Where a range of bytes begins, and the room it is to fill."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file on disk as it was when it was described: by what it was called, and as an absolute path."""

    called: str
    path: str
    size: int
    modified_ns: int

    def fill(self, parts: Sequence[Part]) -> None:
        """Read ranges of bytes, in the order of the file. `FormatError` if it is not the one that was described."""
        try:
            # unbuffered: bytes go where they are wanted, and none beside them is read
            with open(self.path, "rb", buffering=0) as file:
                now = os.fstat(file.fileno())
                if (now.st_size, now.st_mtime_ns) != (self.size, self.modified_ns):
                    raise self._changed()
                for begin, room in sorted(parts, key=itemgetter(0)):
                    file.seek(begin)
                    while room:
                        count = file.readinto(room)
                        if not count:
                            raise self._changed()
                        room = room[count:]
        except OSError as error:
            # a read does not say which file the disk failed at
            error.filename = error.filename or self.called
            raise

    def _changed(self) -> FormatError:
        return FormatError(
            f"{self.called} was changed while it was in use: it is not the file whose header was read. Run it again "
            "when nothing writes to it."
        )

    def __str__(self) -> str:
        return self.called


def local(path: Path) -> LocalFile:
    """The file as it is now. `FormatError` where it is none: to open a pipe waits, and a device has no end."""
    try:
        found = path.stat()
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(f"{path} is not a plain file.")
    return LocalFile(str(path), os.path.abspath(path), found.st_size, found.st_mtime_ns)


File = LocalFile | RemoteFile


@dataclass(frozen=True, slots=True)
class Stored:
    """The tensors of a safetensors file, by its header."""

    file: File
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def load(self, names: Sequence[str]) -> list[Tensor]:
        """Tensors by name, each in memory of its own."""
        entries = [self.entries[name] for name in names]
        buffers = [self._room(entry) for entry in entries]
        rooms = [buffer.numpy().data for buffer in buffers]
        self.file.fill([(entry.begin, room) for entry, room in zip(entries, rooms, strict=True)])
        return [buffer.view(entry.dtype).reshape(entry.shape) for entry, buffer in zip(entries, buffers, strict=True)]

    def _room(self, entry: Entry) -> Tensor:
        size = entry.end - entry.begin
        if size > machine_memory():
            # a sparse file has as many bytes as it says, and takes none of the disk
            raise FormatError(f"{self.file}: a tensor of {size:,} bytes does not fit in this machine's memory.")
        return torch.empty(size, dtype=torch.uint8)


def stored(file: File) -> Stored:
    """What a safetensors file has, by its header. `FormatError` if the file is not whole, or not one to the safetensors
    library."""
    where = str(file)
    first = _read(file, 0, min(_FIRST, file.size))
    end = header.LENGTH_BYTES + header.length(first, file.size, where)
    text = first[header.LENGTH_BYTES : end] + _read(file, len(first), max(end, len(first)))
    found = Stored(file, *header.parse(text, file.size, where))
    _check_is_read(file, first[: header.LENGTH_BYTES] + text)
    return found


def _check_is_read(file: File, head: bytes) -> None:
    """`FormatError` where the safetensors library would not open a file that begins with `head`.

    What it would refuse for reasons of its own, such as half a character in a text, could be read here and then written
    nowhere: an adapter would come into a pack and never come out. So it has the last word.
    """
    try:
        if isinstance(file, LocalFile):
            _open(file.path)
        else:
            # it opens files of this machine alone: this one is as long as the other one, and takes no room on the disk
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder, "copy.safetensors")
                copy.write_bytes(head)
                os.truncate(copy, file.size)
                _open(str(copy))
    except (SafetensorError, ValueError) as error:
        raise FormatError(f"{file} is not a safetensors file that can be read: {reason(error)}.") from error


def _open(path: str) -> None:
    with safe_open(path, framework="np"):
        pass


def _read(file: File, begin: int, end: int) -> bytes:
    room = bytearray(end - begin)
    if room:
        file.fill([(begin, memoryview(room))])
    return bytes(room)
