"""Made-up adapters in the shapes of Mistral-7B's q, k and v, on disk as PEFT folders of bfloat16.

    python benchmarks/large.py /data/mistral-500

Each side of each module has common directions of decaying strength, and every adapter a part of its own beside them.
500 adapters of rank 16 are 9.4 GB. A run that was stopped goes on: what is there is not written again.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "base_model.model.model.layers"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is made up.

    shapes: (out, in) of a layer's modules, by their names. directions: common ones of each side of each module, the
    j-th of strength j ** -decay. noise: the size of an adapter's own part, on the same scale, in every direction.
    """

    adapters: int = 500
    layers: int = 32
    rank: int = 16
    shapes: tuple[tuple[str, int, int], ...] = (("q_proj", 4096, 4096), ("k_proj", 1024, 4096), ("v_proj", 1024, 4096))
    directions: int = 256
    decay: float = 0.7
    noise: float = 0.01
    seed: int = 0

    @property
    def strengths(self) -> Tensor:
        return torch.arange(1, self.directions + 1).float() ** -self.decay

    @property
    def modules(self) -> list[tuple[str, int, int]]:
        return [
            (f"{layer}.self_attn.{name}", out, width)
            for layer in range(self.layers)
            for name, out, width in self.shapes
        ]


def write(plan: Plan, target: Path) -> list[Path]:
    """The adapters' folders in `target`."""
    generator = torch.Generator().manual_seed(plan.seed)
    common = {
        f"{module}.{side}": _orthonormal(plan.directions, width, generator)
        for module, n_out, n_in in plan.modules
        for side, width in (("lora_A", n_in), ("lora_B", n_out))
    }
    paths = [target / f"adapter-{index:04d}" for index in range(plan.adapters)]
    for index, path in enumerate(paths):
        if (path / "adapter_config.json").is_file():
            continue
        own = torch.Generator().manual_seed(plan.seed * 1_000_003 + index + 1)
        tensors = {}
        for side, directions in common.items():
            mixed = torch.randn(plan.rank, len(directions), generator=own) * plan.strengths
            rows = mixed @ directions + plan.noise * torch.randn(plan.rank, directions.shape[1], generator=own)
            rows = rows if side.endswith("lora_A") else rows.mT
            tensors[f"{PREFIX}.{side}.weight"] = rows.to(torch.bfloat16).contiguous()
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        # the config last: a folder with one is whole
        (path / "adapter_config.json").write_text(json.dumps(_config(plan, index)))
    return paths


def _orthonormal(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(width, rows, generator=generator))[0].mT.contiguous()


def _config(plan: Plan, index: int) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": "made-up/mistral-shapes",
        "r": plan.rank,
        "lora_alpha": plan.rank * (1 + index % 2),
        "target_modules": [name for name, _, _ in plan.shapes],
        "task_type": "CAUSAL_LM",
    }


def main() -> None:
    """Write a collection to the folder that is named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--adapters", type=int, default=Plan().adapters)
    parser.add_argument("--layers", type=int, default=Plan().layers)
    given = parser.parse_args()
    write(Plan(adapters=given.adapters, layers=given.layers), given.target)


if __name__ == "__main__":
    main()
