"""Adapters as opened files: the config, and the names and shapes of the tensors. Each tensor is read at each access.

The modules of the formats interpret the tensors.
"""

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import dtypes, keys, limits
from ..errors import FormatError, UrlError
from . import folders, ranges
from .folders import AdapterLocation, Folder
from .urls import RemoteFolder

LORA = "LORA"
"""`peft_type` of the adapters that can be read."""
_PICKLED_DTYPES = {
    *dtypes.STORED,
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
}
"""Dtypes that a tensor of a pickle may have. LoRA factors must have a dtype in `dtypes.STORED`."""

Load = Callable[[list[str]], list[Tensor]]
"""Function that reads tensors by name."""


@dataclass(frozen=True, slots=True)
class Header:
    """Shape and dtype of a stored tensor.

    Attributes:
        shape: Shape of the tensor.
        dtype: Dtype of the tensor; None if a LoRA factor may not have this dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @classmethod
    def of_dtype(cls, shape: tuple[int, ...], dtype: torch.dtype) -> "Header":
        """Return the header of a tensor of any dtype."""
        return cls(tuple(shape), dtype if dtype in dtypes.STORED else None)


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of one file, unread. It can be pickled.

    Attributes:
        path: Path of the file, for error messages.
        size: Size of the file in bytes.
        headers: Shape and dtype of each tensor, by name.
        load: Function that reads tensors by name.
        metadata: Metadata of the file.
    """

    path: str
    size: int
    headers: Mapping[str, Header]
    load: Load
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class OpenedFolder:
    """A PEFT folder: the name of the adapter, its config as text and parsed, and its weights."""

    name: str
    config_text: str
    config: dict[str, Any]
    weights: Weights


@dataclass(frozen=True, slots=True)
class OpenedFile:
    """An adapter in a single file: its name and its weights."""

    name: str
    weights: Weights


def open_folder(
    source: str | Path | AdapterLocation, *, name: str | None = None, allow_pickle: bool = False, **options: Any
) -> OpenedFolder:
    """Open the PEFT folder of an adapter on disk, behind a URL or on the Hub.

    Args:
        source: Source of the adapter; see `folders.locate`.
        name: Name of the adapter. Default: the name of the folder or repository.
        allow_pickle: Whether `adapter_model.bin` is opened if there is no safetensors file.
        options: The other options of `folders.locate`.

    Raises:
        FormatError: The folder is not an adapter, or a file in it is damaged.
        UrlError: There is nothing at the URL.
    """
    location = folders.locate(source, allow_pickle=allow_pickle, **options)
    if location.file is not None:
        raise FormatError(f"{location} is a single file, not a folder with {keys.ADAPTER_CONFIG}. Remove format.")
    text, config = _read_config(location.folder)
    name = keys.check_name(name if name is not None else location.name)
    return OpenedFolder(name, text, config, _open_weights(location, allow_pickle))


def open_file(
    source: str | Path | AdapterLocation, *, name: str | None = None, allow_pickle: bool = False, **options: Any
) -> OpenedFile:
    """Open an adapter in a single safetensors file; see `open_folder` for arguments and errors."""
    location = folders.locate(source, allow_pickle=allow_pickle, **options)
    if location.file is None:
        raise FormatError(f"{location} is neither a {keys.LORA_SUFFIX} file nor a folder with {keys.LORA_FILE}.")
    name = keys.check_name(name if name is not None else location.name)
    if isinstance(location.folder, RemoteFolder) and not location.folder.is_file(location.file):
        raise UrlError(f"{location} does not exist.")
    return OpenedFile(name, open_safetensors(location.folder, location.file))


def _read_config(folder: Folder) -> tuple[str, dict[str, Any]]:
    path = str(folder.at(keys.ADAPTER_CONFIG))
    if not folders.is_adapter(folder):
        if folders.is_pack(folder):
            raise FormatError(
                f"{folder} is a pack, not an adapter. Write its adapters with `eigenlorax export {folder} -o DIR`."
            )
        if isinstance(folder, RemoteFolder):
            _check_is_folder(folder)
        weights = folders.weights_without_config(folder)
        if weights is not None:
            raise FormatError(folders.missing_config(folder, weights))
        hint = folders.ARCHIVE_HINT if folder.is_file(keys.MLX_ARCHIVE) else ""
        raise FormatError(f"{folder} has no {keys.ADAPTER_CONFIG}, so it is not a PEFT adapter folder.{hint}")
    text, config = limits.parse_json_object(folder.read(keys.ADAPTER_CONFIG, limits.MAX_JSON_BYTES), path)
    if config.get("peft_type") == keys.PEFT_TYPE and config.get("subspace") == keys.INSIDE_PACK:
        raise FormatError(
            f"{folder} has coefficients of an adapter in a pack. Write it as an ordinary LoRA with `eigenlorax export`."
        )
    check_config(config, path, (LORA, keys.ADALORA_PEFT_TYPE, keys.PEFT_TYPE, keys.OFFICIAL_PEFT_TYPE))
    return text, config


def _check_is_folder(folder: RemoteFolder) -> None:
    """Raise `UrlError` if there is nothing at the URL, and `FormatError` if it is a file.

    `skip_bad` does not skip a `UrlError`: a wrong URL is a typing error, not a bad adapter.
    """
    kind = folder.kind()
    if kind is None:
        private = " A private repository needs a token (HF_TOKEN)." if folder.url.startswith("hf:") else ""
        raise UrlError(f"{folder} does not exist.{private}")
    if kind == "file":
        raise FormatError(f"{folder} is not a folder: an adapter is the folder with {keys.ADAPTER_CONFIG}.")


def check_config(config: dict[str, Any], path: str, peft_types: Sequence[str] = (LORA,)) -> None:
    """Raise `FormatError` if an adapter's config has another peft_type, or a field of the wrong type."""
    peft_type = config.get("peft_type")
    if peft_type not in peft_types:
        raise FormatError(f"{path}: peft_type is {peft_type!r}; only LORA and ADALORA adapters are supported.")
    for field in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(field), str | None):
            raise FormatError(f"{path}: {field} is {config[field]!r}; a string or null was expected.")
    targets = config.get("target_modules")
    if not isinstance(targets, str | list | None) or any(not isinstance(target, str) for target in targets or ()):
        raise FormatError(
            f"{path}: target_modules is {targets!r}; a list of module names, a pattern as a string, or null was "
            "expected."
        )
    for field in ("modules_to_save", "target_parameters"):
        names = config.get(field) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise FormatError(f"{path}: {field} is {names!r}; a list of strings was expected.")


def open_safetensors(folder: Folder, name: str) -> Weights:
    """Open a safetensors file of a folder by its header."""
    file = folder.file(name)
    tensors = ranges.open_tensors(file)
    keys.check_tensor_names(tensors.entries, str(file))
    headers = {name: Header.of_dtype(entry.shape, entry.dtype) for name, entry in tensors.entries.items()}
    return Weights(str(file), file.size, headers, tensors.load, dict(tensors.metadata))


def _open_weights(location: AdapterLocation, allow_pickle: bool) -> Weights:
    folder = location.folder
    if folder.is_file(keys.ADAPTER_WEIGHTS):
        return open_safetensors(folder, keys.ADAPTER_WEIGHTS)
    if not folder.is_file(keys.ADAPTER_PICKLE):
        may_be_on_hub = location.is_downloaded and not allow_pickle
        hint = " (the Hub's .bin file is downloaded with allow_pickle=True, --allow-pickle only)" * may_be_on_hub
        raise FormatError(f"{folder} has neither {keys.ADAPTER_WEIGHTS} nor {keys.ADAPTER_PICKLE}{hint}.")
    if isinstance(folder, RemoteFolder):
        raise FormatError(
            f"{folder} has its weights in {keys.ADAPTER_PICKLE} only, a pickle, which cannot be read from a URL. "
            "Download the folder, and pass the path of the copy."
        )
    if not allow_pickle:
        raise FormatError(
            f"{folder} has its weights in {keys.ADAPTER_PICKLE} only, a pickle, which may run code when read. If you "
            "trust it, pass --allow-pickle (allow_pickle=True): it is then read with weights_only=True."
        )
    return _open_pickle(folder.at(keys.ADAPTER_PICKLE))


def _open_pickle(path: Path) -> Weights:
    state = _load_pickle(path)
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in state.items()
    ):
        raise FormatError(f"{path} is not a state dict: it contains something other than tensors by name.")
    keys.check_tensor_names(state, str(path))
    if not all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in state.values()):
        # Jagged tensors, for example. torch loads them only if `torch._dynamo` has been imported. The error must not
        # depend on that.
        raise _unreadable_pickle(path)
    size = path.stat().st_size
    for key, tensor in state.items():
        flaw = _flaw(tensor, size)
        if flaw is not None:
            raise FormatError(f"{path}: tensor {key!r} {flaw}. Load it with PyTorch, and save it as a dense tensor.")
    headers = {key: Header.of_dtype(tensor.shape, tensor.dtype) for key, tensor in state.items()}
    load = partial(load_from, {key: tensor.detach() for key, tensor in state.items()})
    return Weights(str(path), size, headers, load, {})


def _flaw(tensor: Tensor, file_bytes: int) -> str | None:
    """Return why a tensor of a pickle is not a plain array of numbers in its file; None if it is one."""
    if tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided:
        return "is nested, quantised or sparse; a dense tensor was expected"
    if tensor.device.type != "cpu":
        return "is on another device than the CPU"
    if tensor.is_conj() or tensor.is_neg():
        return "is a conjugated or negated view"
    if tensor.dtype not in _PICKLED_DTYPES:
        return f"is {dtypes.name(tensor.dtype)}, which safetensors files do not support"
    # with strides of zero, a few stored numbers can claim any shape
    if tensor.numel() * tensor.element_size() > file_bytes:
        return f"has {tensor.numel():,} entries, more than the {file_bytes:,} bytes of the file can contain"
    return None


def load_from(tensors: Mapping[str, Tensor], names: list[str]) -> list[Tensor]:
    """Return tensors in memory by name: a `Load` once its first argument is bound."""
    return [tensors[name] for name in names]


def _load_pickle(path: Path) -> Any:
    try:
        # Mapped, so that a tensor is read at its first access. Files of torch before 1.6 are not zip archives, and
        # cannot be mapped.
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _check_not_compressed(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (PermissionError, FileNotFoundError, FormatError):
        raise
    except Exception as error:
        # torch's unpickler raises any exception for bytes that are not a pickle. The message is not shown, because it
        # recommends weights_only=False.
        raise _unreadable_pickle(path) from error


def _unreadable_pickle(path: Path) -> FormatError:
    return FormatError(
        f"{path} cannot be read as plain tensors (weights_only=True): it is damaged, or contains other objects. "
        "Load the adapter with PEFT where it was trained, and save it again: PEFT writes safetensors."
    )


def _check_not_compressed(path: Path) -> None:
    """Raise `FormatError` for a compressed archive: torch writes none, and would decompress it to any size."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > path.stat().st_size:
        raise FormatError(
            f"{path} is compressed, {unpacked:,} bytes when unpacked. Save it with torch.save, which does not compress."
        )
