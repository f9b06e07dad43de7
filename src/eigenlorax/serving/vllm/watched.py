"""The pack of a server as it is now: looked at again when it may have changed. Nothing here imports vLLM."""

import os
import threading
import time
from pathlib import Path

from ...core import keys
from ...errors import HubError
from ...formats import hub
from ...pack import hub as remote
from ...pack.pack import Pack

HUB_SECONDS = 30.0
"""How long the Hub is not asked again, whatever names requests have."""

Stamp = tuple[int, int, int]


class WatchedPack:
    """A pack in a local folder or in a repository on the Hub, whose adapters may be replaced and become more.

    It is opened at once: `PackError` or `HubError` where that fails. Any thread may ask it.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self.source = os.fspath(source)
        self._repository = hub.parsed(self.source) if not Path(self.source).exists() else None
        self._lock = threading.Lock()
        self._asked = time.monotonic()
        self._opened: tuple[Path, Stamp, Pack] | None = None
        self._open(remote.fetch(self.source, []))

    def now(self) -> Pack:
        """The pack as it is now, or, one on the Hub, as it was less than `HUB_SECONDS` ago; the one before while the
        Hub cannot be asked. The same object until it changes, so that its bases are read once. On the Hub, not all of
        its adapters have to be there: `having` fetches one."""
        with self._lock:
            return self._now()

    def having(self, name: str) -> Pack:
        """The same, with the files of one adapter there; `AdapterNameError` if the pack has none of that name."""
        with self._lock:
            pack = self._now()
            keys.check_known(name, pack.names, f"the pack {self.source}")
            if self._repository is not None:
                assert pack.path is not None
                # from the commit that the manifest is of, whatever has been pushed since
                remote.fetch(self._repository[0], [name], revision=pack.path.name)
            return pack

    def _now(self) -> Pack:
        assert self._opened is not None
        place, _, pack = self._opened
        if self._repository is not None and time.monotonic() - self._asked >= HUB_SECONDS:
            self._asked = time.monotonic()
            try:
                place = remote.fetch(self.source, [])
            except HubError:
                return pack
        return self._open(place)

    def _open(self, place: Path) -> Pack:
        """The pack in a folder; the one that is open already if it is that and has not changed."""
        # before it is read: what is written in between is seen the next time
        stamp = _stamp(place)
        if self._opened is None or self._opened[:2] != (place, stamp):
            self._opened = place, stamp, Pack.open(place)
        return self._opened[2]


def _stamp(place: Path) -> Stamp:
    """What changes with a pack's manifest, which is replaced and never changed."""
    try:
        found = (place / keys.MANIFEST).stat()
    except OSError:
        return (0, 0, 0)
    return found.st_ino, found.st_mtime_ns, found.st_size
