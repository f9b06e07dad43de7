"""Adapters in and out. One table of formats; `read_adapter` and `write_adapter` are all that the rest calls."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import urls
from ..adapter import Adapter
from ..errors import OptionError
from . import hf_peft, official


@dataclass(frozen=True, slots=True)
class Format:
    """How adapters of one format come in, and go out where they may."""

    read: Callable[..., Adapter]
    write: Callable[..., Path] | None = None


FORMATS = {"peft": Format(hf_peft.read, hf_peft.write), "official": Format(official.read)}


def read_adapter(source: str | Path, *, format: str = "peft", **options: Any) -> Adapter:
    """An adapter from a folder, a URL or a Hub id; its tensors are read when they are asked for, and it may be pickled.

    Options: the reader's own.
    """
    return _format(format).read(source, **options)


def write_adapter(adapter: Adapter, path: str | Path, *, format: str = "peft", **options: Any) -> Path:
    """Write an adapter as the folder `path`, whole or not at all. Options: the writer's own."""
    write = _format(format).write
    if write is None:
        writable = ", ".join(name for name, one in FORMATS.items() if one.write is not None)
        raise OptionError(f"format {format!r} is read, not written. Written are: {writable}.")
    if urls.is_url(path):
        raise OptionError(f"{path} is a URL; adapters are read from those, and written to folders of this machine.")
    return write(adapter, Path(path), **options)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise OptionError(f"format {name!r} is not known. Known are: {', '.join(FORMATS)}.")
    return FORMATS[name]
