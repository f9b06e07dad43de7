"""Files and values from outside: bounds that are checked before memory is taken, and one place that turns every failure
to parse them into an error of ours. SECURITY.md says what is promised."""

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
from typing import Any

from safetensors import SafetensorError

from ..errors import EigenloraxError, FormatError, PackDamagedError, PackError, reason

MAX_DIMENSION = 1 << 22
"""Largest width of a row that is read, ten times that of the widest linear layers in use (over vocabularies)."""
MAX_RANK = 1 << 10
"""Largest rank of a module that is narrower than that; of a wider one, a rank may be as large as `out + in`."""
MAX_CORE = 1 << 10
"""Largest number of components per side between which a coded core is read; the encoder stops at half of it."""
MAX_JSON_BYTES = 1 << 26
"""Largest size of a JSON file of an adapter."""
MAX_DEPTH = 100
"""Largest number of lists and objects in one another in such a file. Python reads what is ten times as deep, and then
cannot write it."""
MAX_MANIFEST_BYTES = 1 << 30
"""Largest size of a manifest."""
MAX_REPORT_BYTES = 1 << 28
"""Largest size of a report."""
MAX_HEADER_BYTES = 100_000_000
"""Largest header of a safetensors file, by that format."""
MEMORY_ALLOWANCE = 200_000_000
"""Bytes of memory that may be taken beside what the size of the files, and of the adapters in them, explains."""
MAX_EXPANSION = 64
"""Largest ratio of the bytes of rows in memory to their bytes in a file. Coded rows of length 1 that are worth their
bytes take about a bit a number, and are read as float32."""
FACTOR_BYTES = 16
"""Bytes that a number of an adapter's factors takes while they are made: in float64, as it is kept, and in a file."""

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
"""Exceptions by which Python, NumPy, torch and safetensors answer values that they cannot use.

RuntimeError covers RecursionError, and torch's errors of shapes and of decompositions. OSError is not among them: a
disk that cannot be read says nothing of what is on it.
"""
# of a link that is not followed, systems say ELOOP or EMLINK
_NOT_THERE = {ENOENT, ENOTDIR, EISDIR, ELOOP, EMLINK, ENAMETOOLONG, ENXIO}


@contextmanager
def damaged_on_error(where: Path | str) -> Iterator[None]:
    """Raise `PackDamagedError` for whatever goes wrong in the block because a pack is not as its format asks.

    where: the file or folder that is read, for the message. Errors of packs pass through; `PackError` where memory is
    short, of which the pack may be innocent.
    """
    try:
        yield
    except PackError:
        raise
    except MemoryError as error:
        raise PackError(f"{where} cannot be read: it takes more memory than there is.") from error
    except PARSE_FAILURES as error:
        kind = "" if isinstance(error, EigenloraxError) else f"{type(error).__name__}: "
        raise PackDamagedError(
            f"{where} was not written as the format asks: {kind}{reason(error).rstrip('.')}. Make the pack again, with "
            "another tool or release."
        ) from error


def read_file(path: Path, limit: int, *, follow_links: bool = True) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    A pipe is not waited for, and no device is read. `FormatError` for these, and for a larger file; `FileNotFoundError`
    where there is no file, a folder, a link that leads nowhere, or, unless links are followed, any link.
    """
    names = ("O_NONBLOCK", "O_BINARY", "O_CLOEXEC", *(() if follow_links else ("O_NOFOLLOW",)))
    try:
        descriptor = os.open(path, os.O_RDONLY | sum(getattr(os, name, 0) for name in names))
    except OSError as error:
        if error.errno in _NOT_THERE:
            raise _missing(path) from error
        raise
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise _missing(path)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"{path} is not a regular file, but a pipe, a device or a socket.")
        if status.st_size > limit:
            raise FormatError(f"{path} has {status.st_size:,} bytes; at most {limit:,} were expected.")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(descriptor)


def parse_json_object(data: bytes, where: str) -> tuple[str, dict[str, Any]]:
    """Return the text of a JSON file that holds an object, and the object. `FormatError` for anything else.

    where: the file, for the message.
    """
    try:
        text = data.decode("utf-8")
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not valid JSON: {reason(error)}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{where} holds a JSON {type(found).__name__}; an object was expected.")
    check_depth(found, where)
    return text, found


def check_depth(value: Any, where: str) -> None:
    """Raise `FormatError` where JSON has more than `MAX_DEPTH` lists and objects in one another."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            return
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    raise FormatError(f"{where} has more than {MAX_DEPTH} lists and objects in one another.")


@cache
def machine_memory() -> float:
    """Return the bytes of this machine's memory; infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def _missing(path: Path) -> FileNotFoundError:
    return FileNotFoundError(ENOENT, os.strerror(ENOENT), str(path))


def check_expansion(needed: int, size: int, what: str) -> None:
    """Raise `ValueError` where rows would take more memory than the bytes that they are read from can explain.

    needed: bytes in memory. size: bytes in the file. what: the rows, for the message.
    """
    if needed > MAX_EXPANSION * size + MEMORY_ALLOWANCE:
        raise ValueError(f"{what} would take {needed:,} bytes of memory, from {size:,} bytes of a file")


def check_coded_count(numbers: int, size: int, what: str) -> None:
    """Raise `ValueError` for more numbers of 32 bits than coded bytes may stand for.

    Those that are sure to be zero take a hundredth of a bit, and decoding takes some twenty bytes for each: so many are
    read of few bytes as fit in `ALLOWANCE` then. what: the numbers, for the message.
    """
    most = max(MAX_EXPANSION * size // 4, MEMORY_ALLOWANCE // 20)
    if numbers > most:
        raise ValueError(
            f"{what} would have {numbers:,} numbers, from {size:,} bytes; at most {most:,} are read of these"
        )


def check_factor_memory(numbers: int, what: str) -> None:
    """Raise `ValueError` where factors of so many numbers do not fit in this machine's memory.

    A row of coefficients times one component has as many numbers as their lengths multiplied, so that a small file may
    ask for any number. No other bound is right: a rank of hundreds beside one component is allowed.
    what: the factors, for the message.
    """
    needed = FACTOR_BYTES * numbers
    if needed > machine_memory():
        raise ValueError(f"{what} would take {needed:,} bytes of memory, more than this machine has")
