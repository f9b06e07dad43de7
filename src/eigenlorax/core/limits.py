"""Limits for untrusted files and values, checked before memory is allocated, and errors for what cannot be parsed.

SECURITY.md says what is guaranteed.
"""

import json
import math
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EISDIR, ELOOP, EMLINK, ENAMETOOLONG, ENOENT, ENOTDIR, ENXIO
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from ..errors import EigenloraxError, FormatError, PackDamagedError, PackError, reason
from .json_dataclasses import describe

# Largest width of a row that is read: ten times the width of the widest linear layers in use, which have one row per
# token of a vocabulary.
MAX_DIMENSION = 1 << 22
# Largest rank of a module that is narrower than that. A wider one may have a rank up to `out + in`.
MAX_RANK = 1 << 10
# Largest number of components per side of a coded core. The encoder writes half of it at most.
MAX_CORE = 1 << 10
# Largest number of clusters of a coded basis: it is one byte
MAX_CLUSTERS = 255
# Largest size of a JSON file of an adapter
MAX_JSON_BYTES = 1 << 26
# Largest depth of nested lists and objects in JSON. Python parses ten times that depth, but cannot write it again.
MAX_DEPTH = 100
# Largest size of a manifest
MAX_MANIFEST_BYTES = 1 << 30
# Largest size of a report
MAX_REPORT_BYTES = 1 << 28
# Largest header of a safetensors file, as that format defines
MAX_HEADER_BYTES = 100_000_000
# Bytes of memory that reading may take in addition to what the size of the files explains
MEMORY_ALLOWANCE = 200_000_000
# Largest ratio of bytes in memory to bytes in a file. Useful coded rows take at least about one bit per number, and
# become float32.
MAX_EXPANSION = 64
# Bytes per entry of an adapter's factors while they are built: in float64, in the final dtype, and in a file
FACTOR_BYTES = 16
# Bytes per entry of augmented rows while they are rebuilt: drawn, and made orthogonal to the others, in float64
REBUILDING_BYTES = 40

# Exceptions that Python, NumPy, torch and safetensors raise for values that they cannot use.
#
# RuntimeError covers RecursionError, and torch's errors of shapes and decompositions. OSError is not one of them: an
# unreadable disk says nothing about what is on it.
PARSE_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
    zlib.error,
)
# systems report ELOOP or EMLINK for a link that is not followed
_MISSING_ERRNOS = {ENOENT, ENOTDIR, EISDIR, ELOOP, EMLINK, ENAMETOOLONG, ENXIO}


@contextmanager
def damaged_on_error(where: Path | str) -> Iterator[None]:
    """Raise `PackDamagedError` for every parse failure in the block.

    Errors about packs pass through. Lack of memory becomes a plain `PackError`, since the pack need not be the cause.

    Args:
        where: The file or folder that is read, for the message.
    """
    try:
        yield
    except PackError:
        raise
    except MemoryError as error:
        raise PackError(f"{where} cannot be read: this machine has too little memory for it.") from error
    except PARSE_FAILURES as error:
        kind = "" if isinstance(error, EigenloraxError) else f"{type(error).__name__}: "
        raise PackDamagedError(
            f"{where} does not follow the pack format: {kind}{reason(error).rstrip('.')}. Write the pack again, with "
            "another tool or release."
        ) from error


def check_is_content(start: bytes, where: str) -> None:
    """Raise `FormatError` if a file is the text that Git LFS has in place of a large file.

    Args:
        start: The first four bytes of the file, or more.
        where: Path of the file.
    """
    if start[:4] == b"vers":
        raise FormatError(
            f"{where} is a pointer of Git LFS, not the file itself: run `git lfs pull` in its repository."
        )


def read_file(path: Path, limit: int, *, follow_links: bool = True) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        FormatError: The file is larger, or a pipe, device or socket. None of these is read, and no pipe is waited for.
        FileNotFoundError: `path` is missing, a folder, a broken link, or any link if `follow_links` is false.
    """
    with _opened(path, follow_links=follow_links) as (file, size):
        if size > limit:
            raise FormatError(f"{path} has {size:,} bytes; at most {limit:,} were expected.")
        return file.read(size)


def read_part(path: Path, offset: int, size: int) -> bytes:
    """Return `size` bytes of a regular file from a position on, or those that there are; errors as `read_file`."""
    with _opened(path, follow_links=True) as (file, available):
        file.seek(offset)
        return file.read(min(size, max(available - offset, 0)))


@contextmanager
def _opened(path: Path, *, follow_links: bool) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file, and yield it with its size; arguments and errors as `read_file`."""
    # without O_NONBLOCK, opening a pipe waits for its writer; flags that a system lacks are left out
    names = ("O_NONBLOCK", "O_BINARY", "O_CLOEXEC", *(() if follow_links else ("O_NOFOLLOW",)))
    try:
        descriptor = os.open(path, os.O_RDONLY | sum(getattr(os, name, 0) for name in names))
    except OSError as error:
        if error.errno in _MISSING_ERRNOS:
            raise _missing(path) from error
        raise
    try:
        # the status of the open file, because another process may replace the path in between
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise _missing(path)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"{path} is not a regular file, but a pipe, a device or a socket.")
        with open(descriptor, "rb", closefd=False) as file:
            yield file, status.st_size
    finally:
        os.close(descriptor)


def parse_json_object(data: bytes, where: str) -> tuple[str, dict[str, Any]]:
    """Parse a JSON file that holds an object.

    Args:
        data: Content of the file.
        where: Name of the file, for the message.

    Returns:
        The text, and the object.

    Raises:
        FormatError: The file is not JSON, not an object, or nested too deeply.
    """
    try:
        text = data.decode("utf-8")
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not valid JSON: {reason(error).rstrip('.')}.") from error
    if not isinstance(document, dict):
        raise FormatError(f"{where} contains {describe(document)}; an object was expected.")
    check_depth(document, where)
    return text, document


def check_depth(value: Any, where: str) -> None:
    """Raise `FormatError` if lists and objects are nested more than `MAX_DEPTH` deep."""
    # level by level: a recursion could overflow the stack here
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [node for node in level if isinstance(node, dict | list)]
        if not containers:
            return
        level = [child for node in containers for child in (node.values() if isinstance(node, dict) else node)]
    raise FormatError(f"{where} nests lists and objects more than {MAX_DEPTH} deep.")


@cache
def machine_memory() -> float:
    """Return the size of this machine's memory in bytes; infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def _missing(path: Path) -> FileNotFoundError:
    return FileNotFoundError(ENOENT, os.strerror(ENOENT), str(path))


def check_expansion(needed: int, size: int, subject: str) -> None:
    """Raise `ValueError` if rows would take more memory than the bytes that they are read from explain.

    Args:
        needed: Bytes in memory.
        size: Bytes in the file.
        subject: The rows, for the message.
    """
    if needed > MAX_EXPANSION * size + MEMORY_ALLOWANCE:
        raise ValueError(f"{subject} would take {needed:,} bytes of memory, from {size:,} bytes of a file")


def check_growth(grown: int, size: int, subject: str) -> None:
    """Raise `ValueError` if rows take more memory than earlier ones by more than the bytes of a file explain.

    There is no allowance as in `check_expansion`, because each file of a chain would have it.

    Args:
        grown: Bytes in memory, without those of the earlier rows.
        size: Bytes in the file.
        subject: The rows, for the message.
    """
    if grown > MAX_EXPANSION * size:
        raise ValueError(f"{subject} would take {grown:,} bytes of memory more, from {size:,} bytes of a file")


def check_coded_count(numbers: int, size: int, subject: str) -> None:
    """Raise `ValueError` if coded bytes would decode to more 32-bit numbers than they can usefully represent.

    Numbers that are certain to be zero take a hundredth of a bit each, so few bytes may represent many of them.
    Decoding takes some twenty bytes per number, so `MEMORY_ALLOWANCE` bounds them then.

    Args:
        numbers: Number of decoded numbers.
        size: Bytes in the file.
        subject: The numbers, for the message.
    """
    max_numbers = max(MAX_EXPANSION * size // 4, MEMORY_ALLOWANCE // 20)
    if numbers > max_numbers:
        raise ValueError(
            f"{subject} would have {numbers:,} numbers, from {size:,} bytes; at most {max_numbers:,} were expected"
        )


def check_factor_memory(numbers: int, subject: str) -> None:
    """Raise `ValueError` if factors with this many entries do not fit in the machine's memory.

    Reconstructed factors are as large as rank times width, however few components they are made of, so that a small
    file may ask for any size. There is no tighter bound: a rank of hundreds with a single component is valid.

    Args:
        numbers: Number of entries.
        subject: The factors, for the message.
    """
    needed = FACTOR_BYTES * numbers
    if needed > machine_memory():
        raise ValueError(f"{subject} would take {needed:,} bytes of memory, more than this machine has")
