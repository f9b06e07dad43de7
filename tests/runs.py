"""Folders of training runs: adapters on a random walk, one per checkpoint."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import make_adapter

WEIGHTS = "adapter_model.safetensors"


def make_run(
    folder: Path,
    steps: Iterable[int],
    *,
    seed: int = 1,
    rate: float = 0.1,
    dtype: torch.dtype = torch.float32,
    **options,
) -> list[Path]:
    """Checkpoints as the Trainer saves them. Each differs from the one before by `rate` times noise of its size."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    checkpoints = []
    for step in steps:
        path = make_adapter(folder / f"checkpoint-{step}", seed=seed, head=(2, 31), **options)
        if not tensors:
            tensors = {key: tensor.double() for key, tensor in load_file(path / WEIGHTS).items()}
        else:
            tensors = {
                key: tensor + rate * tensor.std() * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                for key, tensor in tensors.items()
            }
        saved = {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}
        save_file(saved, path / WEIGHTS, metadata={"format": "pt"})
        checkpoints.append(path)
    return checkpoints


def tensors_of(adapter) -> dict[str, Tensor]:
    """All tensors of an adapter by PEFT's key."""
    found = {**adapter.heads, **adapter.carried}
    for module, factors in adapter.modules.items():
        for part, weight in zip(("lora_A", "lora_B"), factors.weights, strict=True):
            found[f"base_model.model.{module}.{part}.weight"] = weight
    return found


def write_states(checkpoints: Iterable[Path], max_steps: int) -> None:
    """Write the Trainer's state into checkpoints: a log with a loss of 10 / step, and an evaluation of 9 / step."""
    log = []
    for checkpoint in checkpoints:
        step = int(checkpoint.name.removeprefix("checkpoint-"))
        log.append({"step": step, "epoch": step / 10, "loss": 10 / step, "learning_rate": 0.5})
        log.append({"step": step, "epoch": step / 10, "eval_loss": 9 / step})
        state = {"global_step": step, "max_steps": max_steps, "log_history": log}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
