"""A small ViT: how it is pretrained and trained on a task by a method, and what its adapters answer once recycled.
Which tasks and which methods, vision.py says."""

from pathlib import Path
from typing import Any

import torch

import eigenlorax as ex
from eigenlorax.reports.analysis import losses
from eigenlorax.train.comparison_run import RunData
from eigenlorax.train.methods import CommonConfig
from eigenlorax.train.metrics import accuracy

from . import images, record, recycled, training
from .images import Rows, Task

Json = dict[str, Any]

WORK = record.ROOT / "experiments" / "work" / "vision"
METRIC = "accuracy"


def base_folder() -> Path:
    return WORK / "base"


def adapter_folder(name: str) -> Path:
    return WORK / "adapters" / name


def weights_of(name: str) -> Path:
    return adapter_folder(name) / "adapter_model.safetensors"


def task_of(config: Json) -> Task:
    return Task(**{**config["task"], "classes": tuple(config["task"]["classes"])})


def new_base(n_classes: int) -> Any:
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(
        base_folder(), num_labels=n_classes, ignore_mismatched_sizes=True, problem_type="single_label_classification"
    )


def pack_of(spec: Json) -> ex.Pack:
    """Return the pack of some source adapters. spec: as in `training.fit_pack`."""
    return training.fit_pack(spec, adapter_folder)


def pretrained(config: Json) -> Json:
    """The base model: all of it trained on all classes of some sets at once."""
    from transformers import ViTConfig, ViTForImageClassification

    rows: Rows = []
    test: Rows = []
    first = 0
    for name, n_test in config["sets"].items():
        task = Task(name, images.classes(name), 10**9, n_test, config["copies"])
        rows += [{**row, "labels": first + row["labels"]} for row in images.train_rows(task, config["seed"])]
        test += [{**row, "labels": first + row["labels"]} for row in images.test_rows(task)]
        first += len(task.classes)
    torch.manual_seed(config["seed"])
    model = ViTForImageClassification(ViTConfig(**config["model"], num_labels=first))
    outcome = trained(model, rows, test, config)
    model.save_pretrained(base_folder())
    return {**outcome, "sha256": training.file_sha256(base_folder() / "model.safetensors")}


def train(config: Json) -> Json:
    """Do one run of a task: a method, a learning rate, a seed. The adapter is saved if the config has a name for it."""
    task, recipe = task_of(config), config["recipe"]
    pack = pack_of(config["pack"]) if config["pack"] else None
    common = CommonConfig(recipe["target_modules"], None, modules_to_save=["classifier"], pack=pack)
    model = training.make_model(config, lambda: new_base(len(task.classes)), common)
    result = trained(model, images.train_rows(task, config["seed"]), images.test_rows(task), config)
    if pack is not None:
        result["subspace"] = training.subspace(pack)
    if config["name"] is not None:
        result["sha256"] = training.save_adapter(model, adapter_folder(config["name"]))
    return result


def trained(model: Any, rows: Rows, test: Rows, config: Json) -> Json:
    """Train and test a model. Returns what the record says of it."""
    run_data = RunData(rows, test, test, images.collate)
    return training.recorded(training.train(model, run_data, config, by_length=False), model, run_data, METRIC)


def recycle(config: Json) -> Json:
    """Score a trained LoRA with its head as each method stores it.

    An adapter that is not among the sources is only projected: these are the paper's zero-shot rows.
    """
    name, sources = config["name"], config["sources"]
    adapter = ex.read_adapter(adapter_folder(name))
    original = dict(adapter.modules)
    bench = Bench(name, task_of(config))
    rows = [{"way": "original", "k": None, "bits": None, "delta_error": 0.0, **bench.answers(original)}]
    rows.append(
        {"way": "base", "k": None, "bits": None, "delta_error": 1.0, **bench.answers(recycled.nothing(original))}
    )
    for k in config["k"]:
        spec = {"sources": [source for source in sources if source != name], "k": k, "weighting": config["weighting"]}
        pack = pack_of(spec)
        for way, bases in (("left out", pack), ("random", ex.random_pack(pack, seed=0))):
            stored = recycled.projected(original, bases)
            rows.append({"way": way, "k": k, **recycled.compared(original, stored, bench)})
        if name not in sources:
            continue
        pack = pack_of({**spec, "sources": sources})
        numbers = recycled.numbers(original, pack, len(sources))
        stored = pack.adapter(name).modules
        rows.append({"way": "seen", "k": k, **recycled.compared(original, stored, bench), **numbers})
        stored = recycled.truncated(original, numbers["numbers_an_adapter"])
        rows.append({"way": "truncated", "k": k, **recycled.compared(original, stored, bench)})
    for bits in (8, 4):
        rows.append(
            {"way": "rounded", "k": None, **recycled.compared(original, recycled.rounded(original, bits), bench)}
        )
        rows[-1]["bits"] = bits
        rows[-1]["bytes"] = sum(
            losses.rounded_bytes(module.spec.rank, module.spec.out_features, module.spec.in_features, bits)
            for module in original.values()
        )
    full = sum(module.spec.numbers for module in original.values())
    return {"test": {"metric": METRIC, "rows": len(bench.labels), "numbers": full, "ways": rows}}


class Bench:
    """A model with an adapter's head, in which the factors are replaced."""

    def __init__(self, name: str, task: Task) -> None:
        from peft import PeftModel

        self.model = PeftModel.from_pretrained(new_base(len(task.classes)), adapter_folder(name)).eval()
        inputs = images.collate(images.test_rows(task))
        self.labels = inputs.pop("labels")
        self.inputs = inputs
        self.first: torch.Tensor | None = None

    @torch.inference_mode()
    def answers(self, factors: recycled.Factors) -> Json:
        """Return the score with these factors, and the fraction of rows with the answer of the first factors."""
        recycled.set_factors(self.model, factors)
        logits = self.model(**self.inputs).logits
        if self.first is None:
            self.first = logits
        return {
            "score": accuracy(logits.numpy(), self.labels.numpy()),
            "agreement": recycled.agreement(logits, self.first),
        }
