"""Files and folders that are written completely or not at all, by one writer at a time.

A new file is prepared beside its path (`staging`), flushed to the disk and renamed. A process that is killed leaves the
old state or the new one.
"""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from hashlib import sha256
from itertools import takewhile
from pathlib import Path

import filelock

from ..errors import FormatError, PackBusyError, PackExistsError
from . import staging
from .exchange import exchange
from .limits import read_file

Files = Mapping[str, bytes]

STAGING_PREFIX = staging.PREFIX
# Folders to be flushed at the end of a `defer_folder_syncs` block; None outside of one
_deferred: ContextVar[set[Path] | None] = ContextVar("_deferred", default=None)


def digest(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return sha256(data).hexdigest()


def read_regular_file(path: Path, at_most: int) -> bytes | None:
    """Return the content of a regular file of at most `at_most` bytes; None for anything else.

    Links are not followed, pipes are not waited for, and nothing is allocated for larger files.
    """
    try:
        return read_file(path, at_most, follow_links=False)
    except (FileNotFoundError, FormatError):
        return None


def sync_folder(path: Path) -> None:
    """Flush the entries of a folder to the disk, so that created, removed and renamed files survive a power cut.

    Within `defer_folder_syncs` that happens at the end of the block.
    """
    deferred = _deferred.get()
    if deferred is not None:
        deferred.add(path)
    else:
        _sync(path)


@contextmanager
def defer_folder_syncs() -> Iterator[None]:
    """Flush each folder that the block writes to once, at the end, rather than once per file."""
    deferred: set[Path] = set()
    token = _deferred.set(deferred)
    try:
        yield
    finally:
        _deferred.reset(token)
    for path in sorted(deferred):
        _sync(path)


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        # Windows cannot open folders, and a folder may be writable without being readable
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # network and FUSE file systems may not support it
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _write_synced(path: Path, data: bytes, mode: str) -> None:
    with open(path, mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _with_filename(path: Path) -> Iterator[None]:
    """Set the file name of an `OSError` that has none: a write on a full disk does not say which file it was."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def stage_file(path: Path, data: bytes) -> Iterator[Callable[[], None]]:
    """Write `data` beside `path`, and yield a function that replaces `path` by it in one step.

    All bytes are on the disk when the block starts, so that a full disk cannot make the replacement fail. After an
    error in the block, the staged file is removed unless it has replaced `path`.
    """
    with staging.claim(path, staging.create_file) as staged:

        def put_in_place() -> None:
            os.replace(staged, path)
            sync_folder(path.parent)

        with _with_filename(path):
            _write_synced(staged, data, "wb")
            yield put_in_place


def write_file(path: Path, data: bytes) -> None:
    """Write a file in one step: a reader sees the old bytes or the new ones, also if the writer is killed."""
    with stage_file(path, data) as put_in_place:
        put_in_place()


@contextmanager
def ensure_folder(folder: Path) -> Iterator[None]:
    """Create `folder` and its parents; after an error in the block, remove the new ones that are empty."""
    # from the folder up to the first ancestor that exists
    missing = list(takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    # a power cut removes a new folder unless its entry in the parent folder is on the disk
    for path in missing:
        sync_folder(path.parent)
    try:
        yield
    except BaseException:
        # another process may write there by now
        with suppress(OSError):
            for path in missing:
                path.rmdir()
        raise


def check_is_folder(path: Path) -> None:
    """Raise `PackExistsError` if `path`, or one of its parents, exists and is not a folder."""
    if path.is_symlink() and not path.exists():
        raise PackExistsError(f"{path} is a link to nothing that exists. Remove it, or choose another folder.")
    for ancestor in (path, *path.parents):
        if ancestor.exists():
            if not ancestor.is_dir():
                raise PackExistsError(f"{ancestor} exists and is not a folder. Choose another path.")
            return


def check_free(path: Path, overwrite: bool = False) -> None:
    """Raise `PackExistsError` unless `path` is free or empty, or a folder that may be overwritten."""
    check_is_folder(path)
    if path.is_symlink():
        raise PackExistsError(f"{path} exists and is a link. Choose another folder, or remove the link.")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise PackExistsError(
            f"{path} exists and is not empty. Choose another folder, or replace it with overwrite=True (--overwrite)."
        )


def check_file_free(path: Path, overwrite: bool = False) -> None:
    """Raise `PackExistsError` unless `path` is free, or a regular file that may be overwritten."""
    check_is_folder(path.parent)
    if path.is_symlink() or path.exists():
        if path.is_symlink() or not path.is_file():
            raise PackExistsError(f"{path} exists and is not a regular file. Choose another path, or remove it.")
        if not overwrite:
            raise PackExistsError(
                f"{path} exists. Choose another folder, or replace it with overwrite=True (--overwrite)."
            )


def write_new_file(path: Path, suffix: str, content: Callable[[], bytes], *, overwrite: bool = False) -> Path:
    """Write a file that is free or may be overwritten, in a folder that is created if it is missing.

    Args:
        path: The file. The suffix is added if it is missing.
        suffix: Suffix of the file.
        content: Function that returns the content, called after the path is checked.
        overwrite: Whether an existing file is replaced.

    Returns:
        The path with the suffix.

    Raises:
        PackExistsError: The file exists, and `overwrite` is not set; or the path is no regular file.
    """
    path = path if path.name.lower().endswith(suffix) else path.with_name(path.name + suffix)
    check_file_free(path, overwrite)
    data = content()
    with ensure_folder(path.parent):
        write_file(path, data)
    return path


def check_replaceable(path: Path, files: Iterable[str], overwrite: bool = False) -> None:
    """Raise `PackExistsError` unless a folder with `files` may be written to `path`.

    A folder is only overwritten if it contains no other files than these.
    """
    check_free(path, overwrite)
    unknown = sorted({entry.name for entry in path.iterdir()} - set(files)) if path.exists() else []
    if unknown:
        raise PackExistsError(
            f"{path} is not replaced: it contains {unknown[0]!r}"
            + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
            + f" beside {', '.join(sorted(files))}, which would be deleted. Choose another folder, or remove this one."
        )


def write_folder(path: Path, files: Files, *, overwrite: bool = False) -> None:
    """Write a folder of files in one step.

    Args:
        path: The folder.
        files: Content of each file, by name.
        overwrite: Whether a folder of the same files is replaced.

    Raises:
        PackExistsError: `path` exists and may not be replaced.
        PackBusyError: Too many other processes are writing to `path`.
    """
    recover(path)
    check_replaceable(path, files, overwrite)
    with ensure_folder(path.parent), staging.claim(path, staging.create_folder) as staged:
        for name, data in files.items():
            with _with_filename(path / name):
                _write_synced(staged / name, data, "xb")
        _sync(staged)
        _put_in_place(staged, path)


def _put_in_place(staged: Path, path: Path) -> None:
    """Rename a staged folder to `path`, and remove the old folder. If that fails, the old folder is restored.

    The two are exchanged in one step where the system can do that. Elsewhere there are two renames, and `recover`
    restores the old folder if the process is killed between them.
    """
    if not path.exists():
        os.replace(staged, path)
        sync_folder(path.parent)
        return
    old = staged
    if not exchange(staged, path):
        old = staging.replaced_folder_path(path)
        os.replace(path, old)
        try:
            os.replace(staged, path)
        finally:
            if not path.exists():
                os.replace(old, path)
    # before the old files are removed: a power cut must not undo the rename and keep the deletions
    _sync(path.parent)
    staging.remove(old)


def recover(path: Path) -> None:
    """Finish a `write_folder` that was killed between its two renames.

    The old folder is restored if nothing is at `path`, and removed if the new one is.
    """
    # a link with that name is not ours
    old = staging.replaced_folder_path(path)
    if old.is_symlink() or not old.is_dir():
        return
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(old, path)
        sync_folder(path.parent)


def copy_permissions(folder: Path, file: Path) -> None:
    """Give every file in `folder` the permissions of `file`.

    safetensors writes files that only their owner may read.
    """
    mode = stat.S_IMODE(file.stat().st_mode)
    for entry in folder.rglob("*"):
        if entry.is_file() and not entry.is_symlink():
            entry.chmod(mode)


def remove_abandoned(folder: Path) -> None:
    """Remove the staging files of killed writers from a folder. The caller holds the lock of the folder."""
    for entry in folder.glob(f"{STAGING_PREFIX}*"):
        if not staging.is_in_use(entry):
            remove(entry)


def remove(path: Path) -> None:
    """Delete a file or folder.

    If the process is killed, a folder is either complete or renamed to a staging name, which the next writer removes.
    """
    if path.is_dir() and not path.is_symlink():
        renamed = (
            path if path.name.startswith(STAGING_PREFIX) else path.parent / f"{STAGING_PREFIX}{secrets.token_hex(8)}"
        )
        os.replace(path, renamed)
        shutil.rmtree(renamed)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def lock(path: Path, timeout: float) -> Iterator[None]:
    """Hold the lock file `path` during the block. A thread that holds it may lock it again.

    Args:
        path: The lock file, which is created if need be.
        timeout: Seconds to wait for another process.

    Raises:
        PackBusyError: Another process holds the lock for longer than `timeout`.
        PackExistsError: `path` is not a lock file.
        OSError: The folder of the lock file cannot be written to.
    """
    held = filelock.FileLock(path, timeout=timeout, is_singleton=True)
    try:
        _check_lock(path)
        held.acquire()
    except filelock.Timeout as error:
        raise PackBusyError(
            f"another process is writing to {path.parent}: its lock was held for more than {timeout:g} s. "
            "Nothing was changed; run the command again when that process is done."
        ) from error
    except PackExistsError:
        raise
    except OSError as error:
        # a user knows the folder, and not the lock file
        raise type(error)(error.errno, error.strerror, str(path.parent)) from error
    try:
        yield
    finally:
        held.release()


def _check_lock(path: Path) -> None:
    """Raise `PackExistsError` if `path` is not a lock file: taking a lock opens the file, and may empty it."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    # a file with content and several hard links belongs to another program
    if not stat.S_ISREG(status.st_mode) or (status.st_nlink > 1 and status.st_size):
        raise PackExistsError(
            f"{path} cannot be used as a lock: the lock file must be a regular file with one hard link. Remove it, and "
            "run the command again."
        )
