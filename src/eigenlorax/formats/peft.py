"""PEFT's LoRA folders: `adapter_config.json` with `adapter_model.safetensors` (or `.bin`, on request), in and out.

Each tensor of a file becomes a factor of a module, a head or a carried tensor, or an error that names it. PEFT itself
is not imported. The format and what is done with each kind of tensor: docs/adapter-formats.md.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import atomic_files, dtypes, keys, narrowing
from ..core.adapter import Adapter, LazyMapping, LoRAFactors, ModuleSpec, Origin
from ..core.keys import Kind
from ..errors import FormatError, NonFiniteError, ShapeError
from . import coefficients, files, lora_config, official, safetensors_file
from .files import Header, Load
from .folders import Place
from .lora_config import Numbers

# Options of a LoraConfig under which lora_A and lora_B do not multiply to the update: such modules are carried whole.
_OTHER_PRODUCTS = ("use_qalora", "use_bdlora")


def read(
    source: str | Path | Place,
    *,
    name: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
) -> Adapter:
    """A PEFT LoRA from a local folder, from behind a URL (`s3://…`, `hf://…`), or from the Hub where no such folder
    exists (`org/name`, `org/name@revision`).

    An adapter that was trained on coefficients is read as the LoRA it is, where its subspace is known (`Pack.open`);
    so is one of the paper's authors, where its config has the `lora_alpha` that it goes with.
    allow_pickle: read `adapter_model.bin` where there are no safetensors, with torch's restricted unpickler.
    The other options are huggingface_hub's; HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN count as they do there.
    """
    opened = files.opened(
        source,
        name=name,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        allow_pickle=allow_pickle,
    )
    weights, headers, load = opened.weights, opened.headers, opened.load
    if official.is_one(opened):
        return official.adapter(opened)
    if opened.config["peft_type"] == keys.PEFT_TYPE:
        tensors = dict(zip(headers, load(list(headers)), strict=True))
        found = coefficients.adapter(opened.name, opened.config, tensors, where=str(weights))
        return replace(found, file_bytes=opened.file_bytes)
    adapter = assemble(
        opened.name, opened.text, opened.config, headers, load, where=str(weights), file_bytes=opened.file_bytes
    )
    # PEFT itself writes no more than the format
    if set(opened.metadata) - {"format"}:
        adapter = replace(adapter, origin=Origin("peft", (), dict(sorted(opened.metadata.items()))))
    if not adapter.specs and not adapter.carried:
        raise FormatError(f"{weights} has no LoRA tensor at all.")
    return adapter


def assemble(
    name: str,
    config_text: str,
    config: dict[str, Any],
    headers: Mapping[str, Header],
    load: Load,
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
        key = place.key
        if key in heads and place.kind is Kind.HEAD:
            # PEFT writes the biases of a saved head twice for bias="all", once under the name they have in its wrapper
            key = keys.MODEL_PREFIX + raw.removeprefix(keys.MODEL_PREFIX)
        if key in seen:
            raise FormatError(f"{where}: tensors {seen[key]!r} and {raw!r} stand for the same one, {key!r}.")
        seen[key] = raw
        if place.kind in (Kind.DOWN, Kind.UP):
            factors.setdefault(place.module, {})[place.kind.value] = raw
        else:
            (heads if place.kind is Kind.HEAD else carried)[key] = raw
    specs: dict[str, ModuleSpec] = {}
    numbers = Numbers(config, where)
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
            specs[module] = _spec(module, pair, headers, numbers, where)

    return Adapter(
        name=name,
        specs=specs,
        modules=LazyMapping(specs, partial(_factors, load, factors, specs)),
        base_model=config.get("base_model_name_or_path") or None,
        revision=config.get("revision") or None,
        heads=LazyMapping(heads, partial(_tensor, load, heads)),
        carried=LazyMapping(carried, partial(_tensor, load, carried)),
        source_config=config_text,
        file_bytes=file_bytes,
    )


# Functions of the module, bound by `partial`: an adapter can be sent to another process, which a closure cannot.


def _factors(
    load: Load, keys_of: Mapping[str, Mapping[str, str]], specs: Mapping[str, ModuleSpec], module: str
) -> LoRAFactors:
    down, up = load([keys_of[module]["down"], keys_of[module]["up"]])
    return LoRAFactors.from_weights(down, up, specs[module].scaling)


def _tensor(load: Load, raw_keys: Mapping[str, str], key: str) -> Tensor:
    return load([raw_keys[key]])[0]


def from_tensors(name: str, config_text: str, tensors: Mapping[str, Tensor], *, where: str) -> Adapter:
    """An adapter out of tensors in memory under PEFT's keys."""
    headers = {key: Header.of(value.shape, value.dtype) for key, value in tensors.items()}
    config = json.loads(config_text)
    return assemble(name, config_text, config, headers, partial(files.in_memory, tensors), where=where)


def _carried_whole(module: str, config: dict[str, Any], pair: list[Header]) -> bool:
    """Whether lora_A and lora_B of a module are kept as they are: experts, grouped convolutions, other products than
    B·A."""
    if any(config.get(option) for option in _OTHER_PRODUCTS) or not _multiply(*(header.shape for header in pair)):
        return True
    owner = module.removesuffix(".base_layer")
    targets = [target.rpartition(".")[0] for target in config.get("target_parameters") or ()]
    return any(owner == target or owner.endswith(f".{target}") for target in targets if target)


def _multiply(down: tuple[int, ...], up: tuple[int, ...]) -> bool:
    """Whether shapes are those of two linear layers, or of a convolution and one of kernel 1, one after the other."""
    if len(down) == len(up) == 2:
        return True
    return len(down) == len(up) > 2 and set(up[2:]) == {1} and up[1] == down[0] and math.prod(down) > 0


def _spec(module: str, pair: dict[str, str], headers: Mapping[str, Header], numbers: Numbers, where: str) -> ModuleSpec:
    down, up = headers[pair["down"]], headers[pair["up"]]
    for side, header in (("down", down), ("up", up)):
        if header.dtype is None:
            raise FormatError(f"{where}: tensor {pair[side]!r} is not float64, float32, float16 or bfloat16.")
    rank, scaling = numbers.of(module)
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
    return ModuleSpec(
        rank=rank,
        in_features=math.prod(down.shape[1:]),
        out_features=up.shape[0],
        scaling=scaling,
        dtype=torch.promote_types(down.dtype, up.dtype),
        kernel=down.shape[2:],
    )


def write(adapter: Adapter, path: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
    """A folder that `PeftModel.from_pretrained` loads. Config word for word, heads and carried tensors to the bit.

    dtype: that of the LoRA factors; the adapter's own where it is not given.
    """
    atomic_files.write_folder(path, to_files(adapter, dtype=dtype), overwrite=overwrite)
    return path


def to_files(adapter: Adapter, *, dtype: torch.dtype | None = None) -> dict[str, bytes]:
    """The bytes of the two files of a PEFT folder."""
    text = adapter.source_config if adapter.source_config is not None else lora_config.make(adapter)
    numbers = Numbers(json.loads(text), adapter.name)
    tensors = {key: owned(value) for group in (adapter.heads, adapter.carried) for key, value in group.items()}
    modules = adapter.modules if dtype is None else dict(narrowing.narrow_adapter(adapter.name, adapter.modules, dtype))
    for module, factors in modules.items():
        numbers.check(module, factors.spec)
        for side, factor in zip(keys.SIDES, factors.weights, strict=True):
            tensors[keys.lora_key(module, side)] = finite(factor, f"{adapter.name!r}, module {module}")
    own = adapter.origin is not None and adapter.origin.format == "peft"
    metadata = {"format": "pt", **(adapter.origin.metadata if adapter.origin is not None and own else {})}
    return {
        keys.ADAPTER_CONFIG: text.encode("utf-8"),
        keys.ADAPTER_WEIGHTS: safetensors_file.to_bytes(tensors, metadata),
    }


def finite(factor: Tensor, where: str) -> Tensor:
    """A copy of a LoRA factor; `NonFiniteError` where it has NaN or Inf."""
    copy = owned(factor)
    if not copy.isfinite().all():
        raise NonFiniteError(
            f"adapter {where}: its factors are too large for {dtypes.name(copy.dtype)}. Take a wider dtype."
        )
    return copy


def owned(tensor: Tensor) -> Tensor:
    """A copy that safetensors accepts: on the CPU, contiguous, sharing memory with no other tensor."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
