"""Adapters of the sources that a user passes: folders, files, parent folders, URLs, Hub ids, NAME=PATH."""

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ..core import keys
from ..core.adapter import Adapter
from ..errors import AdapterNameError, FormatError, OptionError, SkippedAdapterWarning
from . import folders, hub_client, in_memory, urls
from .folders import Folder, LocalFolder
from .in_memory import PeftModel, StateDict

Readable = str | Path | Adapter
Source = Readable | StateDict | PeftModel
Sources = Source | Iterable[Source] | Mapping[str, Source]


# the path of a snapshot in the Hub's cache, and any other absolute path of a folder
_SNAPSHOT = re.compile(r"(?:[A-Za-z]:)?[\\/](?:(?!: )[^'\"`])*?models--([^\\/]+)[\\/]snapshots[\\/][^\\/]+")
_ABSOLUTE = re.compile(r"(?<![\w:/\\.~-])(?:[A-Za-z]:)?[\\/](?:[^\\/\s'\"`:;,]+[\\/])+")

_INSPECTED_CHILDREN = 10
"""Number of subfolders in which an error message looks for adapters one level deeper."""


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter to read, or an adapter in memory.

    Attributes:
        name: Name of the adapter; None if the folder or repository determines it.
        source: Path, URL, Hub id or adapter.
    """

    name: str | None
    source: Readable


def find_adapters(
    sources: Sources, *, revision: str | None = None, token: str | bool | None = None, **_: Any
) -> list[AdapterSource]:
    """Return the adapters of `sources`, in their order. A parent folder is replaced by its adapters, sorted by name.

    Args:
        sources: One source, several, or a mapping of names to sources. A string may be NAME=PATH. A `PeftModel` gives
            all of its adapters.
        revision: Revision of a repository on the Hub, for `hf://` folders.
        token: Access token of the Hub, for `hf://` folders. Other options of `read_adapter` are ignored.

    Raises:
        OptionError: There is no source, or one name is given to a folder of several adapters.
        FormatError: A folder has no adapter.
    """
    if isinstance(sources, Mapping):
        pairs: list[tuple[str | None, Source]] = list(sources.items())
    else:
        is_one = isinstance(sources, str | Path | Adapter) or is_in_memory(sources)
        listed: list[Any] = list(sources) if isinstance(sources, Iterable) and not is_one else [sources]
        pairs = [_split(source) for source in listed]
    adapters = [adapter for name, source in pairs for adapter in _expand(name, source, revision, token)]
    if not adapters:
        raise OptionError("no adapter was passed: pass at least one folder, parent folder or Hub id.")
    return adapters


def is_in_memory(source: object) -> TypeGuard[StateDict | PeftModel]:
    """Return whether the object is a state dict with its config, or a PEFT model."""
    return in_memory.is_state_dict(source) or in_memory.is_peft_model(source)


def single(name: str | None, source: Source) -> AdapterSource:
    """Return the adapter of a source that is not a parent folder. name: in place of its own."""
    if isinstance(source, str | Path | Adapter):
        return AdapterSource(name, source)
    adapters = find_adapters([source] if name is None else {name: source})
    if len(adapters) > 1:
        names = ", ".join(repr(adapter.name) for adapter in adapters)
        raise OptionError(f"the model has {len(adapters)} adapters, {names}: pass the model to add_all.")
    return adapters[0]


def _split(source: Source) -> tuple[str | None, Source]:
    """Split NAME=PATH. Any other source is returned unchanged, without a name."""
    if not isinstance(source, str) or "=" not in source or urls.is_url(source) or Path(source).exists():
        return None, source
    name, _, path = source.partition("=")
    if not path:
        raise OptionError(f"{source} has no path after the '='. Write NAME=PATH.")
    try:
        return keys.check_name(name), path
    except AdapterNameError as error:
        raise AdapterNameError(f"{source} does not exist, and cannot be read as NAME=PATH: {error}") from error


def _expand(name: str | None, source: Source, revision: str | None, token: str | bool | None) -> list[AdapterSource]:
    """Return the adapter of a source, or the adapters in a parent folder."""
    if isinstance(source, Adapter):
        return [AdapterSource(name, source)]
    if in_memory.is_state_dict(source):
        if name is None:
            raise OptionError("a state dict has no name: pass a mapping, {'name': (state_dict, config)}.")
        state_dict, config = source
        return [AdapterSource(name, in_memory.from_state_dict(state_dict, config, name))]
    if in_memory.is_peft_model(source):
        return _from_model(name, in_memory.from_peft_model(source))
    if not isinstance(source, str | Path):
        raise OptionError(
            f"{type(source).__name__} is not an adapter: pass a folder, a file, a URL, a Hub id, an Adapter, a "
            "PeftModel, or a state dict with its config, (state_dict, config)."
        )
    if not str(source).strip():
        # as a path, an empty string means the current folder
        raise OptionError("an adapter was passed as an empty string; check whether a shell variable is not set.")
    source = folders.local_source(source)
    folder = _folder(source, revision, token)
    if folder is None or folders.is_adapter(folder) or folders.is_pack(folder) or folders.holds_lora_file(folder):
        return [AdapterSource(name, source)]
    if folders.weights_without_config(folder) is not None:
        # an adapter without its config, which reading reports: it can be left out as any other broken adapter
        return [AdapterSource(name, source)]
    children = folder.folders()
    adapters = [child for child in children if folders.is_adapter(child) or folders.holds_lora_file(child)]
    files = [file for file in folder.files() if hub_client.is_file_name(file) and not file.startswith(".")]
    loras = [file for file in files if folders.is_lora(folder, file)]
    if not adapters and not loras:
        raise _no_adapter(folder, children, files)
    if name is not None:
        raise OptionError(
            f"{name}={folder} names one adapter, but {folder} has {len(adapters) + len(loras)}. Pass them separately."
        )
    for file in files:
        if file not in loras:
            warnings.warn(f"{folder.at(file)} was passed over: it is not a LoRA.", SkippedAdapterWarning, stacklevel=2)
    # folders of adapters are not listed, which would be a request for each folder behind a URL
    adapter_folders = {str(child.source) for child in adapters}
    for child in (child for child in children if str(child.source) not in adapter_folders):
        weights = [file for file in child.files() if file.endswith((".safetensors", ".bin"))]
        if {keys.ADAPTER_WEIGHTS, keys.ADAPTER_PICKLE} & set(weights):
            # an adapter without its config: reading it raises the error
            adapter_folders.add(str(child.source))
        elif weights:
            reason = "is a pack" if folders.is_pack(child) else f"holds {weights[0]} but no {keys.ADAPTER_CONFIG}"
            warnings.warn(f"{child} was passed over: it {reason}.", SkippedAdapterWarning, stacklevel=2)
    return [AdapterSource(None, child.source) for child in children if str(child.source) in adapter_folders] + [
        AdapterSource(None, folder.at(file)) for file in loras
    ]


def _from_model(name: str | None, adapters: list[Adapter]) -> list[AdapterSource]:
    """Return the adapters of a PEFT model.

    Args:
        name: Name for the only adapter of a model; None for the names in the model.
        adapters: Adapters of the model.
    """
    if name is not None and len(adapters) > 1:
        names = ", ".join(repr(adapter.name) for adapter in adapters)
        raise OptionError(
            f"{name!r} names one adapter, but the model has {len(adapters)}: {names}. Pass it without name."
        )
    return [AdapterSource(name or adapter.name, adapter) for adapter in adapters]


def _no_adapter(folder: Folder, children: Sequence[Folder], files: Sequence[str]) -> FormatError:
    """Return the error for a folder without an adapter.

    Args:
        folder: The folder.
        children: Its subfolders.
        files: Its safetensors files, none of which is a LoRA.
    """
    deeper = [child for child in children[:_INSPECTED_CHILDREN] if any(map(folders.is_adapter, child.folders()))]
    hint = f" There are adapters one level deeper: try {deeper[0]}." if deeper else ""
    no_lora = f" None of its {len(files)} {keys.LORA_SUFFIX} files is a LoRA." if files else ""
    if files and folder.is_file("config.json"):
        no_lora += " It looks like the folder of a whole model."
    return FormatError(
        f"{folder} and the folders in it have neither {keys.ADAPTER_CONFIG} nor a LoRA in one file "
        f"({keys.LORA_SUFFIX}, as kohya or diffusers write it): no adapter was found.{no_lora}{hint}"
    )


def _folder(source: str | Path, revision: str | None, token: str | bool | None) -> Folder | None:
    """Return the existing folder that a source names; None for files, Hub ids and missing paths."""
    if hub_client.is_file_name(source) and not Path(source).is_dir():
        return None
    if isinstance(source, str) and urls.is_url(source):
        remote = urls.folder(source, revision=revision, token=token)
        remote.refresh()
        return remote if folders.is_adapter(remote) or remote.kind() == "directory" else None
    return LocalFolder(Path(source)) if Path(source).is_dir() else None


def default_name(source: AdapterSource) -> str:
    """Return the name of an adapter without reading it."""
    if source.name is not None:
        return source.name
    if isinstance(source.source, Adapter):
        return source.source.name
    return hub_client.adapter_name(source.source)


def without_folders(message: str, source: str | Path | None) -> str:
    """Return an error message with absolute paths shortened to names of folders and files.

    A pack records the message of a skipped source, and is read on other machines.
    """
    if source is not None:
        path = Path(source)
        spellings = {str(source), str(path), os.path.abspath(path), os.path.realpath(path)}
        # longest first, since one spelling may be the end of another
        for spelling in sorted(spellings, key=len, reverse=True):
            if spelling != path.name:
                message = message.replace(spelling, path.name)
    return _ABSOLUTE.sub("", _SNAPSHOT.sub(r"\1", message))
