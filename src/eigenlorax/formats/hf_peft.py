"""PEFT's LoRA folders: `adapter_config.json` with `adapter_model.safetensors` (or `.bin`, on request), in and out.

Each tensor of a file becomes a factor of a module, a head or a carried tensor, or an error that names it. PEFT itself
is not imported. The format and what is done with each kind of tensor: docs/adapter-formats.md.
"""

import json
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from .. import dtypes, hub, keys, store
from ..adapter import Adapter, Lazy, LoRAFactors, ModuleSpec
from ..errors import FormatError, NonFiniteError, ShapeError, reason
from ..keys import Kind
from . import coefficients, lora_config

_DTYPES = dict(zip(("F64", "F32", "F16", "BF16"), dtypes.STORED, strict=True))
# Options of a LoraConfig under which lora_A and lora_B do not multiply to the update: such modules are carried whole.
_OTHER_PRODUCTS = ("use_qalora", "use_bdlora", "kasa_config")


@dataclass(frozen=True, slots=True)
class _Header:
    """What is known of a stored tensor before it is read. `dtype` is None where a factor may not have it."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


def read(
    source: str | Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
) -> Adapter:
    """A PEFT LoRA from a local folder, or from the Hub where no such folder exists (`org/name`, `org/name@revision`).

    An adapter that was trained on coefficients is read as the LoRA it is, where its subspace is known (`Pack.open`).
    allow_pickle: read `adapter_model.bin` where there are no safetensors, with torch's restricted unpickler.
    The other options are huggingface_hub's; HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN count as they do there.
    """
    folder, default_name = hub.adapter_folder(
        source,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        allow_pickle=allow_pickle,
    )
    text, config = _read_config(folder)
    weights, headers, load = _open_weights(folder, allow_pickle)
    name = keys.check_name(name if name is not None else default_name)
    if config["peft_type"] == keys.PEFT_TYPE:
        tensors = dict(zip(headers, load(list(headers)), strict=True))
        found = coefficients.adapter(name, config, tensors, where=str(weights))
        return replace(found, file_bytes=weights.stat().st_size)
    adapter = assemble(
        name,
        text,
        config,
        headers,
        load,
        where=str(weights),
        file_bytes=weights.stat().st_size,
    )
    if not adapter.specs and not adapter.carried:
        raise FormatError(f"{weights} has no LoRA tensor at all.")
    return adapter


def _read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    path = folder / keys.ADAPTER_CONFIG
    if (folder / keys.MANIFEST).is_file():
        raise FormatError(
            f"{folder} is a pack, not an adapter. `eigenlorax export {folder} -o DIR` gives its adapters."
        )
    if not path.is_file():
        raise FormatError(f"{folder} has no {keys.ADAPTER_CONFIG}, so it is not a PEFT adapter folder.")
    try:
        text = path.read_bytes().decode("utf-8")
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path} holds a JSON {type(config).__name__}; an object with peft_type, r, … was expected.")
    kind = config.get("peft_type")
    if kind == keys.PEFT_TYPE and config.get("subspace") == keys.INSIDE_PACK:
        raise FormatError(
            f"{folder} holds coefficients of a pack already. `eigenlorax export` gives it back as an ordinary LoRA."
        )
    if kind not in ("LORA", keys.PEFT_TYPE):
        raise FormatError(f"{path}: peft_type is {kind!r}; only LORA adapters share a subspace of LoRA factors.")
    _check_texts(config, path)
    return text, config


def _check_texts(config: dict[str, Any], path: Path) -> None:
    """`FormatError` where a field that has to be a text, or a list of them, is something else."""
    for field in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(field), str | None):
            raise FormatError(f"{path}: {field} is {config[field]!r}; a text or null was expected.")
    for field in ("modules_to_save", "target_parameters"):
        value = config.get(field) or []
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise FormatError(f"{path}: {field} is {value!r}; a list of texts was expected.")


def _open_weights(
    folder: Path, allow_pickle: bool
) -> tuple[Path, dict[str, _Header], Callable[[list[str]], list[Tensor]]]:
    safetensors, pickled = folder / keys.ADAPTER_WEIGHTS, folder / keys.ADAPTER_PICKLE
    if safetensors.is_file():
        return safetensors, *_open_safetensors(safetensors)
    if not pickled.is_file():
        unfetched = "" if allow_pickle else " (from the Hub, a .bin is fetched with --allow-pickle only)"
        raise FormatError(f"{folder} has neither {keys.ADAPTER_WEIGHTS} nor {keys.ADAPTER_PICKLE}{unfetched}.")
    if not allow_pickle:
        raise FormatError(
            f"{folder} has its weights in {keys.ADAPTER_PICKLE} only, a pickle, which may run code when read. If you "
            "trust it, pass --allow-pickle (allow_pickle=True): it is then read with weights_only=True."
        )
    return pickled, *_open_pickle(pickled)


def _open_safetensors(path: Path) -> tuple[dict[str, _Header], Callable[[list[str]], list[Tensor]]]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            headers = {
                key: _Header(tuple(part.get_shape()), _DTYPES.get(part.get_dtype())) for key, part in slices.items()
            }
    except SafetensorError as error:
        raise FormatError(f"{path} is not a whole safetensors file: {error}") from error

    def load(names: list[str]) -> list[Tensor]:
        # opened at each read: a thousand adapters would be a thousand open files
        with safe_open(path, framework="pt") as file:
            return [file.get_tensor(key) for key in names]

    return headers, load


def _open_pickle(path: Path) -> tuple[dict[str, _Header], Callable[[list[str]], list[Tensor]]]:
    state = _load_pickle(path)
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise FormatError(f"{path} is not a state dict: it holds something other than tensors by name.")
    known = set(_DTYPES.values())
    headers = {
        key: _Header(tuple(value.shape), value.dtype if value.dtype in known else None) for key, value in state.items()
    }
    return headers, lambda names: [state[key].detach() for key in names]


def _load_pickle(path: Path) -> Any:
    try:
        # mapped, so that a tensor is read when it is asked for; files of before torch 1.6 cannot be
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:
        # on bytes that are no pickle, torch's unpickler raises whatever comes
        raise FormatError(f"{path} cannot be read as tensors alone (weights_only=True): {reason(error)}") from error


def assemble(
    name: str,
    config_text: str,
    config: dict[str, Any],
    headers: Mapping[str, _Header],
    load: Callable[[list[str]], list[Tensor]],
    *,
    where: str,
    file_bytes: int = 0,
) -> Adapter:
    """An adapter out of named tensors and its PEFT config; `where` stands before what is wrong with them."""
    factors: dict[str, dict[str, str]] = {}
    heads: dict[str, str] = {}
    carried: dict[str, str] = {}
    seen: dict[str, str] = {}
    for raw in sorted(headers):
        try:
            place = keys.parse_peft_key(raw, config.get("modules_to_save") or ())
        except FormatError as error:
            raise FormatError(f"{where}: {error}") from error
        if place.key in seen:
            raise FormatError(
                f"{where}: tensors {seen[place.key]!r} and {raw!r} stand for the same one, {place.key!r}."
            )
        seen[place.key] = raw
        if place.kind in (Kind.DOWN, Kind.UP):
            factors.setdefault(place.module, {})[place.kind.value] = raw
        else:
            (heads if place.kind is Kind.HEAD else carried)[place.key] = raw
    specs: dict[str, ModuleSpec] = {}
    for module, pair in factors.items():
        for side, other in (("down", "up"), ("up", "down")):
            if side not in pair:
                raise FormatError(
                    f"{where}: tensor {pair[other]!r} has no partner {keys.LORA_PARTS[side]}: the file is not complete."
                )
        for raw in pair.values():
            if len(headers[raw].shape) < 2:
                raise ShapeError(
                    f"{where}: tensor {raw!r} is {headers[raw].shape}; a factor has two dimensions at least."
                )
        if _carried_whole(module, config, [headers[raw] for raw in pair.values()]):
            carried |= {keys.lora_key(module, side): raw for side, raw in pair.items()}
        else:
            specs[module] = _spec(module, pair, headers, config, where)

    def factors_of(module: str) -> LoRAFactors:
        down, up = load([factors[module]["down"], factors[module]["up"]])
        return LoRAFactors(down, up, specs[module].scaling)

    return Adapter(
        name=name,
        specs=specs,
        modules=Lazy(specs, factors_of),
        base_model=config.get("base_model_name_or_path") or None,
        revision=config.get("revision") or None,
        heads=Lazy(heads, lambda key: load([heads[key]])[0]),
        carried=Lazy(carried, lambda key: load([carried[key]])[0]),
        source_config=config_text,
        file_bytes=file_bytes,
    )


def from_tensors(name: str, config_text: str, tensors: Mapping[str, Tensor], *, where: str) -> Adapter:
    """An adapter out of tensors in memory under PEFT's keys."""
    headers = {
        key: _Header(tuple(value.shape), value.dtype if value.dtype in _DTYPES.values() else None)
        for key, value in tensors.items()
    }
    config = json.loads(config_text)
    return assemble(name, config_text, config, headers, lambda names: [tensors[key] for key in names], where=where)


def _carried_whole(module: str, config: dict[str, Any], pair: list[_Header]) -> bool:
    """Whether lora_A and lora_B of a module are kept as they are: convolutions, experts, other products than B·A."""
    if any(len(header.shape) != 2 for header in pair) or any(config.get(option) for option in _OTHER_PRODUCTS):
        return True
    owner = module.removesuffix(".base_layer")
    targets = [target.rpartition(".")[0] for target in config.get("target_parameters") or ()]
    return any(owner == target or owner.endswith(f".{target}") for target in targets if target)


def _spec(
    module: str, pair: dict[str, str], headers: Mapping[str, _Header], config: dict[str, Any], where: str
) -> ModuleSpec:
    down, up = headers[pair["down"]], headers[pair["up"]]
    for side, header in (("down", down), ("up", up)):
        if header.dtype is None:
            raise FormatError(f"{where}: tensor {pair[side]!r} is not float64, float32, float16 or bfloat16.")
    rank, scaling = lora_config.rank_and_scaling(module, config, where)
    if down.shape[0] != up.shape[1] or down.shape[0] < 1:
        raise ShapeError(
            f"{where}: {pair['down']!r} is {down.shape} and {pair['up']!r} is {up.shape}: "
            "(rank, in) and (out, rank) must share one rank of at least 1."
        )
    if rank != down.shape[0]:
        raise ShapeError(
            f"{where}: {pair['down']!r} has rank {down.shape[0]}, but {keys.ADAPTER_CONFIG} says {rank} (r and "
            "rank_pattern). Its scaling lora_alpha / r would be a guess, and PEFT would not load it: mend the config."
        )
    assert down.dtype is not None
    assert up.dtype is not None
    return ModuleSpec(rank, down.shape[1], up.shape[0], scaling, torch.promote_types(down.dtype, up.dtype))


def write(adapter: Adapter, path: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
    """A folder that `PeftModel.from_pretrained` loads. Config word for word, heads and carried tensors to the bit.

    dtype: that of the LoRA factors; the adapter's own where it is not given.
    """
    store.write_folder(path, files(adapter, dtype=dtype), overwrite=overwrite)
    return path


def files(adapter: Adapter, *, dtype: torch.dtype | None = None) -> dict[str, bytes]:
    """The bytes of the two files of a PEFT folder."""
    text = adapter.source_config if adapter.source_config is not None else lora_config.make(adapter)
    config = json.loads(text)
    tensors = {key: owned(value) for group in (adapter.heads, adapter.carried) for key, value in group.items()}
    for module, factors in adapter.modules.items():
        expected = lora_config.rank_and_scaling(module, config, adapter.name)
        if expected[0] != factors.down.shape[0] or not math.isclose(expected[1], factors.scaling, rel_tol=1e-9):
            raise FormatError(
                f"adapter {adapter.name!r}, module {module}: rank {factors.down.shape[0]} and scaling "
                f"{factors.scaling:g} are not those of its config, {expected[0]} and {expected[1]:g}. Clear "
                "source_config, and a fitting one is written."
            )
        for side, factor in (("down", factors.down), ("up", factors.up)):
            tensors[keys.lora_key(module, side)] = rounded(factor, dtype, f"{adapter.name!r}, module {module}")
    return {
        keys.ADAPTER_CONFIG: text.encode("utf-8"),
        keys.ADAPTER_WEIGHTS: to_safetensors(tensors, metadata={"format": "pt"}),
    }


def rounded(factor: Tensor, dtype: torch.dtype | None, where: str) -> Tensor:
    """A copy of a LoRA factor in `dtype`; `NonFiniteError` where that has no room for its numbers."""
    copy = owned(factor, dtype)
    if not copy.isfinite().all():
        raise NonFiniteError(
            f"adapter {where}: its factors are too large for {dtypes.name(copy.dtype)}. Take a wider dtype."
        )
    return copy


def owned(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy that safetensors accepts: on the CPU, contiguous, sharing memory with no other tensor."""
    return tensor.detach().cpu().to(dtype or tensor.dtype).clone(memory_format=torch.contiguous_format)
