"""An adapter's folder, opened: its config, and the names and shapes of its tensors, each read when it is asked for.

What the tensors stand for is for the formats to say.
"""

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import boundary, dtypes, keys
from ..errors import FormatError, UrlError
from . import folders, ranges
from .folders import Folder, Place
from .urls import RemoteFolder

LORA = "LORA"
"""What PEFT calls the adapters that are read."""
_KEPT = {
    *dtypes.STORED,
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
}
"""What a tensor of a pickle may be; of factors, those that are stored."""

Load = Callable[[list[str]], list[Tensor]]
"""Reads tensors by name."""


@dataclass(frozen=True, slots=True)
class Header:
    """What is known of a stored tensor before it is read. `dtype` is None where a factor may not have it."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype) -> "Header":
        """That of a tensor of any dtype."""
        return cls(tuple(shape), dtype if dtype in dtypes.STORED else None)


@dataclass(frozen=True, slots=True)
class Opened:
    """The config, parsed and word for word, and the tensors of an adapter's folder. It may be pickled.

    `weights` is what the file with the tensors is called, `file_bytes` its size.
    """

    name: str
    text: str
    config: dict[str, Any]
    weights: str
    file_bytes: int
    headers: Mapping[str, Header]
    load: Load
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class OpenedFile:
    """The tensors of an adapter that is a single file, and the file's metadata. It may be pickled.

    `weights` is what the file is called, `file_bytes` its size.
    """

    name: str
    weights: str
    file_bytes: int
    headers: Mapping[str, Header]
    load: Load
    metadata: Mapping[str, str]


def opened(source: str | Path | Place, *, name: str | None = None, allow_pickle: bool = False, **where: Any) -> Opened:
    """The folder of an adapter: on disk, behind a URL, or what the Hub has of it, where there is no such folder.

    where: the options of `folders.place`.
    """
    place = folders.place(source, allow_pickle=allow_pickle, **where)
    if place.file is not None:
        raise FormatError(f"{place} is a single file, not a folder with {keys.ADAPTER_CONFIG}. Leave the format away.")
    text, config = _read_config(place.folder)
    name = keys.check_name(name if name is not None else place.name)
    return Opened(name, text, config, *_open_weights(place.folder, allow_pickle))


def opened_file(
    source: str | Path | Place, *, name: str | None = None, allow_pickle: bool = False, **where: Any
) -> OpenedFile:
    """The single file of an adapter: on disk, behind a URL, or on the Hub. Options: those of `opened`."""
    place = folders.place(source, allow_pickle=allow_pickle, **where)
    if place.file is None:
        raise FormatError(f"{place} is not a {keys.LORA_SUFFIX} file, nor a folder of one {keys.LORA_FILE}.")
    name = keys.check_name(name if name is not None else place.name)
    if isinstance(place.folder, RemoteFolder) and not place.folder.is_file(place.file):
        raise UrlError(f"{place} does not exist.")
    return OpenedFile(name, *_open_safetensors(place.folder, place.file))


def _read_config(folder: Folder) -> tuple[str, dict[str, Any]]:
    path = str(folder.at(keys.ADAPTER_CONFIG))
    if not folders.is_adapter(folder):
        if folders.is_pack(folder):
            raise FormatError(
                f"{folder} is a pack, not an adapter. `eigenlorax export {folder} -o DIR` gives its adapters."
            )
        if isinstance(folder, RemoteFolder):
            _check_is_there(folder)
        raise FormatError(f"{folder} has no {keys.ADAPTER_CONFIG}, so it is not a PEFT adapter folder.")
    text, config = boundary.parse_json_object(folder.read(keys.ADAPTER_CONFIG, boundary.MAX_JSON_BYTES), path)
    kind = config.get("peft_type")
    if kind == keys.PEFT_TYPE and config.get("subspace") == keys.INSIDE_PACK:
        raise FormatError(
            f"{folder} holds coefficients of a pack already. `eigenlorax export` gives it back as an ordinary LoRA."
        )
    check_config(config, path, (LORA, keys.PEFT_TYPE, keys.OFFICIAL_PEFT_TYPE))
    return text, config


def _check_is_there(folder: RemoteFolder) -> None:
    """An error unless there is a folder; no `FormatError` where nothing is: a slip in a name breaks no adapter."""
    kind = folder.kind()
    if kind is None:
        private = " A private repository needs a token (HF_TOKEN)." if folder.url.startswith("hf:") else ""
        raise UrlError(f"{folder} does not exist.{private}")
    if kind == "file":
        raise FormatError(f"{folder} is not a folder: an adapter is the folder that holds {keys.ADAPTER_CONFIG}.")


def check_config(config: dict[str, Any], path: str, kinds: Sequence[str] = (LORA,)) -> None:
    """`FormatError` where the config of an adapter is of none of these kinds, or a field that has to be a text, or a
    list of them, is something else."""
    kind = config.get("peft_type")
    if kind not in kinds:
        raise FormatError(f"{path}: peft_type is {kind!r}; only LORA adapters share a subspace of LoRA factors.")
    for field in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(field), str | None):
            raise FormatError(f"{path}: {field} is {config[field]!r}; a text or null was expected.")
    for field in ("modules_to_save", "target_parameters"):
        value = config.get(field) or []
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise FormatError(f"{path}: {field} is {value!r}; a list of texts was expected.")


def _open_safetensors(folder: Folder, name: str) -> tuple[str, int, dict[str, Header], Load, dict[str, str]]:
    """What a file is called, its size, what it has, what reads it, and its metadata."""
    file = folder.file(name)
    found = ranges.open_tensors(file)
    keys.check_tensor_names(found.entries, str(file))
    headers = {name: Header.of(entry.shape, entry.dtype) for name, entry in found.entries.items()}
    return str(file), file.size, headers, found.load, dict(found.metadata)


def _open_weights(folder: Folder, allow_pickle: bool) -> tuple[str, int, dict[str, Header], Load, dict[str, str]]:
    """What the file of weights is called, its size, what it has, what reads it, and its metadata."""
    if folder.is_file(keys.ADAPTER_WEIGHTS):
        return _open_safetensors(folder, keys.ADAPTER_WEIGHTS)
    if not folder.is_file(keys.ADAPTER_PICKLE):
        fetched = allow_pickle or isinstance(folder, RemoteFolder)
        unfetched = (
            "" if fetched else " (from the Hub, a .bin is fetched with allow_pickle=True, --allow-pickle, alone)"
        )
        raise FormatError(f"{folder} has neither {keys.ADAPTER_WEIGHTS} nor {keys.ADAPTER_PICKLE}{unfetched}.")
    if isinstance(folder, RemoteFolder):
        raise FormatError(
            f"{folder} has its weights in {keys.ADAPTER_PICKLE} only, a pickle, of which no ranges can be read. "
            "Download the folder, and name the copy."
        )
    if not allow_pickle:
        raise FormatError(
            f"{folder} has its weights in {keys.ADAPTER_PICKLE} only, a pickle, which may run code when read. If you "
            "trust it, pass --allow-pickle (allow_pickle=True): it is then read with weights_only=True."
        )
    pickled = folder.at(keys.ADAPTER_PICKLE)
    return str(pickled), pickled.stat().st_size, *_open_pickle(pickled), {}


def _open_pickle(path: Path) -> tuple[dict[str, Header], Load]:
    state = _load_pickle(path)
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise FormatError(f"{path} is not a state dict: it holds something other than tensors by name.")
    keys.check_tensor_names(state, str(path))
    size = path.stat().st_size
    for key, value in state.items():
        flaw = _flaw(value, size)
        if flaw is not None:
            raise FormatError(f"{path}: tensor {key!r} {flaw}. Load it with PyTorch, and save what it stands for.")
    headers = {key: Header.of(value.shape, value.dtype) for key, value in state.items()}
    return headers, partial(in_memory, {key: value.detach() for key, value in state.items()})


def _flaw(tensor: Tensor, file_bytes: int) -> str | None:
    """Why a tensor of a pickle cannot be taken for an array of the numbers in its file; None if it can."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"is a {type(tensor).__name__}, where a plain tensor was expected"
    if tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided:
        return "is nested, quantised or sparse, where a dense one was expected"
    if tensor.device.type != "cpu":
        return "has no numbers in the file"
    if tensor.is_conj() or tensor.is_neg():
        return "is a view with other numbers than its file has"
    if tensor.dtype not in _KEPT:
        return f"is {dtypes.name(tensor.dtype)}, which no safetensors file can hold"
    # by strides of zero, a few numbers may stand for as many as one likes
    if tensor.numel() * tensor.element_size() > file_bytes:
        return f"claims {tensor.numel():,} numbers, of which the file has no more than {file_bytes:,} bytes"
    return None


def in_memory(tensors: Mapping[str, Tensor], names: list[str]) -> list[Tensor]:
    """Tensors by name, of those that are there already."""
    return [tensors[name] for name in names]


def _load_pickle(path: Path) -> Any:
    try:
        # mapped, so that a tensor is read when it is asked for; files of before torch 1.6 cannot be
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _check_not_compressed(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (PermissionError, FileNotFoundError, FormatError):
        raise
    except Exception as error:
        # on bytes that are no pickle, torch's unpickler raises whatever comes; what it advises is the opposite of safe
        raise FormatError(
            f"{path} cannot be read as tensors alone (weights_only=True): it is broken, or holds something else "
            f"({type(error).__name__})."
        ) from error


def _check_not_compressed(path: Path) -> None:
    """torch compresses nothing, and would unpack as much as somebody else has compressed."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > path.stat().st_size:
        raise FormatError(f"{path} is compressed, {unpacked:,} bytes in all, which torch.save never does.")
