"""Readers and writers of the dialects of diffusers and ComfyUI.

- diffusers: `unet.….lora_A.weight`.
- diffusers-old: `unet.….lora.down.weight` or `….processor.to_q_lora.down.weight`.
- diffusion-model: ComfyUI's prefix `diffusion_model.` before the names that the model's authors use.
"""

from pathlib import Path
from typing import Any

from ...core.adapter import Adapter
from . import reader, tensor_keys, writer


def read(source: Any, **options: Any) -> Adapter:
    """Read a file as current diffusers writes it; options as for format "peft"."""
    return reader.read(source, tensor_keys.DIFFUSERS, **options)


def write(adapter: Adapter, path: Path, **options: Any) -> Path:
    """Write a file that `load_lora_weights` reads, with alphas in its metadata; options `dtype` and `overwrite`."""
    return writer.write(adapter, path, tensor_keys.DIFFUSERS, **options)


def read_old(source: Any, **options: Any) -> Adapter:
    """Read a file as diffusers wrote it before it used PEFT; options as for format "peft"."""
    return reader.read(source, tensor_keys.OLD, **options)


def write_old(adapter: Adapter, path: Path, **options: Any) -> Path:
    """Write a file for early releases of diffusers, which read no alphas: the up factors contain the scalings."""
    return writer.write(adapter, path, tensor_keys.OLD, **options)


def read_diffusion_model(source: Any, **options: Any) -> Adapter:
    """Read a file with `diffusion_model.` before the authors' names; options as for format "peft"."""
    return reader.read(source, tensor_keys.DIFFUSION_MODEL, **options)


def write_diffusion_model(adapter: Adapter, path: Path, **options: Any) -> Path:
    """Write a file with the module names of ComfyUI; options `dtype` and `overwrite`."""
    return writer.write(adapter, path, tensor_keys.DIFFUSION_MODEL, **options)
