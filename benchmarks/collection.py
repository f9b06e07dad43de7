"""Adapters as PEFT folders of float32 tensors, and the exact error of what a method makes of them.

Nothing here imports a package that is measured: files are read with safetensors, configs with json, and errors are
computed in float64.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PREFIX = "base_model.model."
Pair = tuple[Tensor, Tensor]
"""`down` (rank, in) and `up` (out, rank) of one module."""


@dataclass(frozen=True, slots=True)
class Source:
    """One adapter: its folder, its scaling as PEFT has it, and its factors by module."""

    name: str
    path: Path
    scaling: float
    modules: Mapping[str, Pair]

    @property
    def lora_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self.modules.values() for tensor in pair)


@dataclass(frozen=True, slots=True)
class Shape:
    """A collection to make up: adapters of one rank for square modules of one width."""

    adapters: int
    rank: int
    dimension: int
    modules: int

    @property
    def label(self) -> str:
        plural = "" if self.modules == 1 else "s"
        return f"{self.adapters} × r={self.rank}, d={self.dimension}, {self.modules} module{plural}"


def scaling_of(config: Mapping[str, object], where: Path) -> float:
    """alpha / r, or alpha / √r for rsLoRA. Patterns are refused: no collection here has them."""
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ValueError(f"{where}: rank_pattern and alpha_pattern are not read by this benchmark.")
    rank, alpha = config["r"], config["lora_alpha"]
    assert isinstance(rank, int)
    assert isinstance(alpha, int | float)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def read(path: Path) -> Source:
    """The adapter in a PEFT folder."""
    config_path = path / "adapter_config.json"
    tensors = load_file(path / "adapter_model.safetensors")
    downs = {
        key.removeprefix(PREFIX).removesuffix(".lora_A.weight"): key
        for key in sorted(tensors)
        if key.endswith(".lora_A.weight")
    }
    modules = {module: (tensors[key], tensors[key.replace("lora_A", "lora_B")]) for module, key in downs.items()}
    return Source(path.name, path, scaling_of(json.loads(config_path.read_text()), config_path), modules)


def copies_in_float32(folder: Path, target: Path) -> list[Source]:
    """The adapters in `folder`, one a subfolder, written again in float32: what every method is then given."""
    found = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
    if len(found) < 2:
        raise ValueError(f"{folder} holds {len(found)} PEFT folders; two are needed at least.")
    for path in found:
        (target / path.name).mkdir(parents=True)
        tensors = load_file(path / "adapter_model.safetensors")
        floats = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
        save_file(floats, target / path.name / "adapter_model.safetensors", metadata={"format": "pt"})
        (target / path.name / "adapter_config.json").write_bytes((path / "adapter_config.json").read_bytes())
    return [read(target / path.name) for path in found]


def make_up(shape: Shape, seed: int, target: Path) -> list[Path]:
    """Adapters with common directions of decaying strength and some noise, as PEFT folders of float32."""
    generator = torch.Generator().manual_seed(seed)
    common = 24
    strengths = 0.9 ** torch.arange(common)
    shared = [torch.randn(2, common, shape.dimension, generator=generator) for _ in range(shape.modules)]

    def rows(directions: Tensor) -> Tensor:
        mixed = torch.randn(shape.rank, common, generator=generator) * strengths @ directions
        return mixed + 0.3 * torch.randn(shape.rank, shape.dimension, generator=generator)

    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "made-up",
        "r": shape.rank,
        "lora_alpha": 2 * shape.rank,
        "target_modules": ["q_proj"],
        "task_type": None,
    }
    paths = [target / f"adapter-{index:03d}" for index in range(shape.adapters)]
    for path in paths:
        path.mkdir(parents=True)
        tensors = {}
        for index, (down, up) in enumerate(shared):
            key = f"{PREFIX}model.layers.{index}.self_attn.q_proj"
            tensors[f"{key}.lora_A.weight"] = rows(down).contiguous()
            tensors[f"{key}.lora_B.weight"] = rows(up).mT.contiguous()
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(config))
    return paths


def delta_error(source: Source, other: Mapping[str, Pair], scaling: float | None = None) -> float:
    """√(Σ‖D − D̂‖² / Σ‖D‖²) over the source's modules, in float64.

    A product's norm is that of the product of its factors' triangular parts, so no whole matrix is formed.
    scaling: that of the other's factors; the source's own by default.
    """
    lost = total = 0.0
    for module, (down, up) in source.modules.items():
        other_down, other_up = other[module]
        theirs = source.scaling if scaling is None else scaling
        difference = torch.cat([source.scaling * up.double(), -theirs * other_up.double()], dim=1)
        lost += _product_square(difference, torch.cat([down.double(), other_down.double()]))
        total += _product_square(source.scaling * up.double(), down.double())
    return math.sqrt(lost / total)


def _product_square(left: Tensor, right: Tensor) -> float:
    """‖left @ right‖²_F of a tall matrix and a wide one."""
    return float((torch.linalg.qr(left).R @ torch.linalg.qr(right.mT).R.mT).square().sum())


def saved_tensor_bytes(folder: Path, heads: Sequence[str]) -> int:
    """Bytes of every tensor in the folder's safetensors files, but for task heads, which are kept as they are."""
    return sum(
        tensor.nbytes
        for path in sorted(folder.rglob("*.safetensors"))
        for key, tensor in load_file(path).items()
        if key not in heads
    )


def head_keys(source: Source) -> list[str]:
    """The keys of a source's file that are no LoRA factors."""
    return [key for key in load_file(source.path / "adapter_model.safetensors") if ".lora_" not in key]
