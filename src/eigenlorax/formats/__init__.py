"""Adapters as files: the table of formats, `read_adapter` and `write_adapter`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import keys
from ..core.adapter import Adapter, Origin
from ..core.options import suggestion
from ..errors import OptionError
from . import folders, official, peft, urls
from .image import diffusers, kohya, reader, tensor_keys, writer


@dataclass(frozen=True, slots=True)
class Format:
    """An adapter format: its reader, its writer if it can be written, and the dialect of a format of single files."""

    read: Callable[..., Adapter]
    write: Callable[..., Path] | None = None
    dialect: str | None = None

    @property
    def suffix(self) -> str:
        """Return the suffix of the format's single files; empty for a format of folders."""
        return "" if self.dialect is None else keys.LORA_SUFFIX


PEFT = "peft"
FORMATS = {
    PEFT: Format(peft.read, peft.write),
    tensor_keys.KOHYA: Format(kohya.read, kohya.write, tensor_keys.KOHYA),
    tensor_keys.DIFFUSERS: Format(diffusers.read, diffusers.write, tensor_keys.DIFFUSERS),
    tensor_keys.OLD: Format(diffusers.read_old, diffusers.write_old, tensor_keys.OLD),
    tensor_keys.DIFFUSION_MODEL: Format(
        diffusers.read_diffusion_model, diffusers.write_diffusion_model, tensor_keys.DIFFUSION_MODEL
    ),
    "official": Format(official.read),
}
_LOCATION_OPTIONS = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "allow_pickle")


def read_adapter(source: str | Path, *, format: str | None = None, **options: Any) -> Adapter:
    """Read an adapter. Its tensors are read when they are asked for, also after it has been pickled.

    Args:
        source: a folder, a safetensors file, a URL (`s3://…`, `hf://…`) or a Hub id (`org/name`, `org/name@revision`).
        format: a name in `FORMATS`. By default, a folder with `adapter_config.json` is read as "peft", and a single
            file by the names of its tensors.
        options: those of the reader: name, revision, subfolder, token, cache_dir, local_files_only, allow_pickle.

    Raises:
        FormatError: the source is no adapter, is damaged, or has a tensor that is not understood.
        HubError, UrlError: the source cannot be reached.
        OptionError: the format is not known.
    """
    if format is not None:
        return _format(format).read(source, **options)
    location = folders.locate(source, **{name: options[name] for name in _LOCATION_OPTIONS if name in options})
    return (peft.read if location.file is None else reader.read)(location, **options)


def write_adapter(adapter: Adapter, path: str | Path, *, format: str | None = None, **options: Any) -> Path:
    """Write an adapter, completely or not at all, and return the path.

    Args:
        path: a folder for "peft", a file for the formats of single files.
        format: a name in `FORMATS`; by default the format that the adapter was read from.
        options: those of the writer: `dtype` of the factors, and `overwrite`.

    Raises:
        OptionError: the format cannot be written, or has no place for something in the adapter.
        PackExistsError: `path` exists, and `overwrite` is not set.
    """
    target = format if format is not None else format_of(adapter.origin)
    write = writable(target).write
    assert write is not None
    if urls.is_url(path):
        raise OptionError(f"{path} is a URL; adapters are read from those, and written to folders of this machine.")
    if target == PEFT and format_of(adapter.origin) != PEFT:
        adapter = writer.for_peft(adapter)
    return write(adapter, Path(path), **options)


def check_writable(adapter: Adapter, format: str) -> None:
    """Raise the errors that writing an adapter in a format would raise, without writing it."""
    dialect = writable(format).dialect
    if dialect is not None:
        writer.check(adapter, dialect)
    elif format_of(adapter.origin) != PEFT:
        writer.for_peft(adapter)


def format_of(origin: Origin | None) -> str:
    """Return the format that an adapter of this origin was read from; "peft" without an origin."""
    return origin.format if origin is not None else PEFT


def writable(name: str) -> Format:
    """Return a format by name. Raises `OptionError` if it is not known or can only be read."""
    chosen = FORMATS.get(name)
    if chosen is None or chosen.write is None:
        candidates = [name for name, candidate in FORMATS.items() if candidate.write is not None]
        raise OptionError(
            f"format {name!r} is {'not known' if chosen is None else 'read, not written'}."
            f"{suggestion(name, candidates)} Written are: {', '.join(candidates)}."
        )
    return chosen


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise OptionError(f"format {name!r} is not known.{suggestion(name, FORMATS)} Known are: {', '.join(FORMATS)}.")
    return FORMATS[name]
