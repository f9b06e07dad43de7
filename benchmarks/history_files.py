"""Checkpoints of a training run as float64 arrays, and errors between them, from the files alone.

Nothing here is shared with the package: safetensors, JSON and NumPy.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class SavedVersion:
    """A checkpoint.

    Attributes:
        updates: `up` (out, r) and `down` (r, in) in float64 by module; their product is the update, scaling included.
        tensors: All other tensors in float64 by key: heads, biases, norms, embeddings.
        raw: All tensors by key as the file has them.
        file_bytes: Size of the weights' file.
    """

    updates: Mapping[str, tuple[np.ndarray, np.ndarray]]
    tensors: Mapping[str, np.ndarray]
    raw: Mapping[str, np.ndarray]
    file_bytes: int

    @property
    def lora_bytes(self) -> int:
        return sum(tensor.nbytes for key, tensor in self.raw.items() if is_lora(key))

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.nbytes for key, tensor in self.raw.items() if not is_lora(key))


def is_lora(key: str) -> bool:
    return ".lora_" in key


def read_version(folder: Path) -> SavedVersion:
    """Read a PEFT folder of a LoRA or AdaLoRA."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    raw = load_file(folder / WEIGHTS)
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in raw.items():
        if is_lora(key):
            module, _, part = key.removeprefix(PREFIX).partition(".lora_")
            parts.setdefault(module, {})[part[0]] = tensor.astype(np.float64)
    updates = {module: _factors(tensors, module, config) for module, tensors in parts.items()}
    others = {key: tensor.astype(np.float64) for key, tensor in raw.items() if not is_lora(key)}
    return SavedVersion(updates, others, raw, (folder / WEIGHTS).stat().st_size)


def _factors(parts: Mapping[str, np.ndarray], module: str, config: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return `up`, with the scaling, and `down` of a module."""
    if "E" in parts:
        # PEFT adds 1e-5 to the rank that AdaLoRA begins with
        return parts["B"] * (config["lora_alpha"] / (config["init_r"] + 1e-5)), parts["A"] * parts["E"]
    # an export may have a rank or alpha of its own for each module
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    rank = parts["A"].shape[0]
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return parts["B"] * scaling, parts["A"]


def _pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    # the rule of PEFT: names are regular expressions for the end of a module's name
    matches = [value for name, value in (pattern or {}).items() if re.match(rf"(.*\.)?({name})$", module)]
    return matches[0] if matches else default


def update_error(version: SavedVersion, other: SavedVersion) -> float:
    """Return the relative error of another version's updates, by whole matrices."""
    if version.updates.keys() != other.updates.keys():
        raise ValueError(f"the versions have different modules: {version.updates.keys() ^ other.updates.keys()}")
    squared = norm = 0.0
    for module, (up, down) in version.updates.items():
        matrix = up @ down
        other_up, other_down = other.updates[module]
        squared += float(((matrix - other_up @ other_down) ** 2).sum())
        norm += float((matrix**2).sum())
    return math.sqrt(squared / norm) if norm else math.sqrt(squared)


def tensor_errors(version: SavedVersion, other: SavedVersion) -> Iterator[tuple[str, float]]:
    """Return the relative error of each other tensor, by key."""
    if version.tensors.keys() != other.tensors.keys():
        raise ValueError(f"the versions have different tensors: {version.tensors.keys() ^ other.tensors.keys()}")
    for key, tensor in version.tensors.items():
        norm = float(np.linalg.norm(tensor))
        yield key, float(np.linalg.norm(tensor - other.tensors[key])) / (norm or 1.0)
