"""The folder of an adapter, on disk or behind a URL: which files it has, and what is in them.

Both kinds answer to the same calls. What an adapter's files mean is not known here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import boundary, keys
from ..errors import FormatError, OptionError
from . import hub, ranges, urls
from .image import names
from .ranges import LocalFile
from .urls import RemoteFolder


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

    def read(self, name: str, most: int) -> bytes:
        """All of a small file. `FormatError` where it has more bytes than `most`, or is none."""
        return boundary.read_file(self.at(name), most)

    def file(self, name: str) -> LocalFile:
        """A file that is there, to read ranges of."""
        return ranges.local_file(self.at(name))

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

_LOOKED_AT = 16
"""Files of a repository of which it is asked whether they are LoRAs: a large model is in more."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an adapter is: in a folder, or in a single file of that folder; and the name it goes by."""

    folder: Folder
    name: str
    file: str | None = None

    def __str__(self) -> str:
        return str(self.folder if self.file is None else self.folder.at(self.file))


def place(
    source: str | Path | Place,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
) -> Place:
    """Where an adapter is: behind a URL, on disk, or what the Hub has of it."""
    if isinstance(source, Place):
        return source
    source = localized(source)
    if isinstance(source, str) and urls.is_url(source):
        if local_files_only:
            raise OptionError(f"{source} is not on this machine, and local_files_only allows nothing else.")
        return _remote_place(source, revision, subfolder, token)
    if Path(source).is_file():
        if subfolder:
            raise FormatError(f"{source} is not a folder, so it has no subfolder {subfolder!r}.")
        return _local_file(Path(source))
    if is_file_name(source) and not Path(source).exists():
        raise FormatError(f"{source} does not exist.")
    path, name = hub.adapter_folder(
        source,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        allow_pickle=allow_pickle,
    )
    folder = LocalFolder(path)
    file = keys.LORA_FILE if holds_lora_file(folder) else None
    if file is None and not Path(source).exists() and not is_adapter(folder) and not is_pack(folder):
        how = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        return _on_the_hub(source, name, folder, subfolder, revision, how)
    return Place(folder, name, file)


def _remote_place(source: str, revision: str | None, subfolder: str | None, token: str | bool | None) -> Place:
    if is_file_name(source) and not subfolder:
        parent, _, file = source.rpartition("/")
        if file == keys.ADAPTER_WEIGHTS:
            raise FormatError(_of_a_folder(source))
        remote = urls.folder(parent, revision=revision, token=token)
        remote.refresh()
        return Place(remote, hub.name_of(source), file)
    remote = urls.folder(source, revision=revision, subfolder=subfolder, token=token)
    remote.refresh()
    return Place(remote, hub.name_of(source, subfolder), keys.LORA_FILE if holds_lora_file(remote) else None)


def _of_a_folder(source: str | Path) -> str:
    return (
        f"{source} is not a folder: an adapter as PEFT saves it is the folder that holds this file, with "
        f"{keys.ADAPTER_CONFIG} beside it."
    )


def _local_file(path: Path) -> Place:
    """A single file; an error with what helps, where it is not called like one."""
    if path.name == keys.ADAPTER_WEIGHTS:
        raise FormatError(_of_a_folder(path))
    if is_file_name(path):
        return Place(LocalFolder(path.parent), hub.name_of(path), path.name)
    try:
        ranges.open_tensors(ranges.local_file(path))
    except FormatError:
        pickled = path.suffix in (".bin", ".ckpt", ".pt", ".pth")
        raise FormatError(
            f"{path} is not a folder: an adapter is a folder that holds {keys.ADAPTER_CONFIG}, or a LoRA in one "
            f"{keys.LORA_SUFFIX} file."
            + " This is a pickle, which may run code when it is read: have its author convert it."
            * pickled
        ) from None
    raise FormatError(
        f"{path} is not a folder, but a safetensors file that is not called so. Rename it to {path.name}"
        f"{keys.LORA_SUFFIX}, and name that."
    )


def _on_the_hub(
    source: str | Path,
    name: str,
    folder: LocalFolder,
    subfolder: str | None,
    revision: str | None,
    how: dict[str, Any],
) -> Place:
    """The one LoRA among a repository's safetensors files, fetched; what is no LoRA is not."""
    repository = hub.parsed(source, revision)
    assert repository is not None
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    listed = hub.files(*repository, **how)
    files = [
        file for file in listed if file.startswith(prefix) and "/" not in file[len(prefix) :] and is_file_name(file)
    ]
    remote = urls.folder(f"hf://{repository[0]}", revision=repository[1], token=how["token"])

    def may_be_one(file: str) -> bool:
        local = file[len(prefix) :]
        return is_lora(folder, local) if folder.is_file(local) else is_lora(remote, file)

    loras = [file for file in files[:_LOOKED_AT] if may_be_one(file)]
    if files and not loras:
        raise FormatError(
            f"{source} has no {keys.ADAPTER_CONFIG}, and none of its {keys.LORA_SUFFIX} files, such as {files[0]}, "
            "is a LoRA."
        )
    if len(loras) > 1:
        raise FormatError(
            f"{source} has {len(loras)} LoRA files, {', '.join(loras[:4])}{', …' * (len(loras) > 4)}. Name one of "
            f"them: hf://{repository[0]}/{loras[0]}."
        )
    if not loras:
        return Place(folder, name)
    place = hub.download(*repository, [loras[0]], **how)
    return Place(LocalFolder(place / prefix), name, loras[0][len(prefix) :])


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


def holds_lora_file(folder: Folder) -> bool:
    """Whether a folder is an adapter's as diffusers writes it: with one file, and no config beside it."""
    return not is_adapter(folder) and not is_pack(folder) and folder.is_file(keys.LORA_FILE)


def is_file_name(source: str | Path) -> bool:
    """Whether a path or URL is called like a safetensors file."""
    return str(source).lower().endswith(keys.LORA_SUFFIX)


def is_lora(folder: Folder, file: str) -> bool:
    """Whether a safetensors file, by its header, is an adapter's, or so broken that it cannot be said."""
    try:
        entries = ranges.open_tensors(folder.file(file)).entries
        keys.check_tensor_names(entries, file)
    except FormatError:
        return True
    return names.is_lora(entries)
