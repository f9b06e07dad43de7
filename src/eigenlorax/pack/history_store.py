"""Histories of an open pack: their records, the bytes of versions that are not on disk yet, and decoded versions."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from ..codec.versions import lossy
from ..codec.versions.version import DecodedVersion
from ..core import keys
from ..core.adapter import LazyMapping
from ..core.limits import damaged_on_error
from ..errors import AdapterNameError
from . import lossless_versions
from .history import History, VersionRecord

HELD_BYTES = 2**26
"""Maximum bytes of decoded versions that stay in memory, so that the next version is coded without decoding a chain.

The version that was used last stays, however large it is."""
KEY_DISTANCE = 32
"""Maximum number of versions in a chain, the first of which is a key version that refers to no other one."""


class HistoryStore:
    """Histories of an open pack.

    Args:
        histories: The histories, by name.
        read_file: Function that reads the file of a version from disk; None if the pack is not on disk.
        unsaved: Bytes of versions that are not on disk, by their hash.
    """

    def __init__(
        self,
        histories: Mapping[str, History] | None = None,
        read_file: Callable[[VersionRecord], bytes] | None = None,
        unsaved: Mapping[str, bytes] | None = None,
    ) -> None:
        self.histories = dict(histories or {})
        self._read_file = read_file
        self._unsaved = dict(unsaved or {})
        # by full name, the version that was used last at the end
        self._decoded: OrderedDict[str, DecodedVersion] = OrderedDict()

    def __contains__(self, name: object) -> bool:
        parts = keys.split_version(name)
        return parts is not None and parts[0] in self.histories and parts[1] in self.histories[parts[0]]

    def copied(self, names: Collection[str] | None = None) -> "HistoryStore":
        """Return a store of the same histories, or of those of some names, that reads the same files."""
        chosen = {name: history for name, history in self.histories.items() if names is None or name in names}
        return HistoryStore(chosen, self._read_file, self._unsaved)

    def history(self, name: str) -> History:
        """Return a history by name; `AdapterNameError` if there is none."""
        keys.check_known(name, self.histories, kind="history")
        return self.histories[name]

    def find(self, name: str) -> tuple[History, VersionRecord]:
        """Return the history and the record of a version, by a name such as "run@1000" or "run@latest".

        Raises:
            AdapterNameError: There is no such history or version.
        """
        parts = keys.split_version(name)
        if parts is None:
            example = name if name in self.histories else "run"
            raise AdapterNameError(
                f"{name!r} is not the name of a version. Expected a name such as "
                f"{example + keys.VERSION_MARK + keys.LATEST!r}."
            )
        history = self.history(parts[0])
        return history, history[parts[1]]

    def read(self, record: VersionRecord) -> bytes:
        """Return the bytes of a version's file, from memory if it is not on disk."""
        if record.sha256 in self._unsaved:
            return self._unsaved[record.sha256]
        assert self._read_file is not None
        return self._read_file(record)

    def decode(self, history: History, record: VersionRecord) -> DecodedVersion:
        """Return a version as its bytes say. Of its chain, only the part is decoded that is not in memory.

        Raises:
            PackDamagedError: A file was changed, or cannot be decoded.
        """
        decoded = None
        remaining: list[VersionRecord] = []
        for earlier in reversed(history.chain(record)):
            decoded = self._decoded.get(history.full_name(earlier))
            if decoded is not None:
                break
            remaining.insert(0, earlier)
        name = history.full_name(record)
        with damaged_on_error(f"version {name} ({record.file})"):
            if record.lossless:
                for each in remaining:
                    decoded = lossless_versions.decode(self.read(each), decoded, history.config(each))
            else:
                decoded = self._decode_lossy(remaining, decoded)
        assert decoded is not None
        self._hold(name, decoded)
        return decoded

    def _decode_lossy(self, chain: Sequence[VersionRecord], start: DecodedVersion | None) -> DecodedVersion | None:
        """Decode the last version of a chain, several versions at once as far as their memory allows."""
        while chain:
            count = 1 if start is None else max(1, HELD_BYTES // max(start.nbytes, 1))
            start = lossy.decode_chain([self.read(record) for record in chain[:count]], start)
            chain = chain[count:]
        return start

    def _hold(self, name: str, decoded: DecodedVersion) -> None:
        """Keep a decoded version in memory, in place of those that were not used for longest."""
        self._decoded[name] = decoded
        self._decoded.move_to_end(name)
        while len(self._decoded) > 1 and sum(version.nbytes for version in self._decoded.values()) > HELD_BYTES:
            self._decoded.popitem(last=False)

    def take_decoded(self, earlier: "HistoryStore") -> None:
        """Take over decoded versions from a store of the same pack in an earlier state, unless their files changed."""
        for name, decoded in list(earlier._decoded.items()):
            if name in self and name in earlier:
                (history, record), (earlier_history, earlier_record) = self.find(name), earlier.find(name)
                if history.digest(record) == earlier_history.digest(earlier_record):
                    self._hold(name, decoded)

    def append(self, history: History, record: VersionRecord, data: bytes, decoded: DecodedVersion) -> None:
        """Add a version to a history, which may be new.

        Args:
            history: The history without the version.
            record: The version.
            data: Its bytes.
            decoded: The version as its bytes say.
        """
        history = replace(history, versions=(*history.versions, record))
        self.histories[history.name] = history
        self.add_file(record, data)
        self._hold(history.full_name(record), decoded)

    def add_file(self, record: VersionRecord, data: bytes) -> None:
        """Add the bytes of a version that is not on disk."""
        self._unsaved[record.sha256] = data

    def replace(self, history: History) -> None:
        """Replace the history of the same name by one with fewer versions, or remove it if none is left."""
        self.histories[history.name] = history
        if not history.versions:
            del self.histories[history.name]
        # from now on, versions are decoded from the bytes that readers have
        self._decoded.clear()

    def files(self, *, in_place: bool) -> Mapping[str, bytes]:
        """Return the files of the versions by path in the pack, read when they are used.

        Args:
            in_place: True to leave out those that are on disk already.
        """
        files: dict[str, list[VersionRecord]] = {}
        for history in self.histories.values():
            for record in history.versions:
                files.setdefault(record.file, []).append(record)
        chosen = {
            file: records
            for file, records in sorted(files.items())
            if not in_place or any(record.sha256 in self._unsaved for record in records)
        }
        return LazyMapping(chosen, lambda file: self._content(files[file]))

    def _content(self, records: Sequence[VersionRecord]) -> bytes:
        """Return the content of a file: one version, which several records may have, or those of a bundle."""
        if records[0].bundle is None:
            return self.read(records[0])
        return b"".join(map(self.read, records))

    def saved(self, read_file: Callable[[VersionRecord], bytes]) -> None:
        """Note that all files are on disk, from where `read_file` reads them."""
        self._read_file, self._unsaved = read_file, {}


def offered_reference(history: History, *, lossless: bool, height: int = 1) -> VersionRecord | None:
    """Return the version that the next one of a history may refer to: the last one; None for a new key version.

    Args:
        history: The history.
        lossless: True if the next version is lossless. It refers to no other kind.
        height: Number of versions in the longest chain that begins with the next version.
    """
    latest = next((record for record in reversed(history.versions) if record.lossless == lossless), None)
    return latest if latest is not None and len(history.chain(latest)) + height <= KEY_DISTANCE else None
