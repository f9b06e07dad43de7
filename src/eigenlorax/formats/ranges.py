"""Tensors of a safetensors file, read by byte ranges at each access.

The safetensors library validates every file, but its `safe_open` does not read the tensors, for three reasons:

- It opens local files only. The header of a file behind a URL shows whether the file is a LoRA, and its shapes: it has
  kilobytes, where the file may be a model of gigabytes. So the files of a repository are inspected without a download.
- It maps the file. When another process truncates a mapped file, reading it ends this process with SIGBUS. Here it is
  a `FormatError`.
- Mapped pages count as memory of the process, and a fit reads hundreds of files. Here no file stays open, so the
  description of a file can be pickled and read in any process or thread.
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

from ..core.limits import machine_memory
from ..errors import FormatError, reason
from .safetensors_file import LENGTH_BYTES, TensorEntry, header_length, invalid, parse_header
from .urls import RemoteFile

_FIRST_READ = 1 << 16
"""Bytes of the first read. Most headers are shorter, so one request is enough."""

Target = tuple[int, memoryview]
"""The offset of a range of bytes in a file, and the memory to read the range into."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file on disk, with its size and modification time at the moment it was described.

    Attributes:
        name: Path as the user passed it, for error messages.
        path: The same path, absolute.
        size: Size in bytes.
        modified_ns: Modification time in nanoseconds.
    """

    name: str
    path: str
    size: int
    modified_ns: int

    def read_into(self, targets: Sequence[Target]) -> None:
        """Read ranges of bytes in the order of the file.

        Raises:
            FormatError: The file has changed since it was described.
        """
        try:
            # unbuffered: bytes go directly into the target, and no others are read
            with open(self.path, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if (status.st_size, status.st_mtime_ns) != (self.size, self.modified_ns):
                    raise self._changed()
                for begin, memory in sorted(targets, key=itemgetter(0)):
                    file.seek(begin)
                    while memory:
                        count = file.readinto(memory)
                        if not count:
                            raise self._changed()
                        memory = memory[count:]
        except OSError as error:
            # an error of `readinto` does not name the file
            error.filename = error.filename or self.name
            raise

    def _changed(self) -> FormatError:
        return FormatError(
            f"{self.name} was changed while it was in use: it is not the file whose header was read. Run the command "
            "again when no other program writes to the file."
        )

    def __str__(self) -> str:
        return self.name


def local_file(path: Path) -> LocalFile:
    """Return a description of a file on disk in its present state.

    Raises:
        FormatError: The file does not exist, or is a pipe, which would block, or a device, which has no end.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{path} is not a regular file.")
    return LocalFile(str(path), os.path.abspath(path), status.st_size, status.st_mtime_ns)


File = LocalFile | RemoteFile


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file whose header has been read."""

    file: File
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]

    def load(self, names: Sequence[str]) -> list[Tensor]:
        """Read tensors by name, each into memory of its own."""
        entries = [self.entries[name] for name in names]
        buffers = [self._buffer(entry) for entry in entries]
        memories = [buffer.numpy().data for buffer in buffers]
        self.file.read_into([(entry.begin, memory) for entry, memory in zip(entries, memories, strict=True)])
        return [buffer.view(entry.dtype).reshape(entry.shape) for entry, buffer in zip(entries, buffers, strict=True)]

    def _buffer(self, entry: TensorEntry) -> Tensor:
        size = entry.end - entry.begin
        # a sparse file can have any size without occupying space on the disk
        if size > machine_memory():
            raise FormatError(f"{self.file}: a tensor of {size:,} bytes does not fit in this machine's memory.")
        return torch.empty(size, dtype=torch.uint8)


def open_tensors(file: File) -> TensorFile:
    """Read and check the header of a safetensors file.

    Raises:
        FormatError: The safetensors library does not accept the file, or torch cannot represent one of its tensors.
    """
    name = str(file)
    first = _read(file, 0, min(_FIRST_READ, file.size))
    end = LENGTH_BYTES + header_length(first, file.size, name)
    text = first[LENGTH_BYTES:end] + _read(file, len(first), max(end, len(first)))
    try:
        _validate(file, first[:LENGTH_BYTES] + text)
    except (SafetensorError, ValueError) as error:
        raise invalid(name, reason(error)) from error
    except MemoryError as error:
        # a sparse file can state any size, and the library maps all of it
        raise FormatError(f"{name} has {file.size:,} bytes, more than this process can map.") from error
    return TensorFile(file, *parse_header(text, name))


def _validate(file: File, head: bytes) -> None:
    """Check a file with the safetensors library, given its first bytes `head`: header length and header.

    The library opens local files only. For a remote file it gets a sparse file of the same size and header.
    """
    if isinstance(file, LocalFile):
        with safe_open(file.path, framework="np"):
            pass
        # the library opened the path again: raise if it is not the file whose header was read
        file.read_into([])
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy.safetensors")
        copy.write_bytes(head)
        os.truncate(copy, file.size)
        with safe_open(str(copy), framework="np"):
            pass


def _read(file: File, begin: int, end: int) -> bytes:
    buffer = bytearray(end - begin)
    if buffer:
        file.read_into([(begin, memoryview(buffer))])
    return bytes(buffer)
