"""Two paths that change places in one step, where the system can do that."""

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2


def exchange(one: Path, other: Path) -> bool:
    """Let two files or folders of one file system change places, and return whether they have.

    In no moment one of the paths is missing, whenever the process is killed. Nothing is changed where the system or the
    file system has no such call: it is one of Linux (local file systems, glibc from 2.28 on) and of macOS.
    """
    call = _call()
    # as `os.rename` tells auditors
    sys.audit("os.rename", str(one), str(other), -1, -1)
    return call is not None and call(os.fsencode(one), os.fsencode(other)) == 0


@cache
def _call() -> Callable[[bytes, bytes], int] | None:
    """Return the system's call, for two paths."""
    if sys.platform not in ("linux", "darwin"):
        return None
    library = ctypes.CDLL(None)
    if hasattr(library, "renameat2"):
        return lambda one, other: int(library.renameat2(_AT_FDCWD, one, _AT_FDCWD, other, _RENAME_EXCHANGE))
    if hasattr(library, "renamex_np"):
        return lambda one, other: int(library.renamex_np(one, other, _RENAME_SWAP))
    return None
