"""The record of a run: a JSON file with the field names of PEFT's method comparison, the machine and the commit."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
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
RESAMPLES = 200
PACKAGES = ("eigenlorax", "torch", "transformers", "peft", "accelerate", "safetensors", "numpy")


def write(path: Path, record: Json) -> None:
    """Write a record whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    fresh.replace(path)


def read(path: Path) -> Json:
    record: Json = json.loads(path.read_text(encoding="utf-8"))
    return record


@cache
def commit() -> tuple[str, bool]:
    """Return the commit that is checked out, and whether the code differs from it. Results are not code."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    code = ["src", "experiments", ":!experiments/results", ":!experiments/LOG.md"]
    state = subprocess.run(
        ["git", "status", "--porcelain", "--", *code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return head.stdout.strip(), bool(state.stdout.strip())


def about(name: str, config: Json, command: str, started: float) -> Json:
    """Return `run_info` and `meta_info` of a run. started: by `time.perf_counter`."""
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
            "package_info": {f"{package}-version": version(package) for package in PACKAGES},
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


def resampled(
    score: Callable[[np.ndarray, np.ndarray], float], predictions: np.ndarray, labels: np.ndarray
) -> list[float]:
    """Return the score on `RESAMPLES` draws of the test rows, with replacement.

    The draws are the same for every run on these rows, so that runs can be compared draw by draw.
    """
    draws = np.random.default_rng(len(labels)).integers(len(labels), size=(RESAMPLES, len(labels)))
    return [round(score(predictions[draw], labels[draw]), 4) for draw in draws]
