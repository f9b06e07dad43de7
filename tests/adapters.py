"""Tiny real adapter folders: a PEFT config and safetensors (or a pickle), seeded, all sizes pairwise distinct."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# module → (out_features, in_features); no size occurs twice, and none is a rank that is used below
MODULES = {
    "encoder.layer.0.query": (17, 11),
    "encoder.layer.0.value": (13, 23),
    "encoder.layer.1.query": (19, 29),
}
BASE = "org/base"
RANK, ALPHA = 3, 6
HEAD = (2, 31)


def lora_config(modules: Mapping[str, tuple[int, int]] = MODULES, **fields: Any) -> dict[str, Any]:
    """What PEFT writes to `adapter_config.json`; a field of value `...` is left out."""
    config = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": BASE,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": RANK,
        "rank_pattern": {},
        "revision": None,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "task_type": "SEQ_CLS",
        "use_dora": False,
        "use_rslora": False,
        **fields,
    }
    return {key: value for key, value in config.items() if value is not ...}


def factors(
    *,
    seed: int,
    rank: int = RANK,
    modules: Mapping[str, tuple[int, int]] = MODULES,
    shared: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """lora_A and lora_B by PEFT's keys, drawn in float64; `shared`: from so many directions that all seeds have."""
    own, common = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    tensors = {}
    for module, (n_out, n_in) in modules.items():
        if shared is None:
            down, up = _normal(own, rank, n_in), _normal(own, n_out, rank)
        else:
            down = _normal(own, rank, shared) @ _normal(common, shared, n_in)
            up = _normal(common, n_out, shared) @ _normal(own, shared, rank)
        tensors[f"base_model.model.{module}.lora_A.weight"] = down.to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = up.to(dtype)
    return tensors


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_adapter(
    folder: Path,
    *,
    seed: int,
    rank: int = RANK,
    alpha: float = ALPHA,
    modules: Mapping[str, tuple[int, int]] = MODULES,
    base: str | None = BASE,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    head: tuple[int, int] | None = None,
    shared: int | None = None,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    pickled: bool = False,
) -> Path:
    """An adapter folder as PEFT saves it.

    head: shape of a task head, saved as PEFT saves `modules_to_save`. shared: so many directions that every seed draws
    from; without it each seed has its own. config: fields to change; a field of value `...` is left out. tensors: added
    to the file. pickled: `adapter_model.bin` instead of safetensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = factors(seed=seed, rank=rank, modules=modules, shared=shared, dtype=dtype)
    if head is not None:
        drawn = _normal(torch.Generator().manual_seed(seed + 1), *head)
        saved["base_model.model.classifier.weight"] = drawn.to(torch.float32)
    saved |= tensors or {}
    fields = {
        "r": rank,
        "lora_alpha": alpha,
        "base_model_name_or_path": base,
        "revision": revision,
        "modules_to_save": ["classifier"] if head is not None else None,
        **(config or {}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(lora_config(modules, **fields), indent=2, sort_keys=True))
    if pickled:
        torch.save(saved, folder / "adapter_model.bin")
    else:
        save_file(saved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def make_adapters(parent: Path, names: str, **options: Any) -> list[Path]:
    """One adapter folder in `parent` for each of the blank-separated names, seeded 1, 2, 3, …"""
    return [make_adapter(parent / name, seed=seed, **options) for seed, name in enumerate(names.split(), start=1)]


def change_config(folder: Path, **fields: Any) -> Path:
    """The same adapter with fields of its config changed; a field of value `...` is removed."""
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}, indent=2))
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """The same adapter after `change` has edited the dict of its tensors."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder
