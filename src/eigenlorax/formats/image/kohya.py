"""kohya's dialect: `lora_unet_…`, `lora_te_…`, with `lora_down`, `lora_up` and an alpha for each module."""

from pathlib import Path
from typing import Any

from ...core.adapter import Adapter
from . import names, reader, writer


def read(source: Any, **options: Any) -> Adapter:
    """A single file in this dialect. Options: those of format "peft"."""
    return reader.read(source, names.KOHYA, **options)


def write(adapter: Adapter, path: Path, **options: Any) -> Path:
    """A single file as kohya's trainer calls its modules; SDXL's by their first names, FLUX's by its authors'."""
    return writer.write(adapter, path, names.KOHYA, **options)
