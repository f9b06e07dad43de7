"""The pack of a server, opened again when it has changed."""

import os
import threading
import time
from pathlib import Path

from ..core import keys
from ..errors import HubError
from ..formats import hub_client
from ..pack import hub as remote
from ..pack.pack import Pack

HUB_SECONDS = 30.0
"""Minimum time between two requests to the Hub."""

Stamp = tuple[int, int, int]


class WatchedPack:
    """A pack in a local folder or on the Hub whose adapters may change while a server runs. It is thread-safe.

    Args:
        source: Folder of the pack, or a repository on the Hub.

    Raises:
        PackError, HubError: The pack cannot be opened.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self.source = os.fspath(source)
        self._repository = hub_client.parsed(self.source) if not Path(self.source).exists() else None
        self._lock = threading.Lock()
        self._last_request = time.monotonic()
        self._opened: tuple[Path, Stamp, Pack] | None = None
        self._open(remote.fetch(self.source, []))

    def current(self) -> Pack:
        """Return the pack in its current state. The object is the same until the pack changes.

        A pack on the Hub may be `HUB_SECONDS` old, or older while the Hub is unreachable, and not all of its adapters
        are downloaded.
        """
        with self._lock:
            return self._current()

    def with_adapter(self, name: str) -> Pack:
        """Return the current pack with one adapter downloaded, or the history of a version such as "run@1000".

        Raises:
            AdapterNameError: The pack has no such adapter or version.
        """
        with self._lock:
            pack = self._current()
            if keys.split_version(name) is not None:
                name = pack.history_store.find(name)[0].name
            else:
                keys.check_known(name, pack.names, f"the pack {self.source}")
            if self._repository is not None:
                assert pack.path is not None
                # from the commit of the manifest, which may not be the latest
                remote.fetch(self._repository[0], [name], revision=pack.path.name)
            return pack

    def _current(self) -> Pack:
        assert self._opened is not None
        folder, _, pack = self._opened
        if self._repository is not None and time.monotonic() - self._last_request >= HUB_SECONDS:
            self._last_request = time.monotonic()
            try:
                folder = remote.fetch(self.source, [])
            except HubError:
                return pack
        return self._open(folder)

    def _open(self, folder: Path) -> Pack:
        """Return the pack in a folder, and open it only if it has changed."""
        # read before the pack, so that a change in between is detected at the next call
        stamp = _stamp(folder)
        if self._opened is None or self._opened[:2] != (folder, stamp):
            pack = Pack.open(folder)
            if self._opened is not None:
                # a new version is decoded from the one before it, and not from the beginning of its chain
                pack.history_store.take_decoded(self._opened[2].history_store)
            self._opened = folder, stamp, pack
        return self._opened[2]


def _stamp(folder: Path) -> Stamp:
    """Return inode, modification time and size of the manifest: each change of a pack writes a new manifest file."""
    try:
        status = (folder / keys.MANIFEST).stat()
    except OSError:
        return (0, 0, 0)
    return status.st_ino, status.st_mtime_ns, status.st_size
