"""The record of a run: a JSON file with PEFT's field names (its method comparison), what it was run on, and from which
commit. Nothing here knows what was run."""

import base64
import json
import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eigenlorax.cli import env

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
PACKAGES = ("eigenlorax", "torch", "transformers", "peft", "accelerate", "safetensors", "numpy")


def write(path: Path, record: Json) -> None:
    """Write a record whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    fresh.replace(path)


def read(path: Path) -> Json:
    found: Json = json.loads(path.read_text(encoding="utf-8"))
    return found


@cache
def commit() -> tuple[str, bool]:
    """The commit that is checked out, and whether the code differs from it. Results are not code."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    code = ["src", "experiments", ":!experiments/results", ":!experiments/LOG.md"]
    state = subprocess.run(
        ["git", "status", "--porcelain", "--", *code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return head.stdout.strip(), bool(state.stdout.strip())


def about(name: str, config: Json, command: str, started: float) -> Json:
    """`run_info` and `meta_info` of a run."""
    head, dirty = commit()
    return {
        "run_info": {
            "experiment_name": name,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "total_time": round(time.perf_counter() - started, 2),
            "command": command,
            "commit": head,
            "dirty": dirty,
            "train_config": config,
        },
        "meta_info": {
            "package_info": {f"{one}-version": version(one) for one in PACKAGES},
            "system_info": {
                "system": platform.system(),
                "machine": platform.machine(),
                "processor": env.collect()["processor"],
                "accelerator": env.collect()["cuda"],
                "python": platform.python_version(),
                "threads": torch.get_num_threads(),
            },
        },
    }


def packed(values: np.ndarray) -> str:
    """Predictions as text: classes as bytes, numbers as float16."""
    kind = np.uint8 if values.ndim == 2 and values.shape[1] > 1 else np.float16
    values = values.argmax(axis=-1) if kind is np.uint8 else values.reshape(-1)
    return base64.b64encode(values.astype(kind).tobytes()).decode()


def unpacked(text: str, classes: bool) -> np.ndarray:
    """Predictions out of `packed`."""
    return np.frombuffer(base64.b64decode(text), dtype=np.uint8 if classes else np.float16)
