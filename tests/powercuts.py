"""What may be on a disk after a power cut: a model of folders and files that have, or have not, been flushed to it.

A change of a folder is on the disk for certain once the folder was flushed (fsync) after it; until then it may be, with
all changes of that folder before it, or not. Each folder goes its own way. A file's content is there once it was
flushed; until then it is empty.
"""

import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from children import changes_within


@dataclass
class Recording:
    """All states of a folder, from before a call to after it, by inode, and what of them was flushed when."""

    root: Path
    now: int = 0
    folders: dict[int, list[tuple[int, dict[str, int]]]] = field(default_factory=dict)
    contents: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)
    flushed: dict[int, int] = field(default_factory=dict)
    flushes: list[tuple[int, int]] = field(default_factory=list)
    _held: list[int] = field(default_factory=list)

    def look(self) -> None:
        """Note what every folder lists now."""
        self.now += 1
        self._look(self.root)

    def _look(self, folder: Path) -> None:
        inode = folder.stat().st_ino
        entries = {entry.name: entry for entry in os.scandir(folder)}
        listed = {name: entry.inode() for name, entry in entries.items()}
        known = self.folders.get(inode)
        if known is None:
            # open, its number goes to no other one
            self._held.append(os.open(folder, os.O_RDONLY))
            known = self.folders[inode] = [(0, {})]
        if known[-1][1] != listed:
            known.append((self.now, listed))
        for entry in entries.values():
            if entry.is_dir():
                self._look(Path(entry.path))
            elif entry.inode() not in self.contents:
                self._held.append(os.open(entry.path, os.O_RDONLY))
                self.contents[entry.inode()] = [(0, b"")]

    def flush(self, handle: int) -> None:
        """Note that a file, or what a folder lists, is on the disk from now on."""
        self.look()
        inode = os.fstat(handle).st_ino
        if inode in self.contents:
            self.contents[inode].append((self.now, Path(f"/proc/self/fd/{handle}").read_bytes()))
        self.flushes.append((self.now, inode))

    def flush_all(self) -> None:
        """Take what is there for what has been on the disk all the time."""
        self.look()
        for path in (self.root, *self.root.rglob("*")):
            if path.is_file():
                self.contents[path.stat().st_ino].append((self.now, path.read_bytes()))
            self.flushes.append((self.now, path.stat().st_ino))

    def state(self, moment: int, choose: Callable[[list], dict[str, int]]) -> dict[str, bytes | None]:
        """What is on the disk after a power cut at a moment: bytes of files, None for folders.

        choose: one of the states that a folder may be in, the first of which is certain.
        """
        found: dict[str, bytes | None] = {}
        self._add(found, "", self.root.stat().st_ino, moment, choose)
        return found

    def _add(self, found: dict[str, bytes | None], path: str, inode: int, moment: int, choose: Callable) -> None:
        certain = max((time for time, one in self.flushes if one == inode and time <= moment), default=0)
        states = [listed for time, listed in self.folders[inode] if time <= moment]
        first = sum(time <= certain for time, _ in self.folders[inode]) - 1
        for name, child in choose(states[first:]).items():
            if child in self.folders:
                found[f"{path}{name}"] = None
                self._add(found, f"{path}{name}/", child, moment, choose)
            else:
                found[f"{path}{name}"] = [data for time, data in self.contents[child] if time <= moment][-1]


def record(root: Path, call: Callable[[], object]) -> Recording:
    """Make a call that changes a folder, and look at every step. There is no way back: for forks only."""
    recording, at_work = Recording(root), False

    def before_a_change(event: str, arguments: tuple) -> None:
        nonlocal at_work
        if at_work and changes_within(root, event, arguments):
            at_work = False
            recording.look()
            at_work = True

    recording.flush_all()
    sys.addaudithook(before_a_change)
    fsync, os.fsync = os.fsync, recording.flush
    at_work = True
    call()
    at_work, os.fsync = False, fsync
    recording.look()
    return recording


def cuts(recording: Recording, scratch: Path, seed: int = 0) -> Iterator[tuple[bool, Path]]:
    """The disk after power cuts at every moment: with nothing on it that was not flushed, with all of that, with some.

    Beside it, whether the moment is the one after the end.
    """
    drawn, seen = random.Random(seed), set()
    for moment in range(1, recording.now + 1):
        for choose in (lambda states: states[0], lambda states: states[-1], drawn.choice, drawn.choice):
            state = recording.state(moment, choose)
            key = (moment == recording.now, *state.items())
            if key in seen:
                continue
            seen.add(key)
            place = scratch / str(len(seen))
            place.mkdir()
            for name, data in state.items():
                (place / name).mkdir() if data is None else (place / name).write_bytes(data)
            yield key[0], place
