"""Files and folders that appear whole or not at all, one writer at a time. Nothing here knows what is in them."""

import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from itertools import takewhile
from pathlib import Path

import filelock

from .errors import PackBusyError, PackExistsError

Files = Mapping[str, bytes]

STAGING = ".writing-"


def digest(data: bytes) -> str:
    """sha256, hexadecimal."""
    return sha256(data).hexdigest()


def _beside(path: Path) -> Path:
    """A name for what will become `path`, or was it: in the same folder, so that renaming is one step."""
    return path.parent / f"{STAGING}{secrets.token_hex(8)}"


@contextmanager
def staged(path: Path, data: bytes) -> Iterator[Callable[[], None]]:
    """A file with all of `data` beside `path`; what is yielded puts it in the place of `path` in one step.

    Room on the disk is needed before the block, not in it. After an error, what was not put in place is removed.
    """
    beside = _beside(path)
    try:
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield lambda: os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            # a write does not say where the disk was full
            error.filename = str(path)
        raise


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` in one step: a reader, or a killed writer, sees the old bytes or the new ones."""
    with staged(path, data) as put_in_place:
        put_in_place()


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """`folder` and its parents; after an error, those that were not there are removed again if they are empty."""
    missing = list(takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
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
    check_replaceable(path, files, overwrite)
    beside = _beside(path)
    with made(path.parent):
        try:
            beside.mkdir()
            for name, data in files.items():
                write_file(beside / name, data)
            _put_in_place(beside, path)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise


def _put_in_place(beside: Path, path: Path) -> None:
    """Rename a folder to `path`, away from which goes what is there, and comes back if that fails."""
    if not path.exists():
        os.replace(beside, path)
        return
    old = _beside(path)
    os.replace(path, old)
    try:
        os.replace(beside, path)
    finally:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, path)


def permit_like(folder: Path, file: Path) -> None:
    """Give every file in `folder` the permissions of `file`: safetensors writes its files for their owner alone."""
    mode = stat.S_IMODE(file.stat().st_mode)
    for entry in folder.rglob("*"):
        if entry.is_file() and not entry.is_symlink():
            entry.chmod(mode)


def sweep_staging(folder: Path) -> None:
    """Remove what killed writers left half-written. Only for one who holds the folder's lock."""
    for entry in folder.glob(f"{STAGING}*"):
        remove(entry)


def remove(path: Path) -> None:
    """Delete a file or a folder. Killed in between, it leaves the whole of it, or what `sweep_staging` finds."""
    if path.is_dir() and not path.is_symlink():
        doomed = path if path.name.startswith(STAGING) else _beside(path)
        os.replace(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def lock(path: Path, timeout: float) -> Iterator[None]:
    """Hold the lock file `path`; a thread that holds it already gets it again.

    `PackBusyError` if another process holds it for longer than `timeout` seconds.
    """
    try:
        with filelock.FileLock(path, timeout=timeout, is_singleton=True):
            yield
    except filelock.Timeout as error:
        raise PackBusyError(
            f"another process is writing to {path.parent}: its lock was held for more than {timeout:g} s. "
            "Nothing was changed; run the command again when the other one is done."
        ) from error
