"""PEFT's LoRA folders, read and written: `adapter_config.json` with `adapter_model.safetensors`, or `.bin` on request.

Each tensor of a file becomes a factor of a module, a head or a carried tensor. An error names any other tensor. PEFT
is not imported. docs/adapter-formats.md describes the format.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import atomic_files, dtypes, keys, narrowing
from ..core.adapter import Adapter, LazyMapping, LoRAFactors, ModuleSpec
from ..core.keys import Kind
from ..core.origin import Origin
from ..errors import FormatError, NonFiniteError, ShapeError
from . import adalora, coefficients, files, lora_config, official, safetensors_file
from .files import Header, Load, OpenedFolder, Weights
from .folders import AdapterLocation
from .lora_config import ScalingConfig

# Options of a LoraConfig under which the update is not lora_B @ lora_A. Their tensors are carried unchanged.
_OTHER_PRODUCTS = ("use_qalora", "use_bdlora")


def read(
    source: str | Path | AdapterLocation,
    *,
    name: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
) -> Adapter:
    """Read a PEFT LoRA. Its tensors are read at each access.

    An adapter that was trained on coefficients is returned as the equivalent LoRA if its subspace is loaded
    (`Pack.open`). So is an adapter in the format of the paper's authors if its config has `lora_alpha`. An AdaLoRA
    checkpoint is returned as the LoRA with the same update, and the config of that LoRA.

    Args:
        source: A local folder, a URL (`s3://…`, `hf://…`), or a Hub id (`org/name`, `org/name@revision`).
        name: Name of the adapter. Default: the name of the folder or repository.
        revision: Branch, tag or commit of a repository on the Hub.
        subfolder: Folder in the repository, or below the folder `source`.
        token: Access token of the Hub. huggingface_hub also reads HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.
        cache_dir: Cache folder of the Hub.
        local_files_only: Whether files are only taken from the disk and the cache.
        allow_pickle: Whether `adapter_model.bin` is read, with torch's restricted unpickler, if there is no safetensors
            file.

    Raises:
        FormatError: The folder is not an adapter, or one of its tensors is not recognised.
        ShapeError: Factors do not fit each other or the config.
        HubError, UrlError: The source cannot be reached.
    """
    opened = files.open_folder(
        source,
        name=name,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        allow_pickle=allow_pickle,
    )
    weights = opened.weights
    if official.is_official(opened):
        return official.adapter(opened)
    if opened.config["peft_type"] == keys.PEFT_TYPE:
        tensors = dict(zip(weights.headers, weights.load(list(weights.headers)), strict=True))
        adapter = coefficients.adapter(opened.name, opened.config, tensors, where=weights.path)
        return replace(adapter, file_bytes=weights.size)
    adapter = assemble(opened)
    # PEFT itself writes "format" only; the origin preserves other metadata
    if set(weights.metadata) - {"format"}:
        adapter = replace(adapter, origin=Origin("peft", (), dict(sorted(weights.metadata.items()))))
    check_complete(adapter, weights.path)
    return adapter


def check_complete(adapter: Adapter, where: str) -> None:
    """Raise `FormatError` if an adapter has no tensors, or lacks the magnitudes of DoRA that its config promises.

    Args:
        adapter: The adapter.
        where: Its source, for the message.
    """
    if not adapter.specs and not adapter.carried:
        raise FormatError(f"{where} has no LoRA tensor at all.")
    if not adapter.config.get("use_dora"):
        return
    magnitudes = [key.partition(f".{keys.MAGNITUDE}")[0] for key in adapter.carried if keys.MAGNITUDE in key]
    missing = sorted(adapter.specs.keys() - {key.removeprefix(keys.MODEL_PREFIX) for key in magnitudes})
    if missing:
        raise FormatError(
            f"{where}: use_dora is true in {keys.ADAPTER_CONFIG}, but {len(missing)} of {len(adapter.specs)} modules, "
            f"such as {missing[0]}, have no {keys.MAGNITUDE}. Correct use_dora, or take a complete file."
        )


@dataclass(frozen=True, slots=True)
class _TensorNames:
    """Names of a file's tensors, by their role.

    Attributes:
        factors: Name in the file, by module and side.
        heads: Name in the file, by the key that PEFT writes.
        carried: Name in the file, by the key that PEFT writes.
    """

    factors: Mapping[str, Mapping[str, str]]
    heads: Mapping[str, str]
    carried: Mapping[str, str]


def assemble(opened: OpenedFolder) -> Adapter:
    """Return the adapter of an opened folder with a LoRA or an AdaLoRA. Its tensors are read at each access.

    Raises:
        FormatError: A tensor is not recognised, occurs twice or lacks its partner.
        ShapeError: The factors of a module do not fit each other or the config.
    """
    if opened.config["peft_type"] == keys.ADALORA_PEFT_TYPE:
        opened = adalora.as_lora(opened)
    config, weights = opened.config, opened.weights
    tensors = _classify(opened)
    carried = dict(tensors.carried)
    specs: dict[str, ModuleSpec] = {}
    numbers = ScalingConfig(config, weights.path)
    for module, pair in tensors.factors.items():
        headers = _factor_headers(pair, weights)
        if _is_carried(module, config, headers):
            carried |= {keys.lora_key(module, side): name for side, name in pair.items()}
        else:
            specs[module] = _spec(module, pair, headers, numbers, weights.path)
    return Adapter(
        name=opened.name,
        specs=specs,
        modules=LazyMapping(specs, partial(_factors, weights.load, tensors.factors, specs)),
        base_model=config.get("base_model_name_or_path") or None,
        revision=config.get("revision") or None,
        heads=LazyMapping(tensors.heads, partial(_tensor, weights.load, tensors.heads)),
        carried=LazyMapping(carried, partial(_tensor, weights.load, carried)),
        source_config=opened.config_text,
        file_bytes=weights.size,
    )


def _classify(opened: OpenedFolder) -> _TensorNames:
    """Sort the tensors into factors, heads and carried tensors; raise `FormatError` for any other tensor."""
    where = opened.weights.path
    factors: dict[str, dict[str, str]] = {}
    heads: dict[str, str] = {}
    carried: dict[str, str] = {}
    names: dict[str, str] = {}
    for name in sorted(opened.weights.headers):
        try:
            parsed = keys.parse_peft_key(name, opened.config.get("modules_to_save") or ())
        except FormatError as error:
            raise FormatError(f"{where}: {error}") from error
        key = parsed.key
        if key in heads and parsed.kind is Kind.HEAD:
            # with bias="all", PEFT writes the biases of a saved head twice, once under their name in PEFT's wrapper
            key = keys.MODEL_PREFIX + name.removeprefix(keys.MODEL_PREFIX)
        if key in names:
            raise FormatError(
                f"{where}: tensors {names[key]!r} and {name!r} have the same key, {key!r}. Remove one of them."
            )
        names[key] = name
        if parsed.kind in (Kind.DOWN, Kind.UP):
            factors.setdefault(parsed.module, {})[parsed.kind.value] = name
        else:
            (heads if parsed.kind is Kind.HEAD else carried)[key] = name
    return _TensorNames(factors, heads, carried)


def _factor_headers(pair: Mapping[str, str], weights: Weights) -> dict[str, Header]:
    """Return the headers of a module's two factors by side.

    Args:
        pair: Name of the tensor by side.
        weights: The file.
    """
    for side, opposite in (("down", "up"), ("up", "down")):
        if side not in pair:
            raise FormatError(
                f"{weights.path}: tensor {pair[opposite]!r} has no partner {keys.LORA_PARTS[side]}: the file is "
                "incomplete."
            )
    headers = {side: weights.headers[pair[side]] for side in keys.SIDES}
    for side, header in headers.items():
        if len(header.shape) < 2:
            raise ShapeError(
                f"{weights.path}: tensor {pair[side]!r} is {header.shape}; a factor has at least two dimensions."
            )
    return headers


# `partial` of module functions, not closures: an adapter has to be picklable.


def _factors(
    load: Load, names: Mapping[str, Mapping[str, str]], specs: Mapping[str, ModuleSpec], module: str
) -> LoRAFactors:
    down, up = load([names[module]["down"], names[module]["up"]])
    return LoRAFactors.from_weights(down, up, specs[module].scaling)


def _tensor(load: Load, names: Mapping[str, str], key: str) -> Tensor:
    return load([names[key]])[0]


def from_tensors(name: str, config_text: str, tensors: Mapping[str, Tensor], *, where: str) -> Adapter:
    """Return an adapter of tensors in memory.

    Args:
        name: Name of the adapter.
        config_text: Text of its `adapter_config.json`.
        tensors: Tensors by PEFT's keys.
        where: Source of the tensors, for error messages.
    """
    headers = {key: Header.of_dtype(tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
    weights = Weights(where, 0, headers, partial(files.load_from, tensors), {})
    return assemble(OpenedFolder(name, config_text, json.loads(config_text), weights))


def _is_carried(module: str, config: dict[str, Any], headers: Mapping[str, Header]) -> bool:
    """Return whether lora_A and lora_B of a module are carried unchanged, because the update is not B·A.

    This applies to experts, grouped convolutions and the options in `_OTHER_PRODUCTS`.
    """
    if any(config.get(option) for option in _OTHER_PRODUCTS):
        return True
    if not _multiply(headers["down"].shape, headers["up"].shape):
        return True
    owner = module.removesuffix(".base_layer")
    targets = [target.rpartition(".")[0] for target in config.get("target_parameters") or ()]
    return any(owner == target or owner.endswith(f".{target}") for target in targets if target)


def _multiply(down: tuple[int, ...], up: tuple[int, ...]) -> bool:
    """Return whether the shapes belong to two linear layers, or to a convolution followed by one of kernel 1."""
    if len(down) == len(up) == 2:
        return True
    return len(down) == len(up) > 2 and set(up[2:]) == {1} and up[1] == down[0] and math.prod(down) > 0


def _spec(
    module: str, pair: Mapping[str, str], headers: Mapping[str, Header], numbers: ScalingConfig, where: str
) -> ModuleSpec:
    """Return the spec of a module.

    Args:
        module: Name of the module.
        pair: Name of the tensor by side.
        headers: Header of the tensor by side.
        numbers: Ranks and scalings of the config.
        where: Path of the file, for error messages.

    Raises:
        ShapeError: The ranks of the factors and of the config differ.
    """
    down, up = headers["down"], headers["up"]
    for side, header in headers.items():
        if header.dtype is None:
            raise FormatError(f"{where}: tensor {pair[side]!r} is not float64, float32, float16 or bfloat16.")
    rank, scaling = numbers.rank_and_scaling(module)
    if down.shape[0] != up.shape[1] or down.shape[0] < 1:
        raise ShapeError(
            f"{where}: {pair['down']!r} is {down.shape} and {pair['up']!r} is {up.shape}: "
            "(rank, in) and (out, rank) must share one rank of at least 1."
        )
    if rank != down.shape[0]:
        raise ShapeError(
            f"{where}: {pair['down']!r} has rank {down.shape[0]}, but {keys.ADAPTER_CONFIG} says {rank} (r and "
            "rank_pattern). Its scaling lora_alpha / r would be a guess, and PEFT would reject it: correct the config."
        )
    assert down.dtype is not None
    assert up.dtype is not None
    return ModuleSpec(
        rank=rank,
        in_features=math.prod(down.shape[1:]),
        out_features=up.shape[0],
        scaling=scaling,
        dtype=torch.promote_types(down.dtype, up.dtype),
        kernel=down.shape[2:],
    )


def write(adapter: Adapter, path: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
    """Write a folder that `PeftModel.from_pretrained` loads, and return it.

    Config, heads and carried tensors are written unchanged.

    Args:
        adapter: The adapter.
        path: The folder, which is written completely or not at all.
        dtype: Dtype of the LoRA factors. Default: the dtype of the adapter.
        overwrite: Whether an existing folder is replaced.

    Raises:
        NonFiniteError: A factor has NaN or Inf, or overflows `dtype`.
    """
    atomic_files.write_folder(path, to_files(adapter, dtype=dtype), overwrite=overwrite)
    return path


def to_files(adapter: Adapter, *, dtype: torch.dtype | None = None) -> dict[str, bytes]:
    """Return the content of the two files of a PEFT folder, by name; see `write` for the arguments."""
    text = adapter.source_config if adapter.source_config is not None else lora_config.make(adapter)
    numbers = ScalingConfig(json.loads(text), adapter.name)
    tensors = {key: owned(tensor) for group in (adapter.heads, adapter.carried) for key, tensor in group.items()}
    modules = adapter.modules if dtype is None else dict(narrowing.narrow_adapter(adapter.name, adapter.modules, dtype))
    for module, factors in modules.items():
        numbers.check(module, factors.spec)
        for side, factor in zip(keys.SIDES, factors.weights, strict=True):
            tensors[keys.lora_key(module, side)] = finite(factor, f"{adapter.name!r}, module {module}")
    from_peft = adapter.origin is not None and adapter.origin.format == "peft"
    metadata = {"format": "pt", **(adapter.origin.metadata if adapter.origin is not None and from_peft else {})}
    return {
        keys.ADAPTER_CONFIG: text.encode("utf-8"),
        keys.ADAPTER_WEIGHTS: safetensors_file.to_bytes(tensors, metadata),
    }


def base_weight_hint(key: str) -> str:
    """Return what to do about a tensor that PEFT saves beside a LoRA of an embedding or an output layer, or nothing."""
    if not key.endswith(".base_layer.weight"):
        return ""
    return (
        " It is the base model's weight, which PEFT saves with a LoRA of an embedding or output layer. If no tokens "
        "were added, save the adapter again by save_pretrained(…, save_embedding_layers=False)."
    )


def finite(factor: Tensor, where: str) -> Tensor:
    """Return a copy of a LoRA factor; raise `NonFiniteError` if it has NaN or Inf."""
    copy = owned(factor)
    if not copy.isfinite().all():
        raise NonFiniteError(
            f"adapter {where}: its factors have NaN or Inf in {dtypes.name(copy.dtype)}. If they are too large for "
            "that, use a wider dtype."
        )
    return copy


def owned(tensor: Tensor) -> Tensor:
    """Return a copy that safetensors accepts: on the CPU, contiguous, and without shared memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
