"""Adapters as files. Its public names are imported when they are first used: they need torch, and sources do not."""

from typing import TYPE_CHECKING

from ..core import lazy_names

if TYPE_CHECKING:
    from .table import (
        FORMATS,
        GGUF,
        MLX,
        PEFT,
        Format,
        base_for,
        check_writable,
        file_names,
        format_of,
        read_adapter,
        source_format,
        writable,
        write_adapter,
    )

__all__ = [
    "FORMATS",
    "GGUF",
    "MLX",
    "PEFT",
    "Format",
    "base_for",
    "check_writable",
    "file_names",
    "format_of",
    "read_adapter",
    "source_format",
    "writable",
    "write_adapter",
]

__getattr__ = lazy_names.importer(__name__, dict.fromkeys(__all__, "table"))
