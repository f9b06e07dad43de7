"""From what a user points at to adapters, one by one: folders, folders of folders, Hub ids, NAME=PATH."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import hub, keys
from ..adapter import Adapter
from ..errors import AdapterNameError, FormatError, OptionError, SkippedAdapterWarning

Source = str | Path | Adapter
Sources = Source | Iterable[Source] | Mapping[str, Source]


@dataclass(frozen=True, slots=True)
class Found:
    """One adapter to read; `name` is None where the folder or repository gives it."""

    name: str | None
    source: Source


def find(sources: Sources) -> list[Found]:
    """Every adapter that the sources stand for, in their order; a parent folder gives its children by name."""
    if isinstance(sources, Mapping):
        pairs: list[tuple[str | None, Source]] = list(sources.items())
    else:
        several = [sources] if isinstance(sources, str | Path | Adapter) else list(sources)
        pairs = [_split(source) for source in several]
    found = [item for name, source in pairs for item in _expand(name, source)]
    if not found:
        raise OptionError("no adapter was given: name one folder, a parent folder of some, or a Hub id, at least.")
    return found


def _split(source: Source) -> tuple[str | None, Source]:
    """`NAME=PATH` in its two parts; anything else as it is."""
    if not isinstance(source, str) or "=" not in source or Path(source).exists():
        return None, source
    name, _, path = source.partition("=")
    if not path:
        raise OptionError(f"{source} names no folder after its '='. Write NAME=PATH.")
    try:
        return keys.check_name(name), path
    except AdapterNameError as error:
        raise AdapterNameError(f"{source} does not exist, and cannot be read as NAME=PATH: {error}") from error


def _expand(name: str | None, source: Source) -> list[Found]:
    if isinstance(source, Adapter):
        return [Found(name, source)]
    if not str(source).strip():
        # as a path it would be the current folder
        raise OptionError("an adapter was given as an empty text; was a variable of the shell not set?")
    folder = Path(source)
    if not folder.exists() or not folder.is_dir() or _is_adapter(folder) or (folder / keys.MANIFEST).is_file():
        return [Found(name, source)]
    children = [child for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith(".")]
    adapters = [child for child in children if _is_adapter(child)]
    if not adapters:
        deeper = sorted({path.parent.parent for path in folder.glob(f"*/*/{keys.ADAPTER_CONFIG}")})
        hint = f" There are some one level deeper: try {deeper[0]}." if deeper else ""
        raise FormatError(
            f"{folder} has no {keys.ADAPTER_CONFIG}, and neither has any folder in it: no adapter was found.{hint}"
        )
    if name is not None:
        raise OptionError(f"{name}={folder} names one adapter, but {folder} is a folder of {len(adapters)}.")
    for child in children:
        weights = [*child.glob("*.safetensors"), *child.glob("*.bin")]
        if child not in adapters and weights:
            pack = (child / keys.MANIFEST).is_file()
            reason = "is a pack" if pack else f"holds {weights[0].name} but no {keys.ADAPTER_CONFIG}"
            warnings.warn(f"{child} was passed over: it {reason}.", SkippedAdapterWarning, stacklevel=2)
    return [Found(None, child) for child in adapters]


def _is_adapter(folder: Path) -> bool:
    return (folder / keys.ADAPTER_CONFIG).is_file()


def default_name(found: Found) -> str:
    """The name an adapter goes by unless its reading fails before it has one."""
    if found.name is not None:
        return found.name
    if isinstance(found.source, Adapter):
        return found.source.name
    return hub.name_of(found.source)
