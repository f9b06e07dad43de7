"""Adapters in and out. One table of formats; `read_adapter` and `write_adapter` are all that the rest calls."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import keys
from ..core.adapter import Adapter, Origin
from ..core.options import suggestion
from ..errors import OptionError
from . import folders, official, peft, urls
from .image import diffusers, kohya, names, reader, writer


@dataclass(frozen=True, slots=True)
class Format:
    """How adapters of one format come in, and go out where they may. dialect: of a format of single files."""

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
    names.KOHYA: Format(kohya.read, kohya.write, names.KOHYA),
    names.DIFFUSERS: Format(diffusers.read, diffusers.write, names.DIFFUSERS),
    names.OLD: Format(diffusers.read_old, diffusers.write_old, names.OLD),
    names.DIFFUSION_MODEL: Format(
        diffusers.read_diffusion_model, diffusers.write_diffusion_model, names.DIFFUSION_MODEL
    ),
    "official": Format(official.read),
}
_LOCATION_OPTIONS = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "allow_pickle")


def read_adapter(source: str | Path, *, format: str | None = None, **options: Any) -> Adapter:
    """An adapter from a folder, a single file, a URL or a Hub id; its tensors are read when they are asked for, and it
    may be pickled.

    format: by default, what the files say: a folder with `adapter_config.json` is PEFT's, and a single file says it by
        the names of its tensors. Options: the reader's own.
    """
    if format is not None:
        return _format(format).read(source, **options)
    location = folders.locate(source, **{name: options[name] for name in _LOCATION_OPTIONS if name in options})
    return (peft.read if location.file is None else reader.read)(location, **options)


def write_adapter(adapter: Adapter, path: str | Path, *, format: str | None = None, **options: Any) -> Path:
    """Write an adapter, whole or not at all: as the folder `path`, or, in the formats of single files, as that file.

    format: by default, the one that it came in. Options: the writer's own.
    """
    chosen = format if format is not None else format_of(adapter.origin)
    write = writable(chosen).write
    assert write is not None
    if urls.is_url(path):
        raise OptionError(f"{path} is a URL; adapters are read from those, and written to folders of this machine.")
    if chosen == PEFT and format_of(adapter.origin) != PEFT:
        adapter = writer.for_peft(adapter)
    return write(adapter, Path(path), **options)


def check_writable(adapter: Adapter, format: str) -> None:
    """Raise the error that writing an adapter in a format would raise, without writing it."""
    dialect = writable(format).dialect
    if dialect is not None:
        writer.check(adapter, dialect)
    elif format_of(adapter.origin) != PEFT:
        writer.for_peft(adapter)


def format_of(origin: Origin | None) -> str:
    """The format that an adapter of that origin came in."""
    return origin.format if origin is not None else PEFT


def writable(name: str) -> Format:
    """The format of that name, if it is written and not only read."""
    found = FORMATS.get(name)
    if found is None or found.write is None:
        known = [name for name, one in FORMATS.items() if one.write is not None]
        raise OptionError(
            f"format {name!r} is {'not known' if found is None else 'read, not written'}.{suggestion(name, known)} "
            f"Written are: {', '.join(known)}."
        )
    return found


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise OptionError(f"format {name!r} is not known.{suggestion(name, FORMATS)} Known are: {', '.join(FORMATS)}.")
    return FORMATS[name]
