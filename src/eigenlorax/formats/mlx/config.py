"""`adapter_config.json` of mlx-lm: rank and scale of an adapter, read and written."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from ...core import keys, limits
from ...core.adapter import Adapter
from ...errors import FormatError
from ..folders import Folder

LORA, DORA, FULL = "lora", "dora", "full"
"""Values of `fine_tune_type`."""
ALL_LAYERS = -1
"""`num_layers` of an adapter whose modules are chosen by name in all layers."""
_OWN_FIELDS = ("lora_parameters", "fine_tune_type", "lora_layers")
"""Fields of the config that PEFT does not have; `lora_layers` is the name of `num_layers` in old releases."""
_LAYER = re.compile(r"(?:.+\.)?layers\.\d+\.(?P<key>.+)")


@dataclass(frozen=True, slots=True)
class Settings:
    """Fields of a config that the update depends on, and those that PEFT has too.

    Attributes:
        rank: Rank of every module.
        scale: Factor of the update, the same for every module.
        dropout: Dropout probability of the training.
        is_dora: True if every module has a magnitude.
        model: Path or Hub id of the base model; None if it is not stated.
        iterations: Number of training iterations; None if it is not stated.
    """

    rank: int
    scale: float
    dropout: float
    is_dora: bool
    model: str | None
    iterations: int | None


def read(folder: Folder) -> tuple[str, dict[str, Any]]:
    """Return the text of a folder's config and its fields."""
    path = str(folder.at(keys.ADAPTER_CONFIG))
    return limits.parse_json_object(folder.read(keys.ADAPTER_CONFIG, limits.MAX_JSON_BYTES), path)


def is_adapter(folder: Folder) -> bool:
    """Return whether a folder is an adapter of mlx-lm and not of PEFT, whose config has the same name.

    Some converters write PEFT's `peft_type` into the config of mlx-lm, so that the weights decide.
    """
    has_weights = folder.is_file(keys.MLX_WEIGHTS)
    if not folder.is_file(keys.ADAPTER_CONFIG) or (not has_weights and folder.is_file(keys.ADAPTER_WEIGHTS)):
        return False
    try:
        fields = read(folder)[1]
    except FormatError:
        return has_weights
    if "peft_type" in fields and folder.is_file(keys.ADAPTER_WEIGHTS):
        return False
    return has_weights or ("peft_type" not in fields and not fields.keys().isdisjoint(_OWN_FIELDS))


def settings(fields: Mapping[str, Any], where: str) -> Settings:
    """Return the settings of a config, as mlx-lm 0.32 reads them.

    Args:
        fields: Fields of the config.
        where: Path of the config, for error messages.

    Raises:
        FormatError: A field is missing or has another type; or the adapter is a fine-tuned model, not a LoRA.
    """
    kind = fields.get("fine_tune_type")
    if kind is None:
        # releases before 0.20 had a field of its own for DoRA
        kind = DORA if fields.get("use_dora") is True else LORA
    if kind == FULL:
        raise FormatError(
            f"{where}: fine_tune_type is 'full': the file has whole weights of a fine-tuned model, and no LoRA. Train "
            "with --fine-tune-type lora or dora."
        )
    if kind not in (LORA, DORA):
        raise FormatError(f"{where}: fine_tune_type is {kind!r}; 'lora' or 'dora' was expected.")
    parameters = fields.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise FormatError(
            f"{where}: lora_parameters is {parameters!r}; an object with rank and scale was expected, as mlx-lm "
            "writes it. If the adapter is of an early release, which did not state them, or of a converter, add "
            '"lora_parameters": {"rank": RANK, "scale": SCALE}. Adapters of mlx-vlm are not read.'
        )
    rank, scale, dropout = parameters.get("rank"), parameters.get("scale"), parameters.get("dropout", 0.0)
    if type(rank) is not int or rank < 1:
        raise FormatError(f"{where}: rank in lora_parameters is {rank!r}; a whole number of at least 1 was expected.")
    if not _is_usable(scale):
        hint = " mlx-lm multiplies the update by scale, and ignores alpha." if "alpha" in parameters else ""
        raise FormatError(f"{where}: scale in lora_parameters is {scale!r}; a finite number was expected.{hint}")
    if not _is_usable(dropout):
        raise FormatError(f"{where}: dropout in lora_parameters is {dropout!r}; a finite number was expected.")
    model, iterations = fields.get("model"), fields.get("iters")
    if not isinstance(model, str | None):
        raise FormatError(f"{where}: model is {model!r}; a string or null was expected.")
    return Settings(
        rank=rank,
        scale=float(scale),
        dropout=float(dropout),
        is_dora=kind == DORA,
        model=model or None,
        iterations=iterations if type(iterations) is int and iterations > 0 else None,
    )


def _is_usable(number: Any) -> TypeGuard[float]:
    """Return whether a value is a number with a finite square, which is part of every norm."""
    try:
        return type(number) in (int, float) and math.isfinite(float(number) * float(number))
    except OverflowError:
        return False


def make(adapter: Adapter, modules: Iterable[str], rank: int, scale: float, *, is_dora: bool) -> str:
    """Return a config with which mlx-lm loads an adapter.

    Fields that the config of the adapter's source had in addition are kept.

    Args:
        adapter: The adapter.
        modules: Its modules, with embeddings and experts.
        rank: Rank of all modules.
        scale: Factor of the update.
        is_dora: Whether every module has a magnitude.
    """
    source = json.loads(source_text(adapter) or "{}")
    parameters = {
        "dropout": adapter.config.get("lora_dropout") or 0.0,
        "keys": sorted({_key(module) for module in modules}),
        "rank": rank,
        "scale": scale,
    }
    fields = {
        **source,
        "fine_tune_type": DORA if is_dora else LORA,
        "lora_parameters": parameters,
        "model": adapter.base_model,
        "num_layers": ALL_LAYERS,
    }
    return json.dumps(fields, indent=4, sort_keys=True)


def source_settings(adapter: Adapter) -> Settings | None:
    """Return the settings that an adapter of mlx-lm was read with; None for any other adapter."""
    text = source_text(adapter)
    if text is None:
        return None
    return settings(limits.parse_json_object(text.encode("utf-8"), keys.ADAPTER_CONFIG)[1], repr(adapter.name))


def source_text(adapter: Adapter) -> str | None:
    """Return the text of the config that an adapter of mlx-lm was read with; None for any other adapter."""
    if adapter.origin is None or adapter.origin.format != "mlx":
        return None
    return adapter.origin.metadata.get(keys.ADAPTER_CONFIG)


def _key(module: str) -> str:
    """Return the name by which mlx-lm chooses a module: relative to its layer, if it is in one."""
    match = _LAYER.fullmatch(module)
    return match["key"] if match else module
