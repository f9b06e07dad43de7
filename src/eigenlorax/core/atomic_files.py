"""Files and folders that appear whole or not at all, one writer at a time. Nothing here knows what is in them."""

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
from .boundary import read_file
from .exchange import exchange

Files = Mapping[str, bytes]

STAGING_PREFIX = staging.PREFIX
_noted: ContextVar[set[Path] | None] = ContextVar("_noted", default=None)


def digest(data: bytes) -> str:
    """sha256, hexadecimal."""
    return sha256(data).hexdigest()


def read_regular_file(path: Path, at_most: int) -> bytes | None:
    """Return the bytes of a plain file of at most so many; None for any other.

    Nothing is waited for, followed or allocated: there may be a link, a pipe, a device, or a file without an end.
    """
    try:
        return read_file(path, at_most, follow_links=False)
    except (FileNotFoundError, FormatError):
        return None


def sync_folder(path: Path) -> None:
    """Flush to the disk what a folder lists: files that came, went or were renamed. Their content is not meant.

    In `synced_at_the_end` the folder is noted instead.
    """
    noted = _noted.get()
    if noted is not None:
        noted.add(path)
    else:
        _sync(path)


@contextmanager
def defer_folder_syncs() -> Iterator[None]:
    """Flush each folder that something new comes to in the block once, at its end, rather than for each of them."""
    noted: set[Path] = set()
    token = _noted.set(noted)
    try:
        yield
    finally:
        _noted.reset(token)
    for path in sorted(noted):
        _sync(path)


def _sync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        # Windows opens no folder, and others none that may be written to but not read
        return
    try:
        os.fsync(handle)
    except OSError as error:
        # a file system of the network, or of a process, that cannot
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _write(path: Path, data: bytes, mode: str) -> None:
    """Write a file's content, and flush it to the disk."""
    with open(path, mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an error say which file it is about: a write does not say where the disk was full."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def staged(path: Path, data: bytes) -> Iterator[Callable[[], None]]:
    """A file with all of `data` beside `path`; what is yielded puts it in the place of `path` in one step.

    Room on the disk is needed before the block, not in it. After an error, what was not put in place is removed.
    """
    with staging.claim(path, staging.create_file) as beside:

        def put_in_place() -> None:
            os.replace(beside, path)
            sync_folder(path.parent)

        with _naming(path):
            _write(beside, data, "wb")
            yield put_in_place


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` in one step: a reader, or a killed writer, sees the old bytes or the new ones."""
    with staged(path, data) as put_in_place:
        put_in_place()


@contextmanager
def ensure_folder(folder: Path) -> Iterator[None]:
    """`folder` and its parents; after an error, those that were not there are removed again if they are empty."""
    missing = list(takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)
    try:
        yield
    except BaseException:
        # not empty: another process writes there
        with suppress(OSError):
            for path in missing:
                path.rmdir()
        raise


def check_is_folder(path: Path) -> None:
    """`PackExistsError` if `path`, or what it would lie in, exists and is no folder."""
    if path.is_symlink() and not path.exists():
        raise PackExistsError(f"{path} is a link to nothing. Remove it, or choose another folder.")
    for place in (path, *path.parents):
        if place.exists():
            if not place.is_dir():
                raise PackExistsError(f"{place} exists and is not a folder. Choose another one.")
            return


def check_free(path: Path, overwrite: bool = False) -> None:
    """`PackExistsError` unless a folder may be written to `path`: nothing is there, or it may be replaced."""
    check_is_folder(path)
    if path.is_symlink():
        raise PackExistsError(f"{path} exists and is a link. Choose another folder, or remove the link.")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise PackExistsError(
            f"{path} exists and is not empty. Choose another folder, or replace it with overwrite=True (--overwrite)."
        )


def check_file_free(path: Path, overwrite: bool = False) -> None:
    """`PackExistsError` unless a file may be written to `path`: nothing is there, or a file that may be replaced."""
    check_is_folder(path.parent)
    if path.is_symlink() or path.exists():
        if path.is_symlink() or not path.is_file():
            raise PackExistsError(f"{path} exists and is not a plain file. Choose another one, or remove it yourself.")
        if not overwrite:
            raise PackExistsError(
                f"{path} exists. Choose another folder, or replace it with overwrite=True (--overwrite)."
            )


def check_replaceable(path: Path, files: Iterable[str], overwrite: bool = False) -> None:
    """`PackExistsError` unless a folder of these files may be written to `path`.

    What may be replaced is a folder of the same kind: one with nothing in it but those files.
    """
    check_free(path, overwrite)
    others = sorted({entry.name for entry in path.iterdir()} - set(files)) if path.exists() else []
    if others:
        raise PackExistsError(
            f"{path} is not replaced: it holds {others[0]!r}"
            + (f" and {len(others) - 1} more" if len(others) > 1 else "")
            + f" beside {', '.join(sorted(files))}, which would be lost. Choose another folder, or remove it yourself."
        )


def write_folder(path: Path, files: Files, *, overwrite: bool = False) -> None:
    """A folder of files, written beside and renamed. An existing one is refused unless it may be replaced."""
    recover(path)
    check_replaceable(path, files, overwrite)
    with ensure_folder(path.parent), staging.claim(path, staging.create_folder) as beside:
        for name, data in files.items():
            with _naming(path / name):
                _write(beside / name, data, "xb")
        _sync(beside)
        _put_in_place(beside, path)


def _put_in_place(beside: Path, path: Path) -> None:
    """Rename a folder to `path`; what is there is removed, or comes back if that fails.

    The two change places in one step where the system can do that. Elsewhere there are two renames, and a process that
    is killed between them leaves the old folder aside, from where `recover` takes it back.
    """
    if not path.exists():
        os.replace(beside, path)
        sync_folder(path.parent)
        return
    old = beside
    if not exchange(beside, path):
        old = staging.replaced_folder_path(path)
        os.replace(path, old)
        try:
            os.replace(beside, path)
        finally:
            if not path.exists():
                os.replace(old, path)
    # a power cut must not take what the old one consists of, and leave it in its place
    _sync(path.parent)
    staging.remove(old)


def recover(path: Path) -> None:
    """Finish what a killed `write_folder` has begun at `path`, if one did: the old folder is taken back if it is aside
    and nothing is in its place, or removed if it was replaced."""
    old = staging.replaced_folder_path(path)
    if old.is_symlink() or not old.is_dir():
        return
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(old, path)
        sync_folder(path.parent)


def copy_permissions(folder: Path, file: Path) -> None:
    """Give every file in `folder` the permissions of `file`: safetensors writes its files for their owner alone."""
    mode = stat.S_IMODE(file.stat().st_mode)
    for entry in folder.rglob("*"):
        if entry.is_file() and not entry.is_symlink():
            entry.chmod(mode)


def remove_abandoned(folder: Path) -> None:
    """Remove what killed writers left half-written. Only for one who holds the folder's lock."""
    for entry in folder.glob(f"{STAGING_PREFIX}*"):
        if not staging.is_in_use(entry):
            remove(entry)


def remove(path: Path) -> None:
    """Delete a file or a folder. Killed in between, it leaves the whole of it, or what `sweep_staging` finds."""
    if path.is_dir() and not path.is_symlink():
        doomed = (
            path if path.name.startswith(STAGING_PREFIX) else path.parent / f"{STAGING_PREFIX}{secrets.token_hex(8)}"
        )
        os.replace(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def lock(path: Path, timeout: float) -> Iterator[None]:
    """Hold the lock file `path`; a thread that holds it already gets it again.

    `PackBusyError` if another process holds it for longer than `timeout` seconds. `PackExistsError` where something
    else is in its place.
    """
    _check_lock(path)
    try:
        with filelock.FileLock(path, timeout=timeout, is_singleton=True):
            yield
    except filelock.Timeout as error:
        raise PackBusyError(
            f"another process is writing to {path.parent}: its lock was held for more than {timeout:g} s. "
            "Nothing was changed; run the command again when the other one is done."
        ) from error


def _check_lock(path: Path) -> None:
    """Raise `PackExistsError` for what is no lock file: to take a lock is to open it, and may be to empty it."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    # another name of a file with content is a link as well
    if not stat.S_ISREG(found.st_mode) or (found.st_nlink > 1 and found.st_size):
        raise PackExistsError(
            f"{path} is a link, or a pipe, folder or device, where a lock has to be a file of its own. Remove it, and "
            "run the command again."
        )
