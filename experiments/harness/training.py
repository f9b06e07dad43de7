"""Training runs of the experiments on `eigenlorax.train`: one method on one task, and what the record says of it."""

import hashlib
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

import eigenlorax as ex
from eigenlorax.train import comparison_run, methods
from eigenlorax.train.comparison_run import Recipe, RunData, TrainingRun
from eigenlorax.train.methods import CommonConfig

from . import record
from .metrics import FURTHER_METRICS

Json = dict[str, Any]
WORK = record.ROOT / "experiments" / "work"
RECIPE_FIELDS = ("head_learning_rate", "epochs", "batch_size", "warmup", "schedule", "evaluations", "bf16")


def fit_pack(spec: Json, adapter_folder: Callable[[str], Path]) -> ex.Pack:
    """Fit a pack to source adapters, or make one with a random basis of the same shapes.

    spec: sources (names), k or max_error, weighting, and the seed `random` for a random basis.
    """
    sources = {name: adapter_folder(name) for name in spec["sources"]}
    size = {
        "n_components" if name == "k" else name: spec[name] for name in ("k", "energy", "max_error") if name in spec
    }
    pack = ex.fit(sources, **size, weighting=spec["weighting"], dtype="float32", warn_above=1.0)
    return pack if spec.get("random") is None else ex.random_pack(pack, seed=spec["random"])


def adapter_folder(experiment: str, name: str) -> Path:
    """Return the folder of a source adapter of the experiments on texts."""
    return WORK / experiment / "adapters" / name


def pack_of(experiment: str, spec: Json) -> ex.Pack:
    """Return the pack of some source adapters, cached by spec and contents. spec: as in `fit_pack`."""

    def folder_of(name: str) -> Path:
        return adapter_folder(experiment, name)

    contents = [file_sha256(folder_of(name) / "adapter_model.safetensors") for name in spec["sources"]]
    digest = hashlib.sha256(json.dumps([spec, contents], sort_keys=True).encode()).hexdigest()[:16]
    folder = WORK / experiment / "packs" / digest
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            fit_pack(spec, folder_of).save(folder)
    return ex.Pack.open(folder)


METHOD_FIELDS = frozenset(
    ("label", "kind", "options", "optimizer", "basis", "k", "energy", "recipe", "rates", "learning_rate")
)


def further_fields(method: Json) -> Json:
    """Return the fields of a config's method that go into the configs of its runs as they are."""
    return {name: setting for name, setting in method.items() if name not in METHOD_FIELDS}


def make_model(config: Json, load_base: Callable[[], Any], common: CommonConfig) -> Any:
    """Load the base model and add the config's method, both from the config's seed."""
    torch.manual_seed(config["seed"])
    return methods.apply_method(config["kind"], config["options"], load_base(), common)


def train(model: Any, rows: RunData, config: Json, **recipe: Any) -> TrainingRun:
    """Train a model as the config says. recipe: fields of `Recipe` that are not in the config's recipe."""
    fields = {name: config["recipe"][name] for name in RECIPE_FIELDS if name in config["recipe"]}
    full = Recipe(config["learning_rate"], config.get("optimizer", "adamw"), **{**fields, **recipe})
    return comparison_run.run(model, rows, full, seed=config["seed"])


def recorded(run: TrainingRun, model: Any, rows: RunData, metric: str) -> Json:
    """Return `train_info` and `test` of a run's record. metric: its name."""
    labels = np.array([row["labels"] for row in rows.test])
    further = {name: function(run.predictions, labels) for name, function in FURTHER_METRICS.get(metric, {}).items()}
    return {
        "train_info": train_info(run, model, metric, lambda score: round(score, 5)),
        "test": {
            "metric": metric,
            "score": run.score,
            **further,
            "rows": len(labels),
            "resampled": record.resampled(rows.metric, run.predictions, labels),
        },
    }


def train_info(run: TrainingRun, model: Any, metric: str, shown: Callable[[float], float]) -> Json:
    """Return the fields of PEFT's `train_info`. shown: maps a score during training to the metric that is recorded."""
    return {
        "status": "success",
        "train_time": round(run.seconds, 2),
        "cpu_time": round(run.cpu_seconds, 2),
        "memory_max": peak_bytes(),
        "file_size": methods.saved_bytes(model),
        "num_trainable_params": run.parameters,
        "num_head_params": run.head_parameters,
        "num_total_params": sum(parameter.numel() for parameter in model.parameters()),
        "metrics": [
            {
                "step": checkpoint.step,
                "epoch": round(checkpoint.epoch, 3),
                "train loss": round(checkpoint.loss, 5),
                f"test {metric}": shown(checkpoint.score),
                "train time": round(checkpoint.seconds, 2),
            }
            for checkpoint in run.checkpoints
        ],
    }


def peak_bytes() -> int:
    """Return the highest memory use so far: of the accelerator, or of this process, which does one run."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def save_adapter(model: Any, folder: Path) -> str:
    """Save a PEFT model's adapter, and return the hash of its weights."""
    model.save_pretrained(folder)
    return file_sha256(folder / "adapter_model.safetensors")


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def subspace(pack: ex.Pack) -> Json:
    """Return what a record says of the subspace that a method trained in."""
    return {"fingerprint": pack.info.fingerprint, "k": largest_k(pack)}


def largest_k(pack: ex.Pack) -> list[int]:
    """Return the largest numbers of components of a module, down and up."""
    bases = pack.subspace.modules.values()
    return [max(module.down.k for module in bases), max(module.up.k for module in bases)]
