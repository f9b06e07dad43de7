"""diffusers' dialects: that of now, `unet.….lora_A.weight`, and the older ones, `unet.….lora.down.weight` or
`….processor.to_q_lora.down.weight`; and that with ComfyUI's prefix, `diffusion_model.`, over the authors' names."""

from pathlib import Path
from typing import Any

from ...core.adapter import Adapter
from . import names, reader, writer


def read(source: Any, **options: Any) -> Adapter:
    """A single file as diffusers writes it now. Options: those of format "peft"."""
    return reader.read(source, names.DIFFUSERS, **options)


def write(adapter: Adapter, path: Path, **options: Any) -> Path:
    """A single file that `load_lora_weights` reads; alphas are in its metadata."""
    return writer.write(adapter, path, names.DIFFUSERS, **options)


def read_old(source: Any, **options: Any) -> Adapter:
    """A single file as diffusers wrote it before it had PEFT. Options: those of format "peft"."""
    return reader.read(source, names.OLD, **options)


def write_old(adapter: Adapter, path: Path, **options: Any) -> Path:
    """A single file that early releases of diffusers read too: scalings are multiplied into the second factors."""
    return writer.write(adapter, path, names.OLD, **options)


def read_diffusion_model(source: Any, **options: Any) -> Adapter:
    """A single file with `diffusion_model.` before the authors' names. Options: those of format "peft"."""
    return reader.read(source, names.DIFFUSION_MODEL, **options)


def write_diffusion_model(adapter: Adapter, path: Path, **options: Any) -> Path:
    """A single file as ComfyUI calls the modules."""
    return writer.write(adapter, path, names.DIFFUSION_MODEL, **options)
