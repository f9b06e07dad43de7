"""A bounded cache of folders, one for each process that writes to it. Nothing here knows what is in them.

A folder that was given out is there until its process ends, because whoever has its path may read it again. When the
cache is full, there is no new one. What processes that were killed have left goes when the next one begins.
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
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

import filelock

from ...core import atomic_files
from ...core.atomic_files import Files
from ...errors import CacheFullError, OptionError, reason
from .settings import CACHE, CACHE_BYTES

_MEMORY = Path("/dev/shm")  # noqa: S108 (what is made in it is checked)
_ROOM_IN_MEMORY = 10**9
"""Free bytes from which memory is preferred to a disk: containers often have 64 MB of it."""
_PREFIX, _LOCK = "eigenlorax-server-", ".lock"
# of what is swept: others may have files with names alike
_OURS = re.compile(rf"{_PREFIX}[0-9a-f]{{16}}{re.escape(_LOCK)}")
_LINKS = 40
"""On the way to a folder; a system follows about as many."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def place() -> Path:
    """Where caches of this user are by default: in memory where there is a file system for that with a gigabyte free,
    else among the temporary files."""
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
    """Make the folder in which caches are, or see that nobody else can change what we will put in it; remove what dead
    processes have left there. `OptionError` where it cannot be used."""
    try:
        missing = list(takewhile(lambda path: not os.path.lexists(path), (root, *root.parents)))
        for path in reversed(missing):
            # of another process that has come first; what is there is looked at below
            with suppress(FileExistsError):
                path.mkdir(mode=0o700)
        # of the place itself: a link may have been put there by somebody else
        why = _unusable(root, root.lstat()) or _replaceable(root)
    except OSError as error:
        raise OptionError(f"{root} cannot be a cache: {reason(error)}. Choose another folder with {CACHE}.") from error
    if why is not None:
        raise OptionError(
            f"{root} cannot be a cache: {why}. Choose another folder with {CACHE}; one that is not there is made."
        )
    _sweep(root)


def _unusable(root: Path, found: os.stat_result) -> str | None:
    """Why a place must not be a cache, if it must not."""
    if stat.S_ISLNK(found.st_mode):
        return "it is a link"
    if not stat.S_ISDIR(found.st_mode):
        return "it is not a folder"
    if found.st_uid not in (0, os.geteuid()):
        return "it belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        return f"other users can write to it (its mode is {stat.S_IMODE(found.st_mode):o})"
    if not os.access(root, os.W_OK | os.X_OK):
        return "this user cannot write to it"
    return None


def _replaceable(root: Path) -> str | None:
    """Return why others could put another folder in the place of the cache, from which a server would load; or None."""
    for path, found in _on_the_way(root):
        if found.st_uid not in (0, os.geteuid()):
            return f"{path}, on the way to it, belongs to another user"
        written_by_others = not stat.S_ISLNK(found.st_mode) and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if written_by_others and not found.st_mode & stat.S_ISVTX and not _is_of_us_alone(found):
            return (
                f"other users can rename what is in {path}, on the way to it (its mode is "
                f"{stat.S_IMODE(found.st_mode):o}; chmod go-w, or +t, would do)"
            )
    return None


def _on_the_way(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield every folder and link that is passed on the way to a folder, from the top; not the folder itself."""
    # `..` as the system takes it: of where a link leads
    place, ahead, links = Path("/"), list(reversed(Path(root).absolute().parts[1:-1])), 0
    yield place, place.lstat()
    while ahead:
        name = ahead.pop()
        path = place.parent if name == ".." else place / name
        found = path.lstat()
        yield path, found
        if not stat.S_ISLNK(found.st_mode):
            place = path
            continue
        links += 1
        if links > _LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(root))
        target = path.readlink()
        ahead.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
        place = Path("/") if target.is_absolute() else place


def _is_of_us_alone(found: os.stat_result) -> bool:
    """Return whether nobody else is in the group that can write to a folder: many systems give each user a group."""
    import grp
    import pwd

    if found.st_mode & stat.S_IWOTH:
        return False
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(found.st_gid)
    except KeyError:
        return False
    return user.pw_gid == group.gr_gid and user.pw_name == group.gr_name and set(group.gr_mem) <= {user.pw_name}


def _sweep(root: Path) -> None:
    """Remove what is of processes that have ended: their locks are free."""
    for path in (one for one in root.iterdir() if _OURS.fullmatch(one.name)):
        # of another user, or in use, or gone
        with suppress(OSError, filelock.Timeout):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                with _lock(path):
                    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                    path.unlink()


def _lock(path: Path) -> filelock.BaseFileLock:
    # held by the process, whichever of its threads has taken it
    return filelock.FileLock(path, timeout=0, thread_local=False, mode=0o600)


class Cache:
    """The folders of this process in `root`, which is prepared.

    limit: how many bytes of files they may have in all; half of what is free now where it is not given.
    """

    def __init__(self, root: Path, limit: int | None = None) -> None:
        self.limit = limit if limit is not None else shutil.disk_usage(root).free // 2
        self._process = os.getpid()
        # taken before there is a folder: what has a free lock may be swept
        self._lock = _taken(root)
        self._folder = Path(self._lock.lock_file).with_suffix("")
        self._folder.mkdir(mode=0o700)
        self._writing = threading.Lock()
        self._known: dict[str, Path] = {}
        self._bytes = 0
        atexit.register(self._end)

    def folder(self, name: str, at_least: int, make: Callable[[], Files]) -> Path:
        """The folder of that name, whose files `make` gives if it is not there yet; one call at a time.

        name: decides the content. at_least: bytes that it will certainly have. `CacheFullError` if there is no room.
        """
        with self._writing:
            if name not in self._known:
                self._check_room(name, at_least)
                files = make()
                n = sum(map(len, files.values()))
                self._check_room(name, n)
                self._write(self._folder / name, files)
                self._bytes += n
                self._known[name] = self._folder / name
            return self._known[name]

    def _check_room(self, name: str, n: int) -> None:
        if self._bytes + n > self.limit:
            raise CacheFullError(
                f"no room for {name}: the cache in {self._folder} has {self._bytes:,} of {self.limit:,} bytes, and "
                f"{n:,} would be added. Nothing in it is deleted while the server runs; start it with a larger "
                f"{CACHE_BYTES}, or with {CACHE} on a larger disk."
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
        # a fork of the process has not made it
        if os.getpid() == self._process:
            shutil.rmtree(self._folder, ignore_errors=True)
            with suppress(OSError):
                Path(self._lock.lock_file).unlink()
            self._lock.release()


def _taken(root: Path) -> filelock.BaseFileLock:
    """A new lock, held."""
    while True:
        path = root / f"{_PREFIX}{secrets.token_hex(8)}{_LOCK}"
        lock = _lock(path)
        # a sweeper may have come between, and have taken or removed it
        with suppress(filelock.Timeout):
            lock.acquire()
            if path.exists():
                return lock
            lock.release()
