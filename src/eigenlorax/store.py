"""Files and folders that appear whole or not at all, one writer at a time. Nothing here knows what is in them."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import filelock

from .errors import PackBusyError, PackExistsError

Files = Mapping[str, bytes]

STAGING = ".writing-"


def digest(data: bytes) -> str:
    """sha256, hexadecimal."""
    return sha256(data).hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` in one step: a reader, or a killed writer, sees the old bytes or the new ones."""
    handle, name = tempfile.mkstemp(prefix=STAGING, dir=path.parent)
    staged = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staged.chmod(0o644)
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def check_free(path: Path, overwrite: bool = False) -> None:
    """`PackExistsError` unless a folder may be written to `path`: nothing is there, or it may be replaced."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise PackExistsError(f"{path} exists and is not a folder.")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise PackExistsError(f"{path} exists and is not empty. Choose another folder, or replace it with --overwrite.")


def write_folder(path: Path, files: Files, *, overwrite: bool = False) -> None:
    """A folder of files, written beside and renamed. An existing one is refused unless it may be replaced."""
    check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=STAGING, dir=path.parent))
    try:
        for name, data in files.items():
            write_file(staged / name, data)
        staged.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=STAGING, dir=path.parent))
            os.replace(path, old)
            os.replace(staged, path)
            shutil.rmtree(old)
        else:
            os.replace(staged, path)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def sweep_staging(folder: Path) -> None:
    """Remove what killed writers left half-written. Only for one who holds the folder's lock."""
    for entry in folder.glob(f"{STAGING}*"):
        remove(entry)


def remove(path: Path) -> None:
    """Delete a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
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
