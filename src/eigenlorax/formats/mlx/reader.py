"""Read an adapter folder of mlx-lm.

mlx-lm computes y + scale · (x @ lora_a) @ lora_b with lora_a (in, r) and lora_b (r, out), so that both are transposed
here. Adapters of quantised layers have the same names and shapes.
"""

import json
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core import keys
from ...core.adapter import Adapter, LazyMapping, LoRAFactors, ModuleSpec
from ...core.origin import Origin
from ...errors import FormatError, ShapeError, SourceWarning
from .. import files, folders, lora_config, ranges
from ..files import Load, Weights
from ..folders import AdapterLocation, Folder
from . import config
from .config import Settings

LORA_A, LORA_B, MAGNITUDE = "lora_a", "lora_b", "m"
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embeddings", "tok_embeddings", "embedding", "embed_in")
"""Last components of the names of embeddings, whose tensors have the shapes of a linear layer."""

Stored = tuple[str, bool]
"""Name of a tensor in the file, and whether it is transposed."""


def read(source: str | Path | AdapterLocation, *, name: str | None = None, **options: Any) -> Adapter:
    """Read an adapter folder of mlx-lm, or the file of one checkpoint in it. Tensors are read at each access.

    Args:
        source: A folder, a file `adapters.safetensors` or `0000100_adapters.safetensors`, a URL, or a Hub id.
        name: Name of the adapter. Default: the name of the folder, the file or the repository.
        options: Other options of `folders.locate`.

    Raises:
        FormatError: The config lacks a field; or a tensor is not recognised, or lacks its partner.
        ShapeError: The tensors of a module do not fit each other or the config.
        HubError, UrlError: The source cannot be reached.
    """
    location = folders.locate(source, **options)
    folder, file = location.folder, location.file or keys.MLX_WEIGHTS
    if not folders.is_adapter(folder):
        raise FormatError(f"{folder} has no {keys.ADAPTER_CONFIG} beside {file}. mlx-lm writes it: copy it, too.")
    text, fields = config.read(folder)
    settings = config.settings(fields, str(folder.at(keys.ADAPTER_CONFIG)))
    if "alpha" in fields["lora_parameters"]:
        warnings.warn(
            f"{folder}: alpha in lora_parameters is ignored, as in current mlx-lm: the update is multiplied by scale. "
            "Old releases, such as 0.12, trained with scale · alpha / rank: for such an adapter, write that as scale.",
            SourceWarning,
            stacklevel=3,
        )
    if not folder.is_file(file):
        raise FormatError(f"{folder} has the {keys.ADAPTER_CONFIG} of mlx-lm, but no {file}.{_hint(folder)}")
    weights = files.open_safetensors(folder, file)
    name = keys.check_name(name if name is not None else location.name)
    return _adapter(name, text, settings, weights)


def is_adapter(location: AdapterLocation) -> bool:
    """Return whether a location is a folder of mlx-lm, or a file of one by its name or its tensors."""
    folder, file = location.folder, location.file
    if file is None:
        return config.is_adapter(folder)
    if (file == keys.MLX_WEIGHTS or keys.MLX_CHECKPOINT.fullmatch(file)) and config.is_adapter(folder):
        return True
    # the reader of single files says what is missing
    if not folder.is_file(file):
        return False
    try:
        return any(name.endswith(f".{LORA_A}") for name in ranges.open_tensors(folder.file(file)).entries)
    except FormatError:
        return False


def _hint(folder: Folder) -> str:
    """Return what to do about a folder without `adapters.safetensors`."""
    files = folder.files()
    checkpoints = [file for file in files if keys.MLX_CHECKPOINT.fullmatch(file)]
    if checkpoints:
        return f" Pass one of its checkpoints, such as {folder.at(checkpoints[-1])}, or make a history of all (track)."
    return folders.ARCHIVE_HINT if keys.MLX_ARCHIVE in files else ""


def _adapter(name: str, text: str, settings: Settings, weights: Weights) -> Adapter:
    specs: dict[str, ModuleSpec] = {}
    carried: dict[str, Stored] = {}
    parts = _parts(weights)
    for module, names in parts.items():
        shapes = _shapes(names, settings, weights)
        if len(shapes[LORA_A]) == 3:
            _check_experts(names, shapes, settings.rank, weights.path)
            carried |= {
                keys.lora_key(module, "down"): (names[LORA_A], False),
                keys.lora_key(module, "up"): (names[LORA_B], False),
            }
            continue
        _check_linear(names, shapes, settings.rank, weights.path)
        if MAGNITUDE in names:
            carried[f"{keys.MODEL_PREFIX}{module}.{keys.MAGNITUDE}"] = (names[MAGNITUDE], False)
        if module.rpartition(".")[2] in _EMBEDDINGS:
            carried |= {
                f"{keys.MODEL_PREFIX}{module}.lora_embedding_A": (names[LORA_A], True),
                f"{keys.MODEL_PREFIX}{module}.lora_embedding_B": (names[LORA_B], True),
            }
        else:
            specs[module] = _spec(names, weights, settings)
    return Adapter(
        name=name,
        specs=specs,
        modules=LazyMapping(specs, partial(_factors, weights.load, parts, settings.scale)),
        base_model=settings.model,
        carried=LazyMapping(carried, partial(_carried, weights.load, carried)),
        source_config=_peft_config(settings, sorted(parts)),
        file_bytes=weights.size,
        origin=Origin("mlx", (), {**dict(sorted(weights.metadata.items())), keys.ADAPTER_CONFIG: text}),
    )


def _parts(weights: Weights) -> dict[str, dict[str, str]]:
    """Return the names of a file's tensors by module and part; raise `FormatError` for any other tensor."""
    parts: dict[str, dict[str, str]] = {}
    for name in sorted(weights.headers):
        module, _, part = name.rpartition(".")
        if not module or part not in (LORA_A, LORA_B, MAGNITUDE):
            raise FormatError(
                f"{weights.path}: tensor {name!r} is not part of a LoRA of mlx-lm: known are MODULE.lora_a, "
                "MODULE.lora_b and MODULE.m. Nothing was read, since the tensor would be dropped."
                + " Adapters of mlx-vlm, whose factors are A and B, are not read."
                * (part in ("A", "B"))
            )
        parts.setdefault(module, {})[part] = name
    if not parts:
        raise FormatError(f"{weights.path} has no tensor at all.")
    return parts


def _shapes(names: Mapping[str, str], settings: Settings, weights: Weights) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's tensors by part, after a check that they are complete.

    Args:
        names: Name of the tensor by part.
        settings: Settings of the adapter.
        weights: The file.
    """
    some = next(iter(names.values()))
    for part in (LORA_A, LORA_B):
        if part not in names:
            raise FormatError(f"{weights.path}: tensor {some!r} has no partner {part}: the file is incomplete.")
        if weights.headers[names[part]].dtype is None:
            raise FormatError(f"{weights.path}: tensor {names[part]!r} is not float64, float32, float16 or bfloat16.")
    shapes = {part: weights.headers[name].shape for part, name in names.items()}
    if settings.is_dora and MAGNITUDE not in names:
        raise FormatError(f"{weights.path}: fine_tune_type is 'dora', but {some!r} has no partner m beside it.")
    if not settings.is_dora and MAGNITUDE in names:
        raise FormatError(
            f"{weights.path}: tensor {names[MAGNITUDE]!r} is a magnitude of DoRA, but fine_tune_type is 'lora' in "
            f"{keys.ADAPTER_CONFIG}. Correct the config."
        )
    return shapes


def _check_linear(names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], rank: int, where: str) -> None:
    """Raise `ShapeError` unless the tensors are those of a linear layer or an embedding of this rank."""
    down, up = shapes[LORA_A], shapes[LORA_B]
    if len(down) != 2 or len(up) != 2 or down[1] != rank or up[0] != rank:
        raise ShapeError(
            f"{where}: {names[LORA_A]!r} is {down} and {names[LORA_B]!r} is {up}: (in, rank) and (rank, out) were "
            f"expected with the rank {rank} of {keys.ADAPTER_CONFIG}."
        )
    rows = down[0] if names[LORA_A].rpartition(".")[0].rpartition(".")[2] in _EMBEDDINGS else up[1]
    if MAGNITUDE in shapes and shapes[MAGNITUDE] != (rows,):
        raise ShapeError(f"{where}: {names[MAGNITUDE]!r} is {shapes[MAGNITUDE]}; ({rows},) was expected.")


def _check_experts(names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], rank: int, where: str) -> None:
    """Raise `ShapeError` unless the tensors are those of stacked experts of this rank, which have no magnitude."""
    down, up = shapes[LORA_A], shapes[LORA_B]
    if len(up) != 3 or down[0] != up[0] or down[1] != rank or up[2] != rank:
        raise ShapeError(
            f"{where}: {names[LORA_A]!r} is {down} and {names[LORA_B]!r} is {up}: (experts, rank, in) and (experts, "
            f"out, rank) were expected with the rank {rank} of {keys.ADAPTER_CONFIG}."
        )
    if MAGNITUDE in names:
        raise FormatError(f"{where}: tensor {names[MAGNITUDE]!r} is a magnitude of experts, which mlx-lm has not.")


def _spec(names: Mapping[str, str], weights: Weights, settings: Settings) -> ModuleSpec:
    down, up = weights.headers[names[LORA_A]], weights.headers[names[LORA_B]]
    assert down.dtype is not None
    assert up.dtype is not None
    return ModuleSpec(
        rank=settings.rank,
        in_features=down.shape[0],
        out_features=up.shape[1],
        scaling=settings.scale,
        dtype=torch.promote_types(down.dtype, up.dtype),
    )


# `partial` of module functions, not closures: an adapter has to be picklable.


def _factors(load: Load, parts: Mapping[str, Mapping[str, str]], scale: float, module: str) -> LoRAFactors:
    down, up = load([parts[module][LORA_A], parts[module][LORA_B]])
    return LoRAFactors(down.mT.contiguous(), up.mT.contiguous(), scale)


def _carried(load: Load, stored: Mapping[str, Stored], key: str) -> Tensor:
    name, is_transposed = stored[key]
    (tensor,) = load([name])
    return tensor.mT.contiguous() if is_transposed else tensor


def _peft_config(settings: Settings, modules: list[str]) -> str:
    """Return the `adapter_config.json` of PEFT with the same update.

    Args:
        settings: Settings of the adapter.
        modules: Its modules.
    """
    fields = {
        "peft_type": files.LORA,
        "base_model_name_or_path": settings.model,
        "revision": None,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": lora_config.lora_alpha(settings.rank, settings.scale),
        "lora_dropout": settings.dropout,
        "target_modules": modules,
        **({"use_dora": True} if settings.is_dora else {}),
    }
    return json.dumps(fields, indent=2, sort_keys=True)
