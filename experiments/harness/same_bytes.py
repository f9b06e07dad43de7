"""Scores of adapters stored in so many bytes, by a pack and by other methods, on rows that trained none of them.

One run is one method at one size, of a whole collection. Predictions are those of a PEFT model with the adapter's own
head.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from eigenlorax.train import demo

from . import record, size_methods, text, training
from .jobs import Job
from .recycled import delta_error, set_factors
from .size_methods import PACK, Collection, Factors, Kept

Json = dict[str, Any]

BATCH = 128
WORK = record.ROOT / "experiments" / "work" / "bytes"


def shipped(config: Json) -> Iterator[Job]:
    """Yield the adapters that come with the package, each on the test rows of its task."""
    adapters = {name: about["task"] for name, about in demo.descriptions().items()}
    yield from at_every_size(config, "demo", adapters, config["demo"]["ratios"])


def sources(config: Json) -> Iterator[Job]:
    """Yield the source adapters of `text`, which have more kinds of tasks."""
    spec = config["text"]
    adapters = {f"{task}-{spec['set']}": task for task in spec["tasks"]}
    yield from at_every_size(config, "text", adapters, spec["ratios"])


def at_every_size(config: Json, stage: str, adapters: Mapping[str, str], ratios: list[float]) -> Iterator[Job]:
    for ratio in ratios:
        for method in size_methods.METHODS:
            job = {
                "collection": stage,
                "adapters": dict(adapters),
                "way": method,
                "ratio": ratio,
                "recipe": config["recipe"],
            }
            yield Job(f"bytes/{stage}/{ratio:g}--{file_name(method)}", job, measured)


def file_name(way: str) -> str:
    return way.replace(",", "").replace(" ", "-")


def folder_of(collection: str, name: str) -> Path:
    return demo.shipped()[name] if collection == "demo" else training.adapter_folder("text", name)


def measured(config: Json) -> Json:
    """Store a collection by one method at one size, and score each adapter."""
    collection = Collection({name: folder_of(config["collection"], name) for name in config["adapters"]})
    lora = 2 * sum(spec.numbers for adapter in collection.adapters.values() for spec in adapter.specs.values())
    pack = pack_of(collection, config["ratio"])
    stored = (
        pack if config["way"] == PACK else size_methods.kept(config["way"], collection, config["ratio"], pack.bytes)
    )
    if stored is None:
        return {"test": {"lora_bytes": lora, "pack_bytes": pack.bytes, "bytes": None, "adapters": {}}}
    adapters = {}
    for name, task in config["adapters"].items():
        bench = Bench(task, collection.folders[name], config["recipe"])
        original, logits = bench.first(), bench.answers(stored.adapters[name])
        error = delta_error(collection.adapters[name].modules, stored.adapters[name])
        adapters[name] = {"delta_error": error, **compared(original, logits, bench.labels)}
    sizes = {"lora_bytes": lora, "pack_bytes": pack.bytes, "bytes": stored.bytes, "settings": stored.settings}
    return {"test": {**sizes, "adapters": adapters}}


def compared(original: Tensor, stored: Tensor, labels: Tensor) -> Json:
    """Compare the logits of a stored adapter with the original's and with the labels.

    kl: mean Kullback–Leibler divergence from the original, in nats. lost, won: rows that only the original, or only the
    stored adapter, classifies right.
    """
    before, after = original.argmax(-1) == labels, stored.argmax(-1) == labels
    logs = [logits.double().log_softmax(-1) for logits in (original, stored)]
    return {
        "rows": len(labels),
        "before": before.double().mean().item(),
        "score": after.double().mean().item(),
        "lost": int((before & ~after).sum()),
        "won": int((after & ~before).sum()),
        "agreement": (original.argmax(-1) == stored.argmax(-1)).double().mean().item(),
        "kl": (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().item(),
    }


def pack_of(collection: Collection, ratio: float) -> Kept:
    """Fit the pack of a ratio once. All other methods get as many bytes."""
    return _once("pack", [digests(collection.folders), ratio], lambda: size_methods.packed(collection, ratio))


def digests(folders: Mapping[str, Path]) -> Json:
    """Return the hashes of the adapters' weights."""
    return {
        name: hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
        for name, folder in folders.items()
    }


def _once(kind: str, key: Any, make: Any) -> Any:
    """Return the cached result of `make` for this key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    WORK.mkdir(parents=True, exist_ok=True)
    path = WORK / f"{kind}-{digest}.pt"
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            torch.save(make(), path)
    # written here, by this function
    return torch.load(path, weights_only=False)


class Bench:
    """A model with an adapter's head, in which the factors are replaced."""

    def __init__(self, task: str, folder: Path, recipe: Json) -> None:
        from peft import PeftModel

        self.model = PeftModel.from_pretrained(text.new_base(task, recipe), folder).eval()
        rows = text.encoded(text.test_rows(task, recipe["test_rows"]), recipe["max_length"])
        self.test = sorted(rows, key=text.length)
        self.labels = torch.tensor([row["labels"] for row in self.test])
        self.key = [task, recipe, digests({"": folder})]

    def first(self) -> Tensor:
        """Return the logits of the adapter as it was trained."""
        logits: Tensor = _once("answers", self.key, self.logits)
        return logits

    def answers(self, factors: Factors) -> Tensor:
        """Return the logits with these factors."""
        set_factors(self.model, factors)
        return self.logits()

    @torch.inference_mode()
    def logits(self) -> Tensor:
        collate, batches = text.collate(), []
        for start in range(0, len(self.test), BATCH):
            inputs = collate([dict(row) for row in self.test[start : start + BATCH]])
            inputs.pop("labels")
            with torch.autocast("cpu", torch.bfloat16):
                batches.append(self.model(**inputs).logits.float())
        return torch.cat(batches)


STAGES = {"demo": shipped, "text": sources}
