"""From what a user points at to adapters, one by one: folders and files, folders of some, URLs, Hub ids, NAME=PATH."""

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import keys
from ..core.adapter import Adapter
from ..errors import AdapterNameError, FormatError, OptionError, SkippedAdapterWarning
from . import folders, hub, urls
from .folders import Folder, LocalFolder

Source = str | Path | Adapter
Sources = Source | Iterable[Source] | Mapping[str, Source]


# a snapshot in the Hub's cache, and whatever else begins at the root of a disk
_SNAPSHOT = re.compile(r"(?:[A-Za-z]:)?[\\/](?:(?!: )[^'\"`])*?models--([^\\/]+)[\\/]snapshots[\\/][^\\/]+")
_ABSOLUTE = re.compile(r"(?<![\w:/\\.~-])(?:[A-Za-z]:)?[\\/](?:[^\\/\s'\"`:;,]+[\\/])+")

_LOOKED_INTO = 10
"""Folders of a parent in which adapters are looked for in order to say where some are."""


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """One adapter to read; `name` is None where the folder or repository gives it."""

    name: str | None
    source: Source


def find_adapters(
    sources: Sources, *, revision: str | None = None, token: str | bool | None = None, **_: Any
) -> list[AdapterSource]:
    """Every adapter that the sources stand for, in their order; a parent folder gives its children by name.

    revision, token: of the Hub, where it is looked into (`hf://…`); other options of `read_adapter` change nothing.
    """
    if isinstance(sources, Mapping):
        pairs: list[tuple[str | None, Source]] = list(sources.items())
    else:
        several = [sources] if isinstance(sources, str | Path | Adapter) else list(sources)
        pairs = [_split(source) for source in several]
    found = [item for name, source in pairs for item in _expand(name, source, revision, token)]
    if not found:
        raise OptionError("no adapter was given: name one folder, a parent folder of some, or a Hub id, at least.")
    return found


def _split(source: Source) -> tuple[str | None, Source]:
    """`NAME=PATH` in its two parts; anything else as it is."""
    if not isinstance(source, str) or "=" not in source or urls.is_url(source) or Path(source).exists():
        return None, source
    name, _, path = source.partition("=")
    if not path:
        raise OptionError(f"{source} names no folder after its '='. Write NAME=PATH.")
    try:
        return keys.check_name(name), path
    except AdapterNameError as error:
        raise AdapterNameError(f"{source} does not exist, and cannot be read as NAME=PATH: {error}") from error


def _expand(name: str | None, source: Source, revision: str | None, token: str | bool | None) -> list[AdapterSource]:
    if isinstance(source, Adapter):
        return [AdapterSource(name, source)]
    if not str(source).strip():
        # as a path it would be the current folder
        raise OptionError("an adapter was given as an empty text; was a variable of the shell not set?")
    source = folders.local_source(source)
    folder = _folder(source, revision, token)
    if folder is None or folders.is_adapter(folder) or folders.is_pack(folder) or folders.holds_lora_file(folder):
        return [AdapterSource(name, source)]
    children = folder.folders()
    adapters = [child for child in children if folders.is_adapter(child) or folders.holds_lora_file(child)]
    files = [file for file in folder.files() if folders.is_file_name(file) and not file.startswith(".")]
    loras = [file for file in files if folders.is_lora(folder, file)]
    if not adapters and not loras:
        deeper = [child for child in children[:_LOOKED_INTO] if any(map(folders.is_adapter, child.folders()))]
        hint = f" There are some one level deeper: try {deeper[0]}." if deeper else ""
        none = f" None of its {len(files)} {keys.LORA_SUFFIX} files is a LoRA." if files else ""
        raise FormatError(
            f"{folder} has neither {keys.ADAPTER_CONFIG} nor a LoRA in one file ({keys.LORA_SUFFIX}, as kohya or "
            "diffusers write it), and neither has any folder in it: no adapter was found."
            f"{none}{hint}"
        )
    if name is not None:
        raise OptionError(
            f"{name}={folder} names one adapter, but {folder} is a folder of {len(adapters) + len(loras)}."
        )
    for file in files:
        if file not in loras:
            warnings.warn(f"{folder.at(file)} was passed over: it is no LoRA.", SkippedAdapterWarning, stacklevel=2)
    for child in children:
        if child in adapters:
            continue
        weights = [file for file in child.files() if file.endswith((".safetensors", ".bin"))]
        if weights:
            reason = "is a pack" if folders.is_pack(child) else f"holds {weights[0]} but no {keys.ADAPTER_CONFIG}"
            warnings.warn(f"{child} was passed over: it {reason}.", SkippedAdapterWarning, stacklevel=2)
    return [AdapterSource(None, child.source) for child in adapters] + [
        AdapterSource(None, folder.at(file)) for file in loras
    ]


def _folder(source: str | Path, revision: str | None, token: str | bool | None) -> Folder | None:
    """The folder that a source names, to look into; None for files and the Hub's ids, and for what is not there."""
    if folders.is_file_name(source) and not Path(source).is_dir():
        return None
    if isinstance(source, str) and urls.is_url(source):
        remote = urls.folder(source, revision=revision, token=token)
        remote.refresh()
        return remote if folders.is_adapter(remote) or remote.kind() == "directory" else None
    return LocalFolder(Path(source)) if Path(source).is_dir() else None


def default_name(found: AdapterSource) -> str:
    """The name an adapter goes by unless its reading fails before it has one."""
    if found.name is not None:
        return found.name
    if isinstance(found.source, Adapter):
        return found.source.name
    return hub.name_of(found.source)


def without_folders(message: str, source: str | Path | None) -> str:
    """What an error says of a source, with the names of its folder and files, but not where these are.

    What is kept in a pack is for those who have other disks.
    """
    if source is not None:
        path = Path(source)
        # the longest first: one may be the end of another
        for place in sorted({str(source), str(path), os.path.abspath(path), os.path.realpath(path)}, key=len)[::-1]:
            if place != path.name:
                message = message.replace(place, path.name)
    return _ABSOLUTE.sub("", _SNAPSHOT.sub(r"\1", message))
