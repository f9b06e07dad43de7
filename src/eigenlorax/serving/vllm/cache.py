"""A bounded cache of folders. Each process that writes to it has its own.

A folder exists until its process ends, because a client with its path may read it again. The exception are folders
whose use the process knows: if the cache is full, those that were not used for longest are removed. If that does not
suffice, new folders raise `CacheFullError`. Folders of processes that were killed are removed when the next process
starts.
"""

import atexit
import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import filelock

from ...core import atomic_files
from ...core.atomic_files import Files
from ...errors import CacheFullError, OptionError, reason
from .settings import CACHE, CACHE_BYTES

_MEMORY = Path("/dev/shm")  # noqa: S108 (folders in it are checked)
_ROOM_IN_MEMORY = 10**9
"""Free bytes from which memory is preferred to a disk. Containers often have 64 MB, which is too little."""
_PREFIX, _LOCK = "eigenlorax-server-", ".lock"
# names of lock files; anything else in the folder is left alone
_LOCK_NAME = re.compile(rf"{_PREFIX}[0-9a-f]{{16}}{re.escape(_LOCK)}")
_LINKS = 40
"""Maximum number of links in a path, about as many as Linux follows."""
_RECENT_SECONDS = 60.0
"""Time for which a folder is in use after it was requested: until then, its client is known to use it."""
InUse = Callable[[], Collection[str]]
"""A function that returns the names of the clients whose folders have to stay."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def default_root() -> Path:
    """Return the default folder for caches of this user: in /dev/shm if it has a gigabyte free, else in the temporary
    directory."""
    name = f"eigenlorax-{os.geteuid()}"
    if _is_memory(_MEMORY) and os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free >= _ROOM_IN_MEMORY:
        return _MEMORY / name
    return Path(tempfile.gettempdir()) / name


def _is_memory(path: Path) -> bool:
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(line.split()[1:3] == [str(path), "tmpfs"] for line in mounts.splitlines())


def prepare(root: Path) -> None:
    """Create the folder for caches if it is missing, check that only this user can write there, and clean it up.

    Folders of processes that have ended are removed.

    Raises:
        OptionError: The folder cannot be used.
    """
    try:
        missing = list(takewhile(lambda path: not os.path.lexists(path), (root, *root.parents)))
        for path in reversed(missing):
            # another process may create it at the same time; it is checked below
            with suppress(FileExistsError):
                path.mkdir(mode=0o700)
        # lstat, because another user may have put a link there
        problem = _unusable_reason(root, root.lstat()) or _replaceable_reason(root)
    except OSError as error:
        raise OptionError(f"{root} cannot be a cache: {reason(error)}. Choose another folder with {CACHE}.") from error
    if problem is not None:
        raise OptionError(
            f"{root} cannot be a cache: {problem}. Choose another folder with {CACHE}; a missing one is created."
        )
    _sweep(root)


def _unusable_reason(root: Path, status: os.stat_result) -> str | None:
    """Return why a folder must not be a cache; None if it can be one."""
    if stat.S_ISLNK(status.st_mode):
        return "it is a link"
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a folder"
    if status.st_uid not in (0, os.geteuid()):
        return "it belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX:
        return f"other users can write to it (its mode is {stat.S_IMODE(status.st_mode):o})"
    if not os.access(root, os.W_OK | os.X_OK):
        return "this user cannot write to it"
    return None


def _replaceable_reason(root: Path) -> str | None:
    """Return why other users could replace the cache by another folder, from which a server would load; or None."""
    for path, status in _parents(root):
        if status.st_uid not in (0, os.geteuid()):
            return f"its parent {path} belongs to another user"
        written_by_others = not stat.S_ISLNK(status.st_mode) and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if written_by_others and not status.st_mode & stat.S_ISVTX and not _has_private_group(status):
            return (
                f"other users can rename files in its parent {path} (its mode is "
                f"{stat.S_IMODE(status.st_mode):o}; change it with chmod go-w or +t)"
            )
    return None


def _parents(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield every folder and link on the path to a folder, from the top, without the folder itself."""
    # `..` is relative to the target of a link, as in the system's own resolution
    folder, names, links = Path("/"), list(reversed(Path(root).absolute().parts[1:-1])), 0
    yield folder, folder.lstat()
    while names:
        name = names.pop()
        path = folder.parent if name == ".." else folder / name
        status = path.lstat()
        yield path, status
        if not stat.S_ISLNK(status.st_mode):
            folder = path
            continue
        links += 1
        if links > _LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(root))
        target = path.readlink()
        names.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
        folder = Path("/") if target.is_absolute() else folder


def _has_private_group(status: os.stat_result) -> bool:
    """Return whether only this user is in the group that can write to a folder. Many systems give each user a group."""
    import grp
    import pwd

    if status.st_mode & stat.S_IWOTH:
        return False
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    return user.pw_gid == group.gr_gid and user.pw_name == group.gr_name and set(group.gr_mem) <= {user.pw_name}


def _sweep(root: Path) -> None:
    """Remove folders of processes that have ended: their locks are free."""
    for path in (entry for entry in root.iterdir() if _LOCK_NAME.fullmatch(entry.name)):
        # the lock may be in use, removed already, or belong to another user
        with suppress(OSError, filelock.Timeout):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                with _lock(path):
                    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                    path.unlink()


def _lock(path: Path) -> filelock.BaseFileLock:
    # not per thread: any thread of the process may release it
    return filelock.FileLock(path, timeout=0, thread_local=False, mode=0o600)


@dataclass(slots=True)
class _Folder:
    """A folder of the cache.

    Attributes:
        path: The folder.
        n_bytes: Bytes of its files.
        client: Name under which the folder is used; None if its use is unknown.
        requested: Time of the last request, in seconds.
    """

    path: Path
    n_bytes: int
    client: str | None
    requested: float


class Cache:
    """The folders of this process in a root folder.

    Args:
        root: The folder for caches, after `prepare`.
        limit: Maximum size of all files in bytes. Default: half of the free space.
    """

    def __init__(self, root: Path, limit: int | None = None) -> None:
        self.limit = limit if limit is not None else shutil.disk_usage(root).free // 2
        self._process = os.getpid()
        # before the folder is created, because other processes remove folders whose lock is free
        self._lock = _acquire_new_lock(root)
        self._folder = Path(self._lock.lock_file).with_suffix("")
        self._folder.mkdir(mode=0o700)
        self._writing = threading.Lock()
        # the folder that was requested last at the end
        self._known: OrderedDict[str, _Folder] = OrderedDict()
        atexit.register(self._end)

    def folder(
        self,
        name: str,
        min_bytes: int,
        make: Callable[[], Files],
        *,
        client: str | None = None,
        in_use: InUse | None = None,
    ) -> Path:
        """Return the folder of a name. If it does not exist, write the files that `make` returns.

        Args:
            name: Name of the folder, which determines its content.
            min_bytes: Lower bound of its size, which is checked before `make` is called.
            make: Function that returns the files. Calls are serialised.
            client: Name under which the folder will be used. Without it, the folder is never removed.
            in_use: Clients whose folders have to stay. Without it, no folder is removed.

        Raises:
            CacheFullError: The cache or the disk is full.
        """
        with self._writing:
            if name not in self._known:
                self._make_room(name, min_bytes, in_use)
                files = make()
                n = sum(map(len, files.values()))
                self._make_room(name, n, in_use)
                self._write(self._folder / name, files)
                self._known[name] = _Folder(self._folder / name, n, client, 0.0)
            self._known[name].requested = time.monotonic()
            self._known.move_to_end(name)
            return self._known[name].path

    def _make_room(self, name: str, n: int, in_use: InUse | None) -> None:
        """Remove folders until `n` more bytes fit; `CacheFullError` if they do not."""
        total = sum(folder.n_bytes for folder in self._known.values())
        if total + n > self.limit and in_use is not None:
            used, now = set(in_use()), time.monotonic()
            for known, folder in list(self._known.items()):
                if total + n <= self.limit:
                    break
                if folder.client not in (None, *used) and now - folder.requested > _RECENT_SECONDS:
                    del self._known[known]
                    shutil.rmtree(folder.path)
                    total -= folder.n_bytes
        if total + n > self.limit:
            raise CacheFullError(
                f"no room for {name}: the cache in {self._folder} has {total:,} of {self.limit:,} bytes, and {n:,} "
                "would be added. Only versions that no request uses are deleted while the server runs; start it with a "
                f"larger {CACHE_BYTES}, or with {CACHE} on a larger disk."
            )

    def _write(self, path: Path, files: Files) -> None:
        try:
            atomic_files.write_folder(path, files)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise CacheFullError(
                f"no room for {path.name}: {path.parent} is on a disk that is full ({os.strerror(error.errno or 0)}). "
                f"Start the server with {CACHE} on a larger one."
            ) from error

    def _end(self) -> None:
        # a forked child also runs this at its end
        if os.getpid() == self._process:
            shutil.rmtree(self._folder, ignore_errors=True)
            with suppress(OSError):
                Path(self._lock.lock_file).unlink()
            self._lock.release()


def _acquire_new_lock(root: Path) -> filelock.BaseFileLock:
    """Create a lock file with a random name and acquire it."""
    while True:
        path = root / f"{_PREFIX}{secrets.token_hex(8)}{_LOCK}"
        lock = _lock(path)
        # another process may have acquired or removed it in between
        with suppress(filelock.Timeout):
            lock.acquire()
            if path.exists():
                return lock
            lock.release()
