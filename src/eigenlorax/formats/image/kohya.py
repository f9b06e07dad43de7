"""The dialect of kohya's trainer: `lora_unet_…`, `lora_te_…`, with `lora_down`, `lora_up` and an alpha per module."""

from pathlib import Path
from typing import Any

from ...core.adapter import Adapter
from . import reader, tensor_keys, writer


def read(source: Any, **options: Any) -> Adapter:
    """Read a file in this dialect; options as for format "peft"."""
    return reader.read(source, tensor_keys.KOHYA, **options)


def write(adapter: Adapter, path: Path, **options: Any) -> Path:
    """Write a file in this dialect, SDXL and FLUX with original names; options `dtype` and `overwrite`."""
    return writer.write(adapter, path, tensor_keys.KOHYA, **options)
