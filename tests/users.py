"""Adapters of users that were trained from one common adapter."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from adapters import make_adapter
from runs import WEIGHTS


def make_users(folder: Path, names: Iterable[str], *, rate: float = 0.1, **options) -> tuple[Path, dict[str, Path]]:
    """A common adapter, and by name adapters that differ from it by `rate` times noise of its size."""
    common = make_adapter(folder / "common-adapter", seed=1, head=(2, 31), **options)
    tensors = load_file(common / WEIGHTS)
    users = {}
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        users[name] = make_adapter(folder / "users" / name, seed=1, head=(2, 31), **options)
        changed = {
            key: tensor + rate * tensor.std() * torch.randn(tensor.shape, generator=generator)
            for key, tensor in tensors.items()
        }
        save_file(changed, users[name] / WEIGHTS, metadata={"format": "pt"})
    return common, users
