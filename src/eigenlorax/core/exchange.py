"""Exchange two paths in one step, where the system can do that."""

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

# from linux/fs.h, fcntl.h, and macOS's stdio.h: Python has no names for them
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2


def exchange(left: Path, right: Path) -> bool:
    """Exchange two files or folders of one file system, and return whether the system could do that.

    Neither path is missing at any moment, even if the process is killed. Nothing is changed where the system or the
    file system has no call for that: Linux (local file systems, glibc 2.28 or newer) and macOS have one.
    """
    call = _system_call()
    # the event that `os.rename` raises, which audit hooks may refuse
    sys.audit("os.rename", str(left), str(right), -1, -1)
    return call is not None and call(os.fsencode(left), os.fsencode(right)) == 0


@cache
def _system_call() -> Callable[[bytes, bytes], int] | None:
    """Return a function that exchanges two paths and returns 0 on success, or None."""
    if sys.platform not in ("linux", "darwin"):
        return None
    library = ctypes.CDLL(None)
    if hasattr(library, "renameat2"):
        return lambda left, right: int(library.renameat2(_AT_FDCWD, left, _AT_FDCWD, right, _RENAME_EXCHANGE))
    if hasattr(library, "renamex_np"):
        return lambda left, right: int(library.renamex_np(left, right, _RENAME_SWAP))
    return None
