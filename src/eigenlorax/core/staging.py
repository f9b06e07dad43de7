"""Where writers prepare what will be at a path: beside it, under names that say for which path, and that tell a writer
at work from one that was killed."""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from ..errors import PackBusyError

if sys.platform != "win32":
    import fcntl

PREFIX = ".writing-"
_ATTEMPTS = 100
"""How many names are tried: some folders, such as those of `/proc`, say of any new file that they are not there."""
_CLAIMED = re.compile(rf"{re.escape(PREFIX)}[0-9a-f]{{8}}-\d+")


def replaced_folder_path(path: Path) -> Path:
    """Return where a folder at `path` is for the moment between the two renames that replace it."""
    return path.parent / f"{PREFIX}{_tag(path)}-old"


def create_file(path: Path) -> int:
    """Make an empty file, and return a handle of it; `FileExistsError` if anything is there."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def create_folder(path: Path) -> int | None:
    """Make an empty folder, and return a handle of it, where the system has such ones."""
    path.mkdir()
    return None if sys.platform == "win32" else os.open(path, os.O_RDONLY)


@contextmanager
def claim(path: Path, make: Callable[[Path], int | None]) -> Iterator[Path]:
    """Make a file or folder beside `path` that no other writer of `path` touches while the block lasts.

    What killed writers of `path` have left is removed first, and after an error what was made, if it is still there.
    make: `make_file` or `make_folder`.
    """
    beside, handle = _claim(path, make)
    try:
        yield beside
    except BaseException:
        # it may have been renamed, and another writer's be there now
        if handle is None or _is_at(beside, handle):
            _delete(beside)
        raise
    finally:
        if handle is not None:
            os.close(handle)


def remove_abandoned(folder: Path) -> None:
    """Remove what killed writers have left in a folder in which others may be writing."""
    try:
        entries = list(folder.iterdir())
    except PermissionError:
        # some folders may be written to, and not listed
        return
    for entry in entries:
        if _CLAIMED.fullmatch(entry.name):
            _remove_abandoned(entry)


def remove(path: Path) -> None:
    """Remove a folder that has come to be at a path that was claimed, unless a writer has claimed that by now."""
    if not _remove_abandoned(path) and not is_in_use(path):
        # where the system cannot say whose it is, it is taken for ours
        _delete(path)


def is_in_use(path: Path) -> bool:
    """Return whether a writer is known to be at work on what it has claimed."""
    try:
        handle = _held(path)
    except BlockingIOError:
        return True
    if handle is not None:
        os.close(handle)
    return False


def _tag(path: Path) -> str:
    # not the name itself: with more beside it, it may be too long for the disk
    return sha256(os.fsencode(path.name)).hexdigest()[:8]


def _claim(path: Path, make: Callable[[Path], int | None]) -> tuple[Path, int | None]:
    for number in range(_ATTEMPTS):
        beside = path.parent / f"{PREFIX}{_tag(path)}-{number}"
        _remove_abandoned(beside)
        try:
            handle = make(beside)
            handle = _locked(handle) if handle is not None else None
        except (FileExistsError, BlockingIOError):
            # another writer of the path is at work, or has just taken what was made here for abandoned
            continue
        except OSError as error:
            # so it is where that writer has removed it already
            if isinstance(error, FileNotFoundError) and path.parent.is_dir() and number < _ATTEMPTS - 1:
                continue
            error.filename = str(path)
            raise
        if handle is None or _is_at(beside, handle):
            return beside, handle
        os.close(handle)
    raise PackBusyError(f"{_ATTEMPTS} other processes write to {path} at this moment. Run the command again.")


def _remove_abandoned(path: Path) -> bool:
    """Remove what a writer has claimed, if nobody holds it, and return whether it is known that nobody does."""
    if not os.path.lexists(path):
        return True
    try:
        handle = _held(path)
    except BlockingIOError:
        return False
    if handle is None:
        return False
    try:
        # held, it can be removed by nobody else, and nothing else can come in its place
        if _is_at(path, handle):
            _delete(path)
    finally:
        os.close(handle)
    return True


def _delete(path: Path) -> None:
    """Remove a file or a folder; what cannot be removed stays, and the next writer tries again."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _held(path: Path) -> int | None:
    """Lock a file or folder; None where there is none, or where the system cannot lock it."""
    if sys.platform == "win32":
        return None
    # a file system of the network wants to write what it locks
    access = os.O_RDONLY if path.is_dir() else os.O_RDWR
    try:
        handle = os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    return _locked(handle)


def _locked(handle: int) -> int | None:
    """Lock what a handle is of until it is closed, by whatever ends the process; None, and closed, where that fails.

    `BlockingIOError` where another process, or another handle of this one, has locked it.
    """
    if sys.platform == "win32":
        # an open file could not be renamed
        os.close(handle)
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


def _is_at(path: Path, handle: int) -> bool:
    """Return whether `path` is what was opened as the handle: it may have been removed, and made anew, meanwhile."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(handle))
    except FileNotFoundError:
        return False
