"""Read LoRAs in GGUF. Modules get the names that PEFT has for them, and their rows the order of transformers."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core import keys
from ...core.adapter import Adapter, LazyMapping, LoRAFactors, ModuleSpec
from ...errors import FormatError, ShapeError
from .. import folders, licenses, lora_config
from ..folders import AdapterLocation
from . import architectures, header, row_order
from .architectures import BaseModel
from .header import GgufFile

SIDES = {"down": ".lora_a", "up": ".lora_b"}
"""Suffix of a factor's name, by side."""
EMBEDDING = {"down": "lora_embedding_A", "up": "lora_embedding_B"}
"""PEFT's names of the factors of an embedding, by side."""
ALORA_TOKENS = "alora_invocation_tokens"
_HUB = "https://huggingface.co/"


@dataclass(frozen=True, slots=True)
class _Module:
    """A module of the file.

    Attributes:
        names: Name of the factor by side.
        n_heads: Number of heads by which its rows are permuted; None if they are not.
        is_embedding: Whether it is the token embedding, whose down factor is transposed.
    """

    names: Mapping[str, str]
    n_heads: int | None
    is_embedding: bool


def read(
    source: str | Path | AdapterLocation,
    *,
    name: str | None = None,
    base_config: str | Path | Mapping[str, Any] | BaseModel | None = None,
    **options: Any,
) -> Adapter:
    """Read a LoRA in llama.cpp's format. Its tensors are read at each access.

    Args:
        source: A file on disk, or a URL.
        name: Name of the adapter. Default: the name of the file.
        base_config: Folder with the base model's `config.json`, that file, or its fields. Needed where llama.cpp
            reorders rows, such as for Llama and Mistral; checked against the file for other models.
        options: The other options of `folders.locate`.

    Raises:
        FormatError: The file is damaged, not an adapter, or has a tensor that is not recognised; or `base_config` is
            needed or belongs to another base model.
        ShapeError: Factors do not fit each other.
    """
    location = folders.locate(source, **options)
    if location.file is None or not location.file.lower().endswith(keys.GGUF_SUFFIX):
        raise FormatError(f"{location} is not a {keys.GGUF_SUFFIX} file.")
    opened = header.open_file(location.folder.file(location.file))
    path = str(opened.file)
    _check_is_lora(opened.metadata, path)
    base = _base(opened.metadata, base_config, path)
    alpha = opened.metadata.get("adapter.lora.alpha", 0.0)
    if type(alpha) is not float or not math.isfinite(alpha * alpha):
        raise FormatError(f"{path}: adapter.lora.alpha is {alpha!r}; a number was expected.")
    modules = _modules(opened, base)
    specs = {module: _spec(opened, parts, alpha) for module, parts in modules.items()}
    adapter = Adapter(
        name=keys.check_name(name if name is not None else location.name),
        specs=specs,
        modules=LazyMapping(specs, partial(_factors, opened, modules, specs)),
        base_model=_base_name(opened.metadata),
        file_bytes=opened.file.size,
        license=licenses.of_gguf(opened.metadata),
    )
    adapter = replace(adapter, source_config=_config(adapter, opened.metadata, path))
    return _with_carried_embedding(adapter, opened, modules, base)


def _check_is_lora(metadata: Mapping[str, Any], path: str) -> None:
    if metadata.get("general.type") != header.ADAPTER or metadata.get("adapter.type") != "lora":
        raise FormatError(
            f"{path} is not a LoRA: general.type is {metadata.get('general.type')!r} and adapter.type is "
            f"{metadata.get('adapter.type')!r}; 'adapter' and 'lora' were expected."
        )


def _base(
    metadata: Mapping[str, Any], config: str | Path | Mapping[str, Any] | BaseModel | None, path: str
) -> BaseModel:
    """Return what is known of the base model; raise `FormatError` if that is not enough, or of another one."""
    stated = metadata.get("general.architecture")
    if config is None:
        return architectures.of_gguf(str(stated), path)
    base = architectures.base_model(config)
    if base.architecture.gguf != stated:
        raise FormatError(
            f"{path} is for a base model of architecture {stated!r}, and {base.where} is the config of "
            f"{base.architecture.gguf!r}. Pass the config of the adapter's base model."
        )
    return base


def _modules(opened: GgufFile, base: BaseModel) -> dict[str, _Module]:
    """Return the modules of the file, sorted; raise `FormatError` for a tensor that is not one of their factors."""
    found: dict[str, dict[str, str]] = {}
    for name in opened.entries:
        side = next((side for side, suffix in SIDES.items() if name.endswith(suffix)), None)
        module = base.module(name.removesuffix(SIDES[side])) if side is not None else None
        if module is None or side is None:
            raise FormatError(
                f"{opened.file}: tensor {name!r} is not a factor of a module that {_description(base)} have. Nothing "
                "was read, since it would be dropped."
            )
        found.setdefault(module, {})[side] = name
    if not found:
        raise FormatError(f"{opened.file} has no LoRA tensor at all.")
    for names in found.values():
        if len(names) < len(SIDES):
            raise FormatError(f"{opened.file}: tensor {next(iter(names.values()))!r} has no partner.")
    embedding = base.architecture.embedding
    return {module: _Module(found[module], base.n_heads(module), module == embedding) for module in sorted(found)}


def _description(base: BaseModel) -> str:
    layers = f" and {base.n_layers} layers ({base.where})" if base.n_layers is not None else ""
    return f"base models of architecture {base.architecture.gguf!r}{layers}"


def _spec(opened: GgufFile, parts: _Module, alpha: float) -> ModuleSpec:
    entries = {side: opened.entries[name] for side, name in parts.names.items()}
    down, up = entries["down"].shape, entries["up"].shape
    shape = down[::-1] if parts.is_embedding else down
    if len(shape) != 2 or len(up) != 2 or shape[0] != up[1] or 0 in (*shape, *up):
        raise ShapeError(
            f"{opened.file}: {parts.names['down']!r} is {down} and {parts.names['up']!r} is {up}: "
            f"{'(in, rank)' if parts.is_embedding else '(rank, in)'} and (out, rank) must share one rank of at least 1."
        )
    if parts.n_heads is not None:
        row_order.check(up[0], parts.n_heads, f"{opened.file}: {parts.names['up']!r}")
    # llama.cpp scales by 1 if there is no alpha, or if it is 0
    scaling = alpha / shape[0] if alpha else 1.0
    dtype = torch.promote_types(entries["down"].type.dtype, entries["up"].type.dtype)
    return ModuleSpec(rank=shape[0], in_features=shape[1], out_features=up[0], scaling=scaling, dtype=dtype)


def _base_name(metadata: Mapping[str, Any]) -> str | None:
    """Return the Hub id of the base model, or None."""
    url = metadata.get("general.base_model.0.repo_url")
    return url.removeprefix(_HUB) if isinstance(url, str) and url.startswith(_HUB) else None


def _config(adapter: Adapter, metadata: Mapping[str, Any], path: str) -> str:
    """Return PEFT's config of the adapter."""
    config = json.loads(lora_config.make(adapter))
    tokens = metadata.get(f"adapter.{ALORA_TOKENS.replace('_', '.', 1)}")
    if tokens is not None:
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise FormatError(f"{path}: its invocation tokens are {tokens!r}; a list of numbers was expected.")
        config[ALORA_TOKENS] = tokens
    return json.dumps(config, indent=2, sort_keys=True)


def _with_carried_embedding(
    adapter: Adapter, opened: GgufFile, modules: Mapping[str, _Module], base: BaseModel
) -> Adapter:
    """Return the adapter with the LoRA of its embedding among the carried tensors, where PEFT's folders have it."""
    embedding = base.architecture.embedding
    if embedding not in adapter.specs:
        return adapter
    names = {f"{keys.MODEL_PREFIX}{embedding}.{EMBEDDING[side]}": side for side in SIDES}
    specs = {module: spec for module, spec in adapter.specs.items() if module != embedding}
    return replace(
        adapter,
        specs=specs,
        modules=LazyMapping(specs, partial(_factors, opened, modules, specs)),
        carried=LazyMapping(names, partial(_embedding, opened, modules[embedding], names)),
    )


# `partial` of module functions, not closures: an adapter has to be picklable.


def _factors(
    opened: GgufFile, modules: Mapping[str, _Module], specs: Mapping[str, ModuleSpec], module: str
) -> LoRAFactors:
    parts = modules[module]
    down, up = opened.load([parts.names[side] for side in keys.SIDES])
    down = down.mT.contiguous() if parts.is_embedding else down
    if parts.n_heads is not None:
        up = row_order.separate(up, parts.n_heads, parts.names["up"])
    return LoRAFactors(down, up, specs[module].scaling)


def _embedding(opened: GgufFile, parts: _Module, names: Mapping[str, str], key: str) -> Tensor:
    side = names[key]
    tensor = opened.load([parts.names[side]])[0]
    return tensor.mT.contiguous() if side == "down" else tensor
