"""Reading a pack from disk: its manifest, its lock, and its files, whose hashes are checked.

Tensor files are named by content and never modified. `writer` replaces a pack. docs/pack-format.md gives the reasons.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..core import atomic_files, keys
from ..core.limits import (
    MAX_HEADER_BYTES,
    MAX_JSON_BYTES,
    MAX_MANIFEST_BYTES,
    MEMORY_ALLOWANCE,
    read_file,
    read_part,
)
from ..errors import FormatError, PackBusyError, PackDamagedError, PackExistsError, PackMissingError
from . import manifest_json
from .history import VersionRecord
from .manifest import Entry, Manifest

LOCK_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class PackFolder:
    """Pack on disk, in the state in which its manifest was read.

    Attributes:
        path: Folder of the pack.
        manifest: The manifest.
        digest: Digest of the manifest's bytes, which shows whether the pack was changed since.
        is_partial: True if `manifest` was reduced to some of the adapters.
    """

    path: Path
    manifest: Manifest
    digest: str
    is_partial: bool = False

    def is_at(self, path: Path) -> bool:
        """Return whether `path` is this folder, even through a link."""
        return self.path.exists() and self.path.resolve() == path.resolve()

    def select(self, names: Collection[str]) -> "PackFolder":
        """Return the folder with only these adapters; `AdapterNameError` for an unknown name."""
        return replace(self, manifest=self.manifest.select(names), is_partial=True)

    @property
    def basis(self) -> "PackFolder | None":
        """The basis for training, as a pack without adapters in the same folder; None if there is none."""
        basis = self.manifest.basis
        return replace(self, manifest=basis, is_partial=True) if basis is not None else None

    def adapter(self, name: str) -> "AdapterFolder":
        """Return the folder of an adapter that the manifest lists, or of a parent."""
        return AdapterFolder(self.path, name, self.manifest.needed[name])

    def read_bases(self) -> bytes:
        """Read the file of the bases and check every byte of it."""
        file, sha256 = self.manifest.subspace_file, self.manifest.subspace_sha256
        limit = self.manifest.subspace.stored_bytes + MAX_HEADER_BYTES
        with self._busy_if_replaced(lambda current: current.subspace_files.get(file) == sha256):
            return _read_checked(self.path / file, sha256, limit)

    def read_files(self, name: str, files: Collection[str] | None = None) -> dict[str, bytes]:
        """Read files of an adapter, all by default, and check every byte of them."""
        with self._busy_if_replaced(lambda current: current.files(name) == self.manifest.files(name)):
            return self.adapter(name).read_files(files)

    def read_version(self, record: VersionRecord) -> bytes:
        """Read the file of a version and check every byte of it."""
        with self._busy_if_replaced(lambda current: record.file in current.version_files):
            path, offset = self.path / record.file, record.offset
            if offset is None:
                return _read_checked(path, record.sha256, record.file_bytes)
            return _check_content(path, record.sha256, lambda: read_part(path, offset, record.file_bytes))

    def file_sizes(self) -> tuple[int, int] | None:
        """Return the bytes of the pack's files, model card included, and of its reports; None if a file is missing."""
        listed = (keys.MANIFEST, *self.manifest.subspace_files, *self.manifest.version_files)
        files = [self.path / file for file in listed]
        for name, entry in self.manifest.adapters.items():
            current = self.adapter(name).current
            files += [current / file for file in entry.files]
        card, *reports = (self.path / name for name in (keys.CARD, *keys.REPORTS))
        try:
            pack = sum(file.stat().st_size for file in [*files, *[card] * card.is_file()])
            return pack, sum(file.stat().st_size for file in reports if file.is_file())
        except OSError:
            return None

    def verify(self) -> None:
        """Read every byte of the pack; `PackDamagedError` names the first file that was changed."""

        def is_same(current: Manifest) -> bool:
            if self.manifest == current.basis:
                return True
            # if only a part of the pack was opened, compare these adapters only
            own = self.manifest.adapters.keys() | self.manifest.histories.keys()
            return current.select((current.adapters.keys() | current.histories.keys()) & own) == self.manifest

        with self._busy_if_replaced(is_same):
            for opened in (self, self.basis):
                if opened is not None:
                    opened.read_bases()
            for name in self.manifest.needed:
                self.adapter(name).read_files()
            for history in self.manifest.histories.values():
                bundles: dict[str, int] = {}
                for record in history.versions:
                    self.read_version(record)
                    if record.bundle is not None:
                        bundles[record.bundle] = bundles.get(record.bundle, 0) + record.file_bytes
                for sha256, size in bundles.items():
                    _read_checked(self.path / keys.version_file(sha256), sha256, size)

    @contextmanager
    def _busy_if_replaced(self, is_same: Callable[[Manifest], bool]) -> Iterator[None]:
        """Raise `PackBusyError` in place of `PackDamagedError` if another process replaced the files that are read.

        Args:
            is_same: Returns whether the current manifest lists the same files.
        """
        try:
            yield
        except PackDamagedError as error:
            if is_same(open_pack(self.path).manifest):
                raise
            raise PackBusyError(
                f"{self.path} was changed by another process since it was opened. Open it again."
            ) from error


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """Folder of one adapter in a pack: its own folder, or a spare one that a killed writer left.

    A writer uses the spare folder while the previous pack needs the adapter's own folder, and moves it after the
    manifest was replaced. The hashes in the manifest decide which of the two is read.

    Attributes:
        pack: Folder of the pack.
        name: Name of the adapter.
        entry: Entry of the adapter in the manifest.
    """

    pack: Path
    name: str
    entry: Entry

    @property
    def own(self) -> Path:
        """Folder named after the adapter."""
        return self.pack / keys.ADAPTERS / self.name

    @property
    def spare(self) -> Path:
        """Folder named after the adapter and its content; no adapter's name contains '@'."""
        content = "".join(f"{file}{sha256}" for file, sha256 in sorted(self.entry.files.items()))
        return self.pack / keys.ADAPTERS / f"{self.name}@{atomic_files.digest(content.encode())[:8]}"

    @property
    def current(self) -> Path:
        """The spare folder if it exists, else the own folder."""
        return self.spare if self.spare.is_dir() else self.own

    def read_files(self, names: Collection[str] | None = None) -> dict[str, bytes]:
        """Return the files that the manifest lists, by name.

        Args:
            names: Names of the files to read. Default: all.

        Raises:
            PackDamagedError: A file is missing or was changed.
        """
        digests = {file: sha256 for file, sha256 in self.entry.files.items() if names is None or file in names}
        if self.spare.is_dir():
            try:
                return self._read_from(self.spare, digests)
            except PackDamagedError:
                # another process may have moved the adapter to its own folder in the meantime
                if self.spare.is_dir():
                    raise
        return self._read_from(self.own, digests)

    def is_complete(self) -> bool:
        """Return whether the adapter's files exist with the recorded hashes."""
        try:
            self.read_files()
        except PackDamagedError:
            return False
        return True

    def _read_from(self, folder: Path, digests: Mapping[str, str]) -> dict[str, bytes]:
        record = self.entry.record
        tensor_bytes = {
            keys.ADAPTER_WEIGHTS: record.coefficient_bytes + record.head_bytes,
            keys.CARRIED: record.carried_bytes,
        }
        limits = {file: size + MAX_HEADER_BYTES + MEMORY_ALLOWANCE for file, size in tensor_bytes.items()}
        return {
            file: _read_checked(folder / file, sha256, limits.get(file, MAX_JSON_BYTES))
            for file, sha256 in digests.items()
        }


def find_pack(folder: Path) -> PackFolder | None:
    """Read the manifest of the pack in `folder`; return None if there is no pack."""
    path = folder / keys.MANIFEST
    if not path.is_file():
        return None
    try:
        data = read_file(path, MAX_MANIFEST_BYTES)
    except FormatError as error:
        raise PackDamagedError(f"{error} It cannot be the manifest of a pack.") from error
    return PackFolder(folder, manifest_json.parse(data, path), atomic_files.digest(data))


def is_unchanged(opened: PackFolder) -> bool:
    """Return whether the manifest on disk has the bytes that were read."""
    try:
        data = read_file(opened.path / keys.MANIFEST, MAX_MANIFEST_BYTES)
    except (FileNotFoundError, FormatError):
        return False
    return atomic_files.digest(data) == opened.digest


def open_pack(folder: Path) -> PackFolder:
    """Read the manifest of the pack in `folder`; `PackMissingError` if there is no pack."""
    opened = find_pack(folder)
    if opened is None:
        remedy = (
            f"`eigenlorax fit ADAPTER... -o {folder}` makes one of adapters, `eigenlorax track RUN -o {folder}` one of "
            f"the checkpoints of a run, `eigenlorax pull ORG/NAME -o {folder}` gets one"
        )
        if (folder / keys.ADAPTER_CONFIG).is_file():
            remedy = f"It is an adapter: `eigenlorax fit {folder} MORE... -o pack/` makes a pack, `pull` gets one"
        elif any(folder.glob("checkpoint-*")):
            remedy = f"It is a run: `eigenlorax track {folder} -o history/` makes a pack, `pull` gets one"
        raise PackMissingError(f"{folder} is not a pack: it has no {keys.MANIFEST}. {remedy} from the Hub.")
    return opened


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the pack in `folder`, for one process at a time; the lock is reentrant within a process."""
    check_no_link(folder)
    with atomic_files.lock(folder / keys.LOCK, LOCK_SECONDS):
        yield


def check_no_link(folder: Path) -> None:
    """Raise `PackExistsError` if a folder in the pack is a link, because a writer would delete files in its target.

    Readers follow such a link. `PackDamagedError` if that of a pack is not a folder at all.
    """
    for path in (folder / keys.ADAPTERS, folder / keys.VERSIONS):
        if (folder / keys.MANIFEST).is_file() and path.exists() and not path.is_dir():
            raise PackDamagedError(f"{path} is not a folder. Restore the pack from a copy, or fit it again.")
        if path.is_symlink():
            raise PackExistsError(
                f"{path} is a link to {path.readlink()}: changes of the pack would be made there, where another "
                "pack may need the files. Nothing was changed; replace the link by a copy of that folder."
            )


def _read_checked(path: Path, sha256: str, limit: int) -> bytes:
    """Read a file of at most `limit` bytes; `PackDamagedError` if it is missing, larger, or has another hash."""
    return _check_content(path, sha256, lambda: read_file(path, limit))


def _check_content(path: Path, sha256: str, read: Callable[[], bytes]) -> bytes:
    """Read a file or a part of it; `PackDamagedError` if it is missing, too large, or has another hash."""
    remedy = "Restore the pack from a copy, or fit it again."
    if path.parent.name == keys.VERSIONS:
        remedy = "Restore the pack from a copy, or track the run into a new folder."
    elif path.parent.parent.name == keys.ADAPTERS:
        remedy = (
            "The other adapters are not affected: remove this one (`eigenlorax remove`) and add it again, or restore "
            "the pack from a copy."
        )
    try:
        data = read()
    except FileNotFoundError as error:
        raise PackDamagedError(f"{path} is missing. {remedy}") from error
    except FormatError as error:
        raise PackDamagedError(f"{error} {remedy}") from error
    if atomic_files.digest(data) != sha256:
        raise PackDamagedError(
            f"{path} was changed after it was written: its sha256 is not the one in {keys.MANIFEST}. {remedy}"
        )
    return data
