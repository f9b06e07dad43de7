"""What a record says of a training and of its test. Nothing here knows the data, or the kind of model."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import eigenlorax as ex
from eigenlorax.train import trial

from . import record

Json = dict[str, Any]


def of(found: trial.Trial, model: Any, wanted: Sequence[Any], metric: str) -> Json:
    """`train_info` and `test` of a training that was tested on rows with these labels."""
    score = trial.METRICS[metric]
    return {
        "train_info": train_info(found, model, metric, lambda value: round(value, 5)),
        "test": {
            "metric": metric,
            "score": found.score,
            "rows": len(wanted),
            "resampled": record.resampled(score, found.predicted, np.array(wanted)),
        },
    }


def train_info(found: trial.Trial, model: Any, metric: str, shown: Callable[[float], float]) -> Json:
    """PEFT's `train_info`. shown: the metric, of the score that the training was followed by."""
    return {
        "status": "success",
        "train_time": round(found.seconds, 2),
        "cpu_time": round(found.cpu_seconds, 2),
        "memory_max": found.peak_bytes,
        "file_size": file_size(model),
        "num_trainable_params": found.numbers,
        "num_head_params": found.head_numbers,
        "num_total_params": found.total_numbers,
        "metrics": [
            {
                "step": point.step,
                "epoch": round(point.epoch, 3),
                "train loss": round(point.loss, 5),
                f"test {metric}": shown(point.score),
                "train time": round(point.seconds, 2),
            }
            for point in found.points
        ],
    }


def file_size(model: Any) -> int:
    """Bytes of the file that PEFT saves, heads included; of a model without adapters, of what is trained."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return sum(one.numel() * one.element_size() for one in model.parameters() if one.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def subspace(pack: ex.Pack) -> Json:
    """Which subspace a training had."""
    return {"fingerprint": pack.info.fingerprint, "k": k_of(pack)}


def k_of(pack: ex.Pack) -> list[int]:
    """The most components of a module, down and up."""
    bases = pack.subspace.modules.values()
    return [max(one.down.k for one in bases), max(one.up.k for one in bases)]
