"""The folder of an adapter, on disk or behind a URL: which files it has, and what is in them.

Both kinds answer to the same calls. What an adapter's files mean is not known here.
"""

from dataclasses import dataclass
from pathlib import Path

from .. import hub, keys, urls
from ..errors import OptionError
from ..urls import RemoteFolder
from . import ranges
from .ranges import LocalFile


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder on disk."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def source(self) -> Path:
        """What an adapter in this folder is read by."""
        return self.path

    def at(self, name: str) -> Path:
        """Where a file of the folder is."""
        return self.path / name

    def is_file(self, name: str) -> bool:
        """Whether the folder has a file of that name."""
        return self.at(name).is_file()

    def read(self, name: str) -> bytes:
        """All of a small file."""
        return self.at(name).read_bytes()

    def file(self, name: str) -> LocalFile:
        """A file that is there, to read ranges of."""
        return ranges.local(self.at(name))

    def folders(self) -> list["LocalFolder"]:
        """The folders in it by name, hidden ones aside."""
        return [
            LocalFolder(child)
            for child in sorted(self.path.iterdir())
            if child.is_dir() and not child.name.startswith(".")
        ]

    def files(self) -> list[str]:
        """The names of the files in it."""
        return sorted(child.name for child in self.path.iterdir() if child.is_file())


Folder = LocalFolder | RemoteFolder


def adapter_folder(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
) -> tuple[Folder, str]:
    """The folder of an adapter, and the name it goes by: behind a URL, on disk, or what the Hub has of it."""
    source = localized(source)
    if isinstance(source, str) and urls.is_url(source):
        if local_files_only:
            raise OptionError(f"{source} is not on this machine, and local_files_only allows nothing else.")
        remote = urls.folder(source, revision=revision, subfolder=subfolder, token=token)
        remote.refresh()
        return remote, urls.name_of(source, subfolder)
    path, name = hub.adapter_folder(
        source,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        allow_pickle=allow_pickle,
    )
    return LocalFolder(path), name


def localized(source: str | Path) -> str | Path:
    """The path that a `file://` URL stands for; any other source as it is."""
    path = urls.local_path(source) if isinstance(source, str) and urls.is_url(source) else None
    return source if path is None else path


def is_adapter(folder: Folder) -> bool:
    """Whether a folder has the config of an adapter."""
    return folder.is_file(keys.ADAPTER_CONFIG)


def is_pack(folder: Folder) -> bool:
    """Whether a folder has the manifest of a pack."""
    return folder.is_file(keys.MANIFEST)
