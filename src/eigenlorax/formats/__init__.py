"""Adapters in and out. One table of formats; `read_adapter` and `write_adapter` are all that the rest calls."""

from pathlib import Path
from typing import Any, Protocol, cast

from ..adapter import Adapter
from ..errors import OptionError
from . import hf_peft


class Format(Protocol):
    """What a module of this package offers for its format."""

    def read(self, source: str | Path, **options: Any) -> Adapter: ...

    def write(self, adapter: Adapter, path: Path, **options: Any) -> Path: ...


FORMATS: dict[str, Format] = {"peft": cast(Format, hf_peft)}


def read_adapter(source: str | Path, *, format: str = "peft", **options: Any) -> Adapter:
    """An adapter from a folder or a Hub id; its tensors are read when they are asked for. Options: the reader's own."""
    return _format(format).read(source, **options)


def write_adapter(adapter: Adapter, path: str | Path, *, format: str = "peft", **options: Any) -> Path:
    """Write an adapter as the folder `path`, whole or not at all. Options: the writer's own."""
    return _format(format).write(adapter, Path(path), **options)


def _format(name: str) -> "Format":
    if name not in FORMATS:
        raise OptionError(f"format {name!r} is not known. Known are: {', '.join(FORMATS)}.")
    return FORMATS[name]
