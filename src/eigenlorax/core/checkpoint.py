"""Checkpoints: a folder with the finished parts of a fit, so that an interrupted fit can be continued.

Parts are numbered files, each with a digest. A checkpoint belongs to one fit, which a key identifies; any other
fit finds it empty.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import OptionError, PackError
from . import atomic_files

_KEY = "fit.json"
_LOCK = ".lock"
_PART = re.compile(r"\d{5,}\.safetensors")
_DIGEST_BYTES = 32


class Checkpoint:
    """The finished parts of the fit with this key, by number."""

    def __init__(self, folder: Path, key: bytes) -> None:
        self._folder, self._key = folder, key

    def find(self, number: int, at_most: int) -> bytes | None:
        """Return the content of a part, or None.

        A file is used only if its digest matches. Files that were truncated or changed, that belong to another number
        or key, or that a release without digests wrote, are ignored.

        Args:
            number: Number of the part.
            at_most: Size in bytes above which a file is ignored.
        """
        data = atomic_files.read_regular_file(self._path(number), at_most + _DIGEST_BYTES)
        if data is None or data[:_DIGEST_BYTES] != self._digest(number, data[_DIGEST_BYTES:]):
            return None
        return data[_DIGEST_BYTES:]

    def keep(self, number: int, content: bytes) -> None:
        """Write a part completely or not at all."""
        atomic_files.write_file(self._path(number), self._digest(number, content) + content)

    def _digest(self, number: int, content: bytes) -> bytes:
        # with key and number, because a part of another fit or module is as wrong as a damaged one
        digest = sha256(f"{number}\n".encode())
        digest.update(sha256(self._key).digest())
        digest.update(content)
        return digest.digest()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.safetensors"


def default_folder(folder: Path) -> Path:
    """Return the checkpoint that `eigenlorax fit` uses for the pack that it will write to `folder`."""
    # absolute, because `.` and `..` have no name
    absolute = Path(os.path.abspath(folder))
    return absolute.parent / f".{absolute.name}.fitting"


@contextmanager
def open_checkpoint(folder: Path, key: dict[str, Any]) -> Iterator[Checkpoint]:
    """Open the checkpoint in `folder` for the fit with this key.

    Parts of another fit are deleted. The folder is deleted at the end if it holds no part.

    Args:
        folder: Folder of the checkpoint, which is created if need be.
        key: Everything that determines the result of the fit.

    Raises:
        PackBusyError: Another process uses the checkpoint.
        OptionError: The folder is not a checkpoint.
    """
    encoded_key = (json.dumps(key, sort_keys=True, indent=1) + "\n").encode()
    _check_is_checkpoint(folder)
    is_empty = False
    with atomic_files.ensure_folder(folder.parent):
        folder.mkdir(exist_ok=True)
        atomic_files.sync_folder(folder.parent)
        try:
            with atomic_files.lock(folder / _LOCK, timeout=0.0):
                # the key is written last, so that a killed process leaves no parts of another fit under this key
                if atomic_files.read_regular_file(folder / _KEY, len(encoded_key)) != encoded_key:
                    for path in _parts(folder):
                        path.unlink()
                    atomic_files.write_file(folder / _KEY, encoded_key)
                atomic_files.remove_abandoned(folder)
                try:
                    yield Checkpoint(folder, encoded_key)
                finally:
                    is_empty = not count_parts(folder)
        finally:
            if is_empty:
                discard(folder)


def count_parts(folder: Path) -> int:
    """Return the number of parts in a checkpoint; 0 if the folder does not exist."""
    return len(_parts(folder)) if folder.is_dir() else 0


def discard(folder: Path) -> None:
    """Delete a checkpoint if it exists. A process that is killed meanwhile leaves one with fewer parts.

    Raises:
        PackBusyError: A fit is using the checkpoint.
        OptionError: The folder is not a checkpoint.
    """
    if not folder.exists():
        return
    _check_is_checkpoint(folder)
    with atomic_files.lock(folder / _LOCK, timeout=0.0):
        for path in folder.iterdir():
            if path.name != _LOCK:
                atomic_files.remove(path)
    # another fit may have started to use it
    with suppress(OSError):
        (folder / _LOCK).unlink()
        folder.rmdir()


def discard_default(pack: Path) -> None:
    """Delete the checkpoint of a pack that has been written, unless a fit is using it, or it is not a checkpoint."""
    with suppress(OptionError, PackError, OSError):
        discard(default_folder(pack))


@contextmanager
def new_one_discarded(pack: Path, error: type[Exception]) -> Iterator[None]:
    """Delete the checkpoint of a pack after an error that another fit with the same options would raise too.

    One that was there before stays, as it may belong to a fit with other options.
    """
    is_new = not default_folder(pack).exists()
    try:
        yield
    except error:
        if is_new:
            discard_default(pack)
        raise


def discard_finished(pack: Path, manifest: Path) -> None:
    """Delete the checkpoint of a pack that was written after the last part, by a fit that was killed at its end."""
    folder = default_folder(pack)
    if manifest.is_file() and folder.is_dir():
        part_times = [path.stat().st_mtime_ns for path in _parts(folder)]
        if max(part_times, default=0) <= manifest.stat().st_mtime_ns:
            discard_default(pack)


def _parts(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _PART.fullmatch(path.name)]


def _check_is_checkpoint(folder: Path) -> None:
    """Raise `OptionError` if the folder is a link, or contains other files, which would be deleted."""
    atomic_files.check_is_folder(folder)
    if folder.is_symlink():
        raise OptionError(f"{folder} is a link; a checkpoint must be a folder. Pass the path of the folder itself.")
    if not folder.exists():
        return
    entries = [path for path in folder.iterdir() if not path.name.startswith(atomic_files.STAGING_PREFIX)]
    unknown = [
        path.name
        for path in entries
        if path.is_dir() or (path.name not in (_KEY, _LOCK) and not _PART.fullmatch(path.name))
    ]
    if unknown:
        raise OptionError(
            f"{folder} is not a checkpoint of a fit: it contains {min(unknown)!r}. Choose an empty or new folder."
        )
