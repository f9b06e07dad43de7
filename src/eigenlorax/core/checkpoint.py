"""A folder of what an interrupted piece of work has finished: numbered files, each with a digest. Not: what is in them.

It belongs to one piece of work, told by a key; to any other, it is empty.
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
_FILE = re.compile(r"\d{5,}\.safetensors")
_DIGEST_BYTES = 32


class Checkpoint:
    """The finished parts of the work with this key, by their number."""

    def __init__(self, folder: Path, key: bytes) -> None:
        self._folder, self._key = folder, key

    def find(self, number: int, at_most: int) -> bytes | None:
        """Return what was kept under this number; None where nothing was, or not these bytes, or more than `at_most`.

        A file counts only if its digest is right: one that was cut or changed on the disk, that was kept for another
        number or key, or by a release without digests, is not there.
        """
        data = atomic_files.read_regular_file(self._path(number), at_most + _DIGEST_BYTES)
        if data is None or data[:_DIGEST_BYTES] != self._digest(number, data[_DIGEST_BYTES:]):
            return None
        return data[_DIGEST_BYTES:]

    def keep(self, number: int, content: bytes) -> None:
        """Write a part, whole or not at all."""
        atomic_files.write_file(self._path(number), self._digest(number, content) + content)

    def _digest(self, number: int, content: bytes) -> bytes:
        # the key and the number too: a file of another fit, or of another module, is as wrong as a damaged one
        found = sha256(f"{number}\n".encode())
        found.update(sha256(self._key).digest())
        found.update(content)
        return found.digest()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.safetensors"


def default_folder(folder: Path) -> Path:
    """Return where `eigenlorax fit` keeps the modules of the pack that it will write to `folder`."""
    # of `.` and `..` as well
    whole = Path(os.path.abspath(folder))
    return whole.parent / f".{whole.name}.fitting"


@contextmanager
def open_checkpoint(folder: Path, key: dict[str, Any]) -> Iterator[Checkpoint]:
    """Open the checkpoint in `folder` for the work with this key.

    What other work left there is deleted, and so is the folder if nothing was kept in it.

    `PackBusyError` where another process uses it. `OptionError` where the folder is no checkpoint.
    """
    mine = (json.dumps(key, sort_keys=True, indent=1) + "\n").encode()
    _check_is_one(folder)
    empty = False
    with atomic_files.ensure_folder(folder.parent):
        folder.mkdir(exist_ok=True)
        atomic_files.sync_folder(folder.parent)
        try:
            with atomic_files.lock(folder / _LOCK, timeout=0.0):
                if atomic_files.read_regular_file(folder / _KEY, len(mine)) != mine:
                    for path in _files(folder):
                        path.unlink()
                    atomic_files.write_file(folder / _KEY, mine)
                atomic_files.remove_abandoned(folder)
                try:
                    yield Checkpoint(folder, mine)
                finally:
                    empty = not count_parts(folder)
        finally:
            if empty:
                discard(folder)


def count_parts(folder: Path) -> int:
    """Return how many parts are kept in a folder; none where there is no such folder."""
    return len(_files(folder)) if folder.is_dir() else 0


def discard(folder: Path) -> None:
    """Delete a checkpoint, if there is one. `PackBusyError` where a fit is at work in it.

    A process that is killed meanwhile leaves a checkpoint of fewer modules.
    """
    if not folder.exists():
        return
    _check_is_one(folder)
    with atomic_files.lock(folder / _LOCK, timeout=0.0):
        for path in folder.iterdir():
            if path.name != _LOCK:
                atomic_files.remove(path)
    # another fit may have begun in it
    with suppress(OSError):
        (folder / _LOCK).unlink()
        folder.rmdir()


def discard_default(pack: Path) -> None:
    """Delete what a fit of a pack, which has been written by now, has kept; not while one is at work, nor anything else
    that has the name."""
    with suppress(OptionError, PackError, OSError):
        discard(default_folder(pack))


def discard_finished(pack: Path, manifest: Path) -> None:
    """Do the same where the pack was written after the last module was kept: the fit was killed before it could."""
    folder = default_folder(pack)
    if manifest.is_file() and folder.is_dir():
        kept = [path.stat().st_mtime_ns for path in _files(folder)]
        if max(kept, default=0) <= manifest.stat().st_mtime_ns:
            discard_default(pack)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _FILE.fullmatch(path.name)]


def _check_is_one(folder: Path) -> None:
    """Raise `OptionError` where a folder holds anything else, which would be lost, or is a link to one."""
    atomic_files.check_is_folder(folder)
    if folder.is_symlink():
        raise OptionError(f"{folder} is a link, and a checkpoint of a fit is none. Name the folder itself.")
    if not folder.exists():
        return
    others = [
        path.name for path in folder.iterdir() if path.name not in (_KEY, _LOCK) and not _FILE.fullmatch(path.name)
    ]
    others = [name for name in others if not name.startswith(atomic_files.STAGING_PREFIX)]
    folders = [
        path.name
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(atomic_files.STAGING_PREFIX)
    ]
    if others or folders:
        raise OptionError(
            f"{folder} is no checkpoint of a fit: it holds {min(others + folders)!r}. Choose a folder that is empty or "
            "new."
        )
