"""Folders of adapters, on disk or behind a URL, and the location of a source's adapter in them.

`LocalFolder` and `RemoteFolder` have the same methods. This module knows the names of an adapter's files, not their
content.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import keys, limits
from ..errors import FormatError, OptionError
from . import hub_client, ranges, urls
from .gguf import header
from .image import tensor_keys
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
        """The source by which `read_adapter` reads an adapter in this folder."""
        return self.path

    def at(self, name: str) -> Path:
        """Return the path of a file in the folder."""
        return self.path / name

    def is_file(self, name: str) -> bool:
        """Return whether the folder has a file of that name."""
        return self.at(name).is_file()

    def read(self, name: str, limit: int) -> bytes:
        """Read a small file; raise `FormatError` if it has more than `limit` bytes, or is not a regular file."""
        return limits.read_file(self.at(name), limit)

    def file(self, name: str) -> LocalFile:
        """Return a description of an existing file, from which byte ranges can be read."""
        return ranges.local_file(self.at(name))

    def folders(self) -> list["LocalFolder"]:
        """List the subfolders by name, without hidden ones."""
        return [
            LocalFolder(child)
            for child in sorted(self.path.iterdir())
            if child.is_dir() and not child.name.startswith(".")
        ]

    def files(self) -> list[str]:
        """List the names of the files in the folder."""
        return sorted(child.name for child in self.path.iterdir() if child.is_file())


Folder = LocalFolder | RemoteFolder

ARCHIVE_HINT = (
    f" {keys.MLX_ARCHIVE} is an archive of an early mlx-lm, and is not read. Convert it in Python with mlx: "
    f"mx.save_safetensors('{keys.MLX_WEIGHTS}', mx.load('{keys.MLX_ARCHIVE}')), with "
    '{"lora_parameters": {"rank": RANK, "scale": SCALE}} in ' + f"{keys.ADAPTER_CONFIG}."
)

_INSPECTED_FILES = 16
"""Number of safetensors files of a repository that are inspected for a LoRA. A large model has more shards."""


@dataclass(frozen=True, slots=True)
class AdapterLocation:
    """Location of an adapter.

    Attributes:
        folder: Folder of the adapter.
        name: Name of the adapter by its folder or file.
        file: Name of the file in the folder, if the adapter is a single file.
        is_downloaded: True if the folder is the cache of a repository on the Hub.
    """

    folder: Folder
    name: str
    file: str | None = None
    is_downloaded: bool = False

    def __str__(self) -> str:
        return str(self.folder if self.file is None else self.folder.at(self.file))


def locate(
    source: str | Path | AdapterLocation,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
) -> AdapterLocation:
    """Return the location of an adapter. Files of a repository on the Hub are downloaded; nothing else is read.

    Args:
        source: A folder or file on disk, a URL, or a Hub id (`org/name`, `org/name@revision`).
        revision: Branch, tag or commit of a repository on the Hub.
        subfolder: Folder in the repository, or below the folder `source`.
        token: Access token of the Hub, as in huggingface_hub.
        cache_dir: Cache folder of the Hub, as in huggingface_hub.
        local_files_only: Whether files are only taken from the disk and the cache.
        allow_pickle: Whether `adapter_model.bin` is downloaded too.

    Raises:
        FormatError: The source does not exist, or does not have exactly one adapter.
        HubError: The Hub does not have the repository, or cannot be reached.
        OptionError: `source` is a URL, and `local_files_only` is set.
    """
    if isinstance(source, AdapterLocation):
        return source
    source = local_source(source)
    if isinstance(source, str) and urls.is_url(source):
        if local_files_only:
            raise OptionError(
                f"{source} is not on this machine, which local_files_only requires. Download it first, or "
                "remove local_files_only."
            )
        return _locate_remote(source, revision, subfolder, token)
    if Path(source).is_file():
        if subfolder:
            raise FormatError(f"{source} is not a folder, so it has no subfolder {subfolder!r}.")
        return _locate_file(Path(source))
    hub_client.check_exists(source)
    path, name = hub_client.adapter_folder(
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
        repository = hub_client.parsed(source, revision)
        assert repository is not None
        hub_options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        return _locate_lora_file(repository, AdapterLocation(folder, name, is_downloaded=True), subfolder, hub_options)
    return AdapterLocation(folder, name, file, is_downloaded=not Path(source).exists())


def _locate_remote(
    source: str, revision: str | None, subfolder: str | None, token: str | bool | None
) -> AdapterLocation:
    if hub_client.is_file_name(source) and not subfolder:
        parent, _, file = source.rpartition("/")
        if file == keys.ADAPTER_WEIGHTS:
            raise _not_a_folder(source)
        remote = urls.folder(parent, revision=revision, token=token)
        remote.refresh()
        return AdapterLocation(remote, hub_client.adapter_name(source), file)
    remote = urls.folder(source, revision=revision, subfolder=subfolder, token=token)
    remote.refresh()
    return AdapterLocation(
        remote, hub_client.adapter_name(source, subfolder), keys.LORA_FILE if holds_lora_file(remote) else None
    )


def _not_a_folder(source: str | Path) -> FormatError:
    return FormatError(
        f"{source} is not a folder: an adapter as PEFT saves it is the folder with this file and {keys.ADAPTER_CONFIG}."
    )


def _locate_file(path: Path) -> AdapterLocation:
    """Return the location of an adapter that is a single file.

    Raises:
        FormatError: The file has another suffix. The message says whether it can be renamed.
    """
    if path.name == keys.ADAPTER_WEIGHTS:
        raise _not_a_folder(path)
    if hub_client.is_file_name(path):
        return AdapterLocation(LocalFolder(path.parent), hub_client.adapter_name(path), path.name)
    file = ranges.local_file(path)
    if header.is_gguf(file):
        raise _other_suffix(path, "a GGUF", keys.GGUF_SUFFIX)
    try:
        ranges.open_tensors(file)
    except FormatError:
        is_archive = path.name.endswith(keys.MLX_ARCHIVE)
        is_pickle = path.suffix in (".bin", ".ckpt", ".pt", ".pth")
        raise FormatError(
            f"{path} is not a folder: an adapter is a folder with {keys.ADAPTER_CONFIG}, or a LoRA in one "
            f"{keys.LORA_SUFFIX} or {keys.GGUF_SUFFIX} file."
            + " This is a pickle, which may run code when it is read: ask its author for a safetensors file."
            * is_pickle
            + ARCHIVE_HINT * is_archive
        ) from None
    raise _other_suffix(path, "a safetensors", keys.LORA_SUFFIX)


def _other_suffix(path: Path, kind: str, suffix: str) -> FormatError:
    return FormatError(
        f"{path} is {kind} file with another suffix. Rename it to {path.name}{suffix}, and pass that path."
    )


def _locate_lora_file(
    repository: tuple[str, str | None],
    location: AdapterLocation,
    subfolder: str | None,
    hub_options: dict[str, Any],
) -> AdapterLocation:
    """Find the only LoRA among the safetensors files of a repository, and download it.

    Files are inspected by their headers, so that a model of gigabytes in the same repository is not downloaded.

    Args:
        repository: Id and revision of the repository.
        location: Location of the files that are in the cache.
        subfolder: Folder in the repository to search.
        hub_options: The options token, cache_dir and local_files_only.
    """
    repo_id, revision = repository
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    source = f"{repo_id}{f'@{revision}' if revision else ''}{f'/{prefix[:-1]}' if prefix else ''}"
    candidates = [
        path
        for path in hub_client.files(repo_id, revision, **hub_options)
        if path.startswith(prefix) and "/" not in path[len(prefix) :] and hub_client.is_file_name(path)
    ]
    remote = urls.folder(f"hf://{repo_id}", revision=revision, token=hub_options["token"])

    def may_be_lora(path: str) -> bool:
        file = path[len(prefix) :]
        return is_lora(location.folder, file) if location.folder.is_file(file) else is_lora(remote, path)

    loras = [path for path in candidates[:_INSPECTED_FILES] if may_be_lora(path)]
    if candidates and not loras:
        raise FormatError(
            f"{source} has no {keys.ADAPTER_CONFIG}, and none of its {keys.LORA_SUFFIX} files, such as "
            f"{candidates[0]}, is a LoRA."
        )
    if len(loras) > 1:
        raise FormatError(
            f"{source} has {len(loras)} LoRA files, {', '.join(loras[:4])}{', …' * (len(loras) > 4)}. Pass one of "
            f"them, such as hf://{repo_id}/{loras[0]}."
        )
    if not loras:
        return location
    snapshot = hub_client.download(repo_id, revision, [loras[0]], **hub_options)
    return AdapterLocation(LocalFolder(snapshot / prefix), location.name, loras[0][len(prefix) :])


def local_source(source: str | Path) -> str | Path:
    """Return the path of a `file://` URL, and any other source unchanged."""
    path = urls.local_path(source) if isinstance(source, str) and urls.is_url(source) else None
    return source if path is None else path


def is_adapter(folder: Folder) -> bool:
    """Return whether a folder has the config of an adapter."""
    return folder.is_file(keys.ADAPTER_CONFIG)


def is_pack(folder: Folder) -> bool:
    """Return whether a folder has the manifest of a pack."""
    return folder.is_file(keys.MANIFEST)


def holds_lora_file(folder: Folder) -> bool:
    """Return whether a folder is an adapter as diffusers saves it: one LoRA file without a config."""
    return not is_adapter(folder) and not is_pack(folder) and folder.is_file(keys.LORA_FILE)


def weights_without_config(folder: Folder) -> str | None:
    """Return the name of PEFT's or mlx-lm's weights file in a folder without `adapter_config.json`; None without."""
    names = (keys.ADAPTER_WEIGHTS, keys.ADAPTER_PICKLE)
    if is_adapter(folder):
        return None
    if folder.is_file(keys.MLX_WEIGHTS) and not is_lora(folder, keys.MLX_WEIGHTS):
        return keys.MLX_WEIGHTS
    return next((name for name in names if folder.is_file(name)), None)


def missing_config(folder: Folder, weights: str) -> str:
    """Return the text of the error about a folder with weights, whose `adapter_config.json` is missing."""
    return (
        f"{folder} has no {keys.ADAPTER_CONFIG} beside {weights}. The config states the scaling and the base model. "
        "PEFT's save_pretrained and mlx-lm write both files: copy the config, too."
    )


def is_lora(folder: Folder, file: str) -> bool:
    """Return whether the header of a safetensors or GGUF file is that of an adapter.

    A damaged file counts as a LoRA, so that reading it raises the error about the damage.
    """
    if file.lower().endswith(keys.GGUF_SUFFIX):
        return header.is_adapter(folder.file(file))
    try:
        entries = ranges.open_tensors(folder.file(file)).entries
        keys.check_tensor_names(entries, file)
    except FormatError:
        return True
    return tensor_keys.is_lora(entries)
