"""Staging files and folders, which a writer prepares beside a path and then renames to that path.

The name of a staging file says which path it is for. A lock on it tells an active writer from one that was killed, so
that the next writer can remove files of a killed writer.
"""

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
# Number of names that are tried. Some folders, such as those of `/proc`, report every new file as missing.
_ATTEMPTS = 100
_STAGING_NAME = re.compile(rf"{re.escape(PREFIX)}[0-9a-f]{{8}}-\d+")


def replaced_folder_path(path: Path) -> Path:
    """Return the path that the old folder has between the two renames that replace the folder at `path`."""
    return path.parent / f"{PREFIX}{_tag(path)}-old"


def create_file(path: Path) -> int:
    """Create an empty file and return its descriptor; raise `FileExistsError` if the path exists."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def create_folder(path: Path) -> int | None:
    """Create an empty folder and return its descriptor; None on Windows, which has none for folders."""
    path.mkdir()
    return None if sys.platform == "win32" else os.open(path, os.O_RDONLY)


@contextmanager
def claim(path: Path, create: Callable[[Path], int | None]) -> Iterator[Path]:
    """Create a staging file or folder for `path` that no other writer touches while the block lasts.

    Staging files that killed writers of `path` left are removed first. After an error, the staging file is removed if
    it is still there.

    Args:
        path: The path that will be written.
        create: `create_file` or `create_folder`.

    Raises:
        PackBusyError: Too many other processes are writing to `path`.
    """
    staged, descriptor = _claim(path, create)
    try:
        yield staged
    except BaseException:
        # it may have been renamed already, and the path may be another writer's by now
        if descriptor is None or _is_open_as(staged, descriptor):
            _delete(staged)
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def remove_abandoned(folder: Path) -> None:
    """Remove the staging files of killed writers from a folder to which others may be writing."""
    try:
        entries = list(folder.iterdir())
    except PermissionError:
        # a folder may be writable without being readable
        return
    for entry in entries:
        if _STAGING_NAME.fullmatch(entry.name):
            _remove_if_abandoned(entry)


def remove(path: Path) -> None:
    """Remove the old folder that an exchange moved to a staging path, unless another writer holds it.

    The next writer removes it in that case. It is not tried again: the path may be a new folder of another writer by
    then, who has not locked it yet.
    """
    with suppress(BlockingIOError):
        if not _remove_locked(path):
            # the system has no locks, so the owner of the path is unknown
            _delete(path)


def is_in_use(path: Path) -> bool:
    """Return whether a writer holds the lock of a staging path."""
    try:
        descriptor = _open_locked(path)
    except BlockingIOError:
        return True
    if descriptor is not None:
        os.close(descriptor)
    return False


def _tag(path: Path) -> str:
    # a hash, because prefix and suffix could make a long name too long for the file system
    return sha256(os.fsencode(path.name)).hexdigest()[:8]


def _claim(path: Path, create: Callable[[Path], int | None]) -> tuple[Path, int | None]:
    for number in range(_ATTEMPTS):
        staged = path.parent / f"{PREFIX}{_tag(path)}-{number}"
        _remove_if_abandoned(staged)
        try:
            descriptor = create(staged)
            descriptor = _lock(descriptor) if descriptor is not None else None
        except (FileExistsError, BlockingIOError):
            # another writer of the path is at work, or has just mistaken this new, still unlocked file for an abandoned
            # one
            continue
        except OSError as error:
            # likewise, if that writer has removed the file already
            if isinstance(error, FileNotFoundError) and path.parent.is_dir() and number < _ATTEMPTS - 1:
                continue
            error.filename = str(path)
            raise
        if descriptor is None or _is_open_as(staged, descriptor):
            return staged, descriptor
        os.close(descriptor)
    raise PackBusyError(f"{_ATTEMPTS} other processes are writing to {path}. Run the command again later.")


def _remove_if_abandoned(path: Path) -> None:
    """Remove a staging path that no writer holds."""
    with suppress(BlockingIOError):
        _remove_locked(path)


def _remove_locked(path: Path) -> bool:
    """Remove a staging path while its lock is held, and return whether the system could lock it.

    Raises:
        BlockingIOError: Another process holds the lock.
    """
    if not os.path.lexists(path):
        return True
    descriptor = _open_locked(path)
    if descriptor is None:
        return False
    try:
        # while the lock is held, no other writer removes or replaces the file
        if _is_open_as(path, descriptor):
            _delete(path)
    finally:
        os.close(descriptor)
    return True


def _delete(path: Path) -> None:
    """Remove a file or folder. If that fails, the next writer tries again."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _open_locked(path: Path) -> int | None:
    """Open and lock a file or folder; return None where it does not exist, or the system cannot lock it.

    Raises:
        BlockingIOError: Another process holds the lock.
    """
    if sys.platform == "win32":
        return None
    # network file systems lock only what is open for writing
    access = os.O_RDONLY if path.is_dir() else os.O_RDWR
    try:
        descriptor = os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    return _lock(descriptor)


def _lock(descriptor: int) -> int | None:
    """Lock an open file until it is closed, which the system does however the process ends.

    Returns:
        The descriptor; None, with the file closed, where the system cannot lock it.

    Raises:
        BlockingIOError: Another process, or another descriptor of this one, holds the lock.
    """
    if sys.platform == "win32":
        # Windows cannot rename open files
        os.close(descriptor)
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def _is_open_as(path: Path, descriptor: int) -> bool:
    """Return whether `path` is still the file that was opened: it may have been removed and created anew."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
