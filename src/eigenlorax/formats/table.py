"""Adapters as files: the table of formats, `read_adapter` and `write_adapter`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..core import dtypes, keys
from ..core.adapter import Adapter
from ..core.options import suggestion
from ..core.origin import Origin
from ..errors import OptionError
from . import folders, licenses, official, peft, urls
from .folders import AdapterLocation
from .gguf import architectures
from .gguf import reader as gguf_reader
from .gguf import writer as gguf_writer
from .gguf.architectures import BaseModel
from .image import diffusers, kohya, reader, tensor_keys, writer
from .mlx import reader as mlx_reader
from .mlx import writer as mlx_writer


@dataclass(frozen=True, slots=True)
class Format:
    """An adapter format.

    Attributes:
        read: Function that reads an adapter from a source.
        write: Function that writes an adapter to a path; None if the format can only be read.
        dialect: One of `tensor_keys.DIALECTS` for a format of image LoRAs; None for any other.
        suffix: Suffix of the format's files; empty for a format of folders.
    """

    read: Callable[..., Adapter]
    write: Callable[..., Path] | None = None
    dialect: str | None = None
    suffix: str = ""


PEFT, MLX, GGUF = "peft", "mlx", "gguf"
FORMATS = {
    PEFT: Format(peft.read, peft.write),
    tensor_keys.KOHYA: Format(kohya.read, kohya.write, tensor_keys.KOHYA, keys.LORA_SUFFIX),
    tensor_keys.DIFFUSERS: Format(diffusers.read, diffusers.write, tensor_keys.DIFFUSERS, keys.LORA_SUFFIX),
    tensor_keys.OLD: Format(diffusers.read_old, diffusers.write_old, tensor_keys.OLD, keys.LORA_SUFFIX),
    tensor_keys.DIFFUSION_MODEL: Format(
        diffusers.read_diffusion_model,
        diffusers.write_diffusion_model,
        tensor_keys.DIFFUSION_MODEL,
        keys.LORA_SUFFIX,
    ),
    MLX: Format(mlx_reader.read, mlx_writer.write),
    GGUF: Format(gguf_reader.read, gguf_writer.write, suffix=keys.GGUF_SUFFIX),
    "official": Format(official.read),
}
BaseConfig = str | Path | Mapping[str, Any] | BaseModel
_LOCATION_OPTIONS = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "allow_pickle")


def read_adapter(
    source: str | Path, *, format: str | None = None, base_config: BaseConfig | None = None, **options: Any
) -> Adapter:
    """Read an adapter. Its tensors are read at each access, also after the adapter has been pickled.

    Args:
        source: A folder, a safetensors or GGUF file, a URL (`s3://…`, `hf://…`) or a Hub id (`org/name`,
            `org/name@revision`).
        format: A name in `FORMATS`. By default, a folder with `adapter_config.json` is read as "peft", or as "mlx" if
            mlx-lm has written it, and a single file by its suffix and the names of its tensors.
        base_config: For GGUF files, the folder with the base model's `config.json`, that file, or its fields. Other
            formats state the names of modules themselves, and ignore it.
        options: Options of the reader: name, revision, subfolder, token, cache_dir, local_files_only, allow_pickle.

    Raises:
        FormatError: The source is not an adapter, is damaged, or has a tensor that is not recognised.
        HubError, UrlError: The source cannot be reached.
        OptionError: The format is unknown.

    Example:
        >>> import eigenlorax
        >>> adapter = eigenlorax.read_adapter("adapters/a")
        >>> adapter.ranks, len(adapter.modules)
        ((3,), 3)
    """
    read = _format(format).read if format is not None else None
    location = folders.locate(source, **{name: options[name] for name in _LOCATION_OPTIONS if name in options})
    if read is None:
        read = _reader(location)
    if read is gguf_reader.read:
        options["base_config"] = base_config
    adapter = read(location, **options)
    if adapter.license is None:
        metadata = adapter.origin.metadata if adapter.origin is not None else {}
        adapter = replace(adapter, license=licenses.find(location, metadata))
    return adapter


def _reader(location: AdapterLocation) -> Callable[..., Adapter]:
    """Return the function that reads an adapter whose format was not passed."""
    if location.file is not None and location.file.lower().endswith(keys.GGUF_SUFFIX):
        return gguf_reader.read
    if mlx_reader.is_adapter(location):
        return mlx_reader.read
    return peft.read if location.file is None else reader.read


def write_adapter(
    adapter: Adapter,
    path: str | Path,
    *,
    format: str | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    base_config: BaseConfig | None = None,
) -> Path:
    """Write an adapter, completely or not at all, and return the path.

    Args:
        adapter: The adapter.
        path: A folder for "peft" and "mlx", a file for the formats of single files.
        format: A name in `FORMATS`. Default: the format that the adapter was read from.
        dtype: Dtype of the factors, and "q8_0" for "gguf". Default: the adapter's own.
        overwrite: Replace what is at `path`.
        base_config: For "gguf", the folder with the base model's `config.json`, that file, or its fields.

    Raises:
        OptionError: The format cannot be written, or cannot represent a tensor of the adapter, or needs `base_config`.
        PackExistsError: `path` exists, and `overwrite` is not set.
        NonFiniteError: A factor has NaN or Inf, or numbers outside the range of `dtype`.

    Example:
        >>> import eigenlorax
        >>> adapter = eigenlorax.read_adapter("adapters/a")
        >>> eigenlorax.write_adapter(adapter, "loras/a", dtype="float16").name
        'a'
    """
    if not isinstance(adapter, Adapter):
        raise OptionError(f"the first argument of write_adapter is an Adapter, got {type(adapter).__name__}.")
    target = format if format is not None else format_of(adapter.origin)
    write = writable(target).write
    assert write is not None
    if urls.is_url(path):
        raise OptionError(f"{path} is a URL. Adapters can be read from URLs, but only written to local folders.")
    _check_kind(adapter, target)
    if target == GGUF:
        kind = dtype if dtype == gguf_writer.Q8_0 else dtypes.parse(dtype)
        return gguf_writer.write(adapter, Path(path), base=base_for(base_config), dtype=kind, overwrite=overwrite)
    if target == PEFT:
        adapter = for_peft(adapter)
    return write(adapter, Path(path), dtype=dtypes.parse(dtype), overwrite=overwrite)


def base_for(config: BaseConfig | None) -> BaseModel:
    """Return the base model of adapters that are written in GGUF; raise `OptionError` if its config is missing."""
    if config is None:
        raise OptionError(
            "GGUF files name tensors as llama.cpp does, which depends on the base model: pass the folder with its "
            "config.json, base_config= (--base-config DIR). Its weights are not needed."
        )
    return architectures.base_model(config)


def check_writable(adapter: Adapter, format: str, base: BaseModel | None = None) -> None:
    """Raise the errors that writing an adapter in a format would raise, without writing it."""
    dialect = writable(format).dialect
    _check_kind(adapter, format)
    if format == GGUF:
        gguf_writer.check(adapter, base_for(base))
    elif dialect is not None:
        writer.check(adapter, dialect)
    elif format == MLX:
        mlx_writer.check(adapter)
    else:
        for_peft(adapter)
        peft.check_complete(adapter, f"adapter {adapter.name!r}")


def _check_kind(adapter: Adapter, target: str) -> None:
    """Raise `OptionError` if an adapter of an image model is to be written in a format of language models."""
    source = format_of(adapter.origin)
    if FORMATS[source].dialect is None or target not in (MLX, GGUF):
        return
    candidates = [name for name, candidate in FORMATS.items() if candidate.dialect is not None]
    raise OptionError(
        f"adapter {adapter.name!r} is a LoRA of an image model, read from the format {source!r}, and {target!r} is a "
        f"format of language models. Formats for it: {', '.join([*candidates, PEFT])}."
    )


def for_peft(adapter: Adapter) -> Adapter:
    """Return an adapter of any format for a PEFT folder."""
    source = format_of(adapter.origin)
    if source == PEFT:
        return adapter
    return mlx_writer.for_peft(adapter) if source == MLX else writer.for_peft(adapter)


def file_names(format: str) -> tuple[str, str]:
    """Return the names of the files of an adapter's folder, for a format of folders."""
    return keys.ADAPTER_CONFIG, keys.MLX_WEIGHTS if format == MLX else keys.ADAPTER_WEIGHTS


def format_of(origin: Origin | None) -> str:
    """Return the format that an adapter of this origin was read from; "peft" without an origin."""
    return origin.format if origin is not None else PEFT


def source_format(source: str, adapter: Adapter) -> str:
    """Return the format of the folder or file that an adapter was read from.

    An adapter of a GGUF file has the names and shapes of PEFT, so that it is exported in that format: GGUF would need
    the base model's config.
    """
    is_gguf = source.lower().endswith(keys.GGUF_SUFFIX) and not Path(source).is_dir()
    return GGUF if is_gguf else format_of(adapter.origin)


def writable(name: str) -> Format:
    """Return a format by name; raise `OptionError` if it is unknown or can only be read."""
    chosen = FORMATS.get(name)
    if chosen is None or chosen.write is None:
        candidates = [name for name, candidate in FORMATS.items() if candidate.write is not None]
        raise OptionError(
            f"format {name!r} is {'not known' if chosen is None else 'read, not written'}."
            f"{suggestion(name, candidates)} Formats that can be written: {', '.join(candidates)}."
        )
    return chosen


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise OptionError(f"format {name!r} is not known.{suggestion(name, FORMATS)} Formats: {', '.join(FORMATS)}.")
    return FORMATS[name]
